"""The kernel that decodes packed 4- and 6-bit codes against its formula.

Run by ``test_kernels.py``, once a device.
"""

import pytest
import torch

from ideogram4_quant.errors import OpError
from ideogram4_quant.ops import grouped
from ideogram4_quant.tests.kernel_device import kernel, skip_elsewhere

skip_elsewhere()

pytestmark = pytest.mark.usefixtures("poisoned_outputs")

E4M3 = torch.float8_e4m3fn


def every_scale(n: int, groups: int) -> torch.Tensor:
    """All finite e4m3 numbers, negative and subnormal ones too, over and over."""
    bits = torch.tensor([b for b in range(256) if b & 127 != 127], dtype=torch.uint8)
    return bits.repeat(n * groups // len(bits) + 1)[: n * groups].view(E4M3).view(n, groups)


@pytest.mark.parametrize("group", [4, 16, 32, 48])
@pytest.mark.parametrize(("n", "groups"), [(1, 1), (3, 31), (33, 130)])
@pytest.mark.parametrize("coded", [True, False], ids=["codebook", "uniform"])
def test_int8_grid_of_four_bits(n, groups, group, coded):
    packed = torch.randint(-128, 128, (n, groups * group // 2), dtype=torch.int8)
    codebook = torch.linspace(-1, 1, 16) * 127 if coded else None
    for s_rel in (every_scale(n, groups), torch.randn(n, groups) * 9):
        grid = kernel("int8_grid")(packed, s_rel, codebook, group)
        assert torch.equal(grid, grouped.int8_grid(packed, s_rel, codebook, group))


@pytest.mark.parametrize(("n", "groups", "group"), [(1, 2, 16), (5, 6, 32), (17, 144, 16)])
def test_int8_grid_of_six_bits(n, groups, group):
    packed = torch.randint(-128, 128, (n, groups * group * 6 // 8), dtype=torch.int8)
    for s_rel in (every_scale(n, groups), torch.rand(n, groups) * 4):
        grid = kernel("int8_grid")(packed, s_rel, None, group)
        assert torch.equal(grid, grouped.int8_grid(packed, s_rel, None, group))


@pytest.mark.parametrize(("n", "k"), [(1, 2), (7, 4610), (0, 64)])
def test_int8_grid_of_signed_codes(n, k):
    packed = torch.randint(-128, 128, (n, k // 2), dtype=torch.int8)
    grid = kernel("int8_grid")(packed, None, None, 0)
    assert torch.equal(grid, grouped.unpack_int4(packed))


def test_int8_grid_of_a_cut_out_matrix():
    packed = torch.randint(-128, 128, (6, 64), dtype=torch.int8)
    s_rel = every_scale(6, 8)
    grid = kernel("int8_grid")(packed[1:4], s_rel[1:4], None, 16)
    assert torch.equal(grid, grouped.int8_grid(packed, s_rel, None, 16)[1:4])


def test_int8_grid_refuses_what_does_not_fit():
    packed = torch.zeros(4, 32, dtype=torch.int8)
    with pytest.raises(OpError, match="group scales do not fit"):
        kernel("int8_grid")(packed, torch.ones(3, 4), None, 16)
    with pytest.raises(OpError, match="no code width"):
        kernel("int8_grid")(packed, torch.ones(4, 7), None, 16)
    with pytest.raises(OpError, match="int8 matrix"):
        kernel("int8_grid")(packed.float(), torch.ones(4, 4), None, 16)
