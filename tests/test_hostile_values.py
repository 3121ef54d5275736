"""Files whose headers are fine and whose values are not: small tensors, JSON in them, caches."""

from __future__ import annotations

import json
import os
import struct
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from ideogram4_quant.checkpoint import files as checkpoint_files
from ideogram4_quant.checkpoint import open_checkpoint, open_encoder, write_safetensors
from ideogram4_quant.checkpoint.container import open_container
from ideogram4_quant.engine.compare.cases import CompareError, read_cases
from ideogram4_quant.engine.compare.score import read_captions_file
from ideogram4_quant.engine.compare.store import Record, Store
from ideogram4_quant.nodes.headers import open_header
from ideogram4_quant.nodes.lora_files import parse_lora, read_lora
from ideogram4_quant.ops import choice_files
from ideogram4_quant.ops.choices import LINEAR, Key, Measurement, Table
from ideogram4_quant.ops.errors import CheckpointError, CorruptFileError
from ideogram4_quant.ops.partial import Partial, partial_path
from ideogram4_quant.quant import Calibration, inspect_file
from ideogram4_quant.tests import hostile_files as hostile
from ideogram4_quant.tests.fuzz import seeds, targets

NAN, INF = float("nan"), float("inf")
DEEP = "[" * 100_000
LINEAR_NAME = "layers.0.attention.o"


def load(path: Path) -> dict[str, Tensor]:
    """The conditional copy, dequantized."""
    tensors = open_checkpoint(path).load("conditional")
    return {n: t.dequantize() if hasattr(t, "dequantize") else t for n, t in tensors.items()}


def refused(path: Path, tensor: str | None = None) -> CheckpointError:
    with pytest.raises(CheckpointError) as caught:
        load(path)
    assert caught.value.file == str(path)
    assert tensor is None or caught.value.tensor == tensor
    return caught.value


# --- what was folded ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("site", "kind", "value"),
    [
        *((LINEAR_NAME, "smooth", torch.ones(size)) for size in (0, 1, 5, 48)),
        ("layers.0.feed_forward.w2", "smooth", torch.ones(17)),
        ("llm_cond_proj", "smooth", torch.ones(3)),
        *((LINEAR_NAME, "smooth", torch.full((16,), v)) for v in (NAN, INF, 0.0, -1.0, 1e-45)),
        (LINEAR_NAME, "smooth", torch.ones(16).double()),
        (LINEAR_NAME, "smooth", torch.ones(16, 1)),
        *((LINEAR_NAME, "rotation", torch.tensor([v]).int()) for v in (0, -4, 5, 256, 2**31 - 1)),
        (LINEAR_NAME, "rotation", torch.tensor([4])),
        (LINEAR_NAME, "rotation", torch.tensor([4, 4]).int()),
        ("layers.0.feed_forward.w1", "smooth", torch.ones(16)),  # and w3, on the same input, not
        ("layers.7.attention.o", "smooth", torch.ones(16)),
        ("layers.0.adaln_modulation", "smooth", torch.ones(8)),
    ],
)
def test_a_record_of_folding_that_does_not_fit(tmp_path: Path, site: str, kind: str, value: Tensor):
    path = tmp_path / "m.safetensors"
    state = seeds.folded() | {f"fold.{site}.{kind}": value}
    write_safetensors(path, state, {"lora_basis": "folded"})
    assert refused(path).tensor


def test_sixteen_thousand_records_of_folding_take_no_second(tmp_path: Path):
    path = tmp_path / "m.safetensors"
    state = seeds.transformer()
    one = torch.ones(1)
    for i in range(1, 4000):
        for name in ("attention.o", "feed_forward.w2"):
            state[f"layers.{i}.{name}.weight"] = state[f"fold.layers.{i}.{name}.smooth"] = one
    write_safetensors(path, state)
    start = time.process_time()
    refused(path)
    assert time.process_time() - start < targets.SECONDS


# --- what says how a weight is quantized ----------------------------------------------------------


def int8(path: Path, change: dict[str, Tensor], metadata: dict[str, str] | None = None) -> Path:
    state = seeds.int8() | {f"{LINEAR_NAME}.{suffix}": t for suffix, t in change.items()}
    write_safetensors(path, {k: t for k, t in state.items() if t is not None}, metadata)
    return path


@pytest.mark.parametrize(
    "group",
    [0, -1, -16, 1, 2, 3, 8, 256, 1 << 40, 10**400, 1.5, NAN, INF, "16", None, [16], {}, True],
    ids=lambda value: str(value)[:12],
)
@pytest.mark.parametrize("place", ["tensor", "metadata"])
def test_rotation_groups_that_are_none(tmp_path: Path, group: object, place: str):
    conf = {"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": group}
    tensor = seeds.text(conf) if place == "tensor" else None
    metadata = {"_quantization_metadata": json.dumps({"layers": {LINEAR_NAME: conf}})}
    path = int8(tmp_path / "m.safetensors", {"comfy_quant": tensor}, metadata)
    assert "rotation group" in str(refused(path, f"{LINEAR_NAME}.weight"))


