"""``calibrate`` and ``fragility``: measure a model's linears, and say where it is fragile."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from .sampling_arguments import add_device, add_files, add_picture

_INTERRUPTED = (
    "nothing was written; a long calibration may be made in parts: some of the captions at a time "
    "(--prompts), each run adding the last one's file (--merge)"
)


def add_parsers(subparsers: argparse._SubParsersAction) -> None:
    """Register both commands; nothing heavy is imported until one runs."""
    _add_calibrate(subparsers)
    _add_fragility(subparsers)


def _add_calibrate(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser(
        "calibrate",
        help="watch every linear while captions are sampled; write a calibration",
        description="Sample captions with both copies, twice; write what the inputs of every "
        "linear look like and what quantizing each alone would cost, step by step.",
        epilog="example: ideogram4-quant calibrate my-tune-v2.safetensors --uncond "
        "my-tune-v2-uncond.safetensors --limit 32 --out cal.safetensors",
    )
    files = add_files(parser, encoder="Qwen3-VL text encoder (default: ComfyUI's)")
    files.add_argument("--out", type=Path, required=True, metavar="CAL", help="*.safetensors")
    files.add_argument(
        "--merge", nargs="+", default=[], metavar="CAL", help="earlier runs to add this one to"
    )
    files.add_argument("--overwrite", action="store_true", help="replace CAL if it exists")

    picture = add_picture(
        parser,
        prompts=".txt (one a line) or .jsonl (default: the 128 captions that ship with the pack; "
        "for the pocket model some of its training captions)",
        preset="steps and guidance (default: that of a one-branch model's name, such as instant; "
        "else default, 20 steps)",
    )
    picture.add_argument(
        "--seeds", type=int, nargs="+", default=[0], help="one picture each (default: 0)"
    )

    measured = parser.add_argument_group("what is measured")
    measured.add_argument(
        "--moments",
        type=int,
        metavar="N",
        help="neighbouring inputs whose products are summed, so that rounding knows all pairs of "
        "them: more is nearer and makes a larger file, 4 MB a copy each (default: 512; 0: none)",
    )
    measured.add_argument("--tokens", type=int, default=64, help="rows a call (default: 64)")
    measured.add_argument(
        "--channels", type=int, default=256, help="output channels a linear (default: 256)"
    )
    measured.add_argument(
        "--alphas", type=float, nargs="*", metavar="A", help="smoothing strengths to try"
    )
    measured.add_argument(
        "--types", nargs="*", metavar="TYPE", help="GGUF types to try (default: Q8_0 to Q4_K)"
    )
    add_device(parser)
    parser.set_defaults(func=_run("run_calibrate"), interrupted=_INTERRUPTED)


def _add_fragility(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser(
        "fragility",
        help="rank the linears of a calibration, draw layers x steps",
        description="The linears that quantization hurts most, and a heat map of all.",
        epilog="example: ideogram4-quant fragility cal.safetensors --of Q4_K --heatmap fragile.png",
    )
    parser.add_argument("calibration", metavar="CAL", help="what calibrate wrote")
    parser.add_argument(
        "--of",
        default="int8",
        metavar="C",
        help="quantized how: int8 (default), int8 rotated, Q4_K, ...",
    )
    parser.add_argument("--worst", type=int, default=20, metavar="N", help="rows (default: 20)")
    parser.add_argument("--heatmap", type=Path, metavar="PNG", help="draw it")
    parser.add_argument("--overwrite", action="store_true", help="replace PNG if it exists")
    parser.add_argument("--json", action="store_true", help="print the whole ranking as JSON")
    parser.set_defaults(func=run_fragility)


def _run(name: str):
    def handle(args: argparse.Namespace) -> int:
        from . import arguments

        arguments.check_calibrate(args)
        from . import calibration_commands

        return getattr(calibration_commands, name)(args)

    return handle


def run_fragility(args: argparse.Namespace) -> int:
    """Handler of ``fragility``: the exit code."""
    from ..quant.calibration import Calibration
    from ..quant.fragility import fragility_table, heat_map, to_json

    calibration = Calibration.load(args.calibration)
    if args.json:
        print(json.dumps(to_json(calibration, args.of), indent=2))
    else:
        print(fragility_table(calibration, args.of, args.worst))
    if args.heatmap is not None:
        heat_map(calibration, args.heatmap, args.of, overwrite=args.overwrite)
    return 0
