"""The files of one run at a level: none is written before all can be, and a run is gone on with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from ..files.new_file import check_output
from .finished import check_finished
from .recipes import QuantOptions
from .source import BaseLike
from .target_files import Part, open_files

Progress = Callable[[str, int, int], None]


def check_several(
    parts: Sequence[Part],
    level: str,
    options: QuantOptions,
    base: BaseLike | Sequence[BaseLike] | None = None,
    *,
    resume: bool = False,
    progress: Progress = lambda what, done, total: None,
) -> set[Path]:
    """The outputs that an interrupted run has finished, and that stay; empty for a new run.

    With ``resume`` those that are there must be what this run writes; their sources are hashed.
    Raises what `open_files` does, OutputExistsError where all are there, and QuantOptionError for
    one of another source or other options.
    """
    files = open_files(parts, base)
    done = [file for file in files if file.out.exists()] if resume else []
    if len(done) == len(files):
        for file in done:
            check_output(file.out)
    for file in done:
        check_finished(file, level, options, progress)
    return {file.out for file in done}
