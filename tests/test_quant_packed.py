"""Files of W4A8 and W6A8: comfy-kitchen decodes what we wrote, and they lose less than its own."""

from __future__ import annotations

import json

import comfy_kitchen.tensor as kitchen
import pytest
import torch
from safetensors.torch import load_file

from ideogram4_quant.checkpoint import open_checkpoint
from ideogram4_quant.ops.codes import Levels
from ideogram4_quant.ops.layouts import packed
from ideogram4_quant.ops.rotation import rotate
from ideogram4_quant.quant import QuantOptions, TypeRule, quantize_checkpoint
from ideogram4_quant.quant.errors import QuantOptionError
from ideogram4_quant.quant.input_moments import InputMoments, block_sums
from ideogram4_quant.quant.packed_encoding import CODEBOOK, PackedInt8
from ideogram4_quant.tests.tensors import randn, relative

torch.set_num_threads(1)
LEVELS = {"W4A8": 4, **({"W6A8": 6} if packed.SIX_BITS else {})}


def kitchens(parts: dict, encoding: PackedInt8) -> torch.Tensor:
    """What comfy-kitchen decodes from the stored tensors."""
    constants = encoding.constants()
    said = json.loads(constants["comfy_quant"].numpy().tobytes())
    assert said["format"] == "asym_w4a8_int8"
    return kitchen.dequantize_w4a8_int8_weight(
        parts["weight"],
        parts["weight_s_rel"],
        parts["weight_s_channel"],
        codebook=constants.get("weight_codebook"),
        group_size=said["group_size"],
        convrot_groupsize=said["convrot_groupsize"],
        output_dtype=torch.float32,
    )


@pytest.mark.parametrize("bits", LEVELS.values())
@pytest.mark.parametrize("group", [16, 32])
def test_comfy_kitchen_decodes_what_is_written(bits, group):
    weight = randn(40, 768)
    weight[3] = 0
    weight[5, 300:600] = 0
    weight[7] *= 1e-4
    weight[9, 11] = 80
    encoding = PackedInt8(bits, group)
    parts = encoding.encode(weight)
    for name, (dtype, shape) in encoding.parts((40, 768)).items():
        assert (parts[name].dtype, tuple(parts[name].shape)) == (dtype, shape)
    assert relative(encoding.decode(parts), kitchens(parts, encoding)) < 1e-6
    own = kitchen.AsymW4A8Int8Layout.quantize(weight, bits=bits, group_size=group)
    theirs = relative(kitchen.AsymW4A8Int8Layout.dequantize(*own), weight)
    assert relative(encoding.decode(parts), weight) < 1.001 * theirs


def test_the_codebook_is_the_one_that_the_hosts_kernel_has():
    from comfy_kitchen.tensor.w4a8_packed import default_w4a8_codebook

    assert torch.equal(torch.tensor(CODEBOOK), default_w4a8_codebook())


@pytest.mark.parametrize("bits", LEVELS.values())
def test_nearest_codes_are_the_nearest(bits):
    """By trying every code of a small weight."""
    encoding = PackedInt8(bits, 16, 16)
    weight = randn(6, 32)
    parts = encoding.encode(weight)
    grid = parts["weight_s_rel"].float().repeat_interleave(16, 1)
    table = torch.tensor(CODEBOOK) if bits == 4 else torch.arange(-31.0, 32.0)
    options = (table * grid[..., None]).round().clamp(-127, 127)
    options = options * parts["weight_s_channel"][:, None, None]
    values = rotate(weight, 16)
    least = (options - values[..., None]).abs().amin(2)
    found = rotate(encoding.decode(parts), 16)
    assert torch.allclose((found - values).abs(), least, atol=1e-6)


@pytest.mark.parametrize("bits", LEVELS.values())
def test_feedback_lowers_the_outputs_error(bits):
    generator = torch.Generator().manual_seed(3)
    mix = torch.randn(8, 512, generator=generator) * 3
    x = torch.randn(4096, 8, generator=generator) @ mix + torch.randn(
        4096, 512, generator=generator
    )
    c = x.t() @ x / len(x)
    energy, axes = torch.linalg.eigh(c)
    directions = axes[:, -16:] * (energy[-16:] - energy[:-16].mean()).clamp_min(0).sqrt()
    inputs = InputMoments(c.diagonal().clone(), directions)
    weight = randn(64, 512)

    def lost(encoding):
        error = encoding.decode(encoding.encode(weight)) - weight
        return (x @ error.t()).square().sum()

    nearest, fed = PackedInt8(bits), PackedInt8(bits).led_by(inputs, feedback=True)
    assert lost(fed) < 0.5 * lost(nearest)
    assert lost(PackedInt8(bits).led_by(inputs, feedback=False)) == lost(nearest)


