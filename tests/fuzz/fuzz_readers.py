"""Coverage-guided fuzzing of the readers, for hours: finding by finding, without stopping.

    pip install atheris
    chrt -i 0 nice -n 19 python -m ideogram4_quant.tests.fuzz.fuzz_readers \\
        --seconds 3600 --corpus corpus --findings findings

Inputs that reach new code are kept in ``--corpus``. An input that ends in anything but an error of
the pack, takes more than a second or 64 MB goes to ``--findings``, one of each kind, with its
traceback beside it; tests/test_hostile.py runs every file of tests/fuzz/findings again.
"""

from __future__ import annotations

import argparse
import hashlib
import logging
import re
import signal
import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(
    include=[
        *(f"ideogram4_quant.{name}" for name in ("checkpoint", "gguf_loader", "nodes", "quant")),
        *(f"ideogram4_quant.ops.{name}" for name in ("choice_files", "choices", "fold", "partial")),
        *(f"ideogram4_quant.engine.compare.{name}" for name in ("cases", "metrics", "score")),
    ]
):
    from ideogram4_quant.tests.fuzz import seeds, targets

_LONGEST = 1 << 14
DICTIONARY = Path(__file__).with_name("tokens.dict")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=int, default=3600)
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--findings", type=Path, required=True)
    chosen = parser.parse_args()
    logging.disable(logging.CRITICAL)  # warnings about ignored tensors would be most of the work
    memory = Path("/dev/shm")
    folder = Path(tempfile.mkdtemp(dir=memory if memory.is_dir() else None))
    chosen.corpus.mkdir(parents=True, exist_ok=True)
    chosen.findings.mkdir(parents=True, exist_ok=True)
    targets.write_neighbours(folder)
    scratch = folder / "seeds"
    scratch.mkdir()
    for name, data in seeds.inputs(scratch).items():
        (chosen.corpus / name).write_bytes(data)
    seen: set[str] = set()

    def one(data: bytes) -> None:
        problem = targets.run(data, folder)
        if problem is None or problem[0] in seen:
            return
        kind, report = problem
        seen.add(kind)
        name = re.sub(r"\W+", "-", kind) + "-" + hashlib.sha256(data).hexdigest()[:8]
        (chosen.findings / f"{name}.bin").write_bytes(data)
        (chosen.findings / f"{name}.txt").write_text(
            f"{kind}\n\n{report}", encoding="utf-8", errors="backslashreplace"
        )
        print("FOUND", kind, flush=True)

    options = [
        sys.argv[0],
        str(chosen.corpus),
        f"-max_total_time={chosen.seconds}",
        f"-max_len={_LONGEST}",
        f"-dict={DICTIONARY}",
        f"-artifact_prefix={chosen.findings}/",
        "-handle_alrm=0",
        "-rss_limit_mb=2048",
        "-print_final_stats=1",
        "-reload=0",
    ]
    # its watch on the clock would end a process that waits for a CPU; `targets.run` has its own
    signal.signal(signal.SIGALRM, signal.SIG_IGN)
    atheris.Setup(options, one)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