@pytest.mark.parametrize(
    "text",
    [
        *(b"", b"1", b"null", b"[]", b"\xff\xff", b"{", b"[" * 4000, b'{"a":' * 800),
        *(b'{"format":' + b"1" * 4000 + b"}", b'{"format":' + b"1" * 5000 + b"}"),
        *(b'{"format":"\\ud800"}', b'{"format":"\\u001b[2J"}', b'{"format":{}}', b'{"format":NaN}'),
        b'{"format":"int8_tensorwise","x":"' + b"x" * 5000 + b'"}',
    ],
    ids=lambda text: repr(text[:12]),
)
def test_descriptions_that_are_none(tmp_path: Path, text: bytes):
    conf = torch.tensor(list(text), dtype=torch.uint8)
    error = refused(
        int8(tmp_path / "m.safetensors", {"comfy_quant": conf}), f"{LINEAR_NAME}.weight"
    )
    assert str(error).isprintable()


@pytest.mark.parametrize("text", ["[]", "{}", '{"layers":[]}', '{"layers":{"x":1}}', DEEP])
def test_descriptions_in_metadata_that_are_none(tmp_path: Path, text: str):
    refused(int8(tmp_path / "m.safetensors", {}, {"_quantization_metadata": text}))


@pytest.mark.parametrize(
    "change",
    [
        *({"weight_scale": torch.full((16, 1), value)} for value in (NAN, INF)),
        *({"weight_scale": torch.ones(shape)} for shape in ((5, 1), (0,), (16, 16), (1 << 16,))),
        *({"weight_scale": torch.ones(16, 1, dtype=d)} for d in (torch.int32, torch.float64)),
        {"weight_scale": None},
        *({"smooth": torch.full((16,), value)} for value in (NAN, INF, 0.0, 1e-45)),
        {"smooth": torch.ones(3)},
        *({"pre_quant_scale": torch.full((16,), value)} for value in (NAN, INF, 0.0, 1e-45)),
    ],
    ids=lambda change: str(change).replace("\n", "")[:40],
)
def test_scales_and_smoothing_that_are_none(tmp_path: Path, change: dict[str, Tensor]):
    refused(int8(tmp_path / "m.safetensors", change), f"{LINEAR_NAME}.weight")


def test_thousands_of_long_descriptions_take_no_second(tmp_path: Path):
    """Each is a tensor of its own, so that no bound on the header holds for all of them."""
    conf = seeds.text({"format": "int8_tensorwise", "x": "x" * 4000})
    state = seeds.transformer()
    for i in range(1, 1000):
        for name in ("attention.qkv", "attention.o", "feed_forward.w1"):
            state[f"layers.{i}.{name}.weight"] = torch.zeros(1, 1, dtype=torch.int8)
            state[f"layers.{i}.{name}.comfy_quant"] = conf
    path = tmp_path / "m.safetensors"
    write_safetensors(path, state)
    start = time.process_time()
    refused(path)
    assert time.process_time() - start < targets.SECONDS


@pytest.mark.parametrize("number", ["1" * 5000, "1" * 4000, "1e400", "-1", "NaN", "true", "[[1]]"])
@pytest.mark.parametrize("key", ["num_layers", "rope_theta", "norm_eps", "attention_head_dim"])
def test_numbers_of_a_config_that_are_none(tmp_path: Path, key: str, number: str):
    path = tmp_path / "m.safetensors"
    write_safetensors(path, seeds.transformer(), {"config": f'{{"{key}": {number}}}'})
    refused(path)


# --- calibration ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "text"),
    [
        *(("times", f"[0, {number}, 2]") for number in ("1" * 400, "1e999", "NaN", "1" * 5000)),
        ("times", "[2, 1, 0]"),
        ("times", DEEP),
        ("provenance", '[{"models": {}, "versions": {}, "prompts_sha256": "", "seeds": [1e999]}]'),
        ("candidates", '["int8"]], "x": [['),
    ],
    ids=lambda value: value[:20],
)
def test_numbers_of_a_calibration_that_are_none(tmp_path: Path, key: str, text: str):
    path = seeds.calibration(tmp_path / "calibration.safetensors")
    header, data = targets.split(path)
    header["__metadata__"][key] = text
    path.write_bytes(_file(header, data))
    with pytest.raises(CheckpointError) as caught:
        Calibration.load(path)
    assert caught.value.file == str(path)


@pytest.mark.parametrize("layer", ["²", "9" * 900, "٣", "-1", ""])
def test_names_of_layers_that_are_no_numbers(tmp_path: Path, layer: str):
    path = seeds.calibration(tmp_path / "calibration.safetensors")
    header, data = targets.split(path)
    renamed = {name.replace(".0.", f".{layer}."): entry for name, entry in header.items()}
    path.write_bytes(_file(renamed, data))
    assert len(Calibration.load(path).layers) == 2  # no model has them, and none is looked up


