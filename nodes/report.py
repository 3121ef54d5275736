"""What a loader found, chose and will use, as text for people and as data for the picture."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path

from ..checkpoint.level_order import AUTO
from ..checkpoint.pairs import (
    ALTERNATING,
    BOTH,
    STREAMED,
    WORKING_MEMORY,
    Candidate,
    Pair,
    residency,
)
from ..ops.blocks import PACKED
from ..ops.dispatch import BackendReport
from ..ops.gguf_compute import resolve_compute
from ..ops.linear import LinearOptions
from ..ops.tuning.choices import ALWAYS_DENSE, ATTENTION, GGUF, LINEAR, Measurement, Table
from ..quant.tables import gigabytes
from . import costs
from .fused_choice import OFF
from .report_levels import PLAIN_LEVEL, by_level, copies, protected_lines

HOST_ATTENTION = "host"
ONE_BRANCH = "one branch: needs no guidance and no unconditional copy; half the memory and passes"
NOT_CONNECTED = "unconditional: not connected, so neither read nor counted"
_INT8_LEVELS = ("INT8 W8A8", "INT8 W8A8 rotated", "W6A8", "W4A8", "INT4 W4A4", "mixed")
_RESIDENCY = {
    BOTH: "everything stays there",
    ALTERNATING: "one copy at a time, the other waits in RAM",
    STREAMED: "weights are streamed from RAM, slow; pick a smaller level",
}
_FITS = {
    BOTH: "resident: fits {}",
    ALTERNATING: "copies in turns: one fits {}, the other waits in RAM",
    STREAMED: "streamed from RAM, slow: does not fit {}; pick a smaller level",
}
_UNFOLDED = (
    "undone while loading, so LoRAs work here by any node; in the stock loader they are right with "
    "Load LoRA for Ideogram 4 alone"
)
_SAMPLE = 1 << 16
_SAMPLES = 16


@dataclass(frozen=True)
class Machine:
    """The device that will compute: its name, memory, compute dtype, backends, and what was
    measured on it for the model at hand. ``attention`` is the setting that was asked for."""

    device: str
    memory: int
    dtype: str
    backends: tuple[BackendReport, ...]
    attention: str = HOST_ATTENTION
    attention_by_file: bool = False
    attention_backends: tuple[BackendReport, ...] = ()
    measured: Table = field(default_factory=Table)
    free: int | None = None  # bytes of the device and of RAM, before anything is loaded
    ram_free: int | None = None


def summary(
    pair: Pair,
    asked: str,
    options: LinearOptions,
    machine: Machine,
    fused: str = OFF,
    stands_in: str | None = None,
) -> dict:
    """The choice as plain data; goes into the PNG of a picture made with it.

    stands_in: what the unconditional copy is where no file of it is loaded.
    """
    beside = {} if stands_in is None else {"unconditional": stands_in}
    return beside | {
        "level": pair.label,
        "asked": asked,
        "backend": by_level(pair, lambda level: _backend(level, options, machine)),
        "attention": _attention(machine),
        "fused_blocks": fused,
        "files": {
            copy: {
                "name": candidate.name,
                "bytes": candidate.header.size,
                "fingerprint": fingerprint(candidate.path),
                "folded": len(_folded(copy, candidate)),
            }
            for copy, candidate in copies(pair)
        },
        **({} if pair.one_branch is None else {"one_branch": pair.one_branch.reason}),
    }


def text(
    pair: Pair,
    asked: str,
    options: LinearOptions,
    machine: Machine,
    fused: str = OFF,
    stands_in: str | None = None,
    *,
    details: bool = False,
    alone: bool = False,
) -> str:
    """The same for people, one fact a line: first what it is and whether it fits.

    details: also where each fact comes from, and every time that was measured. alone: nothing asks
    for the unconditional copy.
    """
    lines = [_first_line(pair, asked, machine, stands_in)]
    for copy, candidate in copies(pair):
        lines.append(_file_line(copy, candidate) if details else f"{copy}: {candidate.name}")
    if stands_in is not None:
        lines.append(f"unconditional: {stands_in}")
    elif pair.one_branch is not None:
        lines.append(f"{ONE_BRANCH}: {pair.one_branch.reason}")
    elif alone:
        lines.append(NOT_CONNECTED)
    elif pair.unconditional is None:
        lines.append(
            "unconditional: no file of this level, so this is half a model: without guidance "
            "pictures are worse. Put the other copy beside it, or pick a level that has both"
        )
    lines += _folded_lines(pair)
    if details:
        lines += protected_lines(pair)
    lines.append(f"backend: {by_level(pair, lambda level: _backend(level, options, machine))}")
    for level in pair.levels:
        if level in PACKED:
            how = _computed(level, options, machine)
            of = f"{level} " if len(pair.levels) > 1 else ""
            lines.append(f"  {of}{costs.gguf_compute(level, how, details=details)}")
    if details and any(_may_run_int8(level, options) for level in pair.levels):
        lines += [f"  {m}" for m in _shown(machine.measured, LINEAR, GGUF)]
        lines += [f"  {b.name}: {b.reason}" for b in machine.backends if not b.available]
    if details or machine.attention != HOST_ATTENTION:
        lines += _attention_lines(machine, details)
    if details:
        lines += [f"fused blocks: {fused}", _memory_line(pair, machine)]
    if machine.dtype == "float32":
        lines.append(
            f"compute: float32, because ComfyUI uses no bfloat16 on {machine.device} and float16 "
            "overflows in this model: slow"
        )
    return "\n".join([*lines, *pair.notes])


def fingerprint(path: Path) -> str:
    """SHA-256 over the size and 16 evenly spread 64 KiB samples of a file.

    It tells apart files that differ in more than a few weights, in milliseconds instead of the ten
    seconds of a whole one. A folder's is that of its files' fingerprints.
    """
    digest = hashlib.sha256()
    if path.is_dir():
        for file in sorted(p for p in path.rglob("*.safetensors") if p.is_file()):
            digest.update(fingerprint(file).encode())
        return digest.hexdigest()
    size = path.stat().st_size
    digest.update(size.to_bytes(8, "little"))
    last = max(size - _SAMPLE, 0)
    with path.open("rb") as file:
        for i in range(_SAMPLES):
            file.seek(last * i // (_SAMPLES - 1))
            digest.update(file.read(_SAMPLE))
    return digest.hexdigest()


def _first_line(pair: Pair, asked: str, machine: Machine, stands_in: str | None) -> str:
    """``Q4_K, both copies, 11.20 GB, resident: fits card (24.00 GB)``."""
    if pair.one_branch is not None:
        which = "one branch"
    elif pair.unconditional is not None:
        which = "both copies"
    else:
        which = "the conditional copy alone" if stands_in is None else "one copy for both passes"
    weights = pair.weight_bytes()
    fits = _FITS[residency(weights, machine.memory)]
    place = f"{machine.device} ({gigabytes(machine.memory)})"
    size = gigabytes(sum(weights))
    line = f"{pair.label}, {which}, {size}, {fits.format(place)}"
    return f"{line}; auto picked it, the first level here that fits" if asked == AUTO else line


def _file_line(copy: str, candidate: Candidate) -> str:
    header = candidate.header
    return (
        f"{copy}: {candidate.name}, {gigabytes(header.size)}, {header.origin}, "
        f"fingerprint {fingerprint(candidate.path)[:16]}; "
        f"which copy it is: {header.copy_reason}"
    )


def _folded(copy: str, candidate: Candidate) -> tuple[str, ...]:
    """Linears of a copy whose input is changed by the weights before them; mostly none."""
    folding = candidate.header.folding(copy)
    return () if folding is None else folding.linears


def _folded_lines(pair: Pair) -> list[str]:
    counts = {copy: len(_folded(copy, candidate)) for copy, candidate in copies(pair)}
    found = [f"{copy} {count} linears" for copy, count in counts.items() if count]
    return [f"folded: {', '.join(found)}; {_UNFOLDED}"] if found else []


def _may_run_int8(level: str, options: LinearOptions) -> bool:
    if level in PACKED:
        return _gguf_compute(level, options) == "w8a8"
    return level in _INT8_LEVELS and not options.int8_dense()


def _gguf_compute(level: str, options: LinearOptions) -> str:
    """What the linears of a block get at many tokens: their rows hold whole groups of 256."""
    return resolve_compute(options.gguf_compute, level, 256)


def _computed(level: str, options: LinearOptions, machine: Machine) -> str:
    """What the backend line says, as ``w8a8`` or ``dense``: also where int8 was measured slower."""
    slower = _few_tokens(level, options, machine.measured) == {ALWAYS_DENSE}
    return "w8a8" if _may_run_int8(level, options) and not slower else "dense"


def _backend(level: str, options: LinearOptions, machine: Machine) -> str:
    """Which matrix product runs, and why."""
    if not _may_run_int8(level, options):
        decoded = "" if level == PLAIN_LEVEL else ", weights decoded layer by layer"
        return f"dense {machine.dtype}{decoded}"
    if options.backend != AUTO:
        return f"{options.backend}, as asked"
    few = _few_tokens(level, options, machine.measured)
    if few == {ALWAYS_DENSE}:
        return f"dense {machine.dtype}, weights decoded layer by layer: faster here than int8"
    winners = dict.fromkeys(m.ranking[0] for m in _shown(machine.measured, LINEAR))
    if winners:
        return f"{' and '.join(winners)}, the fastest measured here for each shape"
    first: BackendReport | None = next((b for b in machine.backends if b.available), None)
    return "reference" if first is None else f"{first.name} ({first.reason})"


def _few_tokens(level: str, options: LinearOptions, table: Table) -> set[int | None]:
    """From how many tokens on int8 runs, by what was measured of the level's layers."""
    if options.gguf_compute != AUTO:
        return set()
    keys = {(m.key.n, m.key.k, m.key.dtype) for m in table if m.key.detail == level}
    return {table.few_tokens(level, *key) for key in keys}


