"""Many variants at once: built in several processes, and each once as long as its source stands."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import multiprocessing
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from ...errors import BackendUnavailableError
from ...files.new_file import replaced
from ...files.user_folder import user_folder
from . import offline, sass
from .offline import Built, Report, Variant

log = logging.getLogger(__name__)

Work = Sequence[tuple[Variant, int]]
"""Variants, and the architecture to build each for."""

# A process imports torch and Triton first: two seconds, or four variants.
_EACH = 4


def processes() -> int:
    """How many build at a time: one for each core, up to eight."""
    return min(os.cpu_count() or 1, 8)


def built(work: Work, jobs: int | None = None) -> Iterator[Built]:
    """``work`` compiled, in its order, by up to ``jobs`` processes; raises as ``build`` does."""
    jobs = min(jobs or processes(), len(work) // _EACH)
    if jobs < 2:
        yield from (offline.build(variant, arch) for variant, arch in work)
        return
    # forking a process that has threads, as torch does, may hang
    pool = ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn"))
    try:
        yield from pool.map(offline.build, *zip(*work, strict=True))
    except BrokenProcessPool as error:  # LLVM aborts on what it cannot select
        raise BackendUnavailableError(
            f"a process that compiled kernels ended ({error})",
            hint="--jobs 1 compiles them one by one: the one after the last printed is it.",
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def reports(work: Work, jobs: int | None = None, folder: Path | None = None) -> Iterator[Report]:
    """What the machine code of ``work`` says, in its order.

    Those that were built before, from the same source by the same Triton, are read from ``folder``
    (None: the user's cache); the others are built and kept there.
    """
    file = (folder or user_folder()) / "machine_code.json"
    known = _load(file)
    keys = [_key(variant, arch) for variant, arch in work]
    missing = [pair for key, pair in zip(keys, work, strict=True) if key not in known]
    new = iter(built(missing, jobs))
    added = {}
    try:
        for key in keys:
            if key not in known:
                known[key] = added[key] = next(new).report
            yield known[key]
    finally:
        if added:
            _save(file, _load(file) | added, set(keys))


_KEPT = 4000  # reports: some ten states of all kernels, at 0.6 KB each


def _key(variant: Variant, arch: int) -> str:
    version, _ = offline.require_tools()
    kernel = offline.kernel_of(variant)
    said = (kernel.cache_key, repr(variant), arch, version, _reader())
    return hashlib.sha256(repr(said).encode()).hexdigest()[:24]


def _reader() -> str:
    """A digest of the code that compiles and reads: a new reader reads again."""
    sources = (Path(module.__file__).read_bytes() for module in (offline, sass))
    return hashlib.sha256(b"".join(sources)).hexdigest()


def _load(file: Path) -> dict[str, Report]:
    try:
        return {key: Report(**said) for key, said in json.loads(file.read_bytes()).items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}  # not there, cut off, or of another version: it is only a cache


def _save(file: Path, found: dict[str, Report], current: set[str]) -> None:
    old = [key for key in found if key not in current]
    for key in old[: max(0, len(found) - _KEPT)]:
        del found[key]
    document = {key: dataclasses.asdict(report) for key, report in found.items()}
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with replaced(file) as part:
            part.write_text(json.dumps(document))
    except OSError as error:
        log.warning("the machine code read now is not kept: %s", error)
