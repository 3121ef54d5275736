"""From a checkpoint to a quantized file: plan, hash, encode layer by layer, write, report."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor

from ..checkpoint.attention_wish import attention_configs
from ..checkpoint.writers import TensorSpec, check_output, check_space, write_safetensors
from ..files.partial import Partial, check_unfinished
from ..gguf_loader import GGUFSpec, write_gguf
from .encode import encoding_device
from .encodings import Blocks
from .errors import QuantOptionError
from .plan import container_of, plan_tensors
from .provenance import Provenance, combined_hash, hash_files, licence_of, recipe_record
from .quant_plan import QuantPlan
from .recipes import QuantOptions, recipe_of
from .report import QuantReport
from .source import BaseLike, SourceLike, check_levels, open_source
from .stream import TensorStream, fingerprint

_log = logging.getLogger(__name__)

Progress = Callable[[int, int], None]
"""``progress(done, total)`` in bytes: those read for the hash, then those written."""

SUFFIXES = {"native": ".safetensors", "transformer-lab": ".safetensors", "gguf": ".gguf"}


def plan_quantization(
    source: SourceLike,
    level: str,
    out: str | os.PathLike[str],
    *,
    copy: str | None = None,
    base: BaseLike | Sequence[BaseLike] | None = None,
    pair: SourceLike | None = None,
    options: QuantOptions | None = None,
    overwrite: bool = False,
) -> QuantPlan:
    """Everything that :func:`quantize_checkpoint` checks before it reads a weight.

    Raises its errors, but for those that only the weights can cause.
    """
    options = options or QuantOptions()
    recipe = recipe_of(level)
    container = container_of(recipe, options)
    if Path(out).suffix != SUFFIXES[container]:
        raise QuantOptionError(
            "the output's name does not fit its format",
            file=out,
            needed=f"a name ending in {SUFFIXES[container]}",
        )
    found = open_source(source, container, copy=copy, base=base, pair=pair)
    target = check_output(out, overwrite=overwrite)
    if any(target == Path(os.path.realpath(path)) for path in found.paths):
        raise QuantOptionError("the output is the source itself", file=out)
    if options.calibration is not None:
        for each, shapes in found.shapes().items():
            options.calibration.check_shapes(each, shapes)
    tensors = tuple(plan_tensors(recipe, options, found.shapes()))
    check_levels(found, recipe, ((p.copy, p.name) for p in tensors if p.quantized))
    return QuantPlan(recipe, container, options, found, Path(out), tensors)


def quantize_checkpoint(
    source: SourceLike,
    level: str,
    out: str | os.PathLike[str],
    *,
    copy: str | None = None,
    base: BaseLike | Sequence[BaseLike] | None = None,
    pair: SourceLike | None = None,
    options: QuantOptions | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
    device: str | torch.device = "cpu",
    resume: bool = False,
    keep_partial: bool = False,
) -> QuantReport:
    """Write ``source`` (a checkpoint or its path) at ``level`` to ``out``; say what that cost.

    ``copy`` is needed where the source holds both copies and the container one; ``base`` gives a
    linears-only source its other tensors; ``pair`` is the other copy for one that holds both.
    Streams: beside one tensor and its encoding nothing is held. The same input gives the same
    bytes. ``device`` encodes. With ``keep_partial`` an interrupted run leaves ``out.partial``, and
    ``resume`` goes on with such a file, to the bytes of a run that was not interrupted. Raises
    QuantOptionError, AlreadyQuantizedError, NonFiniteWeightError, WriteError, ResumeError and what
    ``open_checkpoint`` raises; then nothing new is at ``out``.
    """
    device = encoding_device(device)
    plan = plan_quantization(
        source,
        level,
        out,
        copy=copy,
        base=base,
        pair=pair,
        options=options,
        overwrite=overwrite,
    )
    for note in plan.notes:
        _log.warning("%s", note)
    target = check_output(out, overwrite=overwrite)
    check_space(target, plan.nbytes, resume=resume)
    kept = resume or keep_partial
    check_unfinished(target, resume=resume, overwrite=overwrite or not kept)
    counter = _Counter(progress, plan)
    provenance = _provenance(plan, counter)
    metadata = _metadata(plan, provenance)
    asked: dict[str, Tensor] = {}
    if plan.container == "gguf":
        write, specs = write_gguf, _gguf_specs(plan)
    else:
        write, specs = write_safetensors, _safetensors_specs(plan)
        if plan.container == "native":  # the host follows these where it knows them
            asked = attention_configs(plan.source.checkpoints[0].tensor_files)
            specs += [TensorSpec(name, t.dtype, tuple(t.shape)) for name, t in asked.items()]
    partial = Partial(fingerprint(plan, metadata, device), resume=resume) if kept else None
    uncertain = _uncertain(plan, provenance)
    tensors = TensorStream(plan, uncertain, device=device, partial=partial, advance=counter.encoded)
    size = write(
        out,
        specs,
        metadata,
        data=chain(tensors, asked.items()),
        overwrite=overwrite,
        progress=counter.written,
        partial=partial,
    )
    return QuantReport(
        path=str(out),
        level=plan.recipe.level,
        container=plan.container,
        copies=plan.source.copies,
        size=size,
        source_size=counter.source_size,
        tensors=tensors.results,
        meter=tensors.meter,
        metadata=dict(metadata),
        notes=tuple(plan.notes),
    )


def metadata_of(plan: QuantPlan, progress: Progress | None = None) -> dict[str, str | int]:
    """What the file of this plan says of itself: its source's hash and all that was chosen.

    Reads the source's bytes. Raises CheckpointError.
    """
    return _metadata(plan, _provenance(plan, _Counter(progress, plan)))


class _Counter:
    """One bar for two jobs: bytes hashed, then bytes written."""

    def __init__(self, progress: Progress | None, plan: QuantPlan) -> None:
        self._progress = progress
        self._hashed = self._written = self._told = 0
        self.source_size = sum(path.stat().st_size for path in plan.source.paths)
        self._total = self.source_size + plan.nbytes

    def hashed(self, count: int) -> None:
        self._hashed += count
        self._tell(self._hashed)

    def written(self, done: int, total: int) -> None:
        self._written = done
        self._tell(self._hashed + done)

    def encoded(self, nbytes: float) -> None:
        """Of the tensor that will be written next."""
        self._tell(self._hashed + self._written + int(nbytes))

    def _tell(self, done: int) -> None:
        self._told = max(self._told, min(done, self._total))
        if self._progress is not None:
            self._progress(self._told, self._total)


def _metadata(plan: QuantPlan, provenance: Provenance) -> dict[str, str | int]:
    gguf = plan.container == "gguf"
    return provenance.gguf(plan.recipe) if gguf else provenance.safetensors()


def _provenance(plan: QuantPlan, counter: _Counter) -> Provenance:
    return Provenance(
        copies=plan.source.copies,
        config=plan.source.config,
        recipe=recipe_record(plan.recipe, plan.container, plan.options, plan.tensors),
        sources=hash_files(plan.source.paths, counter.hashed),
        source_level=plan.source.level,
        licence=licence_of(plan.source.metadata, plan.options),
        one_branch=next(filter(None, (c.one_branch for c in plan.source.checkpoints)), None),
        attention=plan.source.checkpoints[0].attention_wish,
    )


def _uncertain(plan: QuantPlan, provenance: Provenance) -> dict[str, str]:
    """Copy -> hash of its file, for copies whose calibration was not made on that very file."""
    calibration = plan.options.calibration
    if calibration is None:
        return {}
    files = dict(zip(plan.source.paths, provenance.sources, strict=True))
    digests = {
        copy: combined_hash([files[path] for path in plan.source.paths_of(copy)])
        for copy in plan.source.copies
    }
    return {copy: digest for copy, digest in digests.items() if not calibration.is_of(copy, digest)}


def _safetensors_specs(plan: QuantPlan) -> list[TensorSpec]:
    specs = []
    for tensor in plan.tensors:
        stored = dict(tensor.encoding.parts(tensor.shape))
        for suffix, constant in tensor.encoding.constants().items():
            stored[suffix] = (constant.dtype, tuple(constant.shape))
        for suffix, (dtype, shape) in stored.items():
            specs.append(TensorSpec(plan.stored_name(tensor, suffix), dtype, shape))
    return specs


def _gguf_specs(plan: QuantPlan) -> list[GGUFSpec]:
    return [
        GGUFSpec(tensor.name, tensor.shape, tensor.encoding.ggml_type)
        for tensor in plan.tensors
        if isinstance(tensor.encoding, Blocks)  # all of them, in this container
    ]
