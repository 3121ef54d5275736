"""What a checkpoint loads, against the weights that its writer meant."""

import torch
from comfy_kitchen.tensor import QuantizedTensor

from ideogram4_quant.checkpoint import Checkpoint
from ideogram4_quant.tests.fixtures_storage import State


def check_weights(ck: Checkpoint, copy: str, truth: State, ulps: float = 0) -> dict:
    """Loaded in fp32 the weights are ``truth``, in bf16 their rounding; linears are quantized."""
    loaded = ck.load(copy, dtype=torch.float32)
    assert set(loaded) == set(truth)
    assert list(ck.shapes(copy)) == list(loaded)
    for name, tensor in loaded.items():
        assert tensor.shape == truth[name].shape == ck.shapes(copy)[name], name
        assert tensor.dtype == torch.float32
        dense = tensor.dequantize() if isinstance(tensor, QuantizedTensor) else tensor
        error = (dense - truth[name]).abs().max()
        assert error <= ulps * 2**-24 * truth[name].abs().max(), (name, float(error))
    half = ck.load(copy)
    for name, tensor in half.items():
        assert tensor.dtype == torch.bfloat16
        assert isinstance(tensor, QuantizedTensor) == isinstance(loaded[name], QuantizedTensor)
        if not isinstance(tensor, QuantizedTensor):
            assert torch.equal(tensor, loaded[name].bfloat16())
    return loaded


def quantized(loaded: State) -> set[str]:
    """The names of the weights that were loaded quantized."""
    return {name for name, tensor in loaded.items() if isinstance(tensor, QuantizedTensor)}
