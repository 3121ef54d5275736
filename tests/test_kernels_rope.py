"""q/k RMSNorm and rotary embedding in one kernel, against its formula.

Run by ``test_kernels.py``, once a device.
"""

import pytest
import torch

from ideogram4_quant.errors import OpError
from ideogram4_quant.ops import reference
from ideogram4_quant.tests.kernel_device import DEVICE, kernel, skip_elsewhere
from ideogram4_quant.tests.tensors import randn, relative

skip_elsewhere()

pytestmark = pytest.mark.usefixtures("poisoned_outputs")

EPS = 1e-5


def heads(batch: int, length: int, count: int, d: int, dtype=torch.float32):
    """q and k as views of one qkv output, and the weights of their norms.

    Two heads of zeros and of values so small that eps is most of what they are divided by.
    """
    qkv = randn(batch, length, 3 * count * d, seed=1)
    qkv[..., ::7] *= 30
    q, k, _ = qkv.to(dtype).view(batch, length, 3, count, d).unbind(2)
    if length > 1:
        q[0, 0, 0] = 0
        k[0, 1] *= 1e-4
    return q, k, *(1 + 0.2 * randn(d, seed=seed) for seed in (2, 3))


def tables(batch: int, length: int, half: int):
    """cos and sin [batch, length, half] of any angles."""
    angles = 100 * randn(batch, length, half, seed=4)
    return angles.cos(), angles.sin()


@pytest.mark.parametrize(
    ("batch", "length", "count", "d"),
    [(1, 1, 1, 2), (1, 5, 3, 6), (2, 7, 2, 96), (1, 9, 18, 256), (3, 3, 5, 64)],
)
def test_equals_the_formula(batch, length, count, d):
    inputs = (*heads(batch, length, count, d), *tables(batch, length, d // 2), EPS)
    for found, wanted in zip(kernel("rms_rope")(*inputs), reference.rms_rope(*inputs), strict=True):
        assert found.is_contiguous()
        # of each head, as a small one is nothing beside the others
        error = (found - wanted).norm(dim=-1) / wanted.norm(dim=-1).clamp_min(1e-30)
        assert error.max() < 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_are_rounded_once(dtype):
    q, k, *weights = heads(1, 5, 3, 64, dtype)
    cos, sin = tables(1, 5, 32)
    found = kernel("rms_rope")(q, k, *weights, cos, sin, EPS)
    wide = reference.rms_rope(q.float(), k.float(), *weights, cos, sin, EPS)
    # bf16 is cut off by the interpreter, not rounded
    once = torch.finfo(dtype).eps / (2 if DEVICE == "cuda" or dtype == torch.float16 else 1)
    for one, wanted in zip(found, wide, strict=True):
        assert one.dtype == dtype
        assert ((one.float() - wanted).abs() <= once * wanted.abs() + 1e-6).all()


def test_the_table_may_be_the_hosts_2_by_2_matrices_of_one_batch():
    q, k, *weights = heads(2, 5, 3, 8)
    cos, sin = tables(1, 5, 4)
    matrices = torch.stack((cos, -sin, sin, cos), -1).view(1, 5, 1, 4, 2, 2)
    views = matrices[:, :, 0, :, 0, 0], matrices[:, :, 0, :, 1, 0]
    found = kernel("rms_rope")(q, k, *weights, *views, EPS)
    wanted = reference.rms_rope(q, k, *weights, cos, sin, EPS)
    assert all(relative(f, w) < 1e-6 for f, w in zip(found, wanted, strict=True))


def test_a_head_that_is_not_finite_stays_alone():
    q, k, *weights = heads(1, 4, 3, 8)
    rest = (*weights, *tables(1, 4, 4), EPS)
    clean = kernel("rms_rope")(q.clone(), k, *rest)[0]
    q[0, 1, 2, 3] = float("nan")
    found = kernel("rms_rope")(q, k, *rest)[0]
    assert found[0, 1, 2].isnan().all()
    clean[0, 1, 2] = found[0, 1, 2] = 0
    assert torch.equal(found, clean)


def test_no_tokens_give_nothing():
    q, k, *weights = heads(1, 4, 3, 8)
    q, k = q[:, :0], k[:, :0]
    found = kernel("rms_rope")(q, k, *weights, *tables(1, 0, 4), EPS)
    assert [t.shape for t in found] == [(1, 0, 3, 8)] * 2


def test_refuses_what_does_not_fit():
    q, k, *weights = heads(1, 4, 3, 8)
    cos, sin = tables(1, 4, 4)
    for bad, why in (
        ((q[..., :7], k[..., :7], *weights, cos, sin), "even D"),
        ((q, k[:, :2], *weights, cos, sin), "differ in shape"),
        ((q, k.half(), *weights, cos, sin), "dtypes"),
        ((q, k, weights[0][:3], weights[1], cos, sin), "does not fit the rows"),
        ((q, k, *weights, cos[:, :3], sin), "does not fit the heads"),
    ):
        with pytest.raises(OpError, match=why):
            kernel("rms_rope")(*bad, EPS)
