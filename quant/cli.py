"""``ideogram4-quant quantize | inspect | verify``: arguments in, tables out.

Nothing here imports torch before the arguments are checked.
"""

from __future__ import annotations

import argparse
import json
import sys

from ..checkpoint.copy_names import COPIES
from .command_parts import calibration_of, check_files, progress_bar
from .quantize_command import BOTH, how_to_go_on, quantize
from .recipes import CONTAINERS, RECIPES, ROUNDINGS, TREATMENTS
from .tables import human_db
from .target_cli import add_sizes

_QUANTIZE = """examples:
  ideogram4-quant quantize my-tune-v2.safetensors --level Q4_K
  ideogram4-quant quantize my-tune-v2.safetensors --pair my-tune-v2-uncond.safetensors --level INT8
  ideogram4-quant quantize my-tune-v2.safetensors --level INT8 --calibration cal.safetensors \\
      --treatment auto --out my-tune-v2-best.safetensors
  ideogram4-quant quantize my-tune-v2.safetensors --pair my-tune-v2-uncond.safetensors \\
      --target-gb 10.4 --native --calibration cal.safetensors"""


def add_parsers(subparsers: argparse._SubParsersAction) -> None:
    """Add the three commands; each sets ``func``, a handler ``(args) -> exit code``."""
    _add_quantize(subparsers)
    _add_inspect(subparsers)
    _add_verify(subparsers)


