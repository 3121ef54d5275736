"""What ``ideogram4-quant sensitivity`` does once its arguments are read."""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Sequence

from torch import Tensor
from tqdm import tqdm

from ..checkpoint import Checkpoint, open_checkpoint
from ..checkpoint.canonical import is_linear
from ..errors import OpError
from ..files.new_file import check_output
from ..quant.choice_report import gains_table
from ..quant.errors import QuantOptionError
from ..quant.sensitivity import Sensitivity
from .calibrate import Prompt
from .calibration_commands import digests_of, prompts_and_size
from .encoder import load_encoder
from .generate import GenerateRequest, check_branches
from .linear import default_device
from .loading import COPIES, load_pair, open_pair, preset_for
from .sensitivity import Probes, measure_sensitivity


def run_sensitivity(args: argparse.Namespace) -> int:
    """Everything that can be wrong is checked before a weight loads."""
    if args.out.suffix != ".json":
        raise QuantOptionError("a file of sensitivities is JSON", file=args.out, needed="*.json")
    if args.directions < 1:
        raise OpError("too few walks back", found=args.directions, needed="at least 1")
    check_output(args.out, overwrite=args.overwrite or args.resume)
    earlier = Sensitivity.load(args.out) if args.resume and args.out.exists() else None
    pair = open_pair(args.model, args.uncond, base=args.base, copies=args.copies)
    quantized = _open_quantized(pair, args)
    texts, size = prompts_and_size(args, pair[0])
    preset = preset_for(args.preset, pair[0])
    request = GenerateRequest("", *size, preset=preset, steps=args.steps, guidance=args.guidance)
    steps = request.plan(one_branch=pair[0].one_branch is not None)
    check_branches(request, pair[0].one_branch is not None, pair[1] is not None)
    device = default_device(args.device)
    settings = {
        "prompts": hashlib.sha256(json.dumps(texts).encode()).hexdigest(),
        "size": list(size),
        "times": [round(step.time, 6) for step in steps],
        "guidance": [step.guidance for step in steps],
        "directions": args.directions,
        "seed": args.seed,
        "against": digests_of([quantized.get(copy) for copy in COPIES]),
    }
    digests = digests_of(pair)

    encoder = load_encoder(args.encoder, tokenizer=args.tokenizer, device=device)
    prompts = [Prompt(text, encoder.encode([text])[0].cpu()) for text in texts]
    del encoder
    weights = {}
    for copy, checkpoint in quantized.items():
        weights |= _linears(checkpoint, copy)
    models = load_pair(pair, None, None, device=device)
    with tqdm(desc="sensitivity", total=len(prompts), unit="picture", dynamic_ncols=True) as bar:
        found = measure_sensitivity(
            models,
            weights,
            prompts,
            request,
            probes=Probes(args.directions, args.seed),
            digests=digests,
            settings=settings,
            earlier=earlier,
            keep=lambda found: found.save(args.out, overwrite=True),
            progress=lambda done, total: bar.update(done - bar.n),
        )
    print(gains_table(found))
    print(f"{args.out}: {len(found.linears)} linears, {len(found.done)} pictures")
    return 0


def _open_quantized(
    pair: Sequence[Checkpoint | None], args: argparse.Namespace
) -> dict[str, Checkpoint]:
    """Copy -> the file whose errors are followed, for each copy of the pair."""
    copies = [copy for copy, own in zip(COPIES, pair, strict=True) if own is not None]
    found: dict[str, Checkpoint] = {}
    for path in args.against:
        checkpoint = open_checkpoint(path, args.base)
        found |= {copy: checkpoint for copy in checkpoint.copies if copy in copies}
    for copy, own in zip(copies, pair, strict=False):
        if copy not in found:
            raise QuantOptionError(
                f"no quantized file of the {copy} copy",
                found=", ".join(found) or "none",
                needed="--against Q Q: both copies, as quantize --level W4A8 writes them",
            )
        theirs, ours = found[copy].shapes(copy), own.shapes(copy)
        for name, shape in ours.items():
            if is_linear(name) and name in theirs and tuple(theirs[name]) != tuple(shape):
                raise QuantOptionError(
                    "a quantized file of another model",
                    file=found[copy].paths[0],
                    tensor=name,
                    found=list(theirs[name]),
                    needed=list(shape),
                )
    return found


def _linears(checkpoint: Checkpoint, copy: str) -> dict[str, Tensor]:
    """``conditional.layers.0.attention.qkv`` -> weight, of the linears that the file quantizes."""
    names = [name for name in checkpoint.shapes(copy) if is_linear(name) and _in_block(name)]
    found = checkpoint.stream(copy, only=names)
    return {f"{copy}.{name.rpartition('.')[0]}": tensor for name, tensor in found}


def _in_block(name: str) -> bool:
    return name.startswith("layers.")
