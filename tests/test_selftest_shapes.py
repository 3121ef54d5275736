"""``selftest`` at the shapes of real work: a backend that is wrong at one of them is caught."""

from __future__ import annotations

import pytest
import torch

from ideogram4_quant.diagnostics import selftest, selftest_shapes
from ideogram4_quant.ops import dispatch, grouped
from ideogram4_quant.ops.kernels import configs

CPU = torch.device("cpu")
ON_A_GPU = selftest_shapes.row_counts(torch.device("cuda"))
PRODUCTS = [
    (k, m, dtype)
    for k in (4608, 12288, 53248)
    for m in ON_A_GPU
    for dtype in (torch.bfloat16, torch.float16, torch.float32)
]
PRODUCTS += [(4672, m, torch.float32) for m in ON_A_GPU]


def failing(ops: dict, monkeypatch, wanted: str) -> list[str]:
    """The checks at a GPU's shapes, ``wanted`` in their name, that a backend of ``ops`` fails."""
    backend = dispatch.Backend("triton", ops)
    probes = {**dispatch._PROBES, "triton": lambda device: (backend, "changed")}
    monkeypatch.setattr(dispatch, "_PROBES", probes)
    found = [c for c in selftest_shapes.checks(CPU, ["triton"], ON_A_GPU) if wanted in c[0]]
    assert found
    return [name for name, _, allowed, measure in found if not measure() <= allowed]


@pytest.mark.parametrize("capability", configs.ARCHITECTURES)
def test_every_tile_of_the_tables_multiplies(capability):
    shapes = {(m, k) for k, m, _ in PRODUCTS}
    used = {configs.gemm_candidates(capability, m, k)[0] for m, k in shapes}
    used |= {tile for _, tile in selftest_shapes.tiles(capability, ON_A_GPU)}
    assert used == {c for group in configs.GEMM_CONFIGS[capability].values() for c in group}
    # full tiles and ragged ones both ways, and a second group of tiles that share columns
    wide = configs.gemm_candidates(capability, max(ON_A_GPU), 4608)[0]
    assert max(ON_A_GPU) > wide.group_m * wide.block_m
    assert max(ON_A_GPU) % wide.block_m
    assert wide.block_n < selftest_shapes.COLUMNS < 2 * wide.block_n


def test_a_cpu_multiplies_few_rows_and_every_check_passes_in_time():
    assert max(selftest_shapes.row_counts(CPU)) <= 33
    names = [r.name for r in dispatch.reports(CPU) if r.available]
    rows = selftest_shapes.row_counts(CPU)
    checks = list(selftest_shapes.checks(CPU, names, rows))
    assert {name for _, name, *_ in checks} == set(names)
    assert all(measure() <= allowed for _, _, allowed, measure in checks)


def test_the_sums_to_compare_with_are_exact():
    q, _, w, _, _ = selftest_shapes._factors(4608, 16)
    sums = selftest_shapes._sums(4608, 16)
    assert torch.equal(sums.long(), q.long() @ w.long().t())
    assert sums[0, 0] == -127 * 128 * 4608
    assert selftest_shapes._sums(53248, 16)[0, 0] == -127 * 128 * 53248  # beyond fp32's 2^24


def _tile_unfinished(out, k, product):
    """The last, ragged tile leaves out the last step of K."""
    out[-8:, -72:] -= product[-8:, -72:]


def _value_unwritten(out, k, product):
    out[-1, -1] = float("nan")


def _rows_swapped(out, k, product):
    out[[-1, -2]] = out[[-2, -1]].clone()


@pytest.mark.parametrize("fault", [_tile_unfinished, _value_unwritten, _rows_swapped])
@pytest.mark.parametrize(("k", "m", "dtype"), PRODUCTS)
def test_a_tile_that_is_wrong_at_one_shape_is_caught(k, m, dtype, fault, monkeypatch):
    def gemm(q, scale_x, weight, weight_scale, bias, out_dtype):
        out = dispatch.adapters.int_mm_gemm(q, scale_x, weight, weight_scale, bias, out_dtype)
        if (q.shape[1], len(q), out_dtype) == (k, m, dtype):
            last = (q[:, -64:].float() @ weight[:, -64:].float().t()) * scale_x[:, None]
            fault(out, k, (last * weight_scale).to(out_dtype))
        return out

    label = f"product {m} x 328 x {k}, {selftest_shapes.DTYPES[dtype]}"
    assert failing({"int8_gemm": gemm}, monkeypatch, f" x {k}, {label[-4:]}") == [label]


