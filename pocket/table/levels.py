"""The table of levels: ours beside other programs' of the same size, and how those were run.

Rows may have different numbers of pictures, as a run is broken off or some rows matter less: each
says its own, and two rows are compared on the pictures that both have.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ...engine.compare.results import Comparison
from ...engine.compare.statistics import Interval
from ...engine.compare.tables import markdown_row
from .claims import verdict
from .models import COPIES, VARIANTS, state_of, stored_bytes
from .painting import PART
from .peers import PEERS
from .runs import Run
from .systems import REFERENCE, is_block_linear

MODELS = tuple(variant for variant in VARIANTS if not variant.stress)
METRIC = "latent_sqnr"


@dataclass(frozen=True)
class Level:
    """A row of ours or of the field: its name, whose it is, and who runs its file."""

    name: str
    runs_in: str


_STOCK = "stock ComfyUI"
_PACK = "this pack"
_GGUF = "GGUF readers"

OURS = (
    Level("ours: INT8 auto", _PACK),
    Level("ours: INT8 auto-native", f"{_PACK}; {_STOCK} as int8 throughout"),
    Level("ours: INT8 rotated, calibrated", _STOCK),
    Level("ours: INT8 rotated, calibrated, in 16 bits", _PACK),
    Level("ours: Q8_0, calibrated", _GGUF),
    Level("ours: W6A8, calibrated", _STOCK),
    Level("ours: W4A8, calibrated", _STOCK),
    Level("ours: W4A8 in groups of 32, calibrated", _STOCK),
    Level("ours: Q4_K, calibrated", _GGUF),
    Level("ours: IQ4_XS, calibrated", _GGUF),
    Level("ours: INT4 W4A4, calibrated", _STOCK),
    Level("ours: INT4 W4A4, calibrated, as this pack computes it", _PACK),
)
FIELD = (
    Level("W8A8 rotated", _STOCK),
    Level("Q8_0", _GGUF),
    Level("Q4_K", _GGUF),
    Level("W6A8 (comfy-kitchen)", _STOCK),
    Level("W4A8 (comfy-kitchen)", _STOCK),
    Level("INT4 W4A4 (comfy-kitchen)", _STOCK),
    Level("NVFP4 (comfy-kitchen)", _STOCK),
    *(Level(name, _GGUF if name.startswith("ggml") else peer.package)
      for name, peer in PEERS.items()),
)  # fmt: skip

#: Ours, and what it is held against at the same size or in the same container.
PAIRS = (
    ("ours: INT8 auto", "OrbitQuant W8A8, GPTQ"),
    ("ours: INT8 rotated, calibrated", "OrbitQuant W8A8, GPTQ"),
    ("ours: INT8 rotated, calibrated, in 16 bits", "OrbitQuant W8A8, GPTQ"),
    ("ours: INT8 rotated, calibrated", "W8A8 rotated"),
    ("ours: Q8_0, calibrated", "Q8_0"),
    ("ours: W6A8, calibrated", "ggml Q6_K, imatrix"),
    ("ours: W6A8, calibrated", "W6A8 (comfy-kitchen)"),
    ("ours: W4A8, calibrated", "ggml Q4_K, imatrix"),
    ("ours: W4A8, calibrated", "W4A8 (comfy-kitchen)"),
    ("ours: W4A8, calibrated", "NVFP4 (comfy-kitchen)"),
    ("ours: Q4_K, calibrated", "ggml Q4_K, imatrix"),
    ("ours: Q4_K, calibrated", "OrbitQuant W4A8, GPTQ"),
    ("ours: IQ4_XS, calibrated", "ggml IQ4_XS, imatrix"),
    ("ours: W4A8 in groups of 32, calibrated", "OrbitQuant W4A8, GPTQ"),
    ("ours: INT4 W4A4, calibrated", "OrbitQuant W4A4, GPTQ"),
    ("ours: INT4 W4A4, calibrated", "INT4 W4A4 (comfy-kitchen)"),
)

#: Rows of the short table: what it calls them, and their names here; ours first in each size.
SHORT = (
    ("INT8, calibrated here", "ours: INT8 auto"),
    ("the same for ComfyUI's own loader", "ours: INT8 rotated, calibrated"),
    ("that file, multiplied in 16 bits here", "ours: INT8 rotated, calibrated, in 16 bits"),
    ("OrbitQuant W8A8 by GPTQ", "OrbitQuant W8A8, GPTQ"),
    ("Q8_0, calibrated here", "ours: Q8_0, calibrated"),
    ("Q8_0 by ggml", "Q8_0"),
    ("W6A8, calibrated here", "ours: W6A8, calibrated"),
    ("Q6_K by ggml, with imatrix", "ggml Q6_K, imatrix"),
    ("W4A8, calibrated here", "ours: W4A8, calibrated"),
    ("Q4_K, calibrated here", "ours: Q4_K, calibrated"),
    ("Q4_K by ggml, with imatrix", "ggml Q4_K, imatrix"),
    ("W4A8 by comfy-kitchen", "W4A8 (comfy-kitchen)"),
    ("IQ4_XS, calibrated here", "ours: IQ4_XS, calibrated"),
    ("IQ4_XS by ggml, with imatrix", "ggml IQ4_XS, imatrix"),
    ("OrbitQuant W4A8 by GPTQ", "OrbitQuant W4A8, GPTQ"),
    ("INT4 W4A4, calibrated here", "ours: INT4 W4A4, calibrated"),
    ("OrbitQuant W4A4 by GPTQ", "OrbitQuant W4A4, GPTQ"),
    ("INT4 W4A4 by comfy-kitchen", "INT4 W4A4 (comfy-kitchen)"),
)


def shared_parts(name: str, runs: Sequence[Run]) -> list[int]:
    """The parts that all models have of which a row was run at all; a second seed of half of the
    prompts is left out."""
    found: dict[str, set[int]] = {}
    for run in runs:
        if run.scheme == name and run.variant in {model.name for model in MODELS}:
            found.setdefault(run.variant, set()).add(run.part)
    parts = set.intersection(*found.values()) if found else set()
    both = {part % 2 for part in parts} == {0, 1}
    return sorted(part for part in parts if not both or part ^ 1 in parts)


def pictures(parts: Sequence[int]) -> str:
    """``64 x 2``: prompts and seeds of so many parts, each half of the prompts with one seed."""
    halves = {part % 2 for part in parts}
    return f"{PART * len(halves)} x {len(parts) // max(len(halves), 1)}"


def sizes_of(runs: Sequence[Run]) -> dict[str, int]:
    """Bytes of each row's model as trained; a sick one has more channels."""
    return {run.scheme: run.bytes for run in runs if run.variant == MODELS[0].name}


