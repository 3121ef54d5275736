"""What ``ideogram4-quant demo`` and ``... generate`` do once their arguments are read."""

from __future__ import annotations

import argparse
import json
import logging
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image, PngImagePlugin
from torch import Tensor
from tqdm import tqdm

from ..captions.check import check_caption, is_plain
from ..captions.compose import read_typed
from ..captions.making import make_caption
from ..captions.tokens import MAX_TOKENS
from ..checkpoint import Checkpoint
from ..checkpoint.encoder_writing import Part
from ..errors import OpError
from ..files.new_file import replaced
from ..ops import attention, dispatch
from ..ops.linear import LinearOptions
from ..ops.tuning.autotune import Measure
from ..sampling import check_size, on_grid, trained_sides
from .arguments import NONE
from .encoder import load_encoder
from .files_here import fill_in
from .generate import GenerateRequest, check_branches, generate
from .linear import default_device
from .loading import Copies, load_pair, open_pair, pair_label, preset_for
from .one_copy import SELF, StandIn
from .pictures import read_picture
from .vae import load_vae

_log = logging.getLogger(__name__)
PLAIN_PROMPT = (
    "the prompt is plain text, and the model was trained on JSON captions: words in the picture "
    "will rarely be legible. Give a caption (--prompt-file caption.json), or let the encoder write "
    "one of the sentence (--enhance)"
)


def run_demo(args: argparse.Namespace) -> int:
    """``ideogram4-quant demo``: see `demo.run`."""
    from . import demo

    torch.set_num_threads(args.threads)
    demo.run(args.out, demo.pocket_inputs(args.prompts), preset=args.preset)
    return 0


def run_generate(args: argparse.Namespace) -> int:
    """``ideogram4-quant generate``: everything that can be wrong is checked before a weight loads.

    The encoder is gone before the transformers come: the three do not fit 24 GB together.
    """
    request = _request(args)
    request.plan()
    _check_prompt(request.prompt, enhance=args.enhance)
    alone = args.copies == "conditional" or args.uncond_lora is not None or not request.guided
    fill_in(args, words=(NONE, SELF), one_copy=alone)
    init_image = None if args.init_image is None else read_picture(args.init_image)
    pair, stand_in = _open(args, request)
    sides = trained_sides(pair[0].config.llm_features_dim)
    for warning in check_size(request.width, request.height, sides):
        _log.warning("%s: expect a worse picture", warning)
    request = replace(request, preset=preset_for(args.preset, pair[0]))
    plan = request.plan(one_branch=pair[0].one_branch is not None)
    device = default_device(args.device)
    if args.backend != dispatch.AUTO:
        dispatch.choose("int8_linear", (1, 1, 1), device, args.backend)  # is it there?
    attention.check(args.attention, device)
    options = LinearOptions(args.backend, args.gguf_compute, args.int8_compute)
    place = {"device": device, "options": options}

    request, features = _encode(args, request, place)
    vae = load_vae(args.vae, device=device)
    with tqdm(unit="B", unit_scale=True, dynamic_ncols=True) as bar:

        def loaded(copy: str, done: int, total: int) -> None:
            bar.set_description(copy, refresh=False)
            bar.total = total
            bar.update(done - bar.n)

        how = {"attention": args.attention, "measure": Measure()}
        models = load_pair(pair, None, vae, progress=loaded, stand_in=stand_in, **how, **place)
    with tqdm(desc=pair_label(pair), total=len(plan), unit="step", dynamic_ncols=True) as bar:
        result = generate(
            request,
            models,
            lambda done, total: bar.update(1),
            features=features,
            init_image=init_image,
        )

    _save(result.image, args.out, _settings(request, args))
    seconds = sum(result.seconds.values())
    print(
        f"{args.out}: {request.width}x{request.height}, {pair_label(pair)}, {len(plan)} steps, "
        f"{seconds:.1f} s" + _said(pair[0])
    )
    return 0