def test_the_command_names_a_product_that_is_wrong_in_long_rows_alone(monkeypatch):
    def gemm(q, *rest):
        out = dispatch.adapters.int_mm_gemm(q, *rest)
        return out * 1.5 if q.shape[1] == 53248 else out

    backend = dispatch.Backend("int_mm", {"int8_gemm": gemm})
    probes = {**dispatch._PROBES, "int_mm": lambda device: (backend, "changed")}
    monkeypatch.setattr(dispatch, "_PROBES", probes)
    failed = {r.check for r in selftest.selftest(CPU) if r.status == selftest.FAILED}
    assert failed == {
        f"product {m} x 328 x 53248, {short}"
        for m in selftest_shapes.row_counts(CPU)
        for short in ("bf16", "fp16", "fp32")
    }


ROWS = [("smooth_rotate", k) for k in (4608, 12288, 53248)]
ROWS += [("rmsnorm_scale", 4608), ("swiglu", 12288)]
CHANGES = {
    "the last value": lambda q, scale: q[-1, -1:].copy_(q[-1, -1:] + (-1 if q[-1, -1] > 0 else 1)),
    "a scale": lambda q, scale: scale[0].mul_(1 + 1e-5),
    "NaN": lambda q, scale: scale[-1].fill_(float("nan")),
    "the tail": lambda q, scale: q[0, 4096:].copy_(q[0, 4096:].roll(1)),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize(("op", "k"), ROWS)
def test_rows_that_are_quantized_wrongly_at_one_length_are_caught(op, k, change, monkeypatch):
    op = f"{op}_quantize_rows"

    def quantizer(x, *rest):
        q, scale = dispatch.REFERENCE_OPS[op](x, *rest)
        if x.shape[1] == k:
            CHANGES[change](q, scale)
        return q, scale

    label = f"{op.removesuffix('_quantize_rows')} to int8, K {k}"
    assert failing({op: quantizer}, monkeypatch, "to int8") == [
        f"{label}, {short}" for short in ("bf16", "fp16", "fp32")
    ]


@pytest.mark.parametrize("k", [4608, 12288, 53248])
def test_blocks_that_are_decoded_wrongly_at_one_length_are_caught(k, monkeypatch):
    op = "dequantize_rotate_quantize"

    def decoder(blocks, qtype, shape, rotation):
        q, scale = dispatch.REFERENCE_OPS[op](blocks, qtype, shape, rotation)
        if (qtype, shape[1]) == ("Q5_K", k):
            CHANGES["the last value"](q, scale)
        return q, scale

    found = failing({op: decoder}, monkeypatch, "GGUF")
    assert found == [f"GGUF Q5_K to int8, K {k}"]


def test_a_residual_that_is_wrong_in_one_dtype_is_caught(monkeypatch):
    op = "gate_residual_rmsnorm"

    def residual(x, *rest):
        out = dispatch.REFERENCE_OPS[op](x, *rest)
        if x.dtype == torch.float16:
            out[-1, -1] += 0.1
        return out

    found = failing({op: residual}, monkeypatch, "residual")
    assert found == ["gate and residual, K 4608, fp16"]


@pytest.mark.parametrize("kind", ["W4A8", "W4A8, uniform", "W6A8", "INT4 W4A4"])
@pytest.mark.parametrize("k", [4608, 12288, 53248])
def test_a_packed_grid_that_is_off_by_one_at_one_place_is_caught(kind, k, monkeypatch):
    bits, group, dtype, coded = selftest_shapes._GRIDS[kind]

    def decode(packed, s_rel, codebook, found_group):
        out = grouped.int8_grid(packed, s_rel, codebook, found_group)
        same = (out.shape[1], packed.shape[1], found_group) == (k, k * bits // 8, group)
        if same and (codebook is not None) == coded and (s_rel is None or s_rel.dtype == dtype):
            out[-1, -1] ^= 1
        return out

    broken = failing({"int8_grid": decode}, monkeypatch, "int8 grid")
    assert broken == [f"{kind} to its int8 grid, K {k}"]
