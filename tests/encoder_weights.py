"""A small Qwen3-VL text encoder with random weights, and what open_encoder loads against them."""

import torch
from comfy_kitchen.tensor import QuantizedTensor
from transformers import Qwen3VLTextConfig, Qwen3VLTextModel

from ideogram4_quant.checkpoint import EncoderCheckpoint
from ideogram4_quant.tests import fixtures_files as files
from ideogram4_quant.tests.fixtures_storage import State

SIZES = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "intermediate_size": 96,
    "vocab_size": 160,
}
ROPE = {"rope_type": "default", "rope_theta": 1234567.0, "mrope_section": [6, 5, 5]}
CONFIG = {**SIZES, "rms_norm_eps": 1e-5, "rope_parameters": {**ROPE, "mrope_interleaved": True}}


def random_weights() -> State:
    """By transformers' own names and shapes; values that bf16 holds."""
    with torch.device("meta"):
        model = Qwen3VLTextModel(Qwen3VLTextConfig(**CONFIG))
    generator = torch.Generator().manual_seed(0)
    out = {}
    for name, tensor in model.state_dict().items():
        values = torch.randn(tensor.shape, generator=generator)
        scaled = 1 + 0.1 * values if "norm" in name else values / tensor.shape[-1] ** 0.5
        out[name] = scaled.bfloat16().float()
    return out


def check(ck: EncoderCheckpoint, truth: State, ulps: float = 0, quantized: bool = True) -> None:
    """Loaded in fp32 the weights are ``truth``, linears quantized or not; in bf16 all load too."""
    loaded = ck.load(dtype=torch.float32)
    assert set(loaded) == set(truth)
    assert list(loaded) == list(ck.shapes())
    for name, tensor in loaded.items():
        dense = tensor.dequantize() if isinstance(tensor, QuantizedTensor) else tensor
        assert isinstance(tensor, QuantizedTensor) == (quantized and files.is_linear(name))
        error = (dense - truth[name]).abs().max()
        assert error <= ulps * 2**-24 * truth[name].abs().max(), (name, float(error))
    half = ck.load()
    assert all(tensor.dtype == torch.bfloat16 for tensor in half.values())


def sizes_of(ck: EncoderCheckpoint) -> dict:
    return {key: ck.config[key] for key in SIZES}
