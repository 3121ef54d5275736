"""Every level in the engine against diffusers' model with the level's dequantized weights."""

import json

import pytest
import torch
from comfy_kitchen.tensor import QuantizedTensor
from safetensors.torch import save_file

from ideogram4_quant.checkpoint import open_checkpoint
from ideogram4_quant.engine.loading import open_pair
from ideogram4_quant.engine.transformer import load_transformer, prepare, velocity
from ideogram4_quant.ops import layouts
from ideogram4_quant.ops.linear import LinearOptions
from ideogram4_quant.quant import RECIPES, QuantOptions, quantize_checkpoint
from ideogram4_quant.tests.engine_oracle import Stored, reference_velocity
from ideogram4_quant.tests.tensors import relative
from ideogram4_quant.tests.tiny_model import (
    CONFIG,
    canonical_state,
    diffusers_state,
    random_transformer,
)

ONE_LAYER = CONFIG | {"num_layers": 1}
ROUND_OFF = 3e-6
ACTIVATIONS = 0.02  # int8 activations, rounded a token at a time


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """bf16 files of both copies of a model with one layer."""
    folder = tmp_path_factory.mktemp("source")
    files = []
    for seed, kind in enumerate(("ideogram4_cond", "ideogram4_uncond")):
        metadata = {"model_type": kind, "config": json.dumps(ONE_LAYER)}
        files.append(folder / f"{kind}.safetensors")
        save_file(canonical_state(random_transformer(seed, ONE_LAYER)), files[-1], metadata)
    return files


def inputs():
    torch.manual_seed(9)
    return torch.randn(1, 32, 128), torch.randn(1, 11, 832)


def error_against_dequantized(checkpoint, options=None, copy="conditional") -> float:
    """Relative error of the engine's velocity to diffusers' with dequantized weights."""
    state = dict(checkpoint.stream(copy, dtype=torch.float32))
    packed = [name for name, t in state.items() if isinstance(t, QuantizedTensor)]
    assert len([name for name in packed if name.startswith("layers.")]) >= 5
    for name in packed:
        state[name] = state[name].dequantize()
    reference = random_transformer(0, ONE_LAYER)
    reference.load_state_dict(diffusers_state(state))
    ours = load_transformer(checkpoint, copy, device="cpu", options=options)
    x, features = inputs()
    if copy == "unconditional":
        features = None
    wanted = reference_velocity(reference, x, 0.6, features, 4, 8)
    return relative(velocity(ours, x, 0.6, prepare(ours, 4, 8, features)), wanted)


@pytest.mark.parametrize("level", [r.level for r in RECIPES.values() if r.file_format == "gguf"])
def test_gguf_levels(source, tmp_path, level):
    """Dense: exact to round-off. Through int8: off by the activations' rounding, and not exact."""
    quantize_checkpoint(source[0], level, tmp_path / "m.gguf")
    checkpoint = open_checkpoint(tmp_path / "m.gguf")
    dense = LinearOptions(gguf_compute="dense")
    assert error_against_dequantized(checkpoint, dense) < ROUND_OFF
    through_int8 = error_against_dequantized(checkpoint, LinearOptions(gguf_compute="w8a8"))
    assert 1e-4 < through_int8 < ACTIVATIONS


@pytest.mark.parametrize("level", [r.level for r in RECIPES.values() if r.weight_type == "INT8"])
def test_int8_levels(source, tmp_path, level):
    quantize_checkpoint(source[0], level, tmp_path / "m.safetensors")
    checkpoint = open_checkpoint(tmp_path / "m.safetensors")
    assert 1e-4 < error_against_dequantized(checkpoint) < ACTIVATIONS


def test_fp8_is_exact_to_round_off():
    state = canonical_state(random_transformer(0, ONE_LAYER))
    for name, weight in state.items():
        if name.startswith("layers.") and weight.ndim == 2:
            scale = weight.float().abs().amax(1) / 448
            data = (weight.float() / scale[:, None]).to(torch.float8_e4m3fn)
            state[name] = layouts.fp8_tensor(data, scale, dtype=torch.float32)
    assert error_against_dequantized(Stored(state, ONE_LAYER)) < ROUND_OFF


def test_one_file_with_linears_only_and_its_bases(source, tmp_path):
    """Transformer Lab's layout holds both copies' linears; norms come from the bf16 files."""
    level, file = "INT8 W8A8", tmp_path / "both.safetensors"
    options = QuantOptions(container="transformer-lab")
    quantize_checkpoint(source[0], level, file, pair=source[1], options=options)
    pair = open_pair(file, base=source)
    assert pair[0] is pair[1]
    for copy in ("conditional", "unconditional"):
        assert 1e-4 < error_against_dequantized(pair[0], copy=copy) < ACTIVATIONS
