"""Writers that are killed, run out of room or may not write: FAULT KINDS TRIES FOLDER.

A process of its own, which imports everything once and forks for every try, so that a hundred
tries take seconds. It prints what it saw as JSON; tests/test_faults.py judges it.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import resource
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image

from ideogram4_quant.checkpoint import write_safetensors
from ideogram4_quant.engine.compare.store import Record, Store
from ideogram4_quant.errors import Ideogram4QuantError
from ideogram4_quant.files.new_file import replaced
from ideogram4_quant.gguf_loader import TYPE_NUMBERS, write_gguf
from ideogram4_quant.ops.tuning import choice_files
from ideogram4_quant.ops.tuning.choices import LINEAR, Key, Measurement, Table
from ideogram4_quant.quant import Calibration, LayerStats, QuantOptions, quantize_checkpoint
from ideogram4_quant.tests import quant_model

Write = Callable[[Path], object]
OTHER = "bf16-unconditional.safetensors"
_KEY = "ab" * 32  # of a picture in the store
_NOBODY = 65534


def tensors() -> dict[str, torch.Tensor]:
    return {f"t{i}": torch.full((64, 256), float(i)) for i in range(40)}


def safetensors(folder: Path) -> None:
    write_safetensors(folder / "out.safetensors", tensors(), overwrite=True)


def gguf(folder: Path) -> None:
    items = [(n, tuple(t.shape), TYPE_NUMBERS["F32"], t) for n, t in tensors().items()]
    write_gguf(folder / "out.gguf", items, {"general.architecture": "ideogram4"}, overwrite=True)


def quantize(folder: Path) -> None:
    source = folder / "source" / "bf16.safetensors"
    quantize_checkpoint(source, "INT8 W8A8", folder / "out.safetensors", overwrite=True)


def quantize_gguf(folder: Path) -> None:
    source = folder / "source" / "bf16.safetensors"
    quantize_checkpoint(source, "Q8_0", folder / "out.gguf", overwrite=True)


def pair(folder: Path) -> None:
    """Both copies in one file."""
    source, other = (folder / "source" / name for name in ("bf16.safetensors", OTHER))
    lab = QuantOptions("transformer-lab")
    quantize_checkpoint(
        source, "INT8 W8A8", folder / "out.safetensors", pair=other, options=lab, overwrite=True
    )


def resumed(folder: Path) -> None:
    """Going on where a killed run stopped."""
    source, out = folder / "source" / "bf16.safetensors", folder / "out.safetensors"
    quantize_checkpoint(source, "INT8 W8A8", out, overwrite=True, keep_partial=True, resume=True)


def calibration(folder: Path) -> None:
    x, weight = torch.ones(4, 4096), torch.ones(8, 4096)
    layers = {f"conditional.layers.{i}.attention.o": LayerStats.of(x, weight) for i in range(20)}
    Calibration(layers, (0.0,)).save(folder / "out.safetensors", overwrite=True)


def store(folder: Path) -> None:
    picture = Image.frombytes("RGB", (256, 256), bytes(range(256)) * 768)
    Store(folder / "store").save(_KEY, picture, Record(1.0, "word"), torch.ones(20, 64, 128))


def report(folder: Path) -> None:
    picture = Image.frombytes("RGB", (512, 512), random.Random(0).randbytes(512 * 512 * 3))
    with replaced(folder / "out.png") as part:
        picture.save(part)


def choices(folder: Path) -> None:
    keys = [Key(LINEAR, n, 512, 512, "float32", "") for n in range(1, 400)]
    table = Table(Measurement(key, {"int_mm": 1.0}) for key in keys)
    choice_files.save(folder, torch.device("cpu"), table)


WRITERS: dict[str, Write] = {
    f.__name__: f
    for f in (
        *(safetensors, gguf, quantize, quantize_gguf, pair, resumed),
        *(calibration, store, report, choices),
    )
}


def fork(work: Callable[[], object], kill_after: float | None = None) -> tuple[int, str]:
    """(wait status, what the child reported) of ``work`` in a child process."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        said = ""
        try:
            work()
        except Ideogram4QuantError as error:
            said = f"{type(error).__name__}: {error}"
        except BaseException as error:
            said = f"UNTYPED {error!r}"
        os.write(writing, said.encode()[:4000])
        os._exit(1 if said else 0)
    os.close(writing)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(child, signal.SIGKILL)
    with os.fdopen(reading) as pipe:
        said = pipe.read()
    return os.waitpid(child, 0)[1], said


