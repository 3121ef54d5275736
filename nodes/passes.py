"""The passes of a run: planned by the guidance, made by transformers, skipped by others' caches.

Caches of other nodes answer in the place of the guider, of a copy or of its transformer. So a pass
counts as made where the transformer itself ran: innermost, behind every wrapper that is there.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from comfy.patcher_extension import WrappersMP

from ..checkpoint.copies import CONDITIONAL, UNCONDITIONAL
from ..sampling import StepPlan

KEY = "ideogram4_quant_passes"
_COMPILED = "torch.compile"  # the host's key: what is behind such a wrapper is traced
_SAVINGS = {"reuse": "reused", "skip": "skipped at guidance 1"}


@dataclass
class Passes:
    """Counts of one run. evaluations: how often the sampler asked for a prediction; ``planned`` and
    ``made`` by copy; ``saved``: unconditional passes that the guidance leaves out, by reason."""

    evaluations: int = 0
    planned: Counter[str] = field(default_factory=Counter)
    made: Counter[str] = field(default_factory=Counter)
    saved: Counter[str] = field(default_factory=Counter)
    _calls: int = 0

    def asked(self, step: StepPlan, guided: bool) -> None:
        """A prediction of this step is asked for. guided: there is an unconditional copy."""
        self.evaluations += 1
        self.planned[CONDITIONAL] += 1
        if not guided:
            return
        if step.unconditional == "run":
            self.planned[UNCONDITIONAL] += 1
        else:
            self.saved[step.unconditional] += 1

    def watched(self, options: Mapping) -> dict:
        """Model options of a pass in which the transformer's runs are noticed."""
        inner = options.get("transformer_options", {})
        wrappers = inner.get("wrappers", {})
        compiled = _COMPILED in wrappers.get(WrappersMP.APPLY_MODEL, {})
        behind = wrappers.get(WrappersMP.DIFFUSION_MODEL) and not compiled
        kind = WrappersMP.DIFFUSION_MODEL if behind else WrappersMP.APPLY_MODEL
        last = {**wrappers.get(kind, {}), KEY: [self._notice]}
        return {
            **options,
            "transformer_options": {**inner, "wrappers": {**wrappers, kind: last}},
        }

    def counted(self, copy: str, run: Callable[[], object]) -> object:
        """What ``run`` gives: a pass of ``copy``, made only if its transformer ran."""
        before = self._calls
        result = run()
        self.made[copy] += self._calls > before
        return result

    def lines(self) -> list[str]:
        """For a report."""
        names = [copy for copy in (CONDITIONAL, UNCONDITIONAL) if self.planned[copy]]
        if self.saved:
            names = [CONDITIONAL, UNCONDITIONAL]
        made = ", ".join(f"{self.made[copy]} {copy}" for copy in names)
        lines = [f"passes: {made}"]
        left = sum(self.saved.values())
        if left:
            reasons = [f"{self.saved[k]} {word}" for k, word in _SAVINGS.items() if self.saved[k]]
            share = left / (2 * self.evaluations)
            lines.append(f"saved {share:.0%} of the passes: {', '.join(reasons)}")
        skipped = {copy: self.planned[copy] - self.made[copy] for copy in names}
        others = [f"{count} {copy}" for copy, count in skipped.items() if count > 0]
        if others:
            lines.append(f"skipped by another node's cache: {', '.join(others)}")
        return lines

    def _notice(self, executor: Callable, *args: object, **kwargs: object) -> object:
        self._calls += 1
        return executor(*args, **kwargs)
