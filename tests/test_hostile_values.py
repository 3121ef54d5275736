"""Files whose headers are fine and whose values are not: small tensors, and JSON in them."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ideogram4_quant.checkpoint import open_checkpoint, write_safetensors
from ideogram4_quant.errors import CheckpointError
from ideogram4_quant.quant import Calibration, inspect_file
from ideogram4_quant.tests.fuzz import seeds, targets
from ideogram4_quant.tests.hostile_files import DEEP
from ideogram4_quant.tests.timing import cpu_seconds

NAN, INF = float("nan"), float("inf")
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
    assert cpu_seconds(lambda: refused(path), targets.SECONDS) < targets.SECONDS


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
    assert cpu_seconds(lambda: refused(path), targets.SECONDS) < targets.SECONDS


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
