"""Measure which backend is fastest on this device, when a model is loaded.

``tune`` times the candidates on the shapes of the model's linears and leaves the result where
``dispatch.choose`` looks (``choices``) and on disk (``choice_files``). It is called by loaders: a
step only looks up. The weights and activations are random ones of the same shape, one at a time.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from ...files.user_folder import user_folder
from ..linear import LinearOptions
from . import choice_files, choices
from .choices import Measurement, Table
from .timing import LEAST, cache_bytes, medians
from .tuning_jobs import Job, Layer, inputs_of, jobs, layers_of

__all__ = ["Layer", "Measure", "describe", "inputs_of", "layers_of", "tune"]

logger = logging.getLogger(__name__)

SECONDS = 10.0
MEMORY = 300_000_000
_PROBE_TOKENS = 32


@dataclass(frozen=True)
class Measure:
    """That a loader should measure, where the results are kept, and the bounds it keeps to.

    ``folder`` None: ``user_folder()``. ``seconds`` and ``memory`` (bytes beside the
    model) bound one load; what they leave out is measured at the next one. ``make_room(bytes)`` is
    called before the first measurement, if there is any to make.
    """

    folder: Path | None = None
    seconds: float = SECONDS
    memory: int = MEMORY
    make_room: Callable[[int], object] | None = None


def tune(
    layers: Iterable[Layer],
    device: torch.device | str,
    dtype: torch.dtype,
    measure: Measure | None = None,
    *,
    options: LinearOptions | None = None,
    heads: tuple[int, int] | None = None,
    rope: tuple[int, int] | None = None,
    inputs: Iterable[tuple[str, Layer]] = (),
) -> Table:
    """Measure what ``"auto"`` has to choose for ``layers`` on activations of ``dtype``.

    ``options``: only what they leave to ``"auto"`` is measured. ``heads``: (number, size) where
    attention is left to ``"auto"`` too. ``rope``: the same, and ``inputs``: ``inputs_of(state)``,
    where blocks run fused. Known results are read from the folder; new ones are logged and kept
    there. Returns everything known about the device. Never call it inside a step.
    """
    device, measure = choices.named(device), measure or Measure()
    if torch.compiler.is_compiling():
        return choices.table(device)
    folder = measure.folder or user_folder()
    stored = choice_files.load(folder, device)
    known = stored.with_added(choices.table(device))
    choices.remember(device, known)
    deadline = time.perf_counter() + measure.seconds
    table, new, missing = known, 0, 0
    memory = measure.memory - cache_bytes(device)  # the timer writes so much between runs
    with torch.inference_mode():
        options = options or LinearOptions()
        for job in jobs(layers, device, dtype, options, heads, memory, inputs, rope):
            if job.is_settled(table):
                continue
            if measure.make_room is not None and not (new or missing):
                measure.make_room(measure.memory)
            result = _run(job, device, memory, deadline)
            if result is None:
                missing += 1
                continue
            new += 1
            table = table.with_added([result])
            choices.remember(device, table)  # at once: what comes next runs on it
            logger.info("measured on %s: %s", device, result)
    if missing:
        logger.info(
            "%s: %d measurements did not fit %.0f s and %d MB: the nearest measured token count "
            "decides there, or the documented order",
            device,
            missing,
            measure.seconds,
            measure.memory / 1e6,
        )
    choices.remember(device, table)
    if new:
        choice_files.save(folder, device, table)
    return table


def describe(device: torch.device | str) -> tuple[str, ...]:
    """One line a measurement of ``device``: candidates from the fastest on, with their times."""
    return tuple(str(measurement) for measurement in choices.table(device))


# ---- measuring


def _run(job: Job, device: torch.device, memory: int, deadline: float) -> Measurement | None:
    """The measurement, or None where time or memory do not reach."""
    if job.nbytes > memory or time.perf_counter() >= deadline:
        return None
    try:
        found = _measured(job, device, deadline)
        if found is None:
            return None
        seconds, behind = found
        errors = job.errors() if job.errors is not None else {}
    except Exception as error:  # out of memory, Triton's own: nothing here is worth a failed load
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        logger.warning("cannot measure %s on %s: %s", job.key, device, reason)
        return None
    scaled = {name: job.scale * value for name, value in seconds.items()}
    return Measurement(job.key, scaled, errors, behind)


def _measured(
    job: Job, device: torch.device, deadline: float
) -> tuple[dict[str, float], frozenset[str]] | None:
    """(median seconds, candidates far behind on a few rows, whose seconds these extrapolate to).

    Some processors have no int8 instructions: there ``torch._int_mm`` would take minutes.
    """
    tokens, rounds = job.key.tokens, 5
    behind: dict[str, float] = {}
    if device.type == "cpu":
        rounds = 3
        few = medians(job.make(_PROBE_TOKENS), device, LEAST, deadline)
        if few is None:
            return None
        best = min(few.values())
        behind = {n: t * tokens / _PROBE_TOKENS for n, t in few.items() if t > 8 * best}
    functions = {n: f for n, f in job.make(tokens).items() if n not in behind}
    timed = medians(functions, device, rounds, deadline, prune=True)
    return None if timed is None else (behind | timed, frozenset(behind))
