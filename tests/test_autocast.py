"""Under torch.autocast the ops compute what they say: exact integer sums, rotations in fp32."""

import pytest
import torch

from ideogram4_quant.ops import blocks, dispatch, prequantized, reference
from ideogram4_quant.ops.linear import gguf_linear, int8_linear
from ideogram4_quant.ops.rotation import rotate

N, K = 48, 512
BACKENDS = [r.name for r in dispatch.reports("cpu") if r.available and r.name != "triton"]


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(70, K, generator=torch.Generator().manual_seed(0))


def under_autocast(function, *arguments, **options):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16
        return function(*arguments, **options)


@pytest.mark.parametrize("backend", BACKENDS)
def test_int8_linear(x, backend):
    q, scale = reference.quantize_rows(torch.randn(N, K))
    wanted = int8_linear(x, q, scale, rotation=256, backend=backend)
    assert torch.equal(
        under_autocast(int8_linear, x, q, scale, rotation=256, backend=backend), wanted
    )


@pytest.mark.parametrize("compute", ["w8a8", "dense"])
def test_gguf_linear(x, compute):
    packed = blocks.quantize(torch.randn(N, K), "Q4_K")
    wanted = gguf_linear(x, packed, "Q4_K", (N, K), compute=compute)
    assert torch.equal(
        under_autocast(gguf_linear, x, packed, "Q4_K", (N, K), compute=compute), wanted
    )


def test_quantized_rows(x):
    wanted = prequantized.quantize_rows(x, None, 64, "auto")
    for found, want in zip(
        under_autocast(prequantized.quantize_rows, x, None, 64, "auto"), wanted, strict=True
    ):
        assert torch.equal(found, want)


def test_a_rotation_is_its_own_inverse(x):
    there_and_back = under_autocast(lambda: rotate(rotate(x, 256), 256))
    torch.testing.assert_close(there_and_back, x, rtol=1e-5, atol=1e-5)
