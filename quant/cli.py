"""``ideogram4-quant quantize | inspect | verify``: arguments in, tables out."""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path

from ..checkpoint.grammar import CONDITIONAL, UNCONDITIONAL
from .block_types import check_policy
from .calibration import Calibration
from .errors import QuantOptionError
from .inspect import inspect_file
from .inspect_pair import inspect_pair
from .progress import progress_bar, saying_what_is_left
from .quantize import plan_quantization, quantize_checkpoint
from .recipes import CONTAINERS, RECIPES, ROUNDINGS, TREATMENTS, QuantOptions, TypeRule
from .tables import human_db
from .target_cli import add_sizes, quantize_to_size, wants_size
from .verify import verify_file

COPIES = (CONDITIONAL, UNCONDITIONAL)


def add_parsers(subparsers: argparse._SubParsersAction) -> None:
    """Add the three commands; each sets ``func``, a handler ``(args) -> exit code``."""
    _add_quantize(subparsers)
    _add_inspect(subparsers)
    _add_verify(subparsers)


def _add_quantize(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser(
        "quantize",
        help="write a model at another level",
        description="Write a copy of Ideogram 4 at another level, layer by layer.",
    )
    parser.add_argument("source", metavar="SRC", help="a model file or folder, of any origin")
    parser.add_argument("--level", metavar="L", help=", ".join(RECIPES) + "; or give a size")
    parser.add_argument("--out", required=True, metavar="F", help=".safetensors or .gguf")
    parser.add_argument(
        "--copy", choices=COPIES, help="which copy: where SRC holds both, or does not say"
    )
    parser.add_argument(
        "--base", nargs="+", metavar="F", help="gives a linears-only SRC its other tensors"
    )
    parser.add_argument(
        "--pair", metavar="F", help="the other copy: for a size, and for Transformer Lab's files"
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
    parser.set_defaults(func=_quantize)


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


def _type_rule(text: str) -> TypeRule:
    pattern, equals, qtype = text.rpartition("=")
    if not equals or not pattern or not qtype:
        raise QuantOptionError("--type needs NAME=TYPE", found=text)
    return TypeRule(pattern, qtype)


def _calibration(args: argparse.Namespace) -> Calibration | None:
    return None if args.calibration is None else Calibration.load(args.calibration)


_BUDGET = re.compile(r"(\d+(?:\.\d+)?) ?(%|[kMG]?B)")
_UNITS = {"B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9}


def _budget(text: str | None) -> dict[str, float | int]:
    """The option of QuantOptions that ``8%`` or ``700MB`` means."""
    if text is None:
        return {}
    match = _BUDGET.fullmatch(text.strip())
    if match is None:
        raise QuantOptionError("--protect-budget", found=text, needed="as 8% or 700MB")
    if match[2] == "%":
        return {"protect_share": float(match[1]) / 100}
    return {"protect_bytes": round(float(match[1]) * _UNITS[match[2]])}


def _quantize(args: argparse.Namespace) -> int:
    check_policy(args.policy)
    options = QuantOptions(
        container=args.container,
        protect=tuple(args.protect),
        types=tuple(map(_type_rule, args.types)),
        native=args.native,
        linears=args.linears,
        licence=args.licence,
        calibration=_calibration(args),
        treatment=args.treatment,
        alpha=args.alpha,
        rounding=args.rounding,
        protect_below=args.protect_below,
        **_budget(args.protect_budget),
    )
    if wants_size(args):
        return quantize_to_size(args, options)
    if args.level is None:
        raise QuantOptionError("what to write?", needed="--level L, or a size: --target-gb GB")
    choice = {
        "copy": args.copy,
        "base": args.base,
        "pair": args.pair,
        "options": options,
        "overwrite": args.overwrite,
    }
    if args.dry_run:
        print(plan_quantization(args.source, args.level, args.out, **choice).table())
        return 0
    with progress_bar(args.level, "B") as progress, saying_what_is_left(Path(args.out)):
        report = quantize_checkpoint(
            args.source,
            args.level,
            args.out,
            **choice,
            progress=progress,
            device=args.device,
            resume=args.resume,
            keep_partial=True,
        )
    print(report.table())
    return 0


def _inspect(args: argparse.Namespace) -> int:
    if args.uncond is not None:
        both = inspect_pair(args.file, args.uncond, args.base)
        print(json.dumps(both.to_dict(), indent=2) if args.json else both.table())
        return 0
    found = inspect_file(args.file, args.base)
    print(json.dumps(found.to_dict(), indent=2) if args.json else found.table())
    return 0


def _verify(args: argparse.Namespace) -> int:
    with progress_bar("verify", " values") as progress:
        found = verify_file(
            args.file,
            args.against,
            copy=args.copy,
            base=args.base,
            against_base=args.against_base,
            calibration=_calibration(args),
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
