"""A size instead of a level: choose how each linear of each copy is stored, then write the files.

The loss of a storage is its measured output error times the linear's gain (``sensitivity``); the
sum over all linears of both copies is least within the budget, so the copy that counts less gets
fewer bytes. One file a copy.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from ..cards.known import card as card_of
from ..files.new_file import check_output
from ..files.partial import check_unfinished
from .allocation import Rung, allocate, allocate_within, without
from .calibration import blamed
from .candidate_errors import candidate_errors
from .choice_report import Chosen
from .choose import Choice, Linear, int8_choices
from .encode import encoding_device
from .encodings import Shape
from .errors import NonFiniteWeightError, QuantOptionError
from .finished import check_finished
from .measure import channel_absmax
from .plan import rounding_of, targets_of
from .provenance import combined_hash, hash_files, licence_of
from .quantize import quantize_checkpoint
from .recipes import MIXED, QuantOptions
from .report import QuantReport
from .sensitivity import Loss, Sensitivity, gains_of
from .source import BaseLike, check_levels, files_of
from .storage import INT4, STORAGES
from .target_files import CopyFile, Part, container_of_outputs, open_files
from .target_goal import Target
from .target_sizes import check_needed, check_target, level_of, other_bytes, sizes
from .target_times import Times, check_seconds, times

Progress = Callable[[str, int, int], None]
"""``progress(what, done, total)``: weights under MEASURING, then bytes of a copy under its name."""

MEASURING = "measuring"


@dataclass(frozen=True)
class Request:
    """What is to be written from what: a ``Part`` for each copy, weighed against each other."""

    parts: tuple[Part, ...]
    target: Target
    base: BaseLike | Sequence[BaseLike] | None = None
    options: QuantOptions = field(default_factory=QuantOptions)
    sensitivity: Sensitivity | None = None
    device: str | torch.device = "cpu"
    overwrite: bool = False
    resume: bool = False


def choose_storage(
    request: Request, progress: Progress = lambda what, done, total: None
) -> tuple[Chosen, tuple[CopyFile, ...]]:
    """What would be written, and where; nothing is. Reads the weights once.

    Raises QuantOptionError for a target below the smallest there is, which it names, for one that
    holds everything unquantized, and for options that a mixed file does not have, CalibrationError
    for a calibration or sensitivities of another model, NonFiniteWeightError, and what
    ``open_checkpoint`` raises.
    """
    options, target = request.options, request.target
    container = container_of_outputs(request.parts, options)
    files = open_files(request.parts, request.base)
    device = encoding_device(request.device)
    for file in files:
        out = check_output(file.out, overwrite=request.overwrite or request.resume)
        check_unfinished(out, resume=request.resume, overwrite=request.overwrite)
        if options.calibration is not None:
            options.calibration.check_shapes(file.copy, file.checkpoint.shapes(file.copy))
    shapes = {file.copy: file.checkpoint.shapes(file.copy) for file in files}
    targets = targets_of(container, options, shapes)
    for file in files:
        named = [(c, f"{m}.weight") for c, m in targets if c == file.copy]
        check_levels(file.source, MIXED[level_of(container)], named)
    digests = _digests(request, files)
    gains = gains_of(request.sensitivity, list(targets), digests if request.sensitivity else {})
    int8 = int8_choices(container, options, targets)
    offered = {key: sizes(container, shape, int8.get(key)) for key, shape in targets.items()}
    timed = None
    if target.seconds is not None:
        timed = times(card_of(target.card), offered, targets)
        offered = {k: {n: own[n] for n in timed.more[k]} for k, own in offered.items()}
        check_seconds(target, timed)
    others = other_bytes(container, options, shapes, targets)
    others += sum(len(json.dumps(licence_of(f.source.metadata, options))) for f in files)
    check_target(target.nbytes, target.said, container, offered, others)
    check_needed(target, offered, others, timed)
    losses = _measured(container, options, files, targets, int8, digests, device, progress)
    rungs = {
        key: [
            Rung(offered[key][name], gains[key].of(loss), name)
            for name, loss in losses[key].items()
            if name in offered[key]
        ]
        for key in targets
    }
    if request.sensitivity is None:
        rungs = without(rungs, INT4, target.nbytes - others)  # see docs/chooser.md
    chosen = _allocated(rungs, target, target.nbytes - others, timed)
    found = Chosen(
        container=container,
        target=target.said,
        storage=chosen,
        nbytes=others + sum(rung.nbytes for rung in chosen.values()),
        values=sum(shape[0] * shape[1] for shape in targets.values()),
        measured=request.sensitivity is not None,
        calibrated=options.calibration is not None,
        seconds=None if timed is None else timed.of({k: r.name for k, r in chosen.items()}),
    )
    return found, files


def quantize_to_target(
    request: Request, progress: Progress = lambda what, done, total: None
) -> tuple[Chosen, tuple[QuantReport, ...]]:
    """Choose and write, a file a copy; with ``resume`` a finished file of this choice stays, and
    has no report. Raises what ``choose_storage`` and ``quantize_checkpoint``
    raise; a choice that cannot be made writes nothing."""
    chosen, files = choose_storage(request, progress)
    options = replace(request.options, storage=chosen.by_name(), prediction=chosen.prediction())
    reports = []
    for file in files:
        if request.resume and not request.overwrite and file.out.exists():
            check_finished(file, level_of(chosen.container), options, progress)
            continue
        report = quantize_checkpoint(
            file.checkpoint,
            level_of(chosen.container),
            file.out,
            copy=file.copy,
            options=options,
            overwrite=request.overwrite,
            progress=lambda done, total, copy=file.copy: progress(copy, done, total),
            device=request.device,
            resume=request.resume,
            keep_partial=True,
        )
        reports.append(report)
    return chosen, tuple(reports)


def _allocated(
    rungs: Mapping[Linear, Sequence[Rung]], target: Target, budget: int, timed: Times | None
) -> dict[Linear, Rung]:
    if timed is None:
        return allocate(rungs, budget)
    found = allocate_within(rungs, budget, timed.more, target.seconds - timed.fixed)
    if found is None:
        raise QuantOptionError(
            f"nothing is both so fast and so small: {target.said}",
            needed=f"more seconds, or --target-gb for what {budget / 1e9:.3g} GB hold",
        )
    return found


def _digests(request: Request, files: Sequence[CopyFile]) -> dict[str, str]:
    """Copy -> hash of its files, where something measured is to be compared with it."""
    if request.sensitivity is None and request.options.calibration is None:
        return {}
    return {f.copy: combined_hash(hash_files(files_of(f.checkpoint))) for f in files}


def _measured(
    container: str,
    options: QuantOptions,
    files: Sequence[CopyFile],
    targets: Mapping[Linear, Shape],
    int8: Mapping[Linear, Choice],
    digests: Mapping[str, str],
    device: torch.device,
    progress: Progress,
) -> dict[Linear, dict[str, Loss]]:
    """What each storage of each linear costs, reading one weight at a time."""
    calibration = options.calibration
    feedback = rounding_of(options) == "feedback"
    total, done = sum(shape[0] * shape[1] for shape in targets.values()), 0
    found: dict[Linear, dict[str, Loss]] = {}
    for file in files:
        names = {f"{module}.weight" for copy, module in targets if copy == file.copy}
        stream = file.checkpoint.stream(file.copy, dtype=torch.float32, only=names)
        for name, weight in stream:
            key = file.copy, name.rpartition(".")[0]
            stats = None if calibration is None else calibration.layer(*key)
            absmax = channel_absmax(weight)
            if not bool(absmax.isfinite().all()):
                raise NonFiniteWeightError(
                    "holds values that are not finite",
                    file=file.checkpoint.paths[0],
                    tensor=name,
                    needed="finite values",
                    hint="The source is damaged: nothing can be made from it.",
                )
            if calibration is not None and not calibration.is_of(file.copy, digests[file.copy]):
                calibration.check_weight(*key, absmax, f"sha256 {digests[file.copy]}")
            with blamed(calibration, *key):
                found[key] = candidate_errors(
                    weight.to(device), STORAGES[container], container, stats, int8.get(key),
                    feedback=feedback,
                )  # fmt: skip
            done += weight.numel()
            del weight
            progress(MEASURING, done, total)
    return found
