"""What the inputs of every linear look like, and what quantizing each alone would cost.

A calibration holds sums and maxima, never inputs, so runs over other prompts can be added to it.
One column a denoising step: ``times`` are the model times (0 noise, 1 clean) of the columns.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..ops.gptq import MomentsError
from .calibration_file import read_calibration, write_calibration
from .calibration_run import Run
from .errors import CalibrationError
from .layer_stats import LayerStats

# A weight read from FP8 differs from the bf16 one by at most 1/16; another model's by far more.
_SAME_MODEL = 0.1


@dataclass(frozen=True, eq=False)
class Calibration:
    """``layers``: ``conditional.layers.0.attention.qkv`` -> statistics; one column a time.

    ``provenance`` has an entry for each run that was merged; ``path`` is the file it came from.
    """

    layers: Mapping[str, LayerStats]
    times: tuple[float, ...] = ()
    provenance: tuple[Run, ...] = ()
    path: Path | None = None

    def layer(self, copy: str, module: str) -> LayerStats | None:
        """The statistics of a linear, by copy and canonical module name; None if not watched."""
        return self.layers.get(f"{copy}.{module}")

    @property
    def copies(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(key.partition(".")[0] for key in self.layers))

    @property
    def candidates(self) -> tuple[str, ...]:
        """Every treatment that was measured anywhere, in the order of measuring."""
        return tuple(dict.fromkeys(name for s in self.layers.values() for name in s.noise))

    def ranking(self, candidate: str) -> list[tuple[str, float]]:
        """(layer, relative output error over all steps), the most fragile first."""
        found = [(key, stats.error(candidate)) for key, stats in self.layers.items()]
        return sorted((f for f in found if not math.isnan(f[1])), key=lambda f: -f[1])

    def save(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> int:
        """Write one safetensors file; returns its size. Raises WriteError, OutputExistsError."""
        return write_calibration(
            path, self.layers, self.times, self.provenance, self.candidates, overwrite=overwrite
        )

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Calibration:
        """Read and check a file of :meth:`save`. Raises CheckpointError and its kinds."""
        layers, times, runs = read_calibration(path)
        return cls(layers, times, runs, Path(path))

    def merge(self, *others: Calibration) -> Calibration:
        """All runs as one: maxima of maxima, sums of sums; columns are the union of the times.

        Raises CalibrationError for a run that is in it already, and for runs of other models.
        """
        merged = self
        for other in others:
            merged = merged._merged(other)
        return merged

    def _merged(self, other: Calibration) -> Calibration:
        if any(run in self.provenance for run in other.provenance):
            raise CalibrationError(
                "this run is in it already: its tokens would count twice", file=other.path
            )
        mine, theirs = _models(self.provenance), _models(other.provenance)
        for copy in mine.keys() & theirs.keys():
            if mine[copy] != theirs[copy]:
                raise CalibrationError(
                    f"a run on another model: the {copy} copy differs",
                    file=other.path,
                    found=_hashes(theirs[copy]),
                    needed=_hashes(mine[copy]),
                )
        times = tuple(sorted({*self.times, *other.times}))
        place = {time: i for i, time in enumerate(times)}
        layers: dict[str, LayerStats] = {}
        for part in (self, other):
            places = torch.tensor([place[time] for time in part.times], dtype=torch.long)
            for key, stats in part.layers.items():
                spread = stats.spread_over(places, len(times))
                if key in layers and layers[key].shape != spread.shape:
                    raise CalibrationError(
                        "a run on another model",
                        file=other.path,
                        tensor=key,
                        found=list(spread.shape),
                        needed=list(layers[key].shape),
                    )
                layers[key] = layers[key].plus(spread) if key in layers else spread
        return Calibration(layers, times, (*self.provenance, *other.provenance))

    def check_shapes(self, copy: str, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Raise CalibrationError unless this is of a model with these tensor shapes."""
        if copy not in self.copies:
            raise CalibrationError(
                f"no statistics of the {copy} copy",
                file=self.path,
                found=", ".join(self.copies) or "none",
                hint="Calibrate both copies (--uncond), or merge a run on the other one.",
            )
        for key, stats in self.layers.items():
            own, _, module = key.partition(".")
            if own == copy and shapes.get(f"{module}.weight") != stats.shape:
                found = shapes.get(f"{module}.weight")
                raise CalibrationError(
                    "a calibration of another model",
                    file=self.path,
                    tensor=key,
                    found=list(stats.shape),
                    needed="no such linear" if found is None else list(found),
                    hint="Calibrate this model (ideogram4-quant calibrate).",
                )

    def is_of(self, copy: str, sha256: str) -> bool:
        """Whether every run saw this very file."""
        return _models(self.provenance).get(copy) == {sha256}

    def check_weight(self, copy: str, module: str, weight_absmax: Tensor, model: str) -> None:
        """Raise CalibrationError if a linear's weight is not the one that was calibrated.

        ``weight_absmax`` fp32 [K]. For files of another hash: the same model at another level
        (FP8 for bf16) passes, another training does not. ``model`` names the file at hand.
        """
        stats = self.layer(copy, module)
        if stats is None:
            return
        known = stats.weight_absmax.double()
        off = (weight_absmax.cpu().double() - known).abs().sum() / known.sum().clamp_min(1e-30)
        if not off <= _SAME_MODEL:
            raise CalibrationError(
                "a calibration of another model: the weights differ by "
                f"{off.item():.0%} in the largest of each input channel",
                file=self.path,
                tensor=f"{copy}.{module}",
                found=_hashes(_models(self.provenance).get(copy, set())),
                needed=model,
                hint="Calibrate this model (ideogram4-quant calibrate).",
            )


@contextmanager
def blamed(calibration: Calibration | None, copy: str, module: str) -> Iterator[None]:
    """MomentsError inside becomes a CalibrationError that names the file and the linear."""
    try:
        yield
    except MomentsError as error:
        raise CalibrationError(
            error.message,
            file=None if calibration is None else calibration.path,
            tensor=f"{copy}.{module}",
            found=error.found,
            needed=error.needed,
            hint="The file is damaged: calibrate again (ideogram4-quant calibrate).",
        ) from error


def _models(runs: Iterable[Run]) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for run in runs:
        for copy, digest in run.models.items():
            found.setdefault(copy, set()).add(digest)
    return found


def _hashes(digests: Iterable[str]) -> str:
    return "sha256 " + (", ".join(sorted(digests)) or "unknown")
