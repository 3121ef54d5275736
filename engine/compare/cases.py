"""What is compared: cases (a prompt, a seed, a size) and systems (the files that render them)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ...sampling import NOISES
from .errors import CompareError
from .metrics import text_asked


@dataclass(frozen=True)
class Case:
    """One picture to make with every system: prompt, seed, width and height in pixels.

    ``text`` is what the picture should say; ``None`` leaves the text metrics out.
    """

    prompt: str
    seed: int
    width: int
    height: int
    text: str | None = None

    @property
    def prompt_id(self) -> str:
        """Twelve hex digits that name the prompt and the size, the unit of resampling."""
        material = json.dumps([self.prompt, self.width, self.height])
        return hashlib.sha256(material.encode()).hexdigest()[:12]

    @property
    def key(self) -> tuple[str, int]:
        """The pairing key: the same in every system."""
        return self.prompt_id, self.seed

    @property
    def file_stem(self) -> str:
        """Name of the picture without its suffix."""
        return f"{self.prompt_id}-seed{self.seed}"


@dataclass(frozen=True)
class System:
    """One row of the table: a label and the files it loads.

    One file may hold both copies. ``guided`` False leaves the unconditional copy out, and guidance
    with it. ``stand_in`` is what runs the unconditional pass on the conditional copy's weights:
    ``"self"`` or the file of a LoRA. ``options`` are keyword arguments of
    ``ops.linear.LinearOptions``.
    """

    name: str
    conditional: Path
    unconditional: Path | None = None
    base: Path | None = None
    guided: bool = True
    options: Mapping[str, str] = field(default_factory=dict)
    stand_in: Path | str | None = None

    @property
    def files(self) -> tuple[Path, ...]:
        """The files whose content makes the pictures."""
        found = (self.conditional, self.unconditional, self.base, self.lora)
        return tuple(p for p in found if p is not None)

    @property
    def lora(self) -> Path | None:
        """The file of the LoRA that stands in, if one does."""
        return self.stand_in if isinstance(self.stand_in, Path) else None


def read_cases(
    path: Path, *, seeds: Sequence[int], width: int, height: int, limit: int | None = None
) -> list[Case]:
    """Cases from a text file (a prompt a line) or JSON lines (``prompt``, and optionally ``text``,
    ``seed``, ``width``, ``height``). Raises CompareError naming the line."""
    if not path.is_file():
        raise CompareError("no such prompt file", file=path, hint="Give a .txt or a .jsonl file.")
    if path.suffix.lower() not in (_TEXT, _JSON_LINES):
        raise CompareError("no prompt file", file=path, needed=f"{_TEXT} or {_JSON_LINES}")
    cases: list[Case] = []
    rows = _prompt_rows(path)
    for row in rows[:limit]:
        prompt = row["prompt"]
        text = row["text"] if "text" in row else text_asked(prompt)
        size = row.get("width", width), row.get("height", height)
        for seed in [row["seed"]] if "seed" in row else seeds:
            cases.append(Case(prompt, seed, *size, text=text))
    if not cases:
        raise CompareError("the prompt file holds no prompt", file=path)
    cases = unique(cases)
    _check_noise(cases, path)
    return cases


def _check_noise(cases: Sequence[Case], path: Path) -> None:
    """Raises CompareError for two seeds of one prompt and size that give the same noise."""
    seen: dict[tuple, int] = {}
    for case in cases:
        noise = (case.prompt, case.width, case.height, case.seed % NOISES)
        if seen.setdefault(noise, case.seed) != case.seed:
            raise CompareError(
                "two seeds of a prompt give the same noise",
                file=path,
                found=f"{seen[noise]} and {case.seed}",
                needed=f"seeds that do not differ by a multiple of {NOISES}",
                hint="Torch's generator on the CPU takes the low 32 bits of a seed.",
            )


_TEXT, _JSON_LINES = ".txt", ".jsonl"


def _is_number(value: object) -> bool:
    return type(value) is int and 0 <= value < 1 << 64


# What a line may say beside its prompt: name, what it must be, whether a value is that.
_OPTIONAL = (
    ("text", "a text, or null", lambda value: value is None or isinstance(value, str)),
    *((name, "a natural number", _is_number) for name in ("seed", "width", "height")),
)


def _prompt_rows(path: Path) -> list[dict]:
    try:
        # not splitlines(): a caption may hold U+2028; the BOM is Windows' habit
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise CompareError(f"is no text in UTF-8: {error}", file=path) from error
    rows = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        if path.suffix.lower() != _JSON_LINES:
            rows.append({"prompt": line.rstrip("\r")})
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise CompareError(f"line {number} is no JSON: {error}", file=path) from error
        if not isinstance(row, dict) or not isinstance(row.get("prompt"), str):
            raise CompareError(f'line {number} has no "prompt"', file=path, found=line[:80])
        for key, kind, usable in _OPTIONAL:
            if key in row and not usable(row[key]):
                raise CompareError(
                    f"line {number} has an unusable {key}",
                    file=path,
                    found=repr(row[key])[:80],
                    needed=kind,
                )
        rows.append(row)
    return rows


def unique(cases: Iterable[Case]) -> list[Case]:
    """The cases in order, each (prompt, size, seed) once."""
    return list({case.key: case for case in cases}.values())


def check_reference(reference: str | None, names: Sequence[str]) -> None:
    """CompareError for a reference that is none of the systems; None stands for the first."""
    if reference is not None and reference not in names:
        raise CompareError(
            "the reference is none of the systems", found=", ".join(names), needed=reference
        )


def check_systems(systems: Sequence[System]) -> None:
    """Every name once, every file there. Raises CompareError."""
    names = [system.name for system in systems]
    repeated = {name for name in names if names.count(name) > 1}
    if repeated:
        raise CompareError(f"two systems share the name {sorted(repeated)[0]!r}")
    for system in systems:
        for file in system.files:
            if not file.exists():
                raise CompareError(f"system {system.name!r}: no such file", file=file)
