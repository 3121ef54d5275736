"""What was chosen for a size, and how near the pictures will be: for people and for metadata."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass

from ..sampling.presets import MAIN_GUIDANCE
from .allocation import Rung
from .choose import Linear
from .sensitivity import UNCONDITIONAL_SHARE, Sensitivity
from .storage import INT4, STORAGES
from .tables import human_bytes, text_table
from .target_times import JOB

# What the pocket model's pictures look like at such a latent SQNR (docs/chooser.md).
_WORDS = (
    (45.0, "told apart by figures alone"),
    (35.0, "differences hard to find by eye"),
    (27.0, "small details differ"),
    (20.0, "details differ, composition and text stay"),
    (-math.inf, "pictures may differ as from another seed, text may break"),
)


def in_words(decibels: float) -> str:
    """What a latent SQNR means for a picture."""
    return next(words for least, words in _WORDS if decibels >= least)


@dataclass(frozen=True)
class Chosen:
    """``storage``: each linear's rung. ``nbytes``: of all files; ``values``: weights chosen for.

    ``measured``: gains were measured on this model; ``calibrated``: errors count its inputs;
    ``seconds`` of a picture's steps, modelled, where they were asked for.
    """

    container: str
    target: str
    storage: Mapping[Linear, Rung]
    nbytes: int
    values: int
    measured: bool
    calibrated: bool
    seconds: float | None = None

    @property
    def loss(self) -> float:
        """Relative error energy foretold of the final latents."""
        return sum(rung.loss for rung in self.storage.values())

    @property
    def decibels(self) -> float:
        """Latent SQNR foretold."""
        return math.inf if self.loss == 0 else -10 * math.log10(self.loss)

    @property
    def bits(self) -> float:
        """Bits a weight of the linears that are chosen for."""
        return 8 * sum(rung.nbytes for rung in self.storage.values()) / self.values

    def by_name(self) -> dict[str, str]:
        """``conditional.layers.0.attention.qkv`` -> storage, as ``QuantOptions.storage`` has it."""
        return {f"{copy}.{module}": rung.name for (copy, module), rung in self.storage.items()}

    def prediction(self) -> dict[str, object]:
        """For a file's metadata, JSON-ready."""
        return {
            "target": self.target,
            "latent_sqnr_db": round(self.decibels, 2) if math.isfinite(self.decibels) else None,
            "bits": round(self.bits, 3),
            "sensitivities": "measured" if self.measured else "built in",
            **({} if self.seconds is None else {"modelled_seconds": round(self.seconds, 3)}),
        }

    def table(self) -> str:
        """A row a kind of linear and copy: how many are stored how; then what is foretold."""
        names = [n for n in STORAGES[self.container] if n in set(self.by_name().values())]
        groups: dict[tuple[str, str], dict[str, int]] = {}
        for (copy, module), rung in self.storage.items():
            counts = groups.setdefault((copy, module.rpartition(".")[2]), {})
            counts[rung.name] = counts.get(rung.name, 0) + 1
        rows = [
            [copy, kind, *(str(counts.get(name, "")) for name in names)]
            for (copy, kind), counts in groups.items()
        ]
        near = f"{self.decibels:.1f} dB" if math.isfinite(self.decibels) else "exact"
        lines = [
            f"for {self.target}: {human_bytes(self.nbytes)} at most, {self.bits:.2f} bits a weight "
            "of the linears",
            text_table(["copy", "linear", *names], rows, left=2),
            f"foretold: final latents {near} from the source's: {in_words(self.decibels)}",
        ]
        if self.seconds is not None:
            lines.append(
                f"the {JOB.steps} steps of a picture of {JOB.width} x {JOB.height} take "
                f"{self.seconds:.3g} s: modelled from the card's published rates, not measured"
            )
        if INT4 in names:
            lines.append(
                "W4A4: ComfyUI's own loader rounds the inputs to 4 bits, which is foretold"
            )
        if any(name.startswith("W6A8") for name in names):
            lines.append("W6A8 runs in ComfyUI's own loader with comfy-kitchen 0.2.40 or newer")
        if not self.measured:
            lines.append(
                "sensitivities are built in: the pocket model's conditional copy's, by kind of "
                f"linear, times {UNCONDITIONAL_SHARE:.2f} in the unconditional one, as guidance "
                f"adds their errors {MAIN_GUIDANCE:g} to {MAIN_GUIDANCE - 1:g}. Which linears come "
                "first is a good guess, the dB a rough one (ideogram4-quant sensitivity measures "
                "this model)"
            )
        if not self.calibrated:
            lines.append(
                "no calibration: all inputs count alike, and codes are rounded to nearest "
                "(ideogram4-quant calibrate)"
            )
        return "\n\n".join(lines)


def gains_table(sensitivity: Sensitivity) -> str:
    """A row a kind of linear and copy: median, least and largest gain, where the largest is."""
    kinds: dict[tuple[str, str], dict[str, float]] = {}
    for key, sums in sensitivity.linears.items():
        copy, _, module = key.partition(".")
        kinds.setdefault((copy, module.rpartition(".")[2]), {})[module] = sums.gain.weight
    rows = []
    for (copy, kind), gains in kinds.items():
        largest = max(gains, key=gains.get)
        figures = (statistics.median(gains.values()), min(gains.values()), gains[largest])
        rows.append([copy, kind, *(f"{gain:.2g}" for gain in figures), largest])
    return text_table(["copy", "linear", "median gain", "least", "largest", "of"], rows, left=2)
