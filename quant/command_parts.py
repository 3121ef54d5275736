"""What the commands of the quantizer share; importing it imports nothing heavy."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import CheckpointError

if TYPE_CHECKING:
    from .calibration import Calibration


@contextmanager
def progress_bar(title: str, unit: str) -> Iterator[Callable[[int, int], None]]:
    """A progress callback ``(done, total)`` that draws a bar with rate and time left on stderr.

    The bar appears with the first call, so that an error before the work stands alone.
    """
    from tqdm import tqdm

    with ExitStack() as stack:
        bar: tqdm | None = None

        def progress(done: int, total: int) -> None:
            nonlocal bar
            if bar is None:
                made = tqdm(desc=title, total=total, unit=unit, unit_scale=True, dynamic_ncols=True)
                bar = stack.enter_context(made)
            bar.update(done - bar.n)

        yield progress


def calibration_of(args: argparse.Namespace) -> Calibration | None:
    """The calibration that ``--calibration`` names, if it names one."""
    if args.calibration is None:
        return None
    from .calibration import Calibration

    return Calibration.load(args.calibration)


def check_files(*paths: str | None) -> None:
    """CheckpointError for the first file that is not there, before anything is imported for it."""
    for path in paths:
        if path is not None and not Path(path).exists():
            raise CheckpointError("no such file", file=path)
