"""``quantize`` with a size in the place of a level."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

from .command_parts import progress_bar
from .errors import QuantOptionError
from .target_goal import Target, target_gb, target_memory, target_seconds

if TYPE_CHECKING:
    from .recipes import QuantOptions
    from .target_files import Part


def add_sizes(parser: argparse.ArgumentParser) -> None:
    """The options of ``quantize`` that stand for a level."""
    group = parser.add_argument_group(
        "by size, instead of a level: the nearest picture of so many bytes; both copies of a run "
        "(--pair, --copy both) are weighed against each other"
    )
    size = group.add_mutually_exclusive_group()
    size.add_argument(
        "--target-gb", type=float, metavar="GB", help="size of all that is written (10^9 bytes)"
    )
    size.add_argument(
        "--fit", metavar="24GB", help="memory of the card: what is written leaves 1.9 GB for work"
    )
    size.add_argument(
        "--target-seconds",
        type=float,
        metavar="S",
        help="of the default preset's steps at 1024 x 1024 on --card, modelled and not measured; "
        "and within the card's memory",
    )
    group.add_argument("--card", metavar="NAME", help='for --target-seconds: "RTX 3090"')
    group.add_argument(
        "--native", action="store_true", help="only what ComfyUI's own loader reads (.safetensors)"
    )
    group.add_argument("--sensitivity", metavar="SENS", help="what sensitivity wrote of this model")


def target_of(args: argparse.Namespace) -> Target | None:
    """The size that is asked for; None: a level is.

    Raises QuantOptionError for neither, for both, and for options that go with a size alone.
    """
    if args.target_gb is not None:
        found = target_gb(args.target_gb)
    elif args.fit is not None:
        found = target_memory(args.fit)
    elif args.target_seconds is not None:
        found = target_seconds(args.target_seconds, args.card)
    else:
        found = None
    if args.card is not None and args.target_seconds is None:
        raise QuantOptionError("--card goes with --target-seconds", found=args.card)
    for name, given in {"--native": args.native, "--sensitivity": args.sensitivity}.items():
        if given and found is None:
            raise QuantOptionError(
                f"{name} goes with a size", needed="--target-gb GB or --fit 24GB"
            )
    if found is None and args.level is None:
        raise QuantOptionError("what to write?", needed="--level L, or a size: --target-gb GB")
    if found is not None and args.level is not None:
        raise QuantOptionError(
            "a size or a level, not both: a size mixes levels by itself",
            found=f"--level {args.level}",
            hint="Leave --level out; the name of --out says which format.",
        )
    return found


def quantize_to_size(
    args: argparse.Namespace, target: Target, parts: Sequence[Part], options: QuantOptions
) -> int:
    """Choose for all ``parts`` together and write them: the exit code."""
    from .sensitivity import Sensitivity
    from .target import Request, choose_storage, quantize_to_target

    request = Request(
        tuple(parts),
        target,
        base=args.base,
        options=options,
        sensitivity=None if args.sensitivity is None else Sensitivity.load(args.sensitivity),
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
    with _bars() as progress:
        chosen, reports = quantize_to_target(request, progress)
    print(chosen.table())
    for report in reports:
        print(f"\n{report.table(5)}")
    return 0


@contextmanager
def _bars() -> Iterator[Callable[[str, int, int], None]]:
    """A progress callback that draws a bar for each thing that is done."""
    from .target import MEASURING

    with ExitStack() as stack:
        bars: dict[str, Callable[[int, int], None]] = {}

        def progress(what: str, done: int, total: int) -> None:
            if what not in bars:
                unit = " values" if what == MEASURING else "B"
                bars[what] = stack.enter_context(progress_bar(what, unit))
            bars[what](done, total)

        yield progress
