"""``sensitivity``: how much of each linear's error arrives in the picture."""

from __future__ import annotations

import argparse
from pathlib import Path

from .sampling_arguments import add_device, add_files, add_picture


def add_parsers(subparsers: argparse._SubParsersAction) -> None:
    """Register the command; nothing heavy is imported until it runs."""
    parser = subparsers.add_parser(
        "sensitivity",
        help="measure how much of each linear's error arrives in the picture",
        description="Sample captions and follow them back: how much of the error that the linears "
        "of quantized files make arrives in the final latents. For quantize --target-gb.",
        epilog="example: ideogram4-quant sensitivity my-tune-v2.safetensors --uncond "
        "my-tune-v2-uncond.safetensors --against my-tune-v2-W4A8.safetensors "
        "my-tune-v2-uncond-W4A8.safetensors --encoder qwen3vl_8b.safetensors --prompts "
        "captions.txt --out sens.json",
    )
    files = add_files(parser, encoder="Qwen3-VL text encoder", encoder_required=True)
    files.add_argument(
        "--against",
        nargs="+",
        required=True,
        metavar="Q",
        help="the same copies at a low level (quantize --level W4A8 --calibration CAL), whose "
        "errors are followed",
    )
    files.add_argument("--out", type=Path, required=True, metavar="SENS", help="*.json")
    files.add_argument("--overwrite", action="store_true", help="replace SENS if it exists")
    files.add_argument("--resume", action="store_true", help="go on with SENS")

    picture = add_picture(
        parser,
        prompts=".txt (one a line) or .jsonl; for the pocket model's size some of its training "
        "captions by default",
        preset="schedule and guidance (default: as calibrate's)",
    )
    picture.add_argument(
        "--directions", type=int, default=1, metavar="N", help="walks back a picture (default: 1)"
    )
    picture.add_argument("--seed", type=int, default=0, help="default: 0")
    add_device(parser)
    parser.set_defaults(func=_run, interrupted=_kept)


def _kept(args: argparse.Namespace) -> str:
    """After Ctrl-C: the file is written after every picture."""
    if not args.out.exists():
        return "nothing was written"
    return f"{args.out} holds the pictures that were measured; --resume goes on with it"


def _run(args: argparse.Namespace) -> int:
    from .sensitivity_commands import run_sensitivity

    return run_sensitivity(args)