def digests(folder: Path) -> dict[str, str]:
    """Relative name -> SHA-256 of every file."""
    return {
        file.relative_to(folder).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


def outputs(folder: Path) -> dict[str, str]:
    """Those that carry their final name, without the source.

    A picture in the store counts with its record, which is written last: without one it is not
    there, and made anew.
    """
    found = digests(folder)
    kept = any(name.startswith("store/") and name.endswith(".json") for name in found)
    passed_over = ("source/",) if kept else ("source/", "store/")
    return {n: d for n, d in found.items() if ".partial" not in n and not n.startswith(passed_over)}


def prepare(folder: Path) -> dict[str, str]:
    """Sources to quantize, one for each copy; their digests."""
    (folder / "source").mkdir(parents=True, exist_ok=True)
    quant_model.write(folder / "source" / "bf16.safetensors", quant_model.weights())
    quant_model.write(folder / "source" / OTHER, quant_model.weights(1), "unconditional")
    return digests(folder)


def clean(folder: Path, names) -> None:
    for name in names:
        (folder / name).unlink()


def kill(write: Write, tries: int, folder: Path) -> dict:
    """Kill a writer at random places: what is under the names then, and after one good run."""
    source = prepare(folder)
    durations = []
    for _ in range(3):
        started = time.perf_counter()
        fork(lambda: write(folder))
        durations.append(time.perf_counter() - started)
    whole, duration = outputs(folder), min(durations)
    places, wrong, killed = random.Random(0), [], 0
    for attempt in range(tries):
        if attempt % 2:  # every other time there is nothing to overwrite
            clean(folder, outputs(folder))
        status, said = fork(lambda: write(folder), places.uniform(0, 1) * duration)
        killed += os.WIFSIGNALED(status)
        found = outputs(folder)
        if said or any(whole.get(name) != digest for name, digest in found.items()):
            wrong.append([attempt, said, sorted(found)])
        if {n: d for n, d in digests(folder).items() if n in source} != source:
            wrong.append([attempt, "the source changed", []])
    left = [file for file in folder.rglob("*.partial*") if file.is_file()]
    for file in left:  # as if they had been left a while ago
        os.utime(file, (1, 1))
    _, said = fork(lambda: write(folder))
    again = digests(folder)
    return {
        "killed": killed,
        "wrong": wrong,
        "left": len(left),
        "said": said,
        "again": again == source | whole,
        "files": sorted(again),
    }


def full(write: Write, tries: int, folder: Path) -> dict:
    """A limit on the size of files, at several sizes; an older file is there or not."""
    source = prepare(folder)

    def limited(limit: int) -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        write(folder)

    results = []
    for older in (False, True):
        if older:
            fork(lambda: write(folder))
        whole = outputs(folder)
        for limit in (0, 100, 5000):
            _, said = fork(lambda limit=limit: limited(limit))
            results.append([limit, said, outputs(folder) == whole])
    kept = {n: d for n, d in digests(folder).items() if n in source} == source
    return {"results": results, "source": kept, "files": sorted(digests(folder))}


def readonly(write: Write, tries: int, folder: Path) -> dict:
    """A folder in which the process may not write."""
    rehearsal = folder.with_name(f"{folder.name}-rehearsal")
    prepare(rehearsal)
    write(rehearsal)  # imports what it needs while the package may be read
    source = prepare(folder)
    (folder / "store").mkdir()
    for path in (folder, *folder.rglob("*")):
        path.chmod(0o555 if path.is_dir() else 0o444)

    def without_rights() -> None:
        if os.getuid() == 0:
            os.setgid(_NOBODY)
            os.setuid(_NOBODY)
        write(folder)

    _, said = fork(without_rights)
    after = digests(folder)
    folder.chmod(0o755)
    return {"said": said, "same": after == source}


def vanish(write: Write, tries: int, folder: Path) -> dict:
    """The source is removed between its hash and its first tensor."""
    prepare(folder)
    source = folder / "source" / "bf16.safetensors"
    size = source.stat().st_size

    def work() -> None:
        def progress(done: int, total: int) -> None:
            if done >= size:
                source.unlink(missing_ok=True)

        level, name = (
            ("Q8_0", "out.gguf") if write is quantize_gguf else ("INT8 W8A8", "out.safetensors")
        )
        quantize_checkpoint(source, level, folder / name, progress=progress)

    _, said = fork(work)
    return {"said": said, "files": sorted(digests(folder))}


FAULTS = {f.__name__: f for f in (kill, full, readonly, vanish)}


if __name__ == "__main__":
    torch.set_num_threads(1)
    fault, kinds, tries, place = sys.argv[1:]
    seen = {
        kind: FAULTS[fault](WRITERS[kind], int(tries), Path(place) / kind)
        for kind in kinds.split(",")
    }
    print(json.dumps(seen))
