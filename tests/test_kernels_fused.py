"""The fused block on the Triton kernels against the formulas of the CPU.

Run by ``test_kernels.py``, once a device.
"""

import pytest
import torch

from ideogram4_quant.ops.linear import LinearOptions
from ideogram4_quant.tests.fused_block import Block
from ideogram4_quant.tests.kernel_device import DEVICE, moved, skip_elsewhere
from ideogram4_quant.tests.tensors import relative

skip_elsewhere()

TRITON = LinearOptions(backend="triton", gguf_compute="w8a8")


@pytest.mark.parametrize(
    ("kinds", "bias"),
    [
        ({"*": "int8 smooth rotated"}, True),
        ({"w2": "bf16", "*": "int8"}, False),
        ({"w1": "Q4_K", "*": "int8 rotated"}, False),  # decoding a row takes the interpreter long
    ],
    ids=str,
)
def test_the_kernels_make_the_same_block(kinds, bias):
    block = Block(kinds=kinds, bias=bias, inner=256)
    inputs = block.inputs(2, 3)
    want = block.unfused(*inputs)
    block.options = TRITON
    out = block.to(DEVICE).fused(*moved(inputs, DEVICE))
    assert relative(out.cpu(), want) < 1e-3


def test_a_row_that_is_not_finite_stays_alone():
    block = Block(inner=256, options=TRITON).to(DEVICE)
    x, condition = moved(block.inputs(1, 3), DEVICE)
    clean = block.fused(x, condition, attention=block.per_token)
    x[0, 1, 200] = float("nan")
    out = block.fused(x, condition, attention=block.per_token)
    assert out[0, 1].isnan().all()
    assert torch.equal(out[0, ::2], clean[0, ::2])
