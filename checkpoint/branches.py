"""Whether a model needs guidance: one branch holds it in itself, distilled from both copies.

Told by metadata, by the ``model_index.json`` of its folder, or by name; the user's word goes before
all of them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, printable
from .tensor_files import read_json

GUIDANCE_KEY = "ideogram4.guidance"
"""Metadata key of our own files: ``none`` for one branch, ``pair`` for a copy of two."""
GUIDANCE_NONE, GUIDANCE_PAIR = "none", "pair"
PRESET_KEY = "ideogram4.preset"
"""Metadata key of our own files: the preset of a one-branch model, where its source told it."""

_TITLES = ("modelspec.title", "general.name", "general.basename", "title", "base_model")
_FOLDERS_ABOVE = 2  # instant/transformer/model.safetensors
_WORD_INSIDE = re.compile(r"(?<=[a-z0-9])(?=[A-Z])")
_SEPARATOR = re.compile(r"[-_. ]+")
# fal's Instant and Fast; cfg-fold; what others call models without guidance. "fast" alone may be
# said of anything, so there the name of the model must stand before it.
_ONE_BRANCH = re.compile(
    r"\b(?:instant|turbo ?time|cfg ?fold(?:ed)?|(?:cfg|guidance) ?(?:free|distill(?:ed)?)"
    r"|no ?cfg|(?:one|single) ?branch)\b"
    r"|\b(?:ideogram ?v? ?4(?: ?0)?(?: fal)?|fal) fast\b"
)
# the preset of a name that is one of one branch already, so "fast" alone is enough here
_PRESETS = {
    "instant": re.compile(r"\binstant\b"),
    "turbotime": re.compile(r"\bturbo ?time\b"),
    "fast": re.compile(r"\bfast\b"),
}


@dataclass(frozen=True)
class OneBranch:
    """The rule that told that a model needs no guidance; ``certain``: the file itself says so.

    ``preset``: that of the model which the file says it is (``instant``, ``fast``, ``turbotime``).
    """

    reason: str
    certain: bool = False
    preset: str | None = None


def tell_one_branch(path: Path, metadata: Mapping[str, Any]) -> OneBranch | None:
    """The first rule that says one branch, with the file's preset; None for a copy of a pair."""
    told = _tell(path, metadata)
    return None if told is None else replace(told, preset=tell_preset(path, metadata))


def tell_preset(path: Path, metadata: Mapping[str, Any]) -> str | None:
    """The preset that the metadata, or the names, of a one-branch model tell; None if none does."""
    stated = metadata.get(PRESET_KEY)
    if stated in _PRESETS:
        return stated
    titles = (metadata.get(key) for key in _TITLES)
    names = (path.name, *(folder.name for folder in list(path.parents)[:_FOLDERS_ABOVE]))
    for name in (*(title for title in titles if isinstance(title, str)), *names):
        if named_one_branch(name):
            spaced = _spaced(name)
            return next((p for p, word in _PRESETS.items() if word.search(spaced)), None)
    return None


def _tell(path: Path, metadata: Mapping[str, Any]) -> OneBranch | None:
    stated = metadata.get(GUIDANCE_KEY)
    if stated == GUIDANCE_NONE:
        return OneBranch(f"metadata {GUIDANCE_KEY} is {GUIDANCE_NONE!r}", certain=True)
    if stated == GUIDANCE_PAIR:
        return None
    for key in _TITLES:
        title = metadata.get(key)
        if isinstance(title, str) and named_one_branch(title):
            return OneBranch(f"metadata {key} is {printable(title)!r}")
    indexed = _by_index(path)
    if indexed is not None:
        return indexed
    for named in (path, *list(path.parents)[:_FOLDERS_ABOVE]):
        if named_one_branch(named.name):
            return OneBranch(f"the name {named.name} says so")
    return None


def named_one_branch(name: str) -> bool:
    """Whether a name has the words of a one-branch model: ``Ideogram4-instant_int8``."""
    return _ONE_BRANCH.search(_spaced(name)) is not None


def _spaced(name: str) -> str:
    return _SEPARATOR.sub(" ", _WORD_INSIDE.sub(" ", name[:200])).lower()


def _by_index(path: Path) -> OneBranch | None:
    """By the pipeline's own index, which lists its parts: diffusers' ``model_index.json``."""
    for folder in (path, path.parent, path.parent.parent):
        index = folder / "model_index.json"
        if folder.is_dir() and index.is_file():
            try:
                parts = read_json(index)
            except CheckpointError:
                return None  # it only tells what belongs together: the weights are none the worse
            other = parts.get("unconditional_transformer")
            listed = other[0] if isinstance(other, list) and other else other
            if "Ideogram4" in str(parts.get("_class_name")) and listed is None:
                return OneBranch("model_index.json lists no unconditional_transformer", True)
            return None
    return None
