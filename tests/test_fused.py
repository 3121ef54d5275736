"""The fused block against the unfused one: every layout, mixed ones, shapes, bad rows, compile."""

from __future__ import annotations

import pytest
import torch

from ideogram4_quant.errors import BackendUnavailableError
from ideogram4_quant.ops import fused, layouts, prequantized
from ideogram4_quant.ops.fold import Fold
from ideogram4_quant.ops.linear import LinearOptions, linear
from ideogram4_quant.tests.fused_block import LAYOUTS, Block, encode, random_int8
from ideogram4_quant.tests.tensors import randn, relative

torch.set_num_threads(1)

MIXED = {
    "w2 in 16 bits": {"w2": "bf16", "*": "int8 rotated"},
    "w3 in 16 bits": {"w3": "bf16", "*": "int8"},
    "Q4_K and Q8_0": {"w2": "Q8_0", "*": "Q4_K"},
    "int8 and GGUF": {"w1": "Q4_K", "o": "bf16", "*": "int8 smooth rotated"},
}


@pytest.mark.parametrize("kinds", [{"*": kind} for kind in LAYOUTS] + list(MIXED.values()), ids=str)
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
def test_fused_equals_unfused_in_fp32(kinds, bias):
    block = Block(kinds=kinds, bias=bias)
    inputs = block.inputs(2, 37)
    # Only roundings to int8 that fall the other way.
    assert relative(block.fused(*inputs), block.unfused(*inputs)) < 1e-3


@pytest.mark.parametrize("where", ["rows", "inputs"])
@pytest.mark.parametrize("kind", ["int8 rotated", "Q4_K"])
def test_folded_weights_fuse_where_the_fold_leaves_their_inputs_alone(kind, where):
    def folded(n, k, seed, dtype):
        spread = {"rows": n, "inputs": k}[where]
        factors = 2 ** randn(spread, seed=seed).double()
        fold = Fold(rows=factors) if where == "rows" else Fold(smooth=factors)
        weight = randn(n, k, seed=seed) / k**0.5
        stored = encode(fold.fold(weight.double()).float(), kind, dtype)
        return layouts.folded_tensor(stored, fold)

    block = Block(make=folded)
    inputs = block.inputs(2, 37)
    assert relative(block.fused(*inputs), block.unfused(*inputs)) < 1e-3


@pytest.mark.parametrize("kind", ["int8", "int8 smooth rotated", "Q4_K", "bf16"])
def test_fused_is_no_less_exact_in_bf16(kind):
    block = Block(kinds={"*": kind}, dtype=torch.bfloat16)
    inputs = block.inputs(2, 37)
    exact, out = block.exact(*inputs), block.fused(*inputs)
    assert out.dtype == torch.bfloat16
    assert relative(out, exact) < 1.02 * relative(block.unfused(*inputs), exact)


@pytest.mark.parametrize(("batch", "tokens"), [(1, 1), (1, 63), (2, 65), (3, 2)])
def test_batches_have_their_own_modulation(batch, tokens):
    block = Block()
    x, condition = block.inputs(batch, tokens)
    out = block.fused(x, condition)
    assert out.shape == x.shape
    for i in range(batch):
        alone = block.fused(x[i : i + 1], condition[i : i + 1])
        assert relative(out[i : i + 1], alone) < 1e-3


def test_no_tokens_give_an_empty_result():
    block = Block()
    x, condition = block.inputs(2, 5)
    assert block.fused(x[:, :0], condition, attention=block.per_token).shape == (2, 0, 256)


def test_real_widths():
    """One block of the real model, rotated int8: hidden 4608, 18 heads of 256, 12288 inside."""
    block = Block(4608, 18, 12288, make=random_int8, options=LinearOptions())
    inputs = block.inputs(1, 3)
    assert relative(block.fused(*inputs), block.unfused(*inputs)) < 1e-3


@pytest.mark.parametrize("kind", ["int8 rotated", "Q4_K", "bf16"])
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_row_that_is_not_finite_stays_alone(kind, poison):
    block = Block(kinds={"*": kind})
    x, condition = block.inputs(1, 7)
    clean = block.fused(x, condition, attention=block.per_token)
    x[0, 3, 200] = poison
    out = block.fused(x, condition, attention=block.per_token)
    assert out[0, 3].isnan().all()
    rest = torch.tensor([0, 1, 2, 4, 5, 6])
    assert torch.equal(out[0, rest], clean[0, rest])


