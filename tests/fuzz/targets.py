"""What is fuzzed: bytes in, a model file on the disk, every reader of it, and what may happen then.

The first byte of an input picks a target, the rest is its payload. A reader may raise an error of
the pack that names the file, and nothing else; the second value of `run` is what went wrong.
"""

from __future__ import annotations

import itertools
import json
import os
import resource
import struct
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch

from ideogram4_quant.captions.check import check_caption
from ideogram4_quant.captions.compose import Typed
from ideogram4_quant.captions.making import make_caption
from ideogram4_quant.captions.mend import mend
from ideogram4_quant.checkpoint import EncoderCheckpoint, open_checkpoint, open_encoder
from ideogram4_quant.checkpoint.encoder_writing import find_head, find_vision
from ideogram4_quant.checkpoint.tensor_files import TensorFiles, open_tensor_files
from ideogram4_quant.engine.compare.cases import read_cases
from ideogram4_quant.engine.compare.score import read_captions_file as captions
from ideogram4_quant.errors import Ideogram4QuantError, OpError
from ideogram4_quant.files.partial import Partial, partial_path
from ideogram4_quant.gguf_loader import ArrayRef
from ideogram4_quant.ops.tuning import choice_files
from ideogram4_quant.ops.tuning.choices import LINEAR, Key, Measurement, Table
from ideogram4_quant.tests.timing import cpu_seconds

SECONDS = 1.0
MEGABYTES = 64
_DATA = 1 << 16  # bytes behind a header that the harness frames
_CPU = torch.device("cpu")
UNFINISHED = 16  # bytes of the file to be, behind which the record lies
_LOADED = 1 << 20  # tensors of larger files are not read
# the linears of a model that a LoRA is read for
LORA_SHAPES = {"layers.0.attention.qkv": (48, 16), "layers.0.attention.o": (16, 16)}

Open = Callable[[Path], object]


def raw(name: str) -> Open:
    """The payload is the file."""

    def build(payload: bytes, folder: Path) -> Path:
        path = folder / name
        path.write_bytes(payload)
        return path

    return build


def framed(name: str) -> Open:
    """The payload is the JSON of a safetensors header, a zero byte and data.

    The header's length and more data are added, so that a mutated header stays a whole one.
    """

    def build(payload: bytes, folder: Path) -> Path:
        path = folder / name
        header, _, data = payload.partition(b"\0")
        path.write_bytes(struct.pack("<Q", len(header)) + header + data + bytes(_DATA))
        return path

    return build


def beside(name: str, opened: str) -> Open:
    """The payload is a JSON file beside good weights: an index of shards, or a config."""

    def build(payload: bytes, folder: Path) -> Path:
        (folder / name).write_bytes(payload)
        return folder / opened

    return build


def read_everything(path: Path) -> None:
    """Every way from a path to tensors: the file, the transformer, the text encoder."""
    files = open_tensor_files(path)
    _check_files(files)
    for opener in (open_checkpoint, open_encoder):
        try:
            opened = opener(path)
            _read(opened, files.size)
            if opener is open_encoder:
                _read_writing_parts(opened, files.size)
        except Ideogram4QuantError as error:
            _check_error(error)


def _check_files(files: TensorFiles) -> None:
    for tensor in files.tensors.values():
        assert 0 <= tensor.offset <= tensor.offset + tensor.nbytes <= tensor.file.size
    for key, value in files.metadata.items():
        if isinstance(value, ArrayRef):
            try:
                files.array(key)
            except Ideogram4QuantError as error:
                _check_error(error)


def _read(opened, size: int) -> None:
    copies = getattr(opened, "copies", None)
    for copy in copies or (None,):
        arguments = () if copy is None else (copy,)
        shapes = opened.shapes(*arguments)
        assert all(size > 0 for shape in shapes.values() for size in shape)
        if size <= _LOADED:
            for name, tensor in opened.stream(*arguments):
                assert tuple(tensor.shape) == shapes[name]
                getattr(tensor, "dequantize", tensor.float)()


def _read_writing_parts(encoder: EncoderCheckpoint, size: int) -> None:
    """What an encoder's file has beside conditioning: its head, its vision tower."""
    for find in (find_head, find_vision):
        part = find(encoder)
        if part is not None and size <= _LOADED:
            for tensor in part.load().values():
                getattr(tensor, "dequantize", tensor.float)()


def read_cached(path: Path) -> None:
    """The nodes' cache of headers: what it holds of a file that is written anew is not given out.

    The file is opened twice, the second time without its last byte.
    """
    from ideogram4_quant.nodes.headers import open_header

    for ending in (None, -1):
        path.write_bytes(path.read_bytes()[:ending])
        os.utime(path, ns=(0, next(_times)))  # a clock that ticks between two writes
        outcomes = [
            _outcome(opener, path) for opener in (open_header, open_checkpoint, open_header)
        ]
        assert outcomes[0] == outcomes[1] == outcomes[2], outcomes


_times = itertools.count(1)


def _outcome(opener: Open, path: Path) -> object:
    try:
        opened = opener(path)
    except Ideogram4QuantError as error:
        _check_error(error)
        return str(error)
    return opened.level, opened.config, opened.copies, opened.size, set(opened.entries)


def choices(payload: bytes, folder: Path) -> Path:
    """The payload is the file of measurements kept for this CPU."""
    choice_files.file_for(folder, _CPU).write_bytes(payload)
    return folder


