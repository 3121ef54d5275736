"""Compile the sources beside this file with the system's compiler, and load what was compiled.

The library lies in the user's cache under a name that hashes the sources, the flags and the
processor, so that another version or machine never loads it. Loading compiles nothing.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from ...errors import BackendUnavailableError
from ...files.user_folder import user_folder

_log = logging.getLogger(__name__)

FOLDER = Path(__file__).parent
SOURCES = ("kquants.c", "rows.c")
HEADERS = ("vectors.h",)
# No fused multiply-add and no reordering: bits are those of the formulas in torch.
FLAGS = ("-O3", "-std=gnu11", "-ffp-contract=off", "-fno-math-errno", "-fvisibility=hidden")
_THIS_PROCESSOR = ("-march=native", "-mcpu=native")  # clang on ARM knows the second alone
_SECONDS = 120
# GCC on Windows aligns the stack to 16 bytes and vectors to 64
_COMPILERS = ("clang",) if os.name == "nt" else ("cc", "gcc", "clang")
COMMAND = "ideogram4-quant kernels --cpu"


def library_path() -> Path:
    """Where this version's library for this processor lies, or would."""
    digest = hashlib.sha256()
    for name in (*SOURCES, *HEADERS):
        digest.update((FOLDER / name).read_bytes())
    digest.update(repr((FLAGS, platform.machine(), processor())).encode())
    suffix = ".dll" if os.name == "nt" else ".so"
    return user_folder() / "native" / f"encode-{digest.hexdigest()[:24]}{suffix}"


@functools.cache
def load() -> ctypes.CDLL | None:
    """The compiled library; None, said once in the log, where there is none that can be loaded."""
    path = library_path()
    if not path.is_file():
        _log.info("weights are encoded by torch, more slowly: `%s` compiles an encoder", COMMAND)
        return None
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        _log.warning("weights are encoded by torch, more slowly: %s (`%s`)", error, COMMAND)
        return None


def find_compiler() -> str | None:
    """The C compiler that ``CC`` names, or the first of the usual ones; None without any."""
    names = (os.environ.get("CC"), *_COMPILERS)
    return next((found for name in names if name and (found := shutil.which(name))), None)


def build(check: Callable[[ctypes.CDLL], None]) -> Path:
    """Compile the library unless it is there and loads; keep it if ``check`` passes; its path.

    Raises BackendUnavailableError without a compiler or where it fails; what ``check`` raises.
    """
    path = library_path()
    if _loads(path):
        return path
    compiler = find_compiler()
    if compiler is None:
        raise BackendUnavailableError(
            "there is no C compiler",
            needed=f"{' or '.join(_COMPILERS)} on PATH, or its name in CC",
            hint="Nothing else is lost: weights are encoded by torch, to the same bytes.",
        )
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        made = Path(folder) / path.name
        _compile(compiler, made)
        check(ctypes.CDLL(str(made)))
        try:
            os.replace(made, path)
        except PermissionError:  # Windows keeps a loaded file where it is
            if not _loads(path):
                shutil.copyfile(made, path)
    load.cache_clear()
    return path


def _loads(path: Path) -> bool:
    """Whether there is a library, and no part of one."""
    try:
        ctypes.CDLL(str(path))
    except OSError:
        return False
    return True


def _compile(compiler: str, out: Path) -> None:
    sources = [str(FOLDER / name) for name in SOURCES]
    shared = ["-shared"] if os.name == "nt" else ["-shared", "-fPIC", "-lm"]
    problem = ""
    for processor in _THIS_PROCESSOR:
        command = [compiler, *FLAGS, processor, *sources, *shared, "-o", str(out)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS)
        except (OSError, subprocess.TimeoutExpired) as error:
            problem = str(error)
            continue
        if done.returncode == 0:
            return
        problem = problem or done.stderr.strip()
    raise BackendUnavailableError(
        f"{compiler} cannot compile the encoder: {problem[:2000]}",
        needed="GCC or clang",
        hint="Nothing else is lost: weights are encoded by torch, to the same bytes.",
    )


@functools.cache
def processor() -> str:
    """What the processor can do, as far as the system says."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.lower().startswith(("flags", "features")):
                return " ".join(sorted(line.partition(":")[2].split()))
    return platform.processor()
