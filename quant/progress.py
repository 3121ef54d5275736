"""What commands of this folder show while they work."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from tqdm import tqdm

from ..files.partial import partial_path


@contextmanager
def progress_bar(title: str, unit: str) -> Iterator[Callable[[int, int], None]]:
    """A progress callback ``(done, total)`` that draws a bar with rate and time left on stderr.

    The bar appears with the first call, so that an error before the work stands alone.
    """
    with ExitStack() as stack:
        bar: tqdm | None = None

        def progress(done: int, total: int) -> None:
            nonlocal bar
            if bar is None:
                made = tqdm(desc=title, total=total, unit=unit, unit_scale=True, dynamic_ncols=True)
                bar = stack.enter_context(made)
            bar.update(done - bar.n)

        yield progress


@contextmanager
def saying_what_is_left(out: Path) -> Iterator[None]:
    """On Ctrl-C: how to go on."""
    try:
        yield
    except KeyboardInterrupt:
        left = partial_path(out)
        if left.exists():
            print(f"{left} holds what is done: --resume goes on with it", file=sys.stderr)
        raise
