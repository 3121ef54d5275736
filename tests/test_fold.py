"""Folds of one linear, and layouts that hold a folded weight as one in original coordinates."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from comfy_kitchen.tensor import QuantizedTensor

from ideogram4_quant.errors import OpError
from ideogram4_quant.ops import layouts, reference
from ideogram4_quant.ops.fold import Fold
from ideogram4_quant.ops.linear import LinearOptions, linear
from ideogram4_quant.tests.tensors import randn, relative

torch.set_num_threads(1)
N, K = 3 * 128, 256
FIRST = 2 * 128  # of v in a fused qkv


def factors(size, seed):
    return 2 ** randn(size, seed=seed).double()


FOLDS = {
    "nothing": Fold(),
    "smooth": Fold(smooth=factors(K, 1)),
    "smooth, rotated": Fold(smooth=factors(K, 1), rotation=64),
    "rows": Fold(rows=factors(N, 2)),
    "rows of v, rotated": Fold(rows=factors(N, 2), row_rotation=64, first_row=FIRST),
    "all": Fold(factors(K, 1), 256, factors(N, 2), 64, FIRST),
}


# ---- the formula


@pytest.mark.parametrize("fold", FOLDS.values(), ids=FOLDS)
def test_the_function_is_unchanged_in_fp64(fold):
    # thirds: more digits than fp32 holds
    weight, x = randn(N, K).double() / 3, randn(7, K, seed=3).double() / 3
    folded = fold.fold(weight)
    assert relative(fold.unfold(folded), weight) < 1e-11  # 220 dB
    y = fold.unfold_output(fold.fold_input(x) @ folded.T)
    assert relative(y, x @ weight.T) < 1e-11


@pytest.mark.parametrize("fold", FOLDS.values(), ids=FOLDS)
def test_a_low_rank_update_follows_its_weight(fold):
    down, up = randn(4, K), randn(N, 4, seed=4)
    moved_down, moved_up = fold.fold_low_rank(down, up)
    assert relative(moved_up @ moved_down, fold.fold(up @ down)) < 1e-5


def test_rows_before_the_first_are_not_turned():
    fold = Fold(row_rotation=64, first_row=FIRST)
    weight = randn(N, K)
    folded = fold.fold(weight)
    assert torch.equal(folded[:FIRST], weight[:FIRST])
    assert relative(folded[FIRST:], weight[FIRST:]) > 0.5
    assert relative(folded[FIRST:].norm(), weight[FIRST:].norm()) < 1e-6


@pytest.mark.parametrize(
    ("fold", "message"),
    [
        (Fold(smooth=torch.ones(K - 1)), "folded smooth do not fit"),
        (Fold(rows=torch.ones(K)), "folded rows do not fit"),
        (Fold(rotation=5), "unknown rotation group"),
        (Fold(row_rotation=256, first_row=FIRST), "does not divide"),
    ],
)
def test_folds_of_another_size_are_refused(fold, message):
    weight = QuantizedTensor.from_float(randn(N, K), "Ideogram4QuantInt8")
    with pytest.raises(OpError, match=message):
        layouts.folded_tensor(weight, fold)


# ---- folded weights

KINDS = {
    "int8": ("Ideogram4QuantInt8", {}, 0.013),
    "int8 rotated": ("Ideogram4QuantInt8", {"rotation": 256}, 0.013),
    "Q8_0": ("Ideogram4QuantGGUF", {"qtype": "Q8_0"}, 0.009),
    "Q4_K": ("Ideogram4QuantGGUF", {"qtype": "Q4_K"}, 0.11),
}


def make(kind, fold, weight):
    layout, options, _ = KINDS[kind]
    stored = QuantizedTensor.from_float(fold.fold(weight), layout, **options)
    return layouts.folded_tensor(stored.to(weight.dtype), fold), stored


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fold", FOLDS.values(), ids=FOLDS)
def test_forward_takes_and_gives_original_coordinates(kind, fold, mode):
    weight, x, bias = randn(N, K), randn(2, 5, K, seed=3), randn(N, seed=5)
    folded, stored = make(kind, fold, weight)
    dense = LinearOptions(gguf_compute="dense")
    want = fold.unfold_output(linear(fold.fold_input(x), stored, None, dense)) + bias
    assert relative(linear(x, folded, bias, dense), want) < 1e-5
    assert relative(F.linear(x, folded, bias), want) < (0.02 if kind == "Q4_K" else 1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fold", FOLDS.values(), ids=FOLDS)
def test_the_dense_fallback_is_the_same_linear(kind, fold, mode):
    """The host multiplies by dequantize() where a patch is made at each call."""
    weight, x = randn(N, K), randn(5, K, seed=3)
    folded, stored = make(kind, fold, weight)
    want = fold.unfold_output(F.linear(fold.fold_input(x), stored.dequantize()))
    assert relative(F.linear(x, folded.dequantize()), want) < 1e-5
    assert relative(folded.dequantize(), fold.unfold(stored.dequantize())) < 1e-6


def test_a_gradient_is_that_of_the_original_weight():
    folded, _ = make("int8", FOLDS["all"], randn(N, K))
    x = randn(5, K, seed=3).requires_grad_()
    linear(x, folded).sum().backward()
    assert relative(x.grad, folded.dequantize().sum(0).expand(5, K)) < 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_a_patched_weight_is_encoded_in_the_folded_basis_again(kind, mode):
    fold, weight = FOLDS["all"], randn(N, K)
    delta = 0.3 * randn(N, 4, seed=6) @ randn(4, K, seed=7)
    folded, _ = make(kind, fold, weight)
    patched = folded.requantize_from_float(folded.dequantize() + delta, scale="recalculate")
    _, wanted = make(kind, fold, folded.dequantize() + delta)
    assert patched._layout_cls == folded._layout_cls
    assert relative(patched._qdata, wanted._qdata) < 1e-3 or kind == "Q4_K"
    error = fold.fold(patched.dequantize() - folded.dequantize() - delta)
    assert error.norm() / fold.fold(weight + delta).norm() < KINDS[kind][2]


@pytest.mark.parametrize("kind", KINDS)
def test_the_thirds_of_a_folded_qkv_stay_quantized(kind, mode):
    folded, _ = make(kind, FOLDS["all"], randn(N, K))
    dense, x = folded.dequantize(), randn(5, K, seed=3)
    for parts in (folded.chunk(3), folded.split([128, 128, 128])):
        assert all(isinstance(part, QuantizedTensor) for part in parts)
        assert torch.equal(torch.cat([part.dequantize() for part in parts]), dense)
        whole = torch.cat([F.linear(x, part) for part in parts], 1)
        assert relative(whole, F.linear(x, folded)) < 1e-5
    straddling, one_group = folded[100 : FIRST + 64], folded[FIRST + 64 :]
    for part, want in ((straddling, dense[100 : FIRST + 64]), (one_group, dense[FIRST + 64 :])):
        assert isinstance(part, QuantizedTensor)
        assert torch.equal(part.dequantize(), want)
    assert torch.equal(folded.t()[:, FIRST:].dequantize(), dense[FIRST:].t())


def test_a_slice_through_a_rotated_group_is_dense_and_right(mode):
    folded, _ = make("int8", FOLDS["all"], randn(N, K))
    dense = folded.dequantize()
    for part, want in (
        (folded[FIRST + 1 :], dense[FIRST + 1 :]),
        (folded[::3], dense[::3]),
        (folded.t()[:, 5 : FIRST + 1], dense.t()[:, 5 : FIRST + 1]),
    ):
        assert type(part) is torch.Tensor
        assert torch.equal(part, want)
    assert isinstance(folded[:FIRST:2], QuantizedTensor)


def test_quantized_rows_are_taken_where_the_input_is_not_folded(mode):
    """As the fused block hands them over."""
    weight, x, bias = randn(N, K), randn(5, K, seed=3), randn(N, seed=5)
    options = LinearOptions()
    folded, _ = make("int8 rotated", FOLDS["rows of v, rotated"], weight)
    layout = folded.layout_cls
    recipe = layout.input_recipe(folded, 5, x.dtype, options)
    assert recipe == (None, 256)
    q, scale = reference.smooth_rotate_quantize_rows(x, *recipe)
    y = layout.multiply_rows(q, scale, folded, bias, x.dtype, options)
    assert relative(y, linear(x, folded, bias)) < 1e-6
    inputs_too, _ = make("int8 rotated", FOLDS["all"], weight)
    assert layout.input_recipe(inputs_too, 5, x.dtype, options) is None


def test_only_layouts_that_are_written_folded_can_be():
    weight = QuantizedTensor.from_float(randn(N, K), "Ideogram4QuantFP8")
    with pytest.raises(OpError, match="cannot be folded"):
        layouts.folded_tensor(weight, Fold(rotation=64))
