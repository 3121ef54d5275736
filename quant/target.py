"""A size instead of a level: choose how each linear of each copy is stored, then write the files.

The loss of a storage is its measured output error times the linear's gain (``sensitivity``); the
sum over all linears of both copies is least within the budget, so the copy that counts less gets
fewer bytes. One file a copy.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from ..checkpoint import Checkpoint, check_pair, open_checkpoint
from ..checkpoint.grammar import CONDITIONAL, UNCONDITIONAL
from ..checkpoint.writers import check_output
from ..files.partial import check_unfinished
from .allocation import Rung, allocate
from .candidate_errors import candidate_errors
from .choice_report import Chosen
from .choose import Choice, Linear, int8_choices
from .encode import encoding_device
from .encodings import Shape
from .errors import NonFiniteWeightError, QuantOptionError
from .measure import channel_absmax
from .plan import rounding_of, targets_of
from .provenance import combined_hash, hash_files
from .quantize import SUFFIXES, quantize_checkpoint
from .recipes import MIXED, QuantOptions
from .report import QuantReport
from .sensitivity import Sensitivity, gains_of
from .source import BaseLike, Source, check_levels, files_of
from .storage import STORAGES
from .target_sizes import check_target, level_of, other_bytes, sizes

Progress = Callable[[str, int, int], None]
"""``progress(what, done, total)``: weights under MEASURING, then bytes of a copy under its name."""

MEASURING = "measuring"


@dataclass(frozen=True)
class Target:
    """``nbytes`` for all files together; ``said``: as the user put it."""

    nbytes: int
    said: str


@dataclass(frozen=True)
class Request:
    """What is to be written from what.

    ``source`` holds one copy or both, ``pair`` the other one; ``copy`` takes one of them alone.
    ``out`` is the file of the first copy, ``pair_out`` of the unconditional one where both are
    written (default: ``_unconditional`` at the name's end).
    """

    source: str | os.PathLike[str]
    out: str | os.PathLike[str]
    target: Target
    pair: str | os.PathLike[str] | None = None
    pair_out: str | os.PathLike[str] | None = None
    copy: str | None = None
    base: BaseLike | Sequence[BaseLike] | None = None
    options: QuantOptions = field(default_factory=QuantOptions)
    sensitivity: Sensitivity | None = None
    device: str | torch.device = "cpu"
    overwrite: bool = False
    resume: bool = False


@dataclass(frozen=True)
class _File:
    """One copy, from where to where."""

    checkpoint: Checkpoint
    copy: str
    out: Path

    @property
    def source(self) -> Source:
        return Source(((self.checkpoint, self.copy),))


def choose_storage(
    request: Request, progress: Progress = lambda what, done, total: None
) -> tuple[Chosen, tuple[_File, ...]]:
    """What would be written, and where; nothing is. Reads the weights once.

    Raises QuantOptionError for a target below the smallest there is, which it names, and for
    options that a mixed file does not have, CalibrationError for a calibration or sensitivities of
    another model, NonFiniteWeightError, and what ``open_checkpoint`` raises.
    """
    container = _container(request)
    files = _files(request)
    options = request.options
    device = encoding_device(request.device)
    for file in files:
        target = check_output(file.out, overwrite=request.overwrite or request.resume)
        check_unfinished(target, resume=request.resume, overwrite=request.overwrite)
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
    others = other_bytes(container, options, shapes, targets)
    check_target(request.target.nbytes, request.target.said, container, offered, others)
    errors = _measured(container, options, files, targets, int8, digests, device, progress)
    rungs = {
        key: [
            Rung(offered[key][name], gains[key] * error, name)
            for name, error in errors[key].items()
        ]
        for key in targets
    }
    chosen = allocate(rungs, request.target.nbytes - others)
    found = Chosen(
        container=container,
        target=request.target.said,
        storage=chosen,
        nbytes=others + sum(rung.nbytes for rung in chosen.values()),
        values=sum(shape[0] * shape[1] for shape in targets.values()),
        measured=request.sensitivity is not None,
        calibrated=options.calibration is not None,
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
            _check_finished(file, options)
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


def _check_finished(file: _File, options: QuantOptions) -> None:
    """Raise QuantOptionError unless the output is what an earlier run of this choice wrote."""
    record = open_checkpoint(file.out, copy=file.copy).metadata
    text = record.get("quantization", record.get("ideogram4.quantization"))
    found = json.loads(text) if isinstance(text, str) else text
    if not isinstance(found, dict) or found.get("prediction") != options.prediction:
        raise QuantOptionError(
            "is there already, and not of this choice",
            file=file.out,
            found=None if not isinstance(found, dict) else found.get("prediction"),
            needed=options.prediction,
            hint="Replace it (--overwrite), or choose another name.",
        )


def _container(request: Request) -> str:
    """The container that the output's name asks for."""
    options = request.options
    found = next((c for c in STORAGES if SUFFIXES[c] == Path(request.out).suffix), None)
    if found is None or options.container != "native":
        raise QuantOptionError(
            "a target size is for ComfyUI's own container or GGUF",
            file=request.out,
            found=f"container {options.container}" if found else Path(request.out).suffix,
            needed="--out with a name ending in .safetensors or .gguf",
        )
    if options.native and found == "gguf":
        raise QuantOptionError(
            "stock ComfyUI's own loader reads no GGUF: this container cannot hold a native choice",
            file=request.out,
            needed="--out with a name ending in .safetensors",
        )
    given = {
        "types of single linears": bool(options.types),
        "smoothing vectors": options.smooth is not None,
        "protection by error": (options.protect_share, options.protect_bytes, options.protect_below)
        != (None, None, None),
    }
    for name, there in given.items():
        if there:
            raise QuantOptionError(f"a target size chooses by itself, without {name}")
    return found


def _files(request: Request) -> tuple[_File, ...]:
    first = open_checkpoint(request.source, request.base, copy=request.copy)
    opened = [first]
    if request.pair is not None:
        opened.append(open_checkpoint(request.pair, request.base))
        opened.sort(key=lambda checkpoint: checkpoint.copies != (CONDITIONAL,))
        check_pair(*opened)
        copies = [CONDITIONAL, UNCONDITIONAL]
    else:
        copies = list(first.copies if request.copy is None else (request.copy,))
        opened *= len(copies)
    out = Path(request.out)
    other = out.with_name(f"{out.stem}_unconditional{out.suffix}")
    other = other if request.pair_out is None else Path(request.pair_out)
    if other.suffix != out.suffix:
        raise QuantOptionError("both files are of one format", file=other, needed=out.suffix)
    if len(copies) == 1 and request.pair_out is not None:
        raise QuantOptionError("one copy makes one file", file=request.pair_out, found=copies[0])
    outs = [out, other][: len(copies)]
    files = tuple(_File(*each) for each in zip(opened, copies, outs, strict=True))
    read = {Path(os.path.realpath(path)) for file in files for path in files_of(file.checkpoint)}
    for file in files:
        if Path(os.path.realpath(file.out)) in read:
            raise QuantOptionError("the output is the source itself", file=file.out)
    return files


def _digests(request: Request, files: Sequence[_File]) -> dict[str, str]:
    """Copy -> hash of its files, where something measured is to be compared with it."""
    if request.sensitivity is None and request.options.calibration is None:
        return {}
    return {f.copy: combined_hash(hash_files(files_of(f.checkpoint))) for f in files}


def _measured(
    container: str,
    options: QuantOptions,
    files: Sequence[_File],
    targets: Mapping[Linear, Shape],
    int8: Mapping[Linear, Choice],
    digests: Mapping[str, str],
    device: torch.device,
    progress: Progress,
) -> dict[Linear, dict[str, float]]:
    """What each storage of each linear costs, reading one weight at a time."""
    calibration = options.calibration
    feedback = rounding_of(options) == "feedback"
    total, done = sum(shape[0] * shape[1] for shape in targets.values()), 0
    found: dict[Linear, dict[str, float]] = {}
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
            found[key] = candidate_errors(
                weight.to(device), STORAGES[container], container, stats, int8.get(key),
                feedback=feedback,
            )  # fmt: skip
            done += weight.numel()
            del weight
            progress(MEASURING, done, total)
    return found
