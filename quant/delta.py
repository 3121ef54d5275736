"""The difference of the two copies as a LoRA: the conditional copy then runs both passes.

``W_unconditional ~ W_conditional + up down`` for every linear that the unconditional pass runs. The
file has ai-toolkit's names, so that other tools load it too. Norms, biases and the embedding are
vectors that no LoRA holds: they stay the conditional copy's, and the report says how far off.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from comfy_kitchen.tensor import QuantizedTensor
from torch import Tensor

from ..checkpoint import Checkpoint, check_pair, open_checkpoint
from ..checkpoint.canonical import is_linear
from ..checkpoint.copies import CONDITIONAL, UNCONDITIONAL
from ..checkpoint.writers import TensorSpec, check_output, check_space, write_safetensors
from ..errors import PairMismatchError
from ..ops.wide import wide_sum
from .calibration import Calibration
from .delta_report import DeltaReport, LinearDelta
from .errors import NonFiniteWeightError, QuantOptionError
from .input_moments import InputMoments
from .low_rank import Truncated, truncate
from .measure import channel_absmax
from .provenance import TOOL
from .source import BaseLike

PREFIX = "diffusion_model."
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
LINEARS = ("all", "blocks")
_NEVER_RUN = ("llm_cond_",)  # reads text, which an unconditional pass has not
# Rank of the few linears outside the blocks, at least: the first and the last are 128 wide, so that
# they are whole. On the pocket model that gains 11 dB of latent SQNR at rank 16; 8 MB in all of the
# real one. The last one's error goes straight into the velocity, times guidance.
STEM_RANK = 128
PathArg = str | os.PathLike[str]


@dataclass(frozen=True)
class DeltaOptions:
    """How a difference becomes a LoRA.

    rank: of the linears in the blocks; those outside get STEM_RANK where that is more.
    linears: ``all``, or those in the ``blocks``, which diffusers loads too. calibration: of the
    unconditional copy; its inputs then weigh the difference. device: where products are computed.
    """

    rank: int
    dtype: str = "bf16"
    linears: str = "all"
    calibration: Calibration | None = None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def __post_init__(self) -> None:
        if not 1 <= self.rank <= _MOST:
            raise QuantOptionError("rank", found=self.rank, needed=f"1 to {_MOST}")
        for name, known in (("dtype", DTYPES), ("linears", LINEARS)):
            if getattr(self, name) not in known:
                raise QuantOptionError(name, found=getattr(self, name), needed=", ".join(known))

    def rank_of(self, name: str) -> int:
        """Of one linear, by its canonical name."""
        return self.rank if name.startswith(_BLOCKS) else max(self.rank, STEM_RANK)


_MOST = 4608
_BLOCKS = "layers."


def make_delta(
    conditional: PathArg,
    unconditional: PathArg | None,
    out: PathArg,
    options: DeltaOptions,
    *,
    base: BaseLike | Sequence[BaseLike] | None = None,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> DeltaReport:
    """Write the LoRA ``out`` that makes the conditional copy stand for the unconditional one.

    unconditional: None where one file holds both copies. Holds one linear at a time;
    ``progress(done, total)`` counts weights. The same files give the same bytes on one machine.
    Raises PairMismatchError for two files that are no pair or that are equal, CalibrationError for
    a calibration of another model, NonFiniteWeightError, what ``open_checkpoint`` raises, and
    WriteError and OutputExistsError; then nothing is left at ``out``.
    """
    target = check_output(out, overwrite=overwrite)
    pair = _open(conditional, unconditional, base)
    read = [path for each in pair for file in (each, *each.bases) for path in file.paths]
    check_output(out, overwrite=overwrite, made_of=read)
    names = _linears(pair[0], pair[1], options.linears)
    if options.calibration is not None:
        options.calibration.check_shapes(UNCONDITIONAL, pair[1].shapes(UNCONDITIONAL))
    specs = list(_specs(pair[0].shapes(CONDITIONAL), names, options))
    check_space(target, sum(spec.nbytes for spec in specs))
    rows: list[LinearDelta] = []
    metadata = {
        "format": "pt",
        "ideogram4_quant": json.dumps(
            {
                "kind": "unconditional LoRA",
                "tool": TOOL,
                "rank": options.rank,
                "weighted": options.calibration is not None,
                "conditional": Path(pair[0].paths[0]).name,
                "unconditional": Path(pair[1].paths[0]).name,
                "levels": [pair[0].level, pair[1].level],
            },
            sort_keys=True,
        ),
    }
    stream = _stream(pair, names, options, rows, progress)
    size = write_safetensors(target, specs, metadata, data=stream, overwrite=overwrite)
    levels = (pair[0].level, pair[1].level)
    return DeltaReport(
        target, size, options.rank, options.calibration is not None, levels, tuple(rows),
        tuple(_vectors(pair)),
    )  # fmt: skip


def _open(
    conditional: PathArg,
    unconditional: PathArg | None,
    base: BaseLike | Sequence[BaseLike] | None,
) -> tuple[Checkpoint, Checkpoint]:
    if unconditional is None:
        both = open_checkpoint(conditional, base)
        pair = (both, both)
    else:
        pair = (
            open_checkpoint(conditional, base, copy=CONDITIONAL),
            open_checkpoint(unconditional, base, copy=UNCONDITIONAL),
        )
    check_pair(*pair)
    return pair


def _linears(first: Checkpoint, second: Checkpoint, which: str) -> list[str]:
    there = second.shapes(UNCONDITIONAL)
    return [
        name
        for name in first.shapes(CONDITIONAL)
        if is_linear(name)
        and name in there
        and not name.startswith(_NEVER_RUN)
        and (which == "all" or name.startswith(_BLOCKS))
    ]


def _specs(
    shapes: dict[str, tuple[int, ...]], names: Sequence[str], options: DeltaOptions
) -> Iterator[TensorSpec]:
    dtype = DTYPES[options.dtype]
    for name in names:
        n, k = shapes[name]
        rank = min(options.rank_of(name), n, k)
        yield TensorSpec(_key(name, "A"), dtype, (rank, k))
        yield TensorSpec(_key(name, "B"), dtype, (n, rank))


def _key(name: str, half: str) -> str:
    return f"{PREFIX}{name.removesuffix('.weight')}.lora_{half}.weight"


def _stream(
    pair: tuple[Checkpoint, Checkpoint],
    names: Sequence[str],
    options: DeltaOptions,
    rows: list[LinearDelta],
    progress: Callable[[int, int], None] | None,
) -> Iterator[tuple[str, Tensor]]:
    """The halves of each linear, one linear at a time; ``rows`` gets its figures."""
    shapes = pair[0].shapes(CONDITIONAL)
    total = sum(math.prod(shapes[name]) for name in names)
    done = 0
    for name in names:
        true = _read(pair[1], UNCONDITIONAL, name)
        inputs = _inputs(options.calibration, name, true, pair[1])
        moments = inputs or InputMoments(torch.ones(true.shape[1]), torch.zeros(true.shape[1], 0))
        signal = moments.output_energy(true)
        difference = true.sub_(_read(pair[0], CONDITIONAL, name))
        if not bool(difference.isfinite().all()):
            raise NonFiniteWeightError(
                "the difference of the two copies is not finite",
                file=pair[0].paths[0],
                tensor=name,
                found="NaN or infinity",
                hint="One of the two files is damaged: ideogram4-quant verify tells which.",
            )
        found = truncate(difference.to(options.device), options.rank_of(name), inputs)
        halves = [half.to(DTYPES[options.dtype]).cpu() for half in (found.down, found.up)]
        error = difference.addmm_(halves[1].float(), halves[0].float(), alpha=-1.0)
        rows.append(_row(name, signal, found, moments.output_energy(error)))
        del true, difference, error
        yield _key(name, "A"), halves[0]
        yield _key(name, "B"), halves[1]
        done += math.prod(shapes[name])
        if progress is not None:
            progress(done, total)
    _refuse_equal(pair, rows)


def _row(name: str, signal: float, found: Truncated, written: float) -> LinearDelta:
    module = name.removesuffix(".weight")
    width = found.down.shape[1] + found.up.shape[0]
    stem = not name.startswith(_BLOCKS)
    energies = tuple(found.energies.tolist())
    return LinearDelta(module, width, stem, signal, found.total, energies, written)


def _refuse_equal(pair: tuple[Checkpoint, Checkpoint], rows: Sequence[LinearDelta]) -> None:
    if all(row.total == 0.0 for row in rows):
        raise PairMismatchError(
            "the two copies are equal, so there is no difference to write",
            file=pair[1].paths[0],
            found=f"the weights of {pair[0].paths[0]}",
            needed="the conditional and the unconditional copy",
            hint="The same file may have been given twice.",
        )


def _inputs(
    calibration: Calibration | None, name: str, true: Tensor, checkpoint: Checkpoint
) -> InputMoments | None:
    if calibration is None:
        return None
    module = name.removesuffix(".weight")
    stats = calibration.layer(UNCONDITIONAL, module)
    if stats is None:
        return None
    absmax = channel_absmax(true)
    calibration.check_weight(UNCONDITIONAL, module, absmax, str(checkpoint.paths[0]))
    return stats.moments


def _read(checkpoint: Checkpoint, copy: str, name: str) -> Tensor:
    """One tensor, fp32, that nothing else refers to."""
    ((_, tensor),) = checkpoint.stream(copy, dtype=torch.float32, only={name})
    if isinstance(tensor, QuantizedTensor):
        return tensor.dequantize().float()
    return tensor.float().clone()


def _vectors(pair: tuple[Checkpoint, Checkpoint]) -> Iterator[tuple[str, float]]:
    """(name, relative difference) of what no LoRA holds: norms, biases and the embedding."""
    for name in pair[0].shapes(CONDITIONAL):
        there = name in pair[1].shapes(UNCONDITIONAL)
        if is_linear(name) or name.startswith(_NEVER_RUN) or not there:
            continue
        first, second = (
            _read(checkpoint, copy, name)
            for checkpoint, copy in zip(pair, (CONDITIONAL, UNCONDITIONAL), strict=True)
        )
        size = wide_sum(second.square()).sqrt().item()
        off = wide_sum((second - first).square()).sqrt().item()
        yield name, off / size if size else (math.inf if off else 0.0)