def read_choices(folder: Path) -> None:
    """Whatever lies there, a load gives a table, and a later one what was added to it."""
    table = choice_files.load(folder, _CPU)
    for m in table:
        assert str(m)
        assert m.ranking
        table.nearest(m.key.op, m.key.n, m.key.k, 100, None, None)
        table.few_tokens(m.key.detail, m.key.n, m.key.k, None)
    key = Key(LINEAR, 7, 7, 512, "float32", "0")
    choice_files.save(folder, _CPU, Table([Measurement(key, {"int_mm": 1.0})]))
    kept = choice_files.load(folder, _CPU)
    assert kept.get(key) is not None
    assert len(kept) in (len(table), len(table) + 1)


def unfinished(payload: bytes, folder: Path) -> Path:
    """The payload follows the bytes of an unfinished file: its record of what is done."""
    path = partial_path(folder / "out.bin")
    path.write_bytes(bytes(UNFINISHED) + payload)
    return path


def resume(path: Path) -> Partial:
    """Parts count as done whose bytes have the recorded CRC, and no others."""
    partial = Partial("fingerprint", resume=True)
    with open(path, "r+b", buffering=0) as file:
        partial.start(file, path.with_name("out.bin"), UNFINISHED)
        partial.confirm({"first": (0, 8), "second": (8, 8)})
        assert partial.finished <= {"first", "second"}
        partial.note("more", 1)
    return partial


def read_prompts(path: Path) -> None:
    """Prompts, one a line of JSON, and captions by file name."""
    for read in (lambda: read_cases(path, seeds=(0,), width=64, height=64), lambda: captions(path)):
        try:
            read()
        except Ideogram4QuantError as error:
            _check_error(error)
    text = path.read_bytes().decode("utf-8", "replace")
    check_caption(text)
    try:
        made = make_caption(text, write=lambda *_: text[::-1])
        assert check_caption(made.caption).errors == []
        assert check_caption(mend(text, Typed("a fox")).caption).errors == []
    except OpError:
        pass


def read_lora(path: Path) -> None:
    from ideogram4_quant.checkpoint import loras

    state = loras.read_lora(path)
    loras.describe(loras.parse_lora(state, LORA_SHAPES, str(path)))


def read_calibration(path: Path) -> None:
    from ideogram4_quant.quant import Calibration

    found = Calibration.load(path)
    for candidate in found.candidates:
        found.ranking(candidate)


TARGETS: tuple[tuple[str, Open, Callable[[Path], object]], ...] = (
    ("gguf", raw("model.gguf"), read_everything),
    ("safetensors", raw("model.safetensors"), read_everything),
    ("header", framed("model.safetensors"), read_everything),
    ("lora", framed("lora.safetensors"), read_lora),
    ("index", beside("m.safetensors.index.json", "m.safetensors.index.json"), read_everything),
    ("config", beside("config.json", "encoder.safetensors"), read_everything),
    ("calibration", framed("calibration.safetensors"), read_calibration),
    ("cached", framed("cached.safetensors"), read_cached),
    ("choices", choices, read_choices),
    ("unfinished", unfinished, resume),
    ("prompts", raw("prompts.jsonl"), read_prompts),
)


def number(name: str) -> int:
    """The first byte that picks the target of that name."""
    return next(i for i, target in enumerate(TARGETS) if target[0] == name)


def run(data: bytes, folder: Path) -> tuple[str, str] | None:
    """None where an input is handled as promised; else (a key for its kind, what happened).

    folder: a folder of this process's own, best in memory.
    """
    if not data:
        return None
    name, build, read = TARGETS[data[0] % len(TARGETS)]
    peak, start = _peak(), time.thread_time()

    def attempt() -> None:
        try:
            read(build(data[1:], folder))
        except Ideogram4QuantError as error:
            _check_error(error)

    try:
        attempt()
        seconds, grown = time.thread_time() - start, (_peak() - peak) / 1024
        if seconds > SECONDS:
            seconds = cpu_seconds(attempt, SECONDS)
    except Exception as error:
        frames = [f for f in traceback.extract_tb(error.__traceback__) if "site-" not in f.filename]
        place = f"{Path(frames[-1].filename).name}:{frames[-1].name}"
        return f"{name}: {type(error).__name__} in {place}", traceback.format_exc()
    if seconds > SECONDS:
        return f"{name}: slow", f"{seconds:.2f} CPU seconds"
    if grown > MEGABYTES:
        return f"{name}: memory", f"{grown:.0f} MB more"
    return None


def _check_error(error: Ideogram4QuantError) -> None:
    assert error.file, f"no file in {error!r}"
    str(error).encode()  # can be printed


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def write_neighbours(folder: Path) -> None:
    """The good files that the payload of `beside` lies beside."""
    from ideogram4_quant.checkpoint import write_safetensors
    from ideogram4_quant.tests.fuzz import seeds

    write_safetensors(folder / "m-00001-of-00002.safetensors", seeds.transformer(0))
    write_safetensors(folder / "m-00002-of-00002.safetensors", seeds.transformer(1))
    write_safetensors(folder / "encoder.safetensors", seeds.encoder())


def split(path: Path) -> tuple[dict, bytes]:
    """The header of a safetensors file and its data."""
    content = path.read_bytes()
    (length,) = struct.unpack_from("<Q", content)
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def join(header: dict, data: bytes) -> bytes:
    """The payload of `framed` that makes a safetensors file of a header and data."""
    return json.dumps(header).encode() + b"\0" + data
