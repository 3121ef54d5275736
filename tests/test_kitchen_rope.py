"""q/k norms and rotary embedding: the formula is diffusers', the kernel runs in the host's op."""

from __future__ import annotations

import threading

import comfy_kitchen
import pytest
import torch
import torch.nn.functional as F
from comfy_kitchen.registry import registry

from ideogram4_quant.ops import dispatch, kitchen_rope, prequantized, reference
from ideogram4_quant.ops.linear import LinearOptions
from ideogram4_quant.ops.tuning import choices
from ideogram4_quant.ops.tuning.choices import Key, Measurement, Table
from ideogram4_quant.ops.tuning.tuning_jobs import jobs
from ideogram4_quant.tests.tensors import randn, relative

EPS, SIZE, HEADS, TOKENS = 1e-5, 32, 3, 11
CPU = torch.device("cpu")


@pytest.fixture
def inputs():
    """q, k as views of one qkv, their weights, and the host's table of 2 x 2 matrices."""
    q, k, _ = randn(2, TOKENS, 3, HEADS, SIZE).unbind(2)
    angles = 40 * randn(1, TOKENS, 1, SIZE // 2, seed=1)
    cos, sin = angles.cos(), angles.sin()
    table = torch.stack((cos, -sin, sin, cos), -1).unflatten(-1, (2, 2))
    return q, k, table, 1 + 0.1 * randn(SIZE, seed=2), 1 + 0.1 * randn(SIZE, seed=3)


def test_the_formula_is_diffusers():
    """Its interleaved MRoPE, with positions of text and of an image."""
    from diffusers.models.transformers import transformer_ideogram4 as theirs

    q, k = randn(2, 2, 9, 3, 256)
    weights = 1 + 0.1 * randn(2, 256, seed=1)
    positions = torch.randint(0, 127, (2, 9, 3), generator=torch.Generator().manual_seed(0))
    positions[:, 4:] += theirs.IMAGE_POSITION_OFFSET
    cos, sin = theirs.Ideogram4MRoPE(256, 5_000_000, (24, 20, 20))(positions)
    found = reference.rms_rope(q, k, *weights, cos[..., :128], sin[..., :128], EPS)
    for x, weight, ours in zip((q, k), weights, found, strict=True):
        normed = F.rms_norm(x, (256,), weight, EPS)
        cosines, sines = cos.unsqueeze(2), sin.unsqueeze(2)
        assert relative(ours, normed * cosines + theirs._rotate_half(normed) * sines) < 1e-7


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_formula_is_comfy_kitchens_and_no_less_exact(inputs, dtype):
    q, k, table, *weights = inputs
    q, k = q.to(dtype), k.to(dtype)
    args = [t.to(dtype) for t in weights]
    theirs = comfy_kitchen.rms_rope_split_half(q, k, table, *args, EPS)
    ours = kitchen_rope.rms_rope_split_half(q, k, table, *args, EPS)
    for x, weight, a, b in zip((q, k), args, ours, theirs, strict=True):
        assert a.dtype == dtype
        wanted = exactly(x, table, weight)
        # in fp32 0.7e-7; a tenth of eps is 5e-6 off
        limit = 3e-7 if dtype == torch.float32 else 1.02 * relative(b, wanted)
        assert relative(a, wanted) <= limit


def exactly(x: torch.Tensor, table: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The norm and the products with the table's matrices, in double precision."""
    x = x.double()
    normed = x * (x.square().mean(-1, keepdim=True) + EPS).rsqrt() * weight.double()
    pairs = torch.stack(normed.chunk(2, -1), -1)  # [B, L, H, D / 2, 2]
    turned = (table.double() @ pairs[..., None])[..., 0]
    return torch.cat(turned.unbind(-1), -1)


@pytest.fixture
def ours(monkeypatch) -> list[str]:
    """The kernel pays; what is returned grows by a name whenever it is asked."""
    asked: list[str] = []
    own = kitchen_rope.rms_rope_split_half

    def counting(*args, **kwargs):
        asked.append(threading.current_thread().name)
        return own(*args, **kwargs)

    monkeypatch.setattr(kitchen_rope, "pays", lambda *_: True)
    monkeypatch.setattr(kitchen_rope, "rms_rope_split_half", counting)
    return asked


def test_inside_the_block_the_hosts_op_runs_on_our_kernel_and_nowhere_else(inputs, ours):
    q, k, table, *weights = inputs
    run = lambda: comfy_kitchen.rms_rope_split_half(q, k, table, *weights, EPS)
    before = run()
    assert not ours
    with kitchen_rope.on_our_kernel(table, (HEADS, SIZE), q):
        inside = run()
        other = threading.Thread(target=run)  # another model of the host's, say
        other.start()
        other.join()
        # an op that it has not goes where it went
        comfy_kitchen.apply_rope1(q, torch.zeros(1, TOKENS, 1, SIZE // 2, 2, 2))
    assert len(ours) == 1
    run()
    assert len(ours) == 1
    assert kitchen_rope.BACKEND not in registry._priority
    assert all(relative(a, b) < 1e-6 for a, b in zip(inside, before, strict=True))


def test_another_table_stays_the_hosts(inputs, ours):
    q, k, table, *weights = inputs
    flat = table.squeeze(2)
    with kitchen_rope.on_our_kernel(flat, (HEADS, SIZE), q):
        comfy_kitchen.rms_rope_split_half(q, k, table, *weights, EPS)
    assert not ours


def test_where_nothing_is_gained_the_hosts_op_stays():
    assert "comfy_kitchen" not in kitchen_rope.candidates(CPU, torch.float32, SIZE)
    assert not kitchen_rope.pays(CPU, torch.float32, (HEADS, SIZE), 4608)


@pytest.mark.parametrize(
    ("names", "seconds", "wanted"),
    [
        (("triton",), None, True),
        (("comfy_kitchen",), None, False),
        (("comfy_kitchen", "triton"), None, False),
        (("comfy_kitchen", "triton"), {"comfy_kitchen": 1.0, "triton": 0.9}, True),
        (("comfy_kitchen", "triton"), {"comfy_kitchen": 1.0, "triton": 1.1}, False),
        ((), None, False),
    ],
)
def test_the_faster_one_runs_where_both_are_there(
    names, seconds, wanted, monkeypatch, nothing_measured
):
    monkeypatch.setattr(kitchen_rope, "candidates", lambda *_: names)
    if seconds is not None:
        key = Key(choices.ROPE, 18, 256, 4608, "bfloat16")
        choices.remember(CPU, Table([Measurement(key, seconds)]))
    assert kitchen_rope.pays(CPU, torch.bfloat16, (18, 256), 4096) is wanted


def test_loading_measures_where_there_is_a_choice(monkeypatch):
    monkeypatch.setattr(kitchen_rope, "candidates", lambda *_: ("comfy_kitchen", "triton"))
    found = list(jobs((), CPU, torch.float32, LinearOptions(), None, 10**9, rope=(HEADS, SIZE)))
    (job,) = found
    functions = job.make(TOKENS)
    assert set(functions) == set(job.candidates) == {"comfy_kitchen", "triton"}
    a, b = (run() for run in functions.values())
    assert a.shape == b.shape == (1, TOKENS, HEADS, SIZE)
    assert "q and k norms and rotary embedding, 3 heads of 32" in str(job.key)


def test_the_custom_op_compiles(inputs):
    q, k, table, *weights = inputs
    cos, sin = table[:, :, 0, :, 0, 0], table[:, :, 0, :, 1, 0]
    arguments = (q, k, *weights, cos, sin, EPS, dispatch.AUTO)
    torch.library.opcheck(prequantized._rms_rope_op, arguments)


@pytest.mark.parametrize("way", ["custom op", "kitchen's op"])
def test_gradients_are_those_of_comfy_kitchens_formula(inputs, monkeypatch, way):
    def kernel(*args):  # as a kernel's, its result has no history
        return tuple(t.detach() for t in reference.rms_rope(*args))

    backend = dispatch.Backend("triton", {"rms_rope": kernel})
    monkeypatch.setattr(dispatch, "choose", lambda *args, **more: backend)
    _, _, table, *weights = inputs
    cos, sin = (table[:, :, 0, :, which, 0] for which in (0, 1))
    run = {
        "custom op": lambda q, k: prequantized.rms_rope(q, k, *weights, cos, sin, EPS, "auto"),
        "kitchen's op": lambda q, k: kitchen_rope.rms_rope_split_half(q, k, table, *weights, EPS),
    }
    found, wanted = (_gradients(inputs, f) for f in (run[way], _eager(table, weights)))
    for a, b in zip(found, wanted, strict=True):
        assert relative(a, b) < 1e-6


def _eager(table, weights):
    from comfy_kitchen.backends.eager import rope

    return lambda q, k: rope.rms_rope_split_half(q, k, table, *weights, EPS)


def _gradients(inputs, run) -> list[torch.Tensor]:
    leaves = [t.detach().clone().requires_grad_() for t in inputs[:2]]
    turned = run(*leaves)
    sum((t * randn(*t.shape, seed=9 + i)).sum() for i, t in enumerate(turned)).backward()
    return [t.grad for t in leaves]
