"""``ideogram4-quant selftest | bench``: their arguments; importing this imports nothing heavy."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Callable
from pathlib import Path

_DEVICE = "where to compute (default: cuda where there is one, else cpu)"


def add_parsers(subparsers: argparse._SubParsersAction) -> None:
    """Add both commands; each sets ``func``, a handler ``(args) -> exit code``."""
    _add_selftest(subparsers)
    _add_bench(subparsers)


def _add_selftest(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser(
        "selftest",
        help="check every backend of this device against the formulas",
        description="Run linears of every kind, quantizers and attention on every backend that is "
        "there and compare them with torch formulas on the CPU. Exit code 1 if one differs.",
        epilog="example: ideogram4-quant selftest --device cuda",
    )
    parser.add_argument("--device", metavar="D", help=_DEVICE)
    parser.add_argument("--json", action="store_true", help="one JSON document instead of a table")
    parser.set_defaults(func=_run("selftest"))


def _add_bench(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser(
        "bench",
        help="time every backend of this device side by side",
        description="Time the linears and attentions that this device can compute: each int8 "
        "backend, bf16, fp32, and GGUF, FP8 and NF4 weights decoded before the product. Percents "
        "are of the fastest product that this run measured in the same precision. Half a minute to "
        "a few minutes.",
        epilog="example: ideogram4-quant bench --tokens 4608 --chart bench.png",
    )
    parser.add_argument("--device", metavar="D", help=_DEVICE)
    parser.add_argument(
        "--tokens",
        type=int,
        nargs="+",
        metavar="M",
        help="rows of the inputs (default: 512 4608; on a CPU 512)",
    )
    parser.add_argument(
        "--features", type=int, default=4608, metavar="K", help="columns (default: 4608)"
    )
    parser.add_argument(
        "--rounds", type=int, default=5, metavar="N", help="how often each is timed (default: 5)"
    )
    parser.add_argument("--json", action="store_true", help="one JSON document instead of tables")
    parser.add_argument("--chart", type=Path, metavar="PNG", help="draw the times")
    parser.add_argument("--overwrite", action="store_true", help="replace PNG if it exists")
    parser.set_defaults(func=_run("bench"))


def _run(module: str) -> Callable[[argparse.Namespace], int]:
    """A module's ``run``, imported when it is called."""

    def handle(args: argparse.Namespace) -> int:
        return importlib.import_module(f".{module}", __package__).run(args)

    return handle
