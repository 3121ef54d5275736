"""Block decoding against gguf-py, bit for bit, and the checks around it."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch
from gguf.quants import dequantize as gguf_dequantize

from ideogram4_quant.errors import OpError
from ideogram4_quant.ops import chunks
from ideogram4_quant.ops.blocks import FORMATS, base, dequantize, format_of, quantize

torch.set_num_threads(1)

NAMES = list(FORMATS)
PACKED = [name for name in NAMES if FORMATS[name].block_size > 1]

# Float16 bit patterns: zeros, subnormals, one, the largest, infinities, quiet and signalling NaN.
HALVES = [0x0000, 0x8000, 0x0001, 0x83FF, 0x3C00, 0xBC00, 0x7BFF, 0xFBFF]
HALVES += [0x7C00, 0xFC00, 0x7E00, 0xFE00, 0x7C01]
# Where the float16 fields of a block lie, in units of two bytes.
HALF_FIELDS = {"Q8_0": [0], "Q4_0": [0], "Q4_1": [0, 1], "Q5_0": [0], "Q5_1": [0, 1]}
HALF_FIELDS |= {"Q4_K": [0, 1], "Q5_K": [0, 1], "Q6_K": [104]}
HALF_FIELDS |= {"Q2_K": [40, 41], "Q3_K": [54], "IQ4_NL": [0], "IQ4_XS": [0], "MXFP4": []}


def random_blocks(name, blocks, seed=0):
    """uint8 [blocks, type_size]: every bit pattern is a valid block."""
    generator = np.random.default_rng(seed)
    return generator.integers(0, 256, (blocks, FORMATS[name].type_size), dtype=np.uint8)


def gguf_decode(name, data):
    with np.errstate(all="ignore"):
        return gguf_dequantize(data, gguf.GGMLQuantizationType[name])


def assert_same_bits(got: torch.Tensor, want: np.ndarray):
    """Equal bit for bit, the sign of zero too; NaN where the other has NaN (any payload)."""
    got = got.numpy()
    assert got.shape == want.shape
    nan = np.isnan(want)
    assert np.array_equal(np.isnan(got), nan)
    assert np.array_equal(got.view(np.int32)[~nan], want.view(np.int32)[~nan])


@pytest.mark.parametrize("name", NAMES)
def test_equals_gguf_py_on_random_bytes(name):
    data = random_blocks(name, 7 * 300).reshape(7, -1)
    want = gguf_decode(name, data)
    assert_same_bits(dequantize(torch.from_numpy(data), name, want.shape), want)


@pytest.mark.parametrize("name", PACKED)
def test_equals_gguf_py_for_every_kind_of_scale(name):
    pairs = [(first, second) for first in HALVES for second in HALVES]
    data = random_blocks(name, len(pairs), seed=1)
    fields = HALF_FIELDS[name]
    for column, field in enumerate(fields):
        data.view(np.uint16)[:, field] = [pair[column] for pair in pairs]
    want = gguf_decode(name, data)
    assert_same_bits(dequantize(torch.from_numpy(data), name, want.shape), want)


@pytest.mark.parametrize("name", ["F16", "BF16"])
def test_every_16_bit_float(name):
    data = np.arange(1 << 16, dtype=np.uint16).view(np.uint8).reshape(1, -1)
    want = gguf_decode(name, data)
    assert_same_bits(dequantize(torch.from_numpy(data), name, want.shape), want)


@pytest.mark.parametrize("name", NAMES)
def test_equals_gguf_py_on_encoded_weights(name):
    weight = torch.randn(5, 512, generator=torch.Generator().manual_seed(2))
    weight[1] = 0
    weight[2, 77] = 300
    data = quantize(weight, name)
    got = dequantize(data, name, (5, 512))
    assert_same_bits(got, gguf_decode(name, data.numpy()))
    assert (got[1] == 0).all()


def test_a_q4_k_block_made_by_hand():
    block = np.zeros(144, dtype=np.uint8)
    block[:4] = np.array([0.5, 0.25], dtype=np.float16).view(np.uint8)  # d, dmin
    block[4] = 3 | 0b10 << 6  # scale of group 0; high bits of group 4's
    block[8] = 5 | 0b01 << 6  # minimum of group 0; high bits of group 4's
    block[12] = 7 | 9 << 4  # low bits of group 4's scale and minimum
    block[16] = 0x0B  # weight 0 of group 0: 11
    block[16 + 64] = 0x0D  # weight 0 of group 4: 13
    got = dequantize(torch.from_numpy(block), "Q4_K", (256,)).view(8, 32)
    assert got[0, 0] == 0.5 * 3 * 11 - 0.25 * 5
    assert got[4, 0] == 0.5 * (32 + 7) * 13 - 0.25 * (16 + 9)
    assert got[0, 1] == -0.25 * 5
    assert (got[[1, 2, 3, 5, 6, 7]] == 0).all()


def half(value):
    return np.array([value], dtype=np.float16).view(np.uint8)


def test_a_q2_k_block_made_by_hand():
    block = np.zeros(84, dtype=np.uint8)
    block[80:82], block[82:] = half(0.5), half(0.25)
    block[3] = 7 | 9 << 4  # group 3: weights 16 to 31 of run 1
    block[14] = 15 | 2 << 4  # group 14: weights 0 to 15 of run 3 in the second half
    block[16 + 16 + 5] = 0b00001000  # run 1: code 2
    block[16 + 32 + 4] = 0b11000000  # run 3 of the second half: code 3
    got = dequantize(torch.from_numpy(block), "Q2_K", (256,)).view(16, 16)
    assert got[3, 5] == 0.5 * 7 * 2 - 0.25 * 9
    assert got[3, 4] == -0.25 * 9
    assert got[14, 4] == 0.5 * 15 * 3 - 0.25 * 2
    assert (got[[0, 1, 2, 4, 13, 15]] == 0).all()


def test_a_q3_k_block_made_by_hand():
    block = np.zeros(110, dtype=np.uint8)
    block[108:] = half(0.5)
    block[96:104] = 0
    block[104:108] = 0b10101010  # high bits 2: every scale is zero but for what follows
    block[96 + 3] |= 5  # group 3: 32 + 5 - 32
    block[96 + 6] |= 7 << 4  # group 14: 7 in the low bits, no high ones
    block[104 + 2] &= 0b00111111
    block[16 + 5] = 0b00000010  # third bit of weight 21 of run 1 of half 0: not less 4
    block[32 + 16 + 5] = 0b00001000  # run 1: code 2
    block[32 + 32 + 4] = 0b11000000  # run 3 of the second half: 3, less 4
    got = dequantize(torch.from_numpy(block), "Q3_K", (256,)).view(16, 16)
    assert got[3, 5] == 0.5 * 5 * 2
    assert got[3, 4] == 0.5 * 5 * -4
    assert got[14, 4] == 0.5 * (7 - 32) * (3 - 4)
    assert (got[[0, 1, 2, 4, 13, 15]] == 0).all()


def test_an_iq4_nl_block_made_by_hand():
    block = np.zeros(18, dtype=np.uint8)
    block[:2] = half(2.0)
    block[2] = 0x8F  # weight 0: the last entry, weight 16: the ninth
    got = dequantize(torch.from_numpy(block), "IQ4_NL", (32,))
    assert got[[0, 16, 1, 17]].tolist() == [2.0 * 113, 2.0 * 1, -254.0, -254.0]


def test_an_iq4_xs_block_made_by_hand():
    block = np.zeros(136, dtype=np.uint8)
    block[:2] = half(0.5)
    block[2:4] = 0b10101010  # high bits 2: every scale is zero but for what follows
    block[4 + 1] = 3 | 9 << 4  # groups 2 and 3: 3 and 9
    block[3] ^= 0b11 << 4 | 0b10 << 2  # of groups 6 and 5: 1 and 0
    block[8 + 16 * 3 + 7] = 0x7E  # group 3: weight 7 is entry 14, weight 23 entry 7
    got = dequantize(torch.from_numpy(block), "IQ4_XS", (256,)).view(8, 32)
    assert got[2, 0] == 0.5 * 3 * -127
    assert got[3, 7] == 0.5 * 9 * 89
    assert got[3, 23] == 0.5 * 9 * -10
    assert got[5, 1] == 0.5 * -32 * -127
    assert got[6, 1] == 0.5 * (16 - 32) * -127
    assert (got[[0, 1, 4, 7]] == 0).all()


def test_an_mxfp4_block_made_by_hand():
    block = np.zeros(17, dtype=np.uint8)
    block[0] = 127 - 3
    block[1] = 0xF7  # weight 0: 6, weight 16: -6
    block[2] = 0x91  # weight 1: 0.5, weight 17: -0.5
    block[3] = 0xC5  # weight 2: 3, weight 18: -2
    got = dequantize(torch.from_numpy(block), "MXFP4", (32,))
    want = torch.zeros(32)
    want[[0, 16, 1, 17, 2, 18]] = torch.tensor([6, -6, 0.5, -0.5, 3, -2]) / 8
    assert torch.equal(got, want)
    block[0] = 0  # the least power: float32 holds it as a subnormal
    assert dequantize(torch.from_numpy(block), "MXFP4", (32,))[1] == 2.0**-128


def test_a_q5_0_block_made_by_hand():
    block = np.zeros(22, dtype=np.uint8)
    block[:2] = np.array([2.0], dtype=np.float16).view(np.uint8)
    block[2:6] = np.array([1 << 0 | 1 << 17], dtype=np.uint32).view(np.uint8)
    block[6] = 0x5A  # codes 0 and 16, low bits
    block[7] = 0xF3  # codes 1 and 17, low bits
    got = dequantize(torch.from_numpy(block), "Q5_0", (32,))
    assert got[[0, 16, 1, 17]].tolist() == [2.0 * (26 - 16), 2.0 * (5 - 16), -26.0, 30.0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", NAMES)
def test_other_dtypes_are_the_float32_result_rounded_once(name, dtype, monkeypatch):
    monkeypatch.setattr(base, "CACHED", 3 * 256)
    data = torch.from_numpy(random_blocks(name, 64 * 256 // FORMATS[name].block_size, seed=3))
    want = dequantize(data, name, (64, 256)).to(dtype)
    got = dequantize(data, name, (64, 256), dtype)
    assert got.dtype == dtype
    assert torch.equal(got.nan_to_num(), want.nan_to_num())


@pytest.mark.parametrize("name", NAMES)
def test_chunks_of_any_size_and_huge_pages_give_the_same(name, monkeypatch):
    shape = (257, 4096 + 256)  # more than 4 MiB, and the last chunk is short
    data = torch.from_numpy(random_blocks(name, 257 * 4352 // FORMATS[name].block_size, seed=4))
    want = dequantize(data, name, shape)
    assert want.is_contiguous()
    assert want.data_ptr() % 64 == 0
    for chunk in (1 << 30, 777 * 256):
        monkeypatch.setattr(base, "CACHED", chunk)
        monkeypatch.setattr(chunks, "HUGE_PAGES_FROM", 1 << 40)
        assert torch.equal(dequantize(data, name, shape).view(torch.int32), want.view(torch.int32))


@pytest.mark.parametrize("name", NAMES)
def test_reads_data_of_any_shape_stride_and_offset(name):
    fmt = FORMATS[name]
    rows = torch.from_numpy(random_blocks(name, 3 * 2 * 512 // fmt.block_size, seed=5))
    rows = rows.view(6, fmt.row_bytes(512))
    want = dequantize(rows, name, (6, 512)).view(torch.int32)
    odd = torch.zeros(rows.numel() + 1, dtype=torch.uint8)[1:].copy_(rows.flatten())
    strided = torch.stack([rows, rows], 2)[:, :, 1]
    for data in (rows.flatten(), rows.view(3, 2, -1), odd, strided):
        assert torch.equal(dequantize(data, name, (6, 512)).view(torch.int32), want)
    assert dequantize(rows, name, [3, 2, 512]).shape == (3, 2, 512)
    assert torch.equal(dequantize(rows[4:], name, (2, 512)).view(torch.int32), want[4:])


@pytest.mark.parametrize("name", NAMES)
def test_empty_tensors(name):
    nothing = torch.empty(0, dtype=torch.uint8)
    assert dequantize(nothing, name, (0, 256)).shape == (0, 256)
    assert dequantize(nothing, name, (3, 0), torch.bfloat16).shape == (3, 0)


@pytest.mark.parametrize("name", NAMES)
def test_under_inference_mode(name):
    data = torch.from_numpy(random_blocks(name, 2 * 256, seed=6))
    shape = (2, 256 * FORMATS[name].block_size)
    want = dequantize(data, name, shape)
    with torch.inference_mode():
        got = dequantize(data.clone(), name, shape)
        assert torch.equal(got.view(torch.int32), want.view(torch.int32))


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_compiles_into_one_graph(name):
    data = torch.from_numpy(random_blocks(name, 4 * 512 // FORMATS[name].block_size, seed=7))

    def decode(blocks):
        return dequantize(blocks, name, (4, 512), torch.bfloat16)

    torch.compiler.reset()
    compiled = torch.compile(decode, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(data).nan_to_num(), decode(data).nan_to_num())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_cuda_equals_the_cpu(name):
    data = torch.from_numpy(random_blocks(name, 64 * 512 // FORMATS[name].block_size, seed=8))
    got = dequantize(data.cuda(), name, (64, 512))
    assert got.is_cuda
    assert_same_bits(got.cpu(), dequantize(data, name, (64, 512)).numpy())


# ---- formats


def test_numbers_and_sizes_are_those_of_gguf_py():
    for name, fmt in FORMATS.items():
        kind = gguf.GGMLQuantizationType[name]
        assert fmt.name == name
        assert fmt.ggml_type == kind
        assert (fmt.block_size, fmt.type_size) == gguf.GGML_QUANT_SIZES[kind]
        assert format_of(kind) is format_of(int(kind)) is format_of(name) is fmt


@pytest.mark.parametrize("kind", [k for k in gguf.GGMLQuantizationType if k.name not in FORMATS])
def test_other_types_are_refused_by_name(kind):
    with pytest.raises(OpError, match=f"{int(kind)} {kind.name}.*Q4_K"):
        format_of(int(kind))


@pytest.mark.parametrize(
    ("qtype", "shown"), [(4, "4 Q4_2"), (999, "999 unknown"), ("Q3_X", "Q3_X")]
)
def test_types_that_never_were_or_are_no_more(qtype, shown):
    with pytest.raises(OpError, match=shown):
        dequantize(torch.zeros(4, dtype=torch.uint8), qtype, (1, 32))


def test_sizes():
    assert FORMATS["Q4_K"].row_bytes(4608) == 18 * 144
    assert FORMATS["Q8_0"].nbytes((3, 5, 64)) == 3 * 5 * 68
    assert FORMATS["BF16"].nbytes((7,)) == 14


# ---- errors


@pytest.mark.parametrize("excess", [-1, 1, 144])
def test_a_wrong_number_of_bytes_is_named(excess):
    data = torch.zeros(2 * 144 * 2 + excess, dtype=torch.uint8)
    with pytest.raises(OpError) as error:
        dequantize(data, "Q4_K", (2, 512))
    message = str(error.value)
    for part in ("Q4_K", "[2, 512]", f"{576 + excess} bytes", "576 bytes"):
        assert part in message


@pytest.mark.parametrize(
    ("name", "shape"), [("Q4_K", (3, 128)), ("Q8_0", (4, 100)), ("Q5_0", (8,))]
)
def test_rows_that_blocks_do_not_fill_are_refused(name, shape):
    with pytest.raises(OpError, match=f"a row of {shape[-1]}"):
        dequantize(torch.zeros(1 << 10, dtype=torch.uint8), name, shape)


def test_other_misuse_is_refused():
    data = torch.zeros(34, dtype=torch.uint8)
    with pytest.raises(OpError, match=r"torch\.int8"):
        dequantize(data.view(torch.int8), "Q8_0", (1, 32))
    with pytest.raises(OpError, match=r"torch\.int32"):
        dequantize(data, "Q8_0", (1, 32), torch.int32)
    for shape in ((), (-1, 32)):
        with pytest.raises(OpError, match="not the shape"):
            dequantize(data, "Q8_0", shape)
