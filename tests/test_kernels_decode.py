"""The kernel that decodes GGUF blocks to floats: the formulas' bits, and the bytes it moves.

Run by ``test_kernels.py``, once a device.
"""

import pytest
import torch

from ideogram4_quant.errors import OpError
from ideogram4_quant.ops.blocks import FORMATS, PACKED
from ideogram4_quant.ops.kernels.configs import DECODED
from ideogram4_quant.tests.kernel_device import DEVICE, kernel, skip_elsewhere
from ideogram4_quant.tests.traffic import sectors

skip_elsewhere()

pytestmark = pytest.mark.usefixtures("poisoned_outputs")


def any_bytes(qtype: str, blocks: int) -> torch.Tensor:
    """Blocks of every code and scale, NaN and infinite scales among them; one block of zeros."""
    data = torch.randint(0, 256, (blocks, FORMATS[qtype].type_size), dtype=torch.uint8)
    data[-1] = 0
    return data


def wanted_shape(data: torch.Tensor, qtype: str) -> tuple[int, int]:
    return len(data), FORMATS[qtype].block_size


def formula(data: torch.Tensor, qtype: str) -> torch.Tensor:
    out = torch.empty(len(data), FORMATS[qtype].block_size)
    FORMATS[qtype].decode(data, out)
    return out


def same_bits(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    """Equal to the bit, signs of zeros too, where a number; NaN where the other is."""
    bits = {2: torch.int16, 4: torch.int32}[found.element_size()]
    number = ~wanted.isnan()
    same = torch.equal(found[number].view(bits), wanted[number].view(bits))
    return same and torch.equal(found.isnan(), wanted.isnan())


@pytest.mark.parametrize("qtype", PACKED)
@pytest.mark.parametrize("blocks", [1, 5, 131])
def test_decodes_to_the_bits_of_the_formula(qtype, blocks):
    data = any_bytes(qtype, blocks)
    found = kernel("dequantize")(data, qtype, wanted_shape(data, qtype))
    assert same_bits(found, formula(data, qtype))


@pytest.mark.parametrize("qtype", ["Q8_0", "Q4_K", "Q6_K"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_are_the_formula_rounded_once(qtype, dtype):
    data = any_bytes(qtype, 17)
    wanted = formula(data, qtype)
    found = kernel("dequantize")(data, qtype, wanted_shape(data, qtype), dtype)
    if DEVICE == "cuda" or dtype == torch.float16:
        assert same_bits(found, wanted.to(dtype))
    else:  # the interpreter cuts bf16 off instead of rounding it
        cut = (wanted.view(torch.int32) >> 16).to(torch.int16).view(torch.bfloat16)
        assert same_bits(found, cut)


def test_no_blocks_make_no_weights():
    empty = torch.empty((0, 34), dtype=torch.uint8)
    assert kernel("dequantize")(empty, "Q8_0", (0, 64), torch.bfloat16).shape == (0, 64)


def test_a_kernel_that_gives_other_bits_is_not_used(monkeypatch, caplog):
    from ideogram4_quant.ops.kernels import gguf_floats

    own = gguf_floats._launch
    monkeypatch.setattr(gguf_floats, "_launch", lambda *a: own(*a) * (1 + 2**-20))
    gguf_floats._as_formula.cache_clear()
    data = any_bytes("Q5_1", 3)
    found = kernel("dequantize")(data, "Q5_1", (3, 32))
    gguf_floats._as_formula.cache_clear()
    assert same_bits(found, formula(data, "Q5_1"))
    assert "Q5_1 is decoded by torch" in caplog.text


def test_refuses_bytes_that_do_not_make_the_shape():
    with pytest.raises(OpError, match="does not make the shape"):
        kernel("dequantize")(any_bytes("Q8_0", 3), "Q8_0", (2, 32))
    with pytest.raises(OpError, match="blocks of 32"):
        kernel("dequantize")(any_bytes("Q8_0", 3), "Q8_0", (3, 31))


@pytest.mark.skipif(DEVICE != "cpu", reason="addresses are those of the interpreter")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("qtype", PACKED)
def test_moves_hardly_more_bytes_than_there_are(qtype, dtype):
    fmt = FORMATS[qtype]
    data = any_bytes(qtype, 2 * DECODED.head // fmt.block_size + 1)
    kernel("dequantize")(data, qtype, wanted_shape(data, qtype), dtype)  # the probe is over
    with sectors() as moved:
        kernel("dequantize")(data, qtype, wanted_shape(data, qtype), dtype)
    least = data.numel() + len(data) * fmt.block_size * dtype.itemsize
    # by 32 B sectors, each counted once for every program that touches it
    assert least <= moved.nbytes <= 1.01 * least + 128