def _file(header: dict, data: bytes) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


# --- sizes that are no lie ------------------------------------------------------------------------


def test_a_tensor_beyond_memory_is_told(tmp_path: Path, monkeypatch):
    """A file with a hole may be of any size."""
    path = tmp_path / "m.safetensors"
    write_safetensors(path, seeds.transformer())

    def fail(*_, **__):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    opened = open_checkpoint(path)
    monkeypatch.setattr(checkpoint_files.torch, "empty", fail)
    with pytest.raises(CheckpointError, match=r"m\.safetensors: .*does not fit into memory"):
        opened.load("conditional")


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("diffusion_model." * 240_000 + "x.alpha", 1),  # whose prefixes were taken off one by one
        ("x" * 1025, 1),
        *(("." * 240, 16_000), ("transformer_blocks.1" * 50, 3900), ("lora_unet_" * 50, 7000)),
    ],
    ids=["4 MB", "1025", "dots", "blocks", "prefixes"],
)
def test_names_take_no_second(tmp_path: Path, name: str, count: int):
    path = tmp_path / "m.safetensors"
    entry = {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}
    names = [name] if count == 1 else [f"{i}{name}.alpha" for i in range(count)]
    path.write_bytes(_file(dict.fromkeys(names, entry), b""))
    shapes = {"layers.0.attention.qkv": (48, 16)}
    for load in (open_checkpoint, open_encoder, lambda p: parse_lora(read_lora(p), shapes, str(p))):
        start = time.process_time()
        with pytest.raises(CheckpointError) as caught:
            load(path)
        assert time.process_time() - start < targets.SECONDS
        assert caught.value.file == str(path)
        assert count > 1 or caught.value.tensor == name


def test_a_name_in_a_gguf_file_has_a_length(tmp_path: Path):
    path = tmp_path / "m.gguf"
    path.write_bytes(hostile.gguf([hostile.info(b"x" * 1025)]))
    with pytest.raises(CorruptFileError, match="a name too long for a tensor"):
        open_container(path)
    path.write_bytes(hostile.gguf([hostile.info(b"x" * 1024)]))
    assert len(open_container(path).tensors) == 1


@pytest.mark.parametrize("name", ["m-00001-of-99999.safetensors", "m.safetensors.index.json"])
def test_more_shards_than_any_model_has(tmp_path: Path, name: str):
    path = tmp_path / name
    index = {"weight_map": {str(i): f"{i}.safetensors" for i in range(100_000)}}
    path.write_text(json.dumps(index))
    start = time.process_time()
    with pytest.raises(CorruptFileError, match="too many shards"):
        open_container(path)
    assert time.process_time() - start < targets.SECONDS


@pytest.mark.parametrize("much", ["tensors", "metadata"])
def test_shards_are_bounded_together(tmp_path: Path, much: str):
    entry = {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}
    for i in range(1, 41):
        header = {f"{i}.{j}": entry for j in range(1000)}
        if much == "metadata":
            header = {f"{i}": entry, "__metadata__": {"key": "x" * 1_000_000}}
        (tmp_path / f"m-{i:05d}-of-00040.safetensors").write_bytes(_file(header, b""))
    start = time.process_time()
    with pytest.raises(CorruptFileError, match="the shards together hold too m"):
        open_container(tmp_path / "m-00001-of-00040.safetensors")
    assert time.process_time() - start < targets.SECONDS


@pytest.mark.parametrize(
    "name", ["m-00001-of-00000", "m-00003-of-00002", "m-٠٠٠٠١-of-٠٠٠٠٢", "m-00000-of-00001"]
)
def test_names_that_only_look_like_shards_are_single_files(tmp_path: Path, name: str):
    path = tmp_path / f"{name}.safetensors"
    path.write_bytes(hostile.safetensors(hostile._entry()))
    assert open_container(path).files[0].path == path


def test_a_header_of_a_file_that_is_gone(tmp_path: Path):
    path = tmp_path / "m.safetensors"
    write_safetensors(path, seeds.transformer())
    assert open_header(path) is open_header(path)
    path.unlink()
    with pytest.raises(CheckpointError, match="no such file"):
        open_header(path)


# --- caches and records of this pack --------------------------------------------------------------

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


# --- what is shown --------------------------------------------------------------------------------


def test_what_a_stranger_wrote_does_not_steer_a_terminal(tmp_path: Path):
    """Nor fill a report: metadata are shown short, and without control characters."""
    path = tmp_path / "m.safetensors"
    hostile_text = "\x1b[2J\x07 cond " + "x" * 100_000
    metadata = {"model_type": hostile_text, "\x1b]0;title\x07": "y", "k" * 50_000: "z"}
    write_safetensors(path, seeds.transformer(), metadata)
    table = inspect_file(path).table()
    assert all(line.isprintable() for line in table.splitlines())
    assert len(table) < 5000
    assert r"\x1b[2J\x07" in table
    assert inspect_file(path).copies == ("conditional",)
