"""What folding does to the function: nothing, and what rounding leaves of that."""

from __future__ import annotations

import pytest
import torch

from ideogram4_quant.checkpoint.folding import Folding, sites
from ideogram4_quant.ops.rotation import rotate
from ideogram4_quant.quant.treatments import smooth_factors
from ideogram4_quant.tests import fixtures_fold as fold
from ideogram4_quant.tests import quant_model as model
from ideogram4_quant.tests.fold_writer import fold_tensor, remaining_factor
from ideogram4_quant.tests.tensors import relative

O0 = "layers.0.attention.o"


def random_folding(rotation=64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    smooth = {}
    for site in sites(2):
        width = model.shapes()[f"{site.consumers[0]}.weight"][1]
        factors = 2 ** torch.randn(width, generator=generator, dtype=torch.float64)
        smooth |= dict.fromkeys(site.consumers, factors)
    return Folding(smooth, {f"layers.{i}.attention.o": rotation for i in range(2)})


def block_inputs():
    generator = torch.Generator().manual_seed(1)
    shapes = ((40, 256), (11, 832), (4, 256))
    return [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]


def folded(state, folding):
    return {name: fold_tensor(name, tensor, folding) for name, tensor in state.items()}


def test_folding_leaves_the_function_as_it_is():
    state = {name: tensor.double() for name, tensor in model.weights(4).items()}
    wanted = fold.block(state, *block_inputs())
    changed = folded(state, random_folding())
    assert fold.db(fold.block(changed, *block_inputs()), wanted) > 200
    moved = [name for name in state if not torch.equal(changed[name], state[name])]
    assert (
        len(moved) == 1 + 1 + 2 * 7
    )  # llm_cond_norm and _proj; two norms and five linears a layer


def test_what_rounding_to_bf16_leaves():
    """The rounding of the norms costs nothing where the linears take what remains of the factor."""
    state = {name: tensor.double() for name, tensor in model.weights(4).items()}
    wanted = fold.block(state, *block_inputs())
    planned = random_folding()
    remaining = {
        consumer: remaining_factor(
            state[f"{site.producer}.weight"], planned.smooth[consumer]
        ).double()
        if "norm" in site.producer
        else planned.smooth[consumer]
        for site in sites(2)
        for consumer in site.consumers
    }

    def error(folding, rounded):
        changed = {
            name: tensor.bfloat16().double() if rounded(name) else tensor
            for name, tensor in folded(state, folding).items()
        }
        return fold.db(fold.block(changed, *block_inputs()), wanted)

    exact = Folding(remaining, planned.rotation)
    assert error(exact, lambda name: "norm" in name) > 130  # fp32 factors
    assert error(planned, lambda name: "norm" in name) < 60
    assert error(exact, lambda name: True) > 45


@pytest.mark.parametrize(
    ("what", "least"),
    [("w2 into w1", 0.05), ("rotation of w2", 0.3), ("rotation of qkv", 0.3), ("wide o", 0.3)],
)
def test_what_is_refused_would_change_the_function(what, least):
    state = {name: tensor.double() for name, tensor in model.weights(4).items()}
    wanted = fold.block(state, *block_inputs())
    changed = dict(state)

    def layer(name):
        return f"layers.0.{name}.weight"

    w1, w2, w3 = (layer(f"feed_forward.w{i}") for i in (1, 2, 3))
    if what == "w2 into w1":
        factors = random_folding().smooth["layers.0.feed_forward.w2"]
        changed[w1] = state[w1] / factors[:, None]
        changed[w2] = state[w2] * factors
    elif what == "rotation of w2":
        changed[w3] = rotate(state[w3].T.contiguous(), 256).T
        changed[w2] = rotate(state[w2], 256)
    elif what == "rotation of qkv":
        norm = layer("attention_norm1")
        changed[norm] = rotate(state[norm], 256)
        changed[layer("attention.qkv")] = rotate(state[layer("attention.qkv")], 256)
    else:  # heads are 128 wide
        changed |= folded(state, Folding({}, {O0: 256}))
    assert relative(fold.block(changed, *block_inputs()), wanted) > least


def test_factors_balance_activations_and_weights():
    x, w = torch.tensor([4.0, 1.0, 16.0, 0.0]), torch.tensor([1.0, 1.0, 4.0, 2.0])
    factors = smooth_factors(x, w, 0.5)
    assert torch.allclose(factors[:3].log().mean(), torch.zeros((), dtype=torch.float64))
    assert torch.allclose(factors[:3] / factors[1], torch.tensor([2.0, 1.0, 2.0]).double())
    assert factors[3] == 1
    assert torch.equal(smooth_factors(torch.zeros(3), w[:3]), torch.ones(3).double())
    assert torch.allclose(smooth_factors(x, w, 1.0)[:3] * 4, x[:3].double())


def test_the_remaining_factor_is_what_a_rounded_norm_takes():
    generator = torch.Generator().manual_seed(2)
    norm = torch.randn(500, generator=generator).bfloat16()
    norm[7] = 0
    factors = 4 ** torch.randn(500, generator=generator).double()
    remaining = remaining_factor(norm, factors)
    stored = (norm.float() / remaining).bfloat16()
    assert torch.equal(stored, (norm.double() / factors).bfloat16())
    assert torch.equal((stored.float() * remaining).bfloat16(), norm)
    assert remaining[7] == 1
    assert (remaining > 0).all()
    assert 1e-5 < (remaining.double() / factors - 1).abs()[norm != 0].max() < 2**-8
