"""What writes to a quantized weight, copies it or saves it does so, or raises an error in words."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import safetensors.torch
import torch
from comfy_kitchen.tensor import QuantizedTensor

from ideogram4_quant.errors import OpError
from ideogram4_quant.ops.layouts import Weight
from ideogram4_quant.tests.layout_cases import KINDS, SHARED, K, identical, make
from ideogram4_quant.tests.tensors import randn, relative

torch.set_num_threads(1)
N = 12
D = randn(N, K, seed=5)
ROWS_APART = [kind for kind in KINDS if kind not in (*SHARED, "fp8 tensor")]


def weight(kind: str) -> Weight:
    """As the loader makes it."""
    qt = make(kind, randn(N, K))
    return Weight(qt._qdata, qt._layout_cls, qt._params)


def set_rows(w):
    w[0] = 1.0
    w[2:5] = D[2:5]


def set_columns(w):
    w[:, 3] = 0.5
    w[:, :16] += 0.25


def add_to_row(w):
    w[0] += D[0]
    w[5] -= D[5]


def masked(w):
    w[D > 0] = 0.0


def into_out(w):
    torch.add(w, D, out=w)


def swapped(w):
    w.t().add_(D.t())


# what merging code writes: the same statement on floats is the right result
CHANGES = {
    "add_": lambda w: w.add_(D),
    "add_ alpha": lambda w: w.add_(D, alpha=0.5),
    "+=": lambda w: w.__iadd__(D),
    "*=": lambda w: w.__imul__(0.5),
    "mul_ of itself": lambda w: w.mul_(w),
    "lerp_": lambda w: w.lerp_(D, 0.3),
    "addmm_": lambda w: w.addmm_(D[:, :4] * 0.2, D[:4]),
    "clamp_": lambda w: w.clamp_(-1, 1),
    "zero_": lambda w: w.zero_(),
    "fill_": lambda w: w.fill_(0.25),
    "copy_": lambda w: w.copy_(D),
    "data": lambda w: w.data.add_(D),
    "index_add_": lambda w: w.index_add_(0, torch.tensor([1, 4]), D[:2]),
    "foreach": lambda w: torch._foreach_add_([w], [D]),
    "out=": into_out,
    "transposed": swapped,
    "w[0] = x": set_rows,
    "w[:, 3] = x": set_columns,
    "w[0] += x": add_to_row,
    "w[mask] = x": masked,
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_change_is_quantized_again(kind, change, mode):
    w = weight(kind)
    memory, wanted = w._qdata.data_ptr(), w.dequantize().clone()
    CHANGES[change](w)
    CHANGES[change](wanted)
    assert w._qdata.data_ptr() == memory
    found = w.dequantize()
    bound = 3 * KINDS[kind][2] + 1e-3
    assert (found - wanted).norm() <= bound * max(wanted.norm(), 1e-3), change
    assert relative(w.to(torch.bfloat16).dequantize().float(), found) < 4e-3 or not wanted.any()


@pytest.mark.parametrize("kind", KINDS)
def test_the_operation_returns_the_weight_it_changed(kind, mode):
    w = weight(kind)
    before = w
    assert w.add_(D) is w
    w += D
    assert w is before
    assert torch.add(w, D, out=w) is w


@pytest.mark.parametrize("kind", ROWS_APART)
def test_a_change_of_rows_is_one_of_the_weight(kind, mode):
    w = weight(kind)
    wanted = w.dequantize().clone()
    w[4:8].add_(D[4:8])
    wanted[4:8] += D[4:8]
    found = w.dequantize()
    assert torch.equal(found[:4], wanted[:4])
    assert torch.equal(found[8:], wanted[8:])
    assert relative(found[4:8], wanted[4:8]) < 3 * KINDS[kind][2]


@pytest.mark.parametrize("kind", KINDS)
def test_a_view_of_all_writes_through_and_a_copy_does_not(kind, mode):
    for view in (lambda w: w[:], lambda w: w.detach(), lambda w: w.t().t(), lambda w: w.data[:]):
        w = weight(kind)
        wanted = w.dequantize() + D
        view(w).add_(D)
        assert relative(w.dequantize(), wanted) < 3 * KINDS[kind][2]
    for copied in (
        lambda w: w.to(torch.bfloat16),
        lambda w: w.to("cpu", torch.bfloat16),
        lambda w: w.bfloat16().detach()[:],
        lambda w: w.clone(),
        lambda w: w.to(w.device, copy=True),
    ):
        w = weight(kind)
        before, other = w.clone(), copied(w)
        other.add_(D.to(other.dtype))
        assert identical(w, before)
        assert relative(other.dequantize().float(), w.dequantize() + D) < 3 * KINDS[kind][2] + 0.01


def test_rows_that_share_their_scale_are_not_changed_alone():
    w = weight("fp8 tensor")
    before = w.clone()
    with pytest.raises(OpError, match="share their scale"):
        w[4:8].mul_(3)
    assert identical(w, before)


@pytest.mark.parametrize("kind", KINDS)
def test_what_cannot_be_a_weight_is_refused_and_changes_nothing(kind, mode):
    w = weight(kind)
    before = w.clone()
    for change, words in (
        (lambda: w.mul_(float("nan")), "NaN or infinity"),
        (lambda: w[0].shape and w.__setitem__(0, float("inf")), "NaN or infinity"),
        (lambda: w.t_(), "keeps its shape"),
        (lambda: w.unsqueeze_(0), "keeps its shape"),
    ):
        with pytest.raises(OpError, match=words):
            change()
    assert identical(w, before)


@pytest.mark.parametrize("kind", KINDS)
def test_a_float_tensor_takes_a_weight(kind, mode):
    w = weight(kind)
    assert torch.equal(torch.empty(N, K).copy_(w), w.dequantize())
    assert torch.equal(torch.zeros(N, K).add_(w), w.dequantize())
    other = weight("Q8_0")
    assert relative(other.copy_(w).dequantize(), w.dequantize()) < 0.01


def test_one_layout_is_copied_to_the_bit(mode):
    for kind in KINDS:
        w, v = weight(kind), make(kind, D)
        assert identical(w.copy_(v), v)


def test_a_tensor_that_comfy_kitchen_made_of_our_layout_changes_too():
    for kind in KINDS:
        qt = make(kind, randn(N, K))
        wanted = qt.dequantize() + D
        assert type(qt) is QuantizedTensor
        assert relative(qt.add_(D).dequantize(), wanted) < 3 * KINDS[kind][2]


# ---- copies and files


@pytest.mark.parametrize("kind", KINDS)
def test_copies_are_whole(kind, mode):
    module = torch.nn.Linear(K, N, bias=False)
    module.weight = torch.nn.Parameter(weight(kind), requires_grad=False)
    module.again = module.weight
    saved = io.BytesIO()
    torch.save(module.state_dict(), saved)
    saved.seek(0)
    copied = copy.deepcopy(module)
    others = (
        copied.weight,
        copy.deepcopy(module.weight),
        pickle.loads(pickle.dumps(module.weight)),  # noqa: S301 (our own bytes)
        torch.load(saved, weights_only=False)["weight"],
    )
    for other in others:
        assert identical(other, module.weight)
        assert other._qdata.data_ptr() != module.weight._qdata.data_ptr()
    assert isinstance(copied.weight, torch.nn.Parameter)
    assert copied.again is copied.weight
    before = module.weight.clone()
    with torch.no_grad():
        copied.weight.zero_()
    assert identical(module.weight, before)


@pytest.mark.parametrize("kind", KINDS)
def test_safetensors_refuses_what_it_would_write_as_rubbish(kind, mode, tmp_path):
    w = weight(kind).to(torch.bfloat16)
    parameter = torch.nn.Parameter(w, requires_grad=False)
    module = torch.nn.Linear(K, N, bias=False)
    module.weight = parameter
    path = tmp_path / "saved.safetensors"
    for save in (
        lambda: safetensors.torch.save_file({"w": w}, path),
        lambda: safetensors.torch.save_file({"w": parameter, "v": torch.ones(2)}, path),
        lambda: safetensors.torch.save({"w": w[:]}),
        lambda: safetensors.torch.save_model(module, str(path)),
    ):
        with pytest.raises(OpError, match="state_dict") as raised:
            save()
        assert "dequantize" in str(raised.value)
        assert not path.exists()
    safetensors.torch.save_file(w.state_dict("w"), path)
    assert torch.equal(
        safetensors.torch.load_file(path)["w"].view(torch.uint8), w._qdata.view(torch.uint8)
    )
    safetensors.torch.save_file({"w": w.dequantize()}, path)
    assert torch.equal(safetensors.torch.load_file(path)["w"], w.dequantize())


# ---- which operations keep a weight quantized

QUANTIZED = {
    "detach": lambda w: w.detach(),
    "clone": lambda w: w.clone(),
    "contiguous": lambda w: w.contiguous(),
    "to dtype": lambda w: w.to(torch.bfloat16),
    "t": lambda w: w.t(),
    ".T": lambda w: w.T,
    ".mT": lambda w: w.mT,
    "transpose": lambda w: w.transpose(0, 1),
    "permute": lambda w: w.permute(1, 0),
    "empty_like": torch.empty_like,
    "deepcopy": copy.deepcopy,
    "pickle": lambda w: pickle.loads(pickle.dumps(w)),  # noqa: S301 (our own bytes)
    "torch.save": lambda w: _saved(w),
    "Parameter": lambda w: torch.nn.Parameter(w, requires_grad=False),
    "in place": lambda w: w.mul_(2),
}


def _saved(w):
    file = io.BytesIO()
    torch.save(w, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


OF_ROWS = {
    "w[a:b]": lambda w: w[2:5],
    "narrow": lambda w: w.narrow(0, 1, 3),
    "split": lambda w: w.split(4)[1],
    "chunk": lambda w: w.chunk(3)[2],
}
FLOATS = {
    "w + x": lambda w: w + D,
    "w @ x": lambda w: w @ D.t(),
    "w[0]": lambda w: w[0],
    "columns": lambda w: w[:, 2:5],
    "reshape": lambda w: w.reshape(-1),
    "view": lambda w: w.view(-1),
    "abs": lambda w: w.abs(),
    "cat": lambda w: torch.cat([w, w]),
    "dequantize": lambda w: w.dequantize(),
    "linear": lambda w: torch.nn.functional.linear(D, w),
    "numpy": lambda w: torch.from_numpy(w.numpy()),
}


@pytest.mark.parametrize("kind", KINDS)
def test_which_operations_keep_a_weight_quantized(kind, mode):
    w = weight(kind)
    for name, operation in QUANTIZED.items():
        assert type(operation(w)) in (Weight, torch.nn.Parameter), name
        assert isinstance(operation(w), Weight), name
    for name, operation in OF_ROWS.items():
        assert isinstance(operation(w), Weight) == (kind not in SHARED), name
    for name, operation in FLOATS.items():
        found = operation(w)
        assert type(found) is torch.Tensor, name
        assert torch.equal(found, operation(w)), name
    assert torch.equal(torch.from_numpy(w.numpy()), w.dequantize())