def _check_prompt(prompt: str, *, enhance: bool) -> None:
    """OpError for an empty prompt and for JSON with a fault; a warning for what is no caption."""
    read_typed(prompt)
    if enhance:
        return
    if is_plain(prompt):
        _log.warning("%s", PLAIN_PROMPT)
        return
    for finding in check_caption(prompt).errors:
        _log.warning("the prompt: %s", finding)


def _open(
    args: argparse.Namespace, request: GenerateRequest
) -> tuple[tuple[Checkpoint, Checkpoint | None], StandIn | None]:
    """(The model's files, what stands in); a preset without guidance leaves the second copy out."""
    uncond, copies, stand_in = _unconditional(args)
    if uncond is not None or stand_in is not None:
        check_branches(request, False, True)
    elif not request.guided:
        copies = "conditional"
    word = {"one": True, "two": False}.get(args.branches)
    pair = open_pair(args.model, uncond, base=args.base, copies=copies, one_branch=word)
    if stand_in is not None and pair[0].one_branch is not None:
        check_branches(request, True, True)
    return pair, stand_in


def _said(checkpoint: Checkpoint) -> str:
    branch = checkpoint.one_branch
    return "" if branch is None else f"; one branch, without guidance ({branch.reason})"


def _unconditional(args: argparse.Namespace) -> tuple[str | None, Copies, StandIn | None]:
    """(file, copies to load, what stands in) of ``--uncond``, ``--uncond-lora``, ``--copies``."""
    alone = args.uncond in (NONE, SELF) or args.copies == "conditional"
    if args.uncond_lora is not None:
        return None, "conditional", args.uncond_lora
    stand_in = SELF if args.uncond == SELF else None
    return (None, "conditional", stand_in) if alone else (args.uncond, "both", None)


def _request(args: argparse.Namespace) -> GenerateRequest:
    prompt = args.prompt
    if args.prompt_file is not None:
        prompt = args.prompt_file.read_text(encoding="utf-8-sig").strip()
    (width, height), rounded = on_grid(args.width, args.height)
    if rounded is not None:
        _log.warning("%s", rounded)
    return GenerateRequest(
        prompt,
        width,
        height,
        args.seed,
        args.preset or "default",  # until the file tells its own
        args.steps,
        args.guidance,
        args.denoise,
        mu=args.mu,
        last_sigma=args.last_sigma,
    )


def _encode(
    args: argparse.Namespace, request: GenerateRequest, place: dict
) -> tuple[GenerateRequest, Tensor]:
    """(The request, with the caption that --enhance wrote in place of the prompt, its features)."""
    head = _head(args)
    encoder = load_encoder(args.encoder, tokenizer=args.tokenizer, **place)
    if head is not None:
        from .enhance import writer

        ratio = f"{request.width}:{request.height}"
        made = make_caption(
            request.prompt, ratio=ratio, write=writer(encoder, head, request.seed, MAX_TOKENS)
        )
        print(made.caption)
        request = replace(request, prompt=made.caption)
    return request, encoder.encode([request.prompt])[0]


def _head(args: argparse.Namespace) -> Part | None:
    """What --enhance writes with; None without it."""
    if not args.enhance:
        if args.head is not None:
            raise OpError("--head is for writing", found="no --enhance", needed="both")
        return None
    from .enhance import read_head

    return read_head(args.encoder, args.head)


def _settings(request: GenerateRequest, args: argparse.Namespace) -> dict:
    """What it takes to make the picture again."""
    names = ("prompt", "width", "height", "seed", "preset", "steps", "guidance", "denoise")
    settings = {name: getattr(request, name) for name in names}
    if request.mu is not None or request.last_sigma:
        settings |= {"mu": request.mu, "last_sigma": request.last_sigma}
    names = ("model", "uncond", "uncond_lora", "encoder", "vae")
    files = {name: getattr(args, name) for name in names}
    return settings | {name: Path(f).name for name, f in files.items() if f is not None}


def _save(image: Image.Image, out: Path, settings: dict) -> None:
    info = PngImagePlugin.PngInfo()
    info.add_text("ideogram4_quant", json.dumps(settings))
    with replaced(out) as part:
        image.save(part, pnginfo=info)