def bits(size: int) -> float:
    """Bits a weight of the quantized linears, of ``size`` bytes of both copies."""
    states = [state_of(MODELS[0], copy) for copy in COPIES]
    rest = [{k: v for k, v in state.items() if not is_block_linear(k)} for state in states]
    weights = sum(v.numel() for state in states for k, v in state.items() if is_block_linear(k))
    return 8 * (size - sum(map(stored_bytes, rest))) / weights


def levels_table(comparisons: Mapping[str, Comparison], runs: Sequence[Run]) -> str:
    """Rows by size, the largest first; ours in bold; latent SQNR of each model, and interval."""
    head = ["level", "bits", "runs in", "prompts x seeds", *(model.name for model in MODELS)]
    sizes = sizes_of(runs)
    there = [(bits(sizes[level.name]), level) for level in (*OURS, *FIELD) if level.name in sizes]
    lines = [markdown_row(head), markdown_row(["---"] * len(head))]
    for size, level in sorted(there, key=lambda row: -round(row[0], 2)):
        parts = shared_parts(level.name, runs)
        if parts:
            name = f"**{level.name}**" if level in OURS else level.name
            cells = [_cell(interval_of(comparisons[m.name], level.name)) for m in MODELS]
            row = [name, f"{size:.2f}", level.runs_in, pictures(parts), *cells]
            lines.append(markdown_row(row))
    return "\n".join(lines)