def _add_quantize(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser(
        "quantize",
        help="write a model at another level",
        description="Write a copy of Ideogram 4 at another level, layer by layer. The new file is "
        "named after SRC and lies beside it, unless --out says otherwise.",
        epilog=_QUANTIZE,
    )
    parser.add_argument("source", metavar="SRC", help="a model file or folder, of any origin")
    parser.add_argument(
        "--level",
        metavar="L",
        help=", ".join(RECIPES) + "; INT8 is the rotated one; or give a size",
    )
    parser.add_argument(
        "--out",
        metavar="F|DIR",
        help="the new file, or the folder for it (default: beside SRC, named SRC-LEVEL, or "
        "SRC-10.4GB.safetensors for a size)",
    )
    parser.add_argument(
        "--copy",
        choices=(*COPIES, BOTH),
        help="which copy: where SRC holds both, or does not say; both: a file for each",
    )
    parser.add_argument(
        "--base", nargs="+", metavar="F", help="gives a linears-only SRC its other tensors"
    )
    parser.add_argument(
        "--pair",
        metavar="F",
        help="the file of the other copy, to be written in the same run: to a file of its own, but "
        "for Transformer Lab's container, which holds both",
    )
    parser.add_argument(
        "--container",
        "--layout",  # its name before 0.2.0
        choices=CONTAINERS,
        default="native",
        help="of an INT8 file (default: native)",
    )
    parser.add_argument(
        "--protect",
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME",
        help="linears to leave in bf16, as layers.3.feed_forward.w2 or layers.*.feed_forward.w2",
    )
    parser.add_argument(
        "--type",
        action="append",
        default=[],
        dest="types",
        metavar="NAME=TYPE",
        help="another GGUF type for some linears, as layers.*.feed_forward.w2=Q6_K",
    )
    parser.add_argument("--policy", default="uniform", help=argparse.SUPPRESS)  # of older versions
    parser.add_argument(
        "--linears", choices=("blocks", "all"), help="quantize those in the blocks, or all"
    )
    add_sizes(parser)
    _add_calibrated(parser)
    parser.add_argument("--licence", metavar="TEXT", help="recorded where SRC names none")
    parser.add_argument(
        "--device", default="cpu", metavar="D", help="where to encode: cpu (default), cuda"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace F if it exists")
    parser.add_argument(
        "--resume", action="store_true", help="go on with F.partial, which an interrupted run left"
    )
    parser.add_argument("--dry-run", action="store_true", help="say what would be written")
    parser.set_defaults(func=quantize, interrupted=how_to_go_on)


def _add_calibrated(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("by calibration")
    group.add_argument("--calibration", metavar="CAL", help="what calibrate wrote of this model")
    group.add_argument(
        "--treatment",
        choices=TREATMENTS,
        help="smooth: SmoothQuant on top of an INT8 level; auto: for each linear the best that was "
        "measured, smoothing where it gains 4 dB; auto-native: the best that stock ComfyUI loads",
    )
    group.add_argument(
        "--alpha",
        type=float,
        metavar="A",
        help="strength of smoothing (default: the best measured)",
    )
    group.add_argument(
        "--rounding",
        choices=ROUNDINGS,
        default=ROUNDINGS[0],
        help="feedback (default): codes that make errors of correlated inputs cancel; nearest",
    )
    group.add_argument(
        "--protect-budget",
        metavar="8%|SIZE",
        help="keep the most fragile linears in bf16: a share of them, or what adds SIZE (700MB)",
    )
    group.add_argument(
        "--protect-below",
        type=float,
        metavar="DB",
        help="keep linears in bf16 whose output would be below this SQNR",
    )


def _add_inspect(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser(
        "inspect",
        help="say what a model file is",
        description="Origin, level, copies, sizes and metadata, from the headers alone.",
        epilog="example: ideogram4-quant inspect my-tune-v2-Q4_K.gguf",
    )
    parser.add_argument("file", metavar="FILE", help="a model file or folder")
    parser.add_argument(
        "--base", nargs="+", metavar="F", help="gives a linears-only FILE its other tensors"
    )
    parser.add_argument(
        "--uncond", metavar="F",
        help="FILE's unconditional copy, of any level: is it one, and what do both take",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(func=_inspect)


def _add_verify(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser(
        "verify",
        help="compare the weights of two files",
        description="SQNR of every layer of FILE against SRC, in dB, and the worst layers.",
        epilog="example: ideogram4-quant verify my-tune-v2-Q4_K.gguf --against "
        "my-tune-v2.safetensors",
    )
    parser.add_argument("file", metavar="FILE", help="the quantized model")
    parser.add_argument("--against", required=True, metavar="SRC", help="the reference")
    parser.add_argument("--copy", choices=COPIES, help="compare this copy alone")
    parser.add_argument(
        "--base", nargs="+", metavar="F", help="gives a linears-only FILE its other tensors"
    )
    parser.add_argument("--against-base", nargs="+", metavar="F", help="the same for SRC")
    parser.add_argument(
        "--calibration", metavar="CAL", help="of SRC: foretell the error of each linear's output"
    )
    parser.add_argument(
        "--at-least",
        type=float,
        metavar="DB",
        help="exit with 1 if the SQNR of the linears' weights is below this, for scripts",
    )
    parser.add_argument("--worst", type=int, default=10, metavar="N", help="rows (default: 10)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(func=_verify)


def _inspect(args: argparse.Namespace) -> int:
    check_files(args.file, *(args.base or ()), *([args.uncond] if args.uncond else []))
    if args.uncond is not None:
        from .inspect_pair import inspect_pair

        both = inspect_pair(args.file, args.uncond, args.base)
        print(json.dumps(both.to_dict(), indent=2) if args.json else both.table())
        return 0
    from .inspect import inspect_file

    found = inspect_file(args.file, args.base)
    print(json.dumps(found.to_dict(), indent=2) if args.json else found.table())
    return 0


def _verify(args: argparse.Namespace) -> int:
    bases = (*(args.base or ()), *(args.against_base or ()))
    check_files(args.file, args.against, args.calibration, *bases)
    from .verify import verify_file

    with progress_bar("verify", " values") as progress:
        found = verify_file(
            args.file,
            args.against,
            copy=args.copy,
            base=args.base,
            against_base=args.against_base,
            calibration=calibration_of(args),
            progress=progress,
        )
    print(json.dumps(found.to_dict(), indent=2) if args.json else found.table(args.worst))
    measured = found.meter.sqnr_db
    if args.at_least is None or measured >= args.at_least:
        return 0
    print(
        f"{args.file}: {human_db(measured)} dB, below the {args.at_least:g} dB asked for",
        file=sys.stderr,
    )
    return 1
