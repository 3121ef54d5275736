"""``ideogram4-quant delta``: two copies in, a LoRA that stands for the second one out."""

from __future__ import annotations

import argparse

from ..files.new_file import check_output
from .command_parts import calibration_of, check_files, progress_bar

_DTYPES, _LINEARS = ("bf16", "fp16", "fp32"), ("all", "blocks")


def add_parsers(subparsers: argparse._SubParsersAction) -> None:
    """Add the command; it sets ``func``, a handler ``(args) -> exit code``."""
    parser = subparsers.add_parser(
        "delta",
        help="make an unconditional LoRA of two copies",
        description="Write the low-rank difference of the two copies as a LoRA: with it the "
        "conditional copy runs both passes of guidance, and is in memory once. Prints the error "
        "that each rank leaves.",
        epilog="example: ideogram4-quant delta cond.safetensors uncond.safetensors --rank 16 "
        "--out uncond-lora.safetensors",
    )
    parser.add_argument("conditional", metavar="CONDITIONAL", help="the conditional copy")
    parser.add_argument(
        "unconditional",
        metavar="UNCONDITIONAL",
        nargs="?",
        help="the unconditional copy, where the first file does not hold both",
    )
    parser.add_argument(
        "--rank",
        type=int,
        required=True,
        metavar="R",
        help="of the linears in the blocks; those few outside get 128 where that is more",
    )
    parser.add_argument("--out", required=True, metavar="F", help="lora.safetensors")
    parser.add_argument(
        "--calibration",
        metavar="CAL",
        help="what calibrate wrote of this model: weighs the difference by the inputs",
    )
    parser.add_argument(
        "--linears",
        choices=_LINEARS,
        default="all",
        help="blocks: those in the transformer blocks alone, which diffusers loads too",
    )
    parser.add_argument(
        "--dtype", choices=_DTYPES, default="bf16", help="as stored (default: bf16)"
    )
    parser.add_argument(
        "--base", nargs="+", metavar="F", help="gives linears-only files their other tensors"
    )
    parser.add_argument(
        "--device", default="cpu", metavar="D", help="where to compute: cpu (default), cuda"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace F if it exists")
    parser.set_defaults(func=_delta, interrupted="nothing was written")


def _delta(args: argparse.Namespace) -> int:
    check_files(args.conditional, args.unconditional, args.calibration, *(args.base or ()))
    check_output(args.out, overwrite=args.overwrite, made_of=(args.calibration,))
    from .delta import DeltaOptions, make_delta
    from .encode import encoding_device

    calibration = calibration_of(args)
    device = encoding_device(args.device)
    options = DeltaOptions(args.rank, args.dtype, args.linears, calibration, device)
    with progress_bar(f"rank {args.rank}", " weights") as progress:
        report = make_delta(
            args.conditional,
            args.unconditional,
            args.out,
            options,
            base=args.base,
            overwrite=args.overwrite,
            progress=progress,
        )
    print(report.table())
    return 0
