"""Every naming of a LoRA on every layout: beside a fused qkv, and patched into its row slices."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from comfy_kitchen.tensor import QuantizedTensor

from ideogram4_quant.checkpoint.loras import parse_lora
from ideogram4_quant.ops import layouts
from ideogram4_quant.ops.fold import Fold
from ideogram4_quant.ops.layouts.packed import SIX_BITS
from ideogram4_quant.ops.linear import linear
from ideogram4_quant.tests.tensors import randn, relative

torch.set_num_threads(1)
K, RANK = 256, 4
N = 3 * K
QKV = "layers.7.attention.qkv"
INT8, GGUF, FP8, NF4 = (f"Ideogram4Quant{name}" for name in ("Int8", "GGUF", "FP8", "NF4"))


def factors(seed):
    return 2 ** (randn(K, seed=seed) / 4)  # mild: here they serve nothing


FOLD = Fold(factors(1), None, torch.cat((torch.ones(2 * K), factors(2))))
TURNED = Fold(FOLD.smooth, None, FOLD.rows, 64, 2 * K)

# name: layout, its options, what was folded, the largest error of a linear over a gaussian weight
KINDS = {
    "bf16": (None, {}, None, 0.004),
    "int8": (INT8, {}, None, 0.015),
    "int8 rotated": (INT8, {"rotation": 256}, None, 0.015),
    "int8 smooth": (INT8, {"smooth": FOLD.smooth}, None, 0.02),
    "int8 folded": (INT8, {}, TURNED, 0.025),
    "Q8_0": (GGUF, {"qtype": "Q8_0"}, None, 0.015),
    "Q4_K": (GGUF, {"qtype": "Q4_K"}, None, 0.1),
    "IQ4_XS": (GGUF, {"qtype": "IQ4_XS"}, None, 0.1),
    "MXFP4": (GGUF, {"qtype": "MXFP4"}, None, 0.14),
    "Q2_K": (GGUF, {"qtype": "Q2_K"}, None, 0.3),
    "Q4_K folded": (GGUF, {"qtype": "Q4_K"}, FOLD, 0.13),
    "fp8": (FP8, {}, None, 0.04),
    "nf4": (NF4, {}, None, 0.12),
    "w4a8": ("Ideogram4QuantW4A8", {}, None, 0.1),
    "w6a8": ("Ideogram4QuantW4A8", {"bits": 6}, None, 0.035),
    "w4a4": ("Ideogram4QuantW4A4", {}, None, 0.22),
    "nvfp4": ("Ideogram4QuantNVFP4", {}, None, 0.13),
    "mxfp8": ("Ideogram4QuantMXFP8", {}, None, 0.04),
    "awq": ("Ideogram4QuantAWQ", {}, None, 0.13),
    "SDNQ uint4": (GGUF, {"qtype": "Q4_1"}, Fold(rotation=128), 0.11),
}
if not SIX_BITS:
    del KINDS["w6a8"]  # comfy-kitchen cannot make it

FLOAT_SLICES = ("bf16", "nvfp4", "mxfp8")  # rows share tiles of scales: a slice is decoded


def make(kind, weight):
    layout, options, fold, _ = KINDS[kind]
    if layout is None:
        return weight.bfloat16()
    stored = weight if fold is None else fold.fold(weight)
    quantized = QuantizedTensor.from_float(stored, layout, **options)
    return quantized if fold is None else layouts.folded_tensor(quantized, fold)


def thirds():
    """The halves of q, k and v, each trained apart."""
    return {
        part: (0.1 * randn(RANK, K, seed=10 + i), 0.3 * randn(K, RANK, seed=20 + i))
        for i, part in enumerate(("to_q", "to_k", "to_v"))
    }


def fused(prefix, down, up):
    """One pair of rank 3 r for the fused linear: the same update as that of the thirds."""
    parts = thirds().values()
    joined_up = torch.block_diag(*(up for _, up in parts))
    return {
        f"{prefix}{QKV}.{down}": torch.cat([down for down, _ in parts]),
        f"{prefix}{QKV}.{up}": joined_up,
    }


def split(prefix, down, up, alpha=None, separator="."):
    stem = QKV.removesuffix("qkv").replace(".", separator)
    state = {}
    for part, (first, second) in thirds().items():
        state[f"{prefix}{stem}{part}.{down}"] = first
        state[f"{prefix}{stem}{part}.{up}"] = second if alpha is None else second * RANK / alpha
        if alpha is not None:
            state[f"{prefix}{stem}{part}.alpha"] = torch.tensor(float(alpha))
    return state


PEFT, KOHYA = ("lora_A.weight", "lora_B.weight"), ("lora_down.weight", "lora_up.weight")
NAMINGS = {
    "ai-toolkit": fused("diffusion_model.", *PEFT),
    "of a copy": fused("conditional_transformer.", *PEFT),
    "diffusers": split("transformer.", *PEFT),
    "diffusers, older": split("transformer.", "lora.down.weight", "lora.up.weight"),
    "OneTrainer": split("transformer.", *KOHYA, alpha=2),
    "kohya": split("lora_unet_", *KOHYA, alpha=1, separator="_"),
}


def update_of(naming):
    found = parse_lora(NAMINGS[naming], {QKV: (N, K)}, naming)
    assert found.unknown == []
    return found.for_copy("conditional", "as in the file")[QKV]


def delta():
    return torch.cat([up @ down for down, up in thirds().values()])


@pytest.mark.parametrize("naming", NAMINGS)
def test_every_naming_is_the_same_update(naming):
    update = update_of(naming)
    assert relative(update.up @ update.down, delta()) < 1e-6
    assert update.rank == 3 * RANK


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("naming", NAMINGS)
def test_beside_a_fused_weight(kind, naming):
    weight, x, update = randn(N, K) / K**0.5, randn(7, K, seed=3), update_of(naming)
    with torch.inference_mode():
        y = linear(x, make(kind, weight)) + x @ update.down.T @ update.up.T
    assert relative(x @ delta().T, x @ weight.T) > 0.3  # the update does something
    assert relative(y, x @ (weight + delta()).T) < KINDS[kind][3]


@pytest.mark.parametrize("kind", KINDS)
def test_patched_into_row_slices(kind):
    """As a host does that maps to_q, to_k and to_v to narrowed views of the fused weight."""
    weight, x = randn(N, K) / K**0.5, randn(7, K, seed=3)
    outputs = []
    with torch.inference_mode():
        whole = make(kind, weight)
        for i, (down, up) in enumerate(thirds().values()):
            part = whole.narrow(0, i * K, K)
            if kind in FLOAT_SLICES:
                patched = (part.float() + up @ down).bfloat16()
            else:
                assert isinstance(part, QuantizedTensor)
                dense = part.dequantize() + up @ down
                patched = part.requantize_from_float(dense, scale="recalculate")
                assert patched._layout_cls == part._layout_cls
            outputs.append(F.linear(x, patched.to(x.dtype)))
    # rounded twice: as it was stored, and after the patch
    bound = 1.5 * KINDS[kind][3]
    assert relative(torch.cat(outputs, 1), x @ (weight + delta()).T) < bound
