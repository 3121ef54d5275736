"""Int8 codes do not depend on the dtype that holds a weight; files of which they did are named."""

from __future__ import annotations

import json

import pytest
import torch
from comfy_kitchen.tensor import QuantizedTensor
from safetensors.torch import load_file

from ideogram4_quant.ops.layouts import Int8Layout
from ideogram4_quant.quant import inspect_file, quantize_checkpoint
from ideogram4_quant.tests import quant_model as model

torch.set_num_threads(1)


def foreign(path, convert, rotated):
    """A native file as comfy-kitchen's own quantizer makes it of ``convert(bf16 weight)``."""
    tensors = {}
    for name, value in model.weights().items():
        module = name.removesuffix(".weight")
        if module not in model.linear_names():
            tensors[name] = value
            continue
        options = {"per_channel": True, "convrot": rotated}
        made = QuantizedTensor.from_float(convert(value), "TensorWiseINT8Layout", **options)
        stated = {"format": "int8_tensorwise"}
        stated |= {"convrot": True, "convrot_groupsize": 256} if rotated else {}
        tensors[name] = made._qdata
        tensors[f"{module}.weight_scale"] = made._params.scale.reshape(-1, 1)
        text = json.dumps(stated).encode()
        tensors[f"{module}.comfy_quant"] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    return model.write(path, tensors)


@pytest.mark.parametrize("rotated", [False, True])
def test_a_file_divided_in_bf16_is_named_with_what_it_lost(tmp_path, rotated):
    path = foreign(tmp_path / "theirs.safetensors", lambda w: w, rotated)
    found = inspect_file(path)
    peaks = found.bf16_division
    assert peaks is not None
    stored = load_file(path)
    wanted = [stored[f"{name}.weight"].int().abs().amax(1) for name in peaks.linears]
    assert peaks.low == sum(int((of == 126).sum()) for of in wanted) > 0
    assert peaks.rows == sum(map(len, wanted))
    assert "end at code 126" in found.table()
    assert "gains about 0.5 dB" in found.table()
    assert found.to_dict()["bf16_division"]["low"] == peaks.low


@pytest.mark.parametrize("rotated", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_other_dtypes_leave_no_such_row(tmp_path, dtype, rotated):
    if rotated and dtype == torch.float16:
        return  # rotated in float16 too: its rows end where they may
    path = foreign(tmp_path / "theirs.safetensors", lambda w: w.to(dtype), rotated)
    assert inspect_file(path).bf16_division is None


@pytest.mark.parametrize("level", ["INT8 W8A8", "INT8 W8A8 rotated"])
def test_our_files_are_made_in_float32(tmp_path, level):
    """Of bf16 weights: the codes that comfy-kitchen makes of their exact float32 values."""
    source = model.write(tmp_path / "source.safetensors", model.weights())
    quantize_checkpoint(source, level, tmp_path / "ours.safetensors")
    rotated = level.endswith("rotated")
    exact = foreign(tmp_path / "exact.safetensors", lambda w: w.float(), rotated)
    ours, theirs = load_file(tmp_path / "ours.safetensors"), load_file(exact)
    for name in model.linear_names():
        a, b = ours[f"{name}.weight"], theirs[f"{name}.weight"]
        # a rotation's sums round in another order: a code in a thousand, never in a row's peak
        assert float((a != b).float().mean()) < (1e-3 if rotated else 1e-5)
    assert inspect_file(tmp_path / "ours.safetensors").bf16_division is None


@pytest.mark.parametrize("rotation", [None, 256])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_baked_lora_is_quantized_in_float32(dtype, rotation):
    """The host hands ``quantize`` a weight in its own dtype: its codes are those of float32."""
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(96, 512, generator=generator).to(dtype)
    options = {"rotation": rotation}
    narrow = QuantizedTensor.from_float(weight, Int8Layout.NAME, **options)
    wide = QuantizedTensor.from_float(weight.float(), Int8Layout.NAME, **options)
    assert torch.equal(narrow._qdata, wide._qdata)
    assert torch.equal(narrow._params.scale, wide._params.scale)
    assert bool((narrow._qdata.int().abs().amax(1) == 127).all())
    baked = narrow.clone()
    baked += weight  # as a patch in place does
    assert bool((baked._qdata.int().abs().amax(1) == 127).all())


def test_codes_that_were_chosen_are_not_taken_for_it(tmp_path):
    """Error feedback moves codes too; a row whose peak is lower was not just divided."""
    path = foreign(tmp_path / "theirs.safetensors", lambda w: w, False)
    tensors = load_file(path)
    assert inspect_file(path).bf16_division is not None
    said = {"quantization": json.dumps({"level": "INT8 W8A8", "rounding": "feedback"})}
    chosen = model.write(tmp_path / "chosen.safetensors", tensors, metadata=said)
    assert inspect_file(chosen).bf16_division is None
    name = f"{inspect_file(path).bf16_division.linears[0]}.weight"
    tensors[name][0] = tensors[name][0].clamp(-125, 125)
    lower = model.write(tmp_path / "lower.safetensors", tensors)
    assert inspect_file(lower).bf16_division is None
