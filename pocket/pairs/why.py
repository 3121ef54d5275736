"""Why one copy's loss counts more than the other's: each cause measured apart from the others.

Both copies are asked for their velocity along the exact path, so that no error feeds back. What
enters the latents is ``a e_c - b e_u`` times the step's length; summed over the steps it is the
error that would be left without feedback.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ...engine.linear import QuantLinear
from ...engine.transformer import PackTransformer, canonical_name, prepare, velocity
from ..table.systems import REFERENCE, is_block_linear
from .copies import CONDITIONAL, UNCONDITIONAL, Copies, exact
from .settings import Setting
from .walk import GRID, Batch, both, steps

#: Whose error: of both copies; of the conditional one with the weights of the text's rows exact,
#: of the image's rows exact, and without text.
COPIES = (CONDITIONAL, UNCONDITIONAL)
SOURCES = (*COPIES, "text exact", "image exact", "without text")
GAIN_EVERY = 5


class RowsLinear(nn.Module):
    """A linear whose weight is one for text rows and another for the rows after them."""

    def __init__(self, text: QuantLinear, image: QuantLinear) -> None:
        super().__init__()
        self.text, self.image, self.tokens = text, image, 0

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] <= self.tokens:  # the modulation: one row for all tokens
            return self.image(x)
        parts = self.text(x[:, : self.tokens]), self.image(x[:, self.tokens :])
        return torch.cat(parts, dim=1)


def by_rows(copies: Copies, text: PackTransformer, image: PackTransformer) -> PackTransformer:
    """The conditional copy with the linears of ``text`` for its text rows."""
    model = copies.load(CONDITIONAL, copies.tensors(CONDITIONAL, REFERENCE))
    for name, module in list(model.named_modules()):
        if isinstance(module, QuantLinear) and is_block_linear(canonical_name(f"{name}.weight")):
            model.set_submodule(
                name, RowsLinear(text.get_submodule(name), image.get_submodule(name))
            )
    return model


def _with_text(model: PackTransformer, tokens: int) -> PackTransformer:
    for module in model.modules():
        if isinstance(module, RowsLinear):
            module.tokens = tokens
    return model


class Errors:
    """Errors along the exact path of all cases, fp64.

    entering: source -> [steps, cases, N * C] of what enters the latents. shares: copy -> [cases],
    the energy of what the exact copy puts in, summed over the steps.
    """

    def __init__(self, cases: int) -> None:
        self.entering: dict[str, list[Tensor]] = {name: [] for name in SOURCES}
        self.shares = {copy: torch.zeros(cases, dtype=torch.float64) for copy in COPIES}

    def summed(self, source: str) -> Tensor:
        """[cases, N * C]: what is left in the final latents without feedback."""
        return torch.stack(self.entering[source]).sum(0)

    def energy(self, source: str) -> Tensor:
        """[cases]: of :meth:`summed`."""
        return self.summed(source).square().sum(1)

    def figures(self, setting: Setting) -> dict[str, list[float]]:
        """Name -> a value a case, in dB (the cosine in parts of 1):

        ``own SQNR`` of each copy's velocity, whatever its scale and the guidance; ``entering``, by
        how much the conditional copy's error is the louder one as it enters the latents, and
        ``own error`` the same less guidance and scale; what is left of the conditional copy's with
        ``text exact``, ``image exact`` and ``without text``; ``cosine`` of both copies' errors,
        which cancel where it is positive.
        """
        first, second = self.energy(CONDITIONAL), self.energy(UNCONDITIONAL)
        a, b = setting.true_factors
        noise = {c: sum(e.square().sum(1) for e in self.entering[c]) for c in COPIES}
        found = {f"own SQNR, {c}": _db(self.shares[c] / noise[c]) for c in COPIES}
        found["entering"] = _db(first / second)
        found["own error"] = _db(first / second * (b / a) ** 2)
        found |= {name: _db(self.energy(name) / first) for name in SOURCES[2:]}
        both_of = self.summed(CONDITIONAL), self.summed(UNCONDITIONAL)
        found["cosine"] = nn.functional.cosine_similarity(*both_of)
        return {name: values.tolist() for name, values in found.items()}


def _db(ratio: Tensor) -> Tensor:
    return 10 * ratio.log10()


def errors(copies: Copies, level: str, setting: Setting, parts: Sequence[Batch]) -> Errors:
    """The errors of ``level`` in either copy along the exact path."""
    found = Errors(sum(len(batch.cases) for batch in parts))
    true, lossy = exact(copies), copies.pair(level, level)
    rows = {
        "text exact": by_rows(copies, true[0], lossy[0]),
        "image exact": by_rows(copies, lossy[0], true[0]),
    }
    paths = [_along(true, lossy, rows, setting, batch, found) for batch in parts]
    order = torch.tensor([i for batch in parts for i in batch.cases]).argsort()
    for source in SOURCES:
        by_step = zip(*(path[source] for path in paths), strict=True)
        found.entering[source] = [torch.cat(step)[order] for step in by_step]
    return found


def _along(
    true_models: tuple[PackTransformer, PackTransformer],
    lossy_models: tuple[PackTransformer, PackTransformer],
    rows: dict[str, PackTransformer],
    setting: Setting,
    batch: Batch,
    found: Errors,
) -> dict[str, list[Tensor]]:
    true = both(true_models, setting.factors, batch)
    lossy = both(lossy_models, setting.factors, batch)
    bare = prepare(true.models[0], *GRID)
    a = setting.factors[0]
    places = torch.tensor(batch.cases)
    out: dict[str, list[Tensor]] = {name: [] for name in SOURCES}
    x = batch.noise
    for step in steps():
        length = step.sigma - step.sigma_next
        exactly = true.velocities(x, step.time)
        changes = {
            copy: loss - this
            for copy, this, loss in zip(
                COPIES, exactly, lossy.velocities(x, step.time), strict=True
            )
        }
        for source, model in rows.items():
            found_here = velocity(_with_text(model, batch.text), x, step.time, true.prepared[0])
            changes[source] = a * found_here - exactly[0]
        alone = [velocity(m.models[0], x, step.time, bare) for m in (lossy, true)]
        changes["without text"] = a * (alone[0] - alone[1])
        for source, change in changes.items():
            out[source].append((length * change).double().flatten(1))
        for copy, this in zip(COPIES, exactly, strict=True):
            found.shares[copy][places] += (length * this).double().square().sum((1, 2))
        x = x + length * (exactly[0] - exactly[1])
    return out


def gains(
    copies: Copies, level: str, setting: Setting, parts: Sequence[Batch]
) -> dict[str, list[float]]:
    """Source -> dB at every fifth step: energy of the final error over that of one step's error.

    One step's error of either copy, or noise as loud as the conditional copy's, is put into the
    exact path, which then goes on exactly. Means over cases of the decibels.
    """
    at = range(0, len(steps()), GAIN_EVERY)
    sums = {name: [0.0] * len(at) for name in ("conditional", "unconditional", "noise")}
    cases = sum(len(batch.cases) for batch in parts)
    for batch in parts:
        true = both(exact(copies), setting.factors, batch)
        lossy = both(copies.pair(level, level), setting.factors, batch)
        path = torch.cat([batch.noise[None], true.walk(batch.noise, steps())])
        for place, k in enumerate(at):
            step, rest = steps()[k], steps()[k + 1 :]
            pairs = zip(
                lossy.velocities(path[k], step.time), true.velocities(path[k], step.time),
                strict=True,
            )  # fmt: skip
            put = [(step.sigma - step.sigma_next) * (loss - exactly) for loss, exactly in pairs]
            noise = torch.randn(put[0].shape, generator=torch.Generator().manual_seed(k))
            put.append(noise * put[0].norm() / noise.norm())
            for name, change in zip(sums, put, strict=True):
                start = path[k + 1] + change
                last = true.walk(start, rest)[-1] if rest else start
                over = (last - path[-1]).double().square().sum((1, 2))
                ratio = over / change.double().square().sum((1, 2))
                sums[name][place] += float((10 * ratio.log10()).sum()) / cases
    return sums
