"""Where a calibration's figures come from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Run:
    """Where one run's figures come from.

    ``models``: copy -> SHA-256 of its file (of several files: the hash of their hashes).
    ``prompts_sha256``: of the JSON list of all prompts. ``versions``: package -> version.
    """

    models: Mapping[str, str]
    prompts_sha256: str
    prompts: int
    seeds: tuple[int, ...]
    steps: int
    width: int
    height: int
    versions: Mapping[str, str] = field(default_factory=dict)
