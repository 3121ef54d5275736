"""What ``ideogram4-quant calibrate`` does once its arguments are read."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from tqdm import tqdm

from ..checkpoint import Checkpoint
from ..files.new_file import check_output
from ..quant.calibration import Calibration
from ..quant.captions import calibration_captions
from ..quant.fragility import fragility_table
from ..quant.profiler import ProfilerOptions
from ..quant.provenance import combined_hash, hash_files
from ..quant.source import files_of
from .calibrate import Prompt, calibrate
from .compare.cases import read_cases
from .encoder import load_encoder
from .files_here import fill_in
from .generate import GenerateRequest, check_branches
from .linear import default_device
from .loading import COPIES, load_pair, open_pair, preset_for

POCKET_PROMPTS = 8
_FULL_SIZE = 1024


def run_calibrate(args: argparse.Namespace) -> int:
    """``ideogram4-quant calibrate``: everything that can be wrong is checked before a weight loads.

    The encoder is gone before the transformers come: the three do not fit 24 GB together.
    """
    fill_in(args)
    earlier = [Calibration.load(path) for path in args.merge]
    options = _options(args)
    pair = open_pair(args.model, args.uncond, base=args.base, copies=args.copies)
    read = [path for each in pair if each for file in (each, *each.bases) for path in file.paths]
    check_output(args.out, overwrite=args.overwrite, made_of=read)
    texts, size = prompts_and_size(args, pair[0])
    preset = preset_for(args.preset, pair[0])
    request = GenerateRequest("", *size, preset=preset, steps=args.steps, guidance=args.guidance)
    steps = len(request.plan(one_branch=pair[0].one_branch is not None))
    check_branches(request, pair[0].one_branch is not None, pair[1] is not None)
    device = default_device(args.device)
    digests = digests_of(pair)

    encoder = load_encoder(args.encoder, tokenizer=args.tokenizer, device=device)
    prompts = [Prompt(text, encoder.encode([text])[0].cpu()) for text in texts]  # 60 MB each
    del encoder
    models = load_pair(pair, None, None, device=device)
    total = 2 * len(prompts) * len(args.seeds) * steps
    with tqdm(desc="calibrate", total=total, unit="step", dynamic_ncols=True) as bar:
        found = calibrate(
            models,
            prompts,
            request,
            seeds=args.seeds,
            digests=digests,
            options=options,
            progress=lambda done, total: bar.update(done - bar.n),
        )
    for calibration in earlier:
        found = calibration.merge(found)
    size = found.save(args.out, overwrite=args.overwrite)
    if "int8" in found.candidates:
        print(fragility_table(found, count=10))
    print(f"{args.out}: {len(found.layers)} linears, {len(found.times)} times, {size:,} bytes")
    return 0


def _options(args: argparse.Namespace) -> ProfilerOptions:
    given = {
        "alphas": None if args.alphas is None else tuple(args.alphas),
        "blocks": None if args.types is None else tuple(args.types),
        "moments": args.moments,
    }
    chosen = {name: value for name, value in given.items() if value is not None}
    return ProfilerOptions(args.tokens, args.channels, **chosen)


def prompts_and_size(args: argparse.Namespace, ck: Checkpoint) -> tuple[list[str], tuple[int, int]]:
    """The captions and the size (width, height)."""
    pocket = _is_pocket(ck)
    usual = (128, 64) if pocket else (_FULL_SIZE, _FULL_SIZE)
    size = (args.width or usual[0], args.height or usual[1])
    if args.prompts is not None:
        cases = read_cases(args.prompts, seeds=[0], width=size[0], height=size[1], limit=args.limit)
        return list(dict.fromkeys(case.prompt for case in cases)), size
    if not pocket:
        return calibration_captions(args.limit), size
    from ..pocket.data import prompt_batch  # training captions: no held-out word

    return [p.caption for p in prompt_batch("calibration", args.limit or POCKET_PROMPTS)], size


def _is_pocket(ck: Checkpoint) -> bool:
    from ..pocket.transformer import CONFIG

    config = ck.config.to_dict()
    names = ("num_layers", "num_attention_heads", "attention_head_dim", "llm_features_dim")
    return all(config[name] == CONFIG[name] for name in names)


def digests_of(pair: Sequence[Checkpoint | None]) -> dict[str, str]:
    """Copy -> hash of the files that it is read from."""
    copies = zip(COPIES, pair, strict=True)
    return {copy: combined_hash(hash_files(files_of(ck))) for copy, ck in copies if ck is not None}
