"""Files of INT4 W4A4: comfy-kitchen decodes what we wrote, and w2 gets what it needs."""

from __future__ import annotations

import json

import comfy_kitchen.tensor as kitchen
import pytest
import torch
from safetensors import safe_open

from ideogram4_quant.checkpoint import open_checkpoint
from ideogram4_quant.ops.rotation import rotate
from ideogram4_quant.quant import (
    QuantOptions,
    TypeRule,
    inspect_file,
    quantize_checkpoint,
    verify_file,
)
from ideogram4_quant.quant.errors import QuantOptionError
from ideogram4_quant.quant.input_moments import InputMoments, block_sums
from ideogram4_quant.quant.int4_encoding import ConvrotInt4
from ideogram4_quant.tests.tensors import randn, relative

torch.set_num_threads(1)
LEVEL = "INT4 W4A4"


def kitchens(parts: dict, encoding: ConvrotInt4, shape: tuple[int, int]) -> torch.Tensor:
    """What comfy-kitchen decodes from the stored tensors."""
    said = json.loads(encoding.constants()["comfy_quant"].numpy().tobytes())
    assert said == {"format": "convrot_w4a4", "convrot_groupsize": encoding.rotation}
    layout = kitchen.TensorCoreConvRotW4A4Layout
    params = layout.Params(
        scale=parts["weight_scale"],
        orig_dtype=torch.float32,
        orig_shape=shape,
        convrot_groupsize=said["convrot_groupsize"],
    )
    return layout.dequantize(parts["weight"], params)


@pytest.mark.parametrize("rotation", [16, 256])
def test_comfy_kitchen_decodes_what_is_written(rotation):
    weight = randn(40, 768)
    weight[3] = 0
    weight[7] *= 1e-4
    weight[9, 11] = 80
    encoding = ConvrotInt4(rotation)
    parts = encoding.encode(weight)
    for name, (dtype, shape) in encoding.parts((40, 768)).items():
        assert (parts[name].dtype, tuple(parts[name].shape)) == (dtype, shape)
    assert relative(encoding.decode(parts), kitchens(parts, encoding, (40, 768))) < 1e-6
    own = kitchen.TensorCoreConvRotW4A4Layout.quantize(weight, convrot_groupsize=rotation)
    theirs = kitchen.TensorCoreConvRotW4A4Layout.dequantize(*own)
    usual = slice(10, None)
    found = relative(encoding.decode(parts)[usual], weight[usual])
    assert found < 0.9 * relative(theirs[usual], weight[usual])


def test_the_scale_of_a_row_is_about_the_best_there_is():
    """Against a thousand scales: no more than 1 % of the error is left."""
    weight = randn(6, 256)
    encoding = ConvrotInt4()
    values = rotate(weight, 256)
    found = (encoding.decode(encoding.encode(weight)) - weight).square().sum(1)
    scales = values.abs().amax(1, keepdim=True) / 7 * torch.linspace(0.2, 1.1, 1000)
    grid = (values[:, None] / scales[..., None]).round().clamp(-7, 7) * scales[..., None]
    assert (found <= 1.01 * (grid - values[:, None]).square().sum(2).amin(1)).all()


def test_feedback_lowers_the_outputs_error():
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(4096, 8, generator=generator) @ torch.randn(8, 512, generator=generator) * 3
    x = x + torch.randn(4096, 512, generator=generator)
    inputs = InputMoments(x.square().mean(0), torch.zeros(512, 0), block_sums(x) / 4096)
    weight = randn(64, 512)

    def lost(encoding):
        error = encoding.decode(encoding.encode(weight)) - weight
        return (x @ error.t()).square().sum()

    nearest = lost(ConvrotInt4())
    assert lost(ConvrotInt4().led_by(inputs, feedback=True)) < 0.3 * nearest
    assert lost(ConvrotInt4().led_by(inputs, feedback=False)) == nearest


@pytest.fixture(scope="module")
def file(pocket, tmp_path_factory):
    out = tmp_path_factory.mktemp("int4") / "m.safetensors"
    quantize_checkpoint(pocket.conditional_file, LEVEL, out, copy="conditional")
    return out


def test_a_file_is_read_and_described(pocket, file):
    found = open_checkpoint(file)
    assert (found.level, found.copies) == (LEVEL, ("conditional",))
    source = open_checkpoint(pocket.conditional_file).load("conditional")
    for name, weight in found.load("conditional").items():
        if name.startswith("layers.") and name.endswith(("w2.weight", "w1.weight", "qkv.weight")):
            fine = "w2" in name
            assert weight._params.label == ("W4A8 g16" if fine else "W4A4"), name
            error = relative(weight.dequantize().float(), source[name].float())
            assert error < (0.075 if fine else 0.15), name
    seen = inspect_file(file)
    kinds = {kind.level: kind for kind in seen.storage}
    assert {level: kind.linears for level, kind in kinds.items()} == {
        LEVEL: 20, "W4A8": 4, "BF16": 7,
    }  # fmt: skip
    blocks = [kinds[LEVEL], kinds["W4A8"]]
    assert 8 * sum(k.nbytes for k in blocks) / sum(k.weights for k in blocks) < 4.6
    assert "20 as INT4 W4A4, 4.1" in seen.table()
    assert "4 as W4A8, 4.5" in seen.table()
    types = {row.type for row in verify_file(file, pocket.conditional_file).tensors}
    assert types == {"W4A4", "W4A8 g16", "float32"}
    with safe_open(file, "pt") as opened:
        record = json.loads(opened.metadata()["quantization"])
    assert record["other_types"] == {"W4A8 g16": [f"layers.{i}.feed_forward.w2" for i in range(4)]}


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"container": "transformer-lab"}, "cannot say that a weight is rotated"),
        ({"smooth": {}}, "INT4 W4A4 container cannot carry smoothing"),
        ({"treatment": "auto"}, "treatment is for INT8"),
        ({"types": (TypeRule("layers.*", "Q8_0"),)}, "for GGUF levels"),
    ],
)
def test_what_the_container_cannot_hold_writes_nothing(pocket, options, match, tmp_path):
    out = tmp_path / "m.safetensors"
    with pytest.raises(QuantOptionError, match=match):
        quantize_checkpoint(pocket.conditional_file, LEVEL, out, options=QuantOptions(**options))
    assert not list(tmp_path.iterdir())
