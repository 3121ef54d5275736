"""What this pack keeps or is given beside models: caches, unfinished files, pictures, prompts."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from PIL import Image

from ideogram4_quant.checkpoint import write_safetensors
from ideogram4_quant.engine.compare.cases import CompareError, read_cases
from ideogram4_quant.engine.compare.score import read_captions_file
from ideogram4_quant.engine.compare.store import Record, Store
from ideogram4_quant.errors import CheckpointError
from ideogram4_quant.files.partial import Partial, partial_path
from ideogram4_quant.nodes.headers import open_header
from ideogram4_quant.ops.tuning import choice_files
from ideogram4_quant.ops.tuning.choices import LINEAR, Key, Measurement, Table
from ideogram4_quant.tests.fuzz import seeds, targets
from ideogram4_quant.tests.hostile_files import DEEP


def test_a_header_of_a_file_that_is_gone(tmp_path: Path):
    path = tmp_path / "m.safetensors"
    write_safetensors(path, seeds.transformer())
    assert open_header(path) is open_header(path)
    path.unlink()
    with pytest.raises(CheckpointError, match="no such file"):
        open_header(path)


CPU = torch.device("cpu")
ENTRY = {"op": LINEAR, "n": 8, "k": 8, "tokens": 512, "dtype": "float32", "detail": ""}


@pytest.mark.parametrize(
    "entry",
    [
        {"seconds": {"int_mm": 10**400}},
        {"seconds": {"int_mm": 1}, "errors": {"int_mm": -(10**400)}},
        {"seconds": {"int_mm": 1}, "tokens": 10**400},  # would overflow inside a step
        {"seconds": {"int_mm": 1}, "n": 1 << 70},
        {"seconds": {"int_mm": True}, "detail": None},
    ],
    ids=lambda entry: str(entry)[:40],
)
def test_measurements_beyond_numbers_are_measured_again(tmp_path: Path, entry: dict):
    path = choice_files.file_for(tmp_path, CPU)
    path.write_text(json.dumps({"measurements": [{**ENTRY, "errors": {}, **entry}]}))
    assert len(choice_files.load(tmp_path, CPU)) == 0
    table = Table([Measurement(Key(**ENTRY), {"int_mm": 1.0})])
    choice_files.save(tmp_path, CPU, table)
    assert len(choice_files.load(tmp_path, CPU)) == 1


@pytest.mark.parametrize(
    "line",
    [
        *(b'{"part":"b","crc":Infinity}', b'{"part":"b","crc":1e999}', b"[" * 100_000),
        *(b'{"part":"b","crc":' + b"1" * 5000 + b"}", b'{"note":1}', b"7", b"[]", b"\xff"),
    ],
    ids=lambda line: repr(line[:24]),
)
def test_a_record_of_an_unfinished_file_ends_where_it_is_damaged(tmp_path: Path, line: bytes):
    path = partial_path(tmp_path / "out.bin")
    good = bytes(targets.UNFINISHED) + seeds.record()
    path.write_bytes(good + line + b"\n" + seeds.record())
    partial = Partial("fingerprint", resume=True)
    with open(path, "r+b", buffering=0) as file:
        partial.start(file, tmp_path / "out.bin", targets.UNFINISHED)
        partial.confirm({"first": (0, 8), "second": (8, 8)})
    assert partial.finished == {"first"}
    assert partial.notes == {"smoothed": [1, 2]}
    assert path.read_bytes() == good


def test_a_first_line_of_an_unfinished_file_that_is_too_deep(tmp_path: Path):
    path = partial_path(tmp_path / "out.bin")
    path.write_bytes(bytes(targets.UNFINISHED) + DEEP.encode() + b"\n")
    with (
        open(path, "r+b", buffering=0) as file,
        pytest.raises(CheckpointError, match="another source, or of other options"),
    ):
        Partial("fingerprint").start(file, tmp_path / "out.bin", targets.UNFINISHED)


@pytest.mark.parametrize("text", [DEEP, '{"seconds": 1' + "0" * 400 + ', "read": null}', "[]", "7"])
def test_a_record_of_a_picture_that_is_damaged(tmp_path: Path, text: str):
    store = Store(tmp_path)
    store.save("ab" * 32, Image.new("RGB", (8, 8)), Record(1.0, None), None)
    (record,) = tmp_path.rglob("*.json")
    record.write_text(text)
    with pytest.raises(CompareError, match="damaged record"):
        store.record("ab" * 32)


@pytest.mark.parametrize(
    "line",
    [
        *('{"prompt": "x", "seed": "nine"}', '{"prompt": "x", "seed": 1e999}', DEEP),
        *('{"prompt": "x", "width": null}', '{"prompt": "x", "height": -1}', "\udcff"),
        *('{"prompt": "x", "text": 7}', '{"prompt": 7}', "[]", '{"prompt": "x", "seed": true}'),
    ],
    ids=lambda line: repr(line[:32]),
)
def test_a_line_of_prompts_that_is_none(tmp_path: Path, line: str):
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(line.encode("utf-8", "surrogateescape"))
    with pytest.raises(CompareError) as caught:
        read_cases(path, seeds=(0,), width=64, height=64)
    assert caught.value.file == str(path)


def test_captions_and_prompts_may_be_deep_and_are_text_then(tmp_path: Path):
    path = tmp_path / "prompts.txt"
    path.write_text(DEEP)
    (case,) = read_cases(path, seeds=(0,), width=64, height=64)
    assert case.prompt == DEEP
    assert case.text is None
    with pytest.raises(CompareError, match="is no JSON"):
        read_captions_file(path)
    os.remove(path)
    with pytest.raises(CompareError, match=r"prompts\.txt"):
        read_captions_file(path)
