"""Arguments of the commands that paint, checked before torch is imported, which takes seconds."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path

from ..errors import CheckpointError, Ideogram4QuantError, OpError
from ..files.new_file import check_output
from ..quant.errors import QuantOptionError

NONE, SELF = "none", "self"


def check_demo(args: argparse.Namespace) -> None:
    """OpError for numbers that cannot be."""
    for name in ("threads", "prompts"):
        if getattr(args, name) < 1:
            raise OpError(f"too few {name}", found=getattr(args, name), needed="at least 1")


def check_generate(args: argparse.Namespace) -> None:
    """What is wrong with the arguments by themselves: Ideogram4QuantError and its kinds."""
    if args.out.suffix.lower() != ".png":
        raise Ideogram4QuantError("the picture is written as PNG", file=args.out, needed="*.png")
    if args.out.exists() and not args.overwrite:
        raise Ideogram4QuantError("the file exists", file=args.out, hint="--overwrite replaces it.")
    if not args.out.parent.is_dir():
        raise Ideogram4QuantError("no such folder", file=args.out.parent)
    if args.denoise < 1.0 and args.init_image is None:
        raise OpError("--denoise needs --init-image", found=args.denoise)
    alone = args.uncond in (NONE, SELF) or args.copies == "conditional"
    if args.uncond_lora is not None and (args.uncond is not None or alone):
        raise OpError(
            "--uncond-lora stands for the unconditional copy, so nothing else can",
            found="--copies conditional" if args.uncond is None else f"--uncond {args.uncond}",
            needed="one of the two",
        )
    if args.uncond == SELF and args.copies == "conditional":
        raise OpError("--copies conditional is without guidance", found="--uncond self")
    check_there((args.prompt_file, args.init_image, args.uncond_lora, args.tokenizer))


def check_calibrate(args: argparse.Namespace) -> None:
    """The same for ``calibrate``."""
    if args.out.suffix != ".safetensors":
        raise QuantOptionError("a calibration is a safetensors file", file=args.out)
    check_output(args.out, overwrite=args.overwrite)
    if args.limit is not None and args.limit < 1:
        raise OpError("too few prompts", found=args.limit, needed="at least 1")
    check_there((args.prompts, args.tokenizer, *args.merge))
    if len(Path(args.model).parts) > 1:  # a bare name may be one in ComfyUI's folders
        check_there((args.model,))


def check_there(paths: Iterable[str | Path | None]) -> None:
    """CheckpointError for the first one that is named and not there."""
    for path in paths:
        if path is not None and not Path(path).exists():
            raise CheckpointError("no such file or folder", file=path)