def _shown(table: Table, *ops: str) -> list[Measurement]:
    """Of every layer the measurement with most tokens; a report of all would be long."""
    most: dict[tuple, Measurement] = {}
    for m in table:
        kind = (m.key.op, m.key.n, m.key.k, m.key.dtype, m.key.detail)
        if m.key.op in ops and (kind not in most or most[kind].key.tokens < m.key.tokens):
            most[kind] = m
    return sorted(most.values(), key=lambda m: (ops.index(m.key.op), -m.key.n * m.key.k))


def _attention(machine: Machine) -> str:
    """Which attention runs, and why."""
    if machine.attention == HOST_ATTENTION:
        return "the host's own setting"
    if machine.attention != AUTO:
        return (
            f"{machine.attention}, as {'the file asks' if machine.attention_by_file else 'asked'}"
        )
    found = _shown(machine.measured, ATTENTION)
    if found:
        return f"{found[0].ranking[0]}, the fastest measured here"
    return "sdpa, because there is nothing else here"


def _attention_lines(machine: Machine, details: bool) -> list[str]:
    lines = [f"attention: {_attention(machine)}"]
    if machine.attention == HOST_ATTENTION:
        return lines
    if details:
        lines += [f"  {m}" for m in _shown(machine.measured, ATTENTION)]
        lines += [f"  {b.name}: {b.reason}" for b in machine.attention_backends if not b.available]
    if machine.attention == "int8":
        lines.append(
            "  int8: less exact than sdpa, by emulation a relative error of 0.010 against 0.002"
        )
    return lines


def _memory_line(pair: Pair, machine: Machine) -> str:
    weights = pair.weight_bytes()
    line = (
        f"memory: {gigabytes(sum(weights))} of weights and about {gigabytes(WORKING_MEMORY)} "
        "at 1024 px; "
        f"{machine.device} has {gigabytes(machine.memory)}"
    )
    if machine.free is not None:
        line += f", {gigabytes(machine.free)} of them free"
    return f"{line}: {_RESIDENCY[residency(weights, machine.memory)]}"


def expected_memory(pair: Pair, machine: Machine) -> tuple[str, bool]:
    """(what loading and a picture will take against what is free, whether that is too much).

    Every copy is read into RAM whole before the host moves it to the device.
    """
    weights = pair.weight_bytes()
    ram = sum(weights) if machine.ram_free is None else machine.ram_free
    line = _memory_line(pair, machine)
    needed = f"loading takes {gigabytes(sum(weights))} of RAM, {gigabytes(ram)} are free"
    if sum(weights) <= ram:
        return f"{line}; {needed}", False
    advice = "the system may swap, or end ComfyUI: close other programs or pick a smaller level"
    return f"{line}; {needed}: {advice}", True