def interval_of(comparison: Comparison, name: str) -> Interval | None:
    """Latent SQNR of one row; None where it was not run."""
    if name not in {system.name for system in comparison.systems}:
        return None
    return comparison.cell(comparison.system(name), METRIC).interval


def _cell(found: Interval | None) -> str:
    return "not run" if found is None else _interval(found)


def _interval(found: Interval, sign: str = "") -> str:
    return f"{found.mean:{sign}.1f} [{found.low:{sign}.1f}, {found.high:{sign}.1f}]"


def pairs_table(comparisons: Mapping[str, Comparison]) -> str:
    """Ours minus another program's, on the pictures of both, and what the interval says."""
    head = ["ours", "against", *comparisons]
    lines = [markdown_row(head), markdown_row(["---"] * len(head))]
    for name, other in PAIRS:
        cells = [_difference(comparison, name, other) for comparison in comparisons.values()]
        if any(cells):
            shown = [cell or "not run" for cell in cells]
            lines.append(markdown_row([name.removeprefix("ours: "), other, *shown]))
    return "\n".join(lines)


def _difference(comparison: Comparison, name: str, other: str) -> str:
    if not {name, other} <= {system.name for system in comparison.systems}:
        return ""
    found = comparison.cell(comparison.system(name), METRIC, against=other).difference
    words = {"agrees": "nearer", "**does not**": "**farther**"}
    return f"{words.get(verdict(found), verdict(found))}: {_interval(found, '+')}"


def points_of(
    comparisons: Mapping[str, Comparison], runs: Sequence[Run]
) -> dict[str, list[tuple[str, float, float, bool]]]:
    """Model -> (name, bits, latent SQNR, whether it is ours) of every row."""
    sizes, ours = sizes_of(runs), {level.name for level in OURS}
    return {
        model: [
            (s.name, bits(sizes[s.name]), interval_of(comparison, s.name).mean, s.name in ours)
            for s in comparison.systems
            if s.name != REFERENCE
        ]
        for model, comparison in comparisons.items()
    }


def short_table(comparisons: Mapping[str, Comparison], runs: Sequence[Run]) -> str:
    """For readers without decibels: the error as a share of the latents, as trained and the worse
    of the two models with outliers. SQNR is of energies, so the share is 10^(-dB / 20)."""
    head = ["file", "bits a weight", "strays by", "with outliers"]
    lines = [markdown_row(head), markdown_row(["---"] * len(head))]
    sizes = sizes_of(runs)
    for words, name in SHORT:
        found = [interval_of(comparison, name) for comparison in comparisons.values()]
        shares = [100 * 10 ** (-each.mean / 20) for each in found if each is not None]
        if found[0] is not None and len(shares) > 1:
            shown = f"**{words}**" if name.startswith("ours") else words
            row = [shown, f"{bits(sizes[name]):.1f}", f"{shares[0]:.1f} %"]
            lines.append(markdown_row([*row, f"{max(shares[1:]):.1f} %"]))
    return "\n".join(lines)


def peers_table(runs: Sequence[Run]) -> str:
    """How each peer was run: package, version, settings; those not run with the reason."""
    by = {run.scheme: run.by for run in runs if run.by}
    lines = [markdown_row(["row", "package, version: settings"]), markdown_row(["---"] * 2)]
    for name, peer in PEERS.items():
        missing = f"not run: {peer.package} is not installed" if peer.version is None else "not run"
        lines.append(markdown_row([name, by.get(name, missing)]))
    return "\n".join(lines)


def levels_csv(comparisons: Mapping[str, Comparison], runs: Sequence[Run]) -> str:
    """A row a model and level: bits, pictures, latent SQNR in dB with its interval."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["model", "level", "bits", "bytes", "prompts x seeds", "sqnr", "low", "high"])
    sizes = sizes_of(runs)
    for model, comparison in comparisons.items():
        for system in comparison.systems:
            if system.name != REFERENCE:
                found = interval_of(comparison, system.name)
                size = sizes[system.name]
                many = pictures(shared_parts(system.name, runs))
                figures = (f"{v:.3f}" for v in (found.mean, found.low, found.high))
                row = [model, system.name, f"{bits(size):.3f}", size, many, *figures]
                writer.writerow(row)
    return out.getvalue()