@pytest.mark.parametrize("bits", LEVELS.values())
def test_scales_are_refitted_to_what_is_rounded(bits, monkeypatch):
    """With all moments known: nearer than the scales of the weight itself, and as stored."""
    generator = torch.Generator().manual_seed(3)
    mix = torch.randn(8, 512, generator=generator) * 3
    noise = torch.randn(4096, 512, generator=generator)
    x = torch.randn(4096, 8, generator=generator) @ mix + noise
    inputs = InputMoments(x.square().mean(0), torch.zeros(512, 0), block_sums(x) / 4096)
    weight = randn(64, 512)
    weight[3] = 0
    led = PackedInt8(bits).led_by(inputs, feedback=True)
    assert led.feedback.run == led.group

    def lost():
        parts = led.encode(weight)
        assert relative(led.decode(parts), kitchens(parts, led)) < 1e-6
        error = led.decode(parts) - weight
        assert not error[3].any()
        return (x @ error.t()).square().sum()

    refitted = lost()
    monkeypatch.setattr(PackedInt8, "_codes", _static_codes)
    assert refitted < 0.97 * lost()


def _static_codes(self, values, relative, channel):
    """What ``PackedInt8._codes`` would do with the scales that it is given."""
    levels = self._levels(relative)
    codes, better = self.feedback.round(values, levels.grid * channel[:, None], None, levels)
    nearest = self._to_grid(values, levels, channel)
    return torch.where(better[:, None], codes, nearest), relative


def test_levels_on_a_grid_are_what_a_reader_takes():
    """Against rounding by hand: codes, levels, a group of zeros and one beyond the limit."""
    table = torch.tensor([-1.0, -0.2, 0.3, 1.0])
    grid = torch.tensor([[3.0, 0.0], [200.0, 1.0]])  # [N, G]
    levels = Levels((0, 3), table, grid).on(torch.device("cpu"))
    values = torch.tensor([[0.31, -0.9], [0.1, 2.0]]).expand(2, 2, 2).clone()  # [2, B, N]
    codes = levels.round_(values, torch.tensor([0, 1]))
    assert codes[0].tolist() == [[2, 0], [2, 3]]
    # round(.3 * 3) / 3, round(-200) clamped / 200, 0 / 0 -> 0, round(1) / 1
    assert torch.allclose(values[0], torch.tensor([[1 / 3, -127 / 200], [0.0, 1.0]]))


@pytest.mark.parametrize("level", LEVELS)
def test_a_file_is_read_by_this_pack(pocket, level, tmp_path):
    out = tmp_path / "m.safetensors"
    quantize_checkpoint(pocket.conditional_file, level, out, copy="conditional")
    found = open_checkpoint(out)
    assert found.level == level
    assert found.copies == ("conditional",)
    source = open_checkpoint(pocket.conditional_file).load("conditional")
    stored, name = load_file(out), "layers.1.feed_forward.w2.weight"
    weight = found.load("conditional")[name]
    assert stored[name].dtype == torch.int8
    assert weight._params.bits == LEVELS[level]
    assert (
        relative(weight.dequantize().float(), source[name].float())
        < (0.075, 0.024)[level == "W6A8"]
    )


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"container": "transformer-lab"}, "cannot say that a weight is rotated"),
        ({"smooth": {}}, "W4A8 container cannot carry smoothing"),
        ({"treatment": "auto"}, "treatment is for INT8"),
        ({"types": (TypeRule("layers.*", "Q8_0"),)}, "for GGUF levels"),
    ],
)
def test_options_that_the_container_has_not(pocket, options, match, tmp_path):
    with pytest.raises(QuantOptionError, match=match):
        quantize_checkpoint(
            pocket.conditional_file,
            "W4A8",
            tmp_path / "m.safetensors",
            options=QuantOptions(**options),
        )
    assert not list(tmp_path.iterdir())