# ---- what is computed, and how often


@pytest.fixture
def calls(monkeypatch) -> list[str]:
    """The names of the fused quantizers, in the order they ran."""
    names: list[str] = []
    for name in ("normed_rows", "gated_rows"):
        own = getattr(prequantized, name)

        def counted(*args, own=own, name=name):
            names.append(name)
            return own(*args)

        monkeypatch.setattr(prequantized, name, counted)
    return names


@pytest.mark.parametrize(
    ("kinds", "want"),
    [
        ({"*": "int8 rotated"}, ["normed_rows", "normed_rows", "gated_rows"]),
        ({"*": "Q4_K"}, ["normed_rows", "normed_rows", "gated_rows"]),
        ({"w2": "bf16", "*": "int8"}, ["normed_rows", "normed_rows"]),
        ({"w1": "int8", "*": "int8 rotated"}, ["normed_rows"] * 3 + ["gated_rows"]),
        ({"*": "nf4"}, []),
    ],
    ids=str,
)
def test_linears_that_want_the_same_rows_share_them(kinds, want, calls):
    block = Block(kinds=kinds)
    block.fused(*block.inputs(1, 5))
    assert calls == want


def test_smoothing_is_shared_only_where_it_is_known_to_be_alike(calls):
    block = Block(kinds={"*": "int8 smooth rotated"})
    inputs = block.inputs(1, 5)
    apart = block.fused(*inputs)
    assert calls.count("normed_rows") == 3
    calls.clear()
    together = block.fused(*inputs, alike=True)
    assert calls.count("normed_rows") == 2
    assert torch.equal(apart, together)


def test_few_tokens_leave_gguf_weights_dense(calls):
    block = Block(kinds={"*": "Q4_K"}, options=LinearOptions())
    block.fused(*block.inputs(1, 63))
    assert calls == []
    block.fused(*block.inputs(1, 64))
    assert calls == ["normed_rows", "normed_rows", "gated_rows"]


def test_a_backend_of_whole_layers_gets_values(calls):
    h = fused.Normed(randn(3, 256), torch.ones(256), torch.ones(256), 1e-5)
    # Not there on a CPU, so the layer itself refuses: it was not split behind its back.
    with pytest.raises(BackendUnavailableError, match="comfy_kitchen"):
        linear(
            h, encode(randn(4, 256), "int8", torch.float32), None, LinearOptions("comfy_kitchen")
        )
    assert calls == []


# ---- torch.compile and the custom ops


@pytest.mark.parametrize("kinds", [{"*": "fp8"}, *MIXED.values()], ids=str)
def test_compiles_without_graph_breaks(kinds):
    torch._dynamo.reset()
    block = Block(kinds=kinds)
    with torch.no_grad():
        compiled = torch.compile(block.fused, fullgraph=True, backend="aot_eager")
        for tokens in (5, 70):
            inputs = block.inputs(1, tokens)
            assert relative(compiled(*inputs), block.fused(*inputs)) < 1e-3


def test_the_custom_ops_are_sound():
    x, weight = randn(2, 3, 256), encode(randn(8, 256), "int8", torch.float32)
    packed = encode(randn(8, 256), "Q4_K", torch.float32)._qdata
    vector, scale = weight._qdata, weight._params.scale
    q, rows = prequantized.quantize_rows(x, None, 256, "auto")
    one, bias = torch.ones(256), randn(8)
    for op, args in (
        ("_quantize_rows_op", (x, one, 256, "auto")),
        ("_normed_rows_op", (x, one, one, 1e-5, None, 0, "auto")),
        ("_gated_rows_op", (x, x, None, 256, "auto")),
        ("_gate_residual_op", (x, one, x, one, 1e-5, "auto")),
        ("_int8_product_op", (q, rows, vector, scale, bias, torch.bfloat16, "auto")),
        ("_gguf_product_op", (q, rows, packed, "Q4_K", None, 256, torch.float32, "auto")),
    ):
        checks = torch.library.opcheck(getattr(prequantized, op), args)
        assert set(checks.values()) == {"SUCCESS"}, op
