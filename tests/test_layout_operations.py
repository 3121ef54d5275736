"""What a weight goes through and stays quantized: moves, copies, slices, transposes, patches."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from comfy_kitchen.tensor import QuantizedTensor

from ideogram4_quant.tests.layout_cases import (
    BLOCKS,
    KINDS,
    ROUNDED_TWICE,
    SHARED,
    W4A8,
    K,
    identical,
    make,
)
from ideogram4_quant.tests.tensors import randn, relative

torch.set_num_threads(1)

SLICEABLE = [name for name in KINDS if name not in SHARED]

# ---- moving and copying


@pytest.mark.parametrize("kind", KINDS)
def test_copies_keep_everything(kind, mode):
    qt = make(kind, randn(12, K))
    before = qt.clone()
    for other in (
        qt.clone(),
        qt.detach(),
        qt.contiguous(),
        qt.to("cpu", copy=True),
        qt.to(torch.bfloat16).to(torch.float32),
        qt.to("cpu", torch.bfloat16).to(device="cpu", dtype=torch.float32),
        qt.to("cpu", torch.float32, True),
        qt.to(device="cpu", dtype=torch.float32, copy=True),
        qt.bfloat16().to(torch.zeros(1)),
        qt.bfloat16().float().cpu(),
        torch.nn.Parameter(qt, requires_grad=False),
        qt.t().t(),
    ):
        assert isinstance(other, QuantizedTensor)
        assert identical(other, qt)
    target = torch.empty_like(qt, dtype=torch.bfloat16)
    target.copy_(qt)
    assert target.dtype == torch.bfloat16
    if kind.startswith(ROUNDED_TWICE):
        assert relative(target.dequantize().float(), qt.dequantize()) < 0.005
    else:
        assert torch.equal(target.dequantize(), qt.dequantize().bfloat16())
    target._qdata.view(torch.uint8).fill_(1)
    for name in target._params._tensor_fields():
        getattr(target._params, name).fill_(2)
    assert identical(before, qt)


@pytest.mark.parametrize("kind", KINDS)
def test_modules_move_their_weights(kind, mode):
    """Module.to hands device and dtype to the tensor at once."""
    qt = make(kind, randn(12, K))
    module = torch.nn.Linear(K, 12)
    module.weight = torch.nn.Parameter(qt, requires_grad=False)
    module.to(device="cpu", dtype=torch.bfloat16)
    assert isinstance(module.weight, QuantizedTensor)
    assert module.weight.dtype == torch.bfloat16
    assert identical(module.weight.float(), qt)


@pytest.mark.parametrize("kind", KINDS)
def test_moved_to_another_device(kind, mode):
    qt = make(kind, randn(12, K))
    meta = qt.to("meta", torch.bfloat16)
    assert isinstance(meta, QuantizedTensor)
    assert meta.device.type == "meta"
    assert all(
        getattr(meta._params, name).device.type == "meta" for name in meta._params._tensor_fields()
    )
    assert meta.shape == qt.shape


def test_copy_between_weights_with_and_without_smoothing(mode):
    plain, smooth = make("int8", randn(12, K)), make("int8 smooth rotated", randn(12, K, seed=1))
    plain.copy_(smooth)
    assert identical(plain, smooth)
    smooth.copy_(make("int8", randn(12, K, seed=2)))
    assert smooth._params.smooth is None
    assert smooth._params.rotation is None


@pytest.mark.parametrize("kind", KINDS)
def test_inference_tensors_move_in_both_modes(kind):
    """What the host does: made inside inference mode, moved inside and outside."""
    with torch.inference_mode():
        inside = make(kind, randn(12, K))
        moved = torch.empty_like(inside).copy_(inside)
    assert identical(moved, inside)
    assert identical(inside.clone().to(torch.bfloat16), inside.to(torch.bfloat16))


@pytest.mark.parametrize("kind", KINDS)
def test_flatten_and_unflatten(kind):
    qt = make(kind, randn(12, K))
    names, context = qt.__tensor_flatten__()
    inner = {name: getattr(qt, name).clone() for name in names}
    again = QuantizedTensor.__tensor_unflatten__(inner, context, qt.shape, qt.stride())
    assert identical(again, qt)


@pytest.mark.parametrize("kind", KINDS)
def test_state_dict_has_an_empty_key_and_every_tensor(kind):
    qt = make(kind, randn(12, K))
    tensors = qt.state_dict("layer.weight")
    assert tensors["layer.weight"] is qt._qdata
    fields = 1 + len(qt._params._tensor_fields())
    assert len(tensors) == fields + kind.startswith("nf4")  # bitsandbytes has a text beside them
    assert len(qt.layout_cls.get_plain_tensors(qt)) == fields
    if kind.startswith("int8"):
        assert tensors["layer.weight_scale"].shape == (12, 1)
    module = torch.nn.Linear(K, 12, bias=False)
    module.weight = torch.nn.Parameter(qt, requires_grad=False)
    assert identical(module.state_dict()["weight"], qt)


# ---- row slices and transposes


@pytest.mark.parametrize("kind", SLICEABLE)
def test_row_slices_stay_quantized_and_share_storage(kind, mode):
    qt = make(kind, randn(12, K))
    dense = qt.dequantize()
    for part, want in (
        (qt[3:8], dense[3:8]),
        (qt[-4:], dense[-4:]),
        (qt[:0], dense[:0]),
        (qt[1:11:3], dense[1:11:3]),
        (qt[3:8][1:3], dense[4:6]),
        (qt[3:8, :], dense[3:8]),
        (qt.narrow(0, 2, 5), dense[2:7]),
        (qt.narrow(0, -5, 5), dense[-5:]),
        (qt.t()[:, 3:8], dense[3:8].t()),
    ):
        assert isinstance(part, QuantizedTensor)
        assert part.shape == want.shape
        assert torch.equal(part.dequantize(), want)
        if part.numel():
            inside = part._qdata.data_ptr() - qt._qdata.data_ptr()
            assert 0 <= inside < qt._qdata.nbytes


@pytest.mark.parametrize("kind", SLICEABLE)
def test_a_fused_weight_splits_into_its_layers(kind, mode):
    qt = make(kind, randn(12, K))
    x, dense = randn(3, K), qt.dequantize()
    for parts in (qt.chunk(3), qt.split(4), qt.split([4, 4, 4]), torch.chunk(qt, 3, dim=0)):
        assert len(parts) == 3
        assert all(isinstance(part, QuantizedTensor) for part in parts)
        assert torch.equal(torch.cat([part.dequantize() for part in parts]), dense)
        whole = F.linear(x, qt)
        assert torch.allclose(torch.cat([F.linear(x, part) for part in parts], 1), whole, atol=1e-5)
    assert [part.shape[0] for part in qt.split(5)] == [5, 5, 2]
    assert [part.shape[0] for part in qt.chunk(5)] == [3, 3, 3, 3]


@pytest.mark.parametrize("kind", SHARED)
def test_what_cannot_stay_quantized_is_still_right(kind, mode):
    qt = make(kind, randn(12, K))
    dense = qt.dequantize()
    for part, want in ((qt[3:8], dense[3:8]), (qt[:, 2:9], dense[:, 2:9]), (qt[5], dense[5])):
        assert type(part) is torch.Tensor
        assert torch.equal(part, want)
    assert isinstance(qt[:], QuantizedTensor)
    with pytest.raises(RuntimeError, match="exceed"):
        qt.narrow(0, 9, 4)


@pytest.mark.parametrize("kind", KINDS)
def test_transposes_are_flags(kind, mode):
    qt = make(kind, randn(12, K))
    for other in (qt.t(), qt.T, qt.transpose(0, 1), qt.transpose(-1, -2), qt.permute(1, 0)):
        assert isinstance(other, QuantizedTensor)
        assert other._params.transposed
        assert other._qdata.data_ptr() == qt._qdata.data_ptr()
        assert torch.equal(other.dequantize(), qt.dequantize().t())
    assert identical(qt.permute(0, 1), qt)


@pytest.mark.parametrize("kind", KINDS)
def test_matmul_with_the_transposed_weight_is_linear(kind, mode):
    qt, x = make(kind, randn(12, K)), randn(5, K)
    want = F.linear(x, qt)
    assert torch.equal(x @ qt.t(), want)
    assert torch.equal(torch.mm(x, qt.T), want)
    assert torch.equal(torch.addmm(torch.ones(12), x, qt.mT), F.linear(x, qt, torch.ones(12)))
    got = torch.addmm(torch.ones(12), x, qt.t(), alpha=2)
    assert torch.allclose(got, 1 + 2 * (x @ qt.dequantize().t()), atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_other_operations_see_the_dense_weight(kind, mode):
    qt = make(kind, randn(12, K))
    dense = qt.dequantize()
    assert torch.equal(qt + 1, dense + 1)
    assert torch.equal(torch.cat((qt, qt)), torch.cat((dense, dense)))
    y = randn(5, 12)
    assert torch.equal(torch.mm(y, qt), torch.mm(y, dense))


# ---- patching, as the host does it


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", [None, 0, 4123456789])
def test_a_patched_weight_goes_back_into_its_own_layout(kind, seed, mode):
    weight = randn(24, K) * 0.02
    qt = make(kind, weight.to(torch.bfloat16))
    delta = (randn(24, 4, seed=1) @ randn(4, K, seed=2)) * 0.002
    patched = qt.to(torch.float32, copy=True).dequantize() + delta
    kept = patched.clone()
    again = qt.requantize_from_float(
        patched, scale="recalculate", stochastic_rounding=seed, inplace_ops=True
    ).to(qt.dtype)
    assert torch.equal(patched, kept)
    assert again._layout_cls == qt._layout_cls
    assert again.dtype == torch.bfloat16
    assert again._qdata.shape == qt._qdata.shape
    for name in ("rotation", "qtype", "block_size"):
        assert getattr(again._params, name, None) == getattr(qt._params, name, None)
    noise = 1.0 if not seed or KINDS[kind][0] in BLOCKS else 1.6
    assert relative(again.dequantize(), patched) < noise * KINDS[kind][2] + 2e-3
    qt.copy_(again)
    assert identical(qt, again)


@pytest.mark.parametrize("kind", [k for k in KINDS if k not in ("nf4", "nf4 across rows")])
def test_requantizing_unchanged_weights_changes_nothing(kind):
    qt = make(kind, randn(24, K))
    again = qt.requantize_from_float(qt.dequantize(), scale="recalculate", stochastic_rounding=0)
    searched = kind == "Q4_K" or KINDS[kind][0] == W4A8  # scales are sought, not computed
    assert relative(again.dequantize(), qt.dequantize()) < (0.02 if searched else 1e-6)


@pytest.mark.parametrize("kind", [k for k in KINDS if KINDS[k][0] not in BLOCKS])
def test_stochastic_rounding_has_the_right_mean_and_a_seed(kind):
    weight = randn(3, K, seed=5) * 0.02
    one, same, other = (
        make(kind, weight, stochastic_rounding=s).dequantize() for s in (11, 11, 12)
    )
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    nearest = make(kind, weight).dequantize()
    draws = [make(kind, weight, stochastic_rounding=s).dequantize() for s in range(1, 65)]
    mean = torch.stack(draws).mean(0)
    # comfy-kitchen's codes with zeros end at the group's extremes, which the noise crosses
    assert relative(mean, weight) < relative(nearest, weight) / (
        2.2 if kind == "w4a8 zeros" else 2.5
    )
