"""Final latents of every pair against those of the exact copies, kept as they come."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

from torch import Tensor

from ...engine.compare.cases import Case
from ...files.new_file import replaced
from ..table.models import Variant
from .copies import Copies, exact
from .settings import Pair, Setting, pairs_of, settings_of
from .walk import Batch, batches, decibels, finals
from .why import GAIN_EVERY, errors, gains

#: Part of every key; raised when the same weights would be sampled or measured otherwise.
VERSION = 1


class Known:
    """Figures by name in a JSON file, rewritten whole at each new one."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._found = json.loads(path.read_text("utf-8")) if path.is_file() else {}

    def __contains__(self, key: str) -> bool:
        return key in self._found

    def __getitem__(self, key: str) -> dict:
        return self._found[key]

    def __setitem__(self, key: str, value: dict) -> None:
        self._found[key] = value
        with replaced(self.path) as part:
            part.write_text(json.dumps(self._found), encoding="utf-8")


class PairTable:
    """Latent SQNR in dB of each case, by pair and setting, for one model of the table."""

    def __init__(self, variant: Variant, cases: Sequence[Case], work: Path) -> None:
        self.variant, self.cases = variant, cases
        self.copies = Copies(variant, work)
        self.known = Known(work / f"pairs-{variant.slug}.json")
        self._what = hashlib.sha256(json.dumps([asdict(c) for c in cases]).encode()).hexdigest()
        self._truth: dict[Setting, Tensor] = {}

    def rows(self) -> Iterator[tuple[Setting, Pair]]:
        """All that the table holds, the presets' guidance first."""
        sick = self.variant.disease is not None
        for setting in settings_of(sick):
            yield from ((setting, pair) for pair in pairs_of(sick, setting))

    def decibels(self, setting: Setting, pair: Pair, parts: Sequence[Batch]) -> list[float]:
        """A value a case: known, or measured now."""
        key = self._key(setting, pair)
        if key not in self.known:
            truth = self.truth(setting, parts)
            found = finals(self.copies.pair(*pair), setting.factors, parts)
            self.known[key] = {"dB": decibels(truth, found).tolist()}
        return self.known[key]["dB"]

    def causes(self, level: str, setting: Setting) -> dict[str, list[float]]:
        """`why.Errors.figures` of two copies at ``level``: known, or measured now."""
        key = f"causes {self._key(setting, (level, level))}"
        if key not in self.known:
            found = errors(self.copies, level, setting, batches(self.cases))
            self.known[key] = found.figures(setting)
        return self.known[key]

    def gains(self, level: str, setting: Setting) -> dict[str, list[float]]:
        """`why.gains` of two copies at ``level``: known, or measured now."""
        key = f"gains {GAIN_EVERY} {self._key(setting, (level, level))}"
        if key not in self.known:
            self.known[key] = gains(self.copies, level, setting, batches(self.cases))
        return self.known[key]

    def truth(self, setting: Setting, parts: Sequence[Batch]) -> Tensor:
        """Final latents of the exact copies."""
        if setting not in self._truth:
            self._truth[setting] = finals(exact(self.copies), setting.factors, parts)
        return self._truth[setting]

    def _key(self, setting: Setting, pair: Pair) -> str:
        return f"{VERSION} {setting.factors} {self._what} {self.copies.digest(*pair)}"
