"""``quantize`` with a size instead of a level."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from ..checkpoint.pairs import WORKING_MEMORY
from .errors import QuantOptionError
from .progress import progress_bar, saying_what_is_left
from .recipes import QuantOptions
from .sensitivity import Sensitivity
from .target import MEASURING, Request, Target, choose_storage, quantize_to_target

_CARD = re.compile(r"(\d+(?:\.\d+)?) ?GB")


def add_sizes(parser: argparse.ArgumentParser) -> None:
    """The options of ``quantize`` that stand for a level."""
    group = parser.add_argument_group(
        "by size, instead of a level: the nearest picture of so many bytes; both copies of SRC, or "
        "SRC and --pair, are weighed against each other and written to a file each"
    )
    size = group.add_mutually_exclusive_group()
    size.add_argument(
        "--target-gb", type=float, metavar="GB", help="size of what is written (10^9 bytes)"
    )
    size.add_argument(
        "--fit", metavar="24GB", help="memory of the card: what is written leaves 1.9 GB for work"
    )
    group.add_argument(
        "--native", action="store_true", help="only what ComfyUI's own loader reads (.safetensors)"
    )
    group.add_argument("--sensitivity", metavar="SENS", help="what sensitivity wrote of this model")
    group.add_argument(
        "--pair-out", metavar="F", help="of the unconditional copy (default: F_unconditional)"
    )


def wants_size(args: argparse.Namespace) -> bool:
    """Whether a size is asked for. Raises QuantOptionError for options that go with one alone, and
    for a level beside it."""
    size = args.target_gb is not None or args.fit is not None
    alone = {
        "--native": args.native,
        "--sensitivity": args.sensitivity,
        "--pair-out": args.pair_out,
    }
    for name, given in alone.items():
        if given and not size:
            raise QuantOptionError(
                f"{name} goes with a size", needed="--target-gb GB or --fit 24GB"
            )
    if size and args.level is not None:
        raise QuantOptionError(
            "a size or a level, not both: a size mixes levels by itself",
            found=f"--level {args.level}",
            hint="Leave --level out; the name of --out says which format.",
        )
    return size


def quantize_to_size(args: argparse.Namespace, options: QuantOptions) -> int:
    """Handler of ``quantize`` with a size: the exit code."""
    sensitivity = None if args.sensitivity is None else Sensitivity.load(args.sensitivity)
    request = Request(
        args.source,
        args.out,
        _target(args),
        pair=args.pair,
        pair_out=args.pair_out,
        copy=args.copy,
        base=args.base,
        options=options,
        sensitivity=sensitivity,
        device=args.device,
        overwrite=args.overwrite,
        resume=args.resume,
    )
    if args.dry_run:
        with _bars() as progress:
            chosen, files = choose_storage(request, progress)
        print(chosen.table())
        print("\n".join(f"would write {file.out} ({file.copy})" for file in files))
        return 0
    with _bars() as progress, saying_what_is_left(Path(args.out)):
        chosen, reports = quantize_to_target(request, progress)
    print(chosen.table())
    for report in reports:
        print(f"\n{report.table(5)}")
    return 0


@contextmanager
def _bars() -> Iterator[Callable[[str, int, int], None]]:
    """A progress callback that draws a bar for each thing that is done."""
    with ExitStack() as stack:
        bars: dict[str, Callable[[int, int], None]] = {}

        def progress(what: str, done: int, total: int) -> None:
            if what not in bars:
                unit = " values" if what == MEASURING else "B"
                bars[what] = stack.enter_context(progress_bar(what, unit))
            bars[what](done, total)

        yield progress


def _target(args: argparse.Namespace) -> Target:
    if args.target_gb is not None:
        if not 0 < args.target_gb < 1e6:
            raise QuantOptionError("--target-gb", found=args.target_gb, needed="above 0")
        return Target(int(args.target_gb * 1e9), f"{args.target_gb:g} GB")
    match = _CARD.fullmatch(args.fit.strip())
    if match is None:
        raise QuantOptionError("--fit", found=args.fit, needed="as 24GB")
    return Target(int(float(match[1]) * 1e9) - WORKING_MEMORY, f"a card of {args.fit.strip()}")
