"""Which of the two copies a file holds: the rules, in order, each able to say that it decided."""

from __future__ import annotations

import logging
import re
from collections.abc import Collection
from dataclasses import dataclass

from ..errors import CheckpointError, PairMismatchError, printable
from .canonical import TEXT_ONLY
from .container import Container
from .grammar import CONDITIONAL, UNCONDITIONAL

logger = logging.getLogger(__name__)

COPIES = (CONDITIONAL, UNCONDITIONAL)
COPY_FOLDERS = {CONDITIONAL: "transformer", UNCONDITIONAL: "unconditional_transformer"}
_METADATA_KEYS = ("ideogram4.copy", "model_type", "copy")
_NAMES_OF_ANY_MODEL = ("diffusion_pytorch_model", "model.", "model-")
_OVERRIDE = "say copy='unconditional' if it is the other one"


@dataclass(frozen=True)
class Verdict:
    """A copy and the rule that told it; ``certain``: the file itself says so."""

    copy: str
    reason: str
    certain: bool = False


def tell_copy(container: Container, names: Collection[str], copy: str | None) -> Verdict:
    """The copy of a file whose keys name none: metadata, then file name, then content.

    ``copy`` is the user's word and wins over name and content. Raises PairMismatchError if it
    contradicts the file's metadata.
    """
    verdict = _by_metadata(container) or _by_name(container) or _by_content(names)
    if copy is None:
        return verdict
    check_copy_name(copy)
    if verdict.copy != copy:
        if verdict.certain:
            raise PairMismatchError(
                "the file is the other copy",
                file=container.path,
                found=f"{verdict.copy} ({verdict.reason})",
                needed=copy,
            )
        logger.warning(
            "%s: taken as the %s copy as asked, though %s", container.path, copy, verdict.reason
        )
    return Verdict(copy, "the caller says so")


def check_copy_name(copy: str) -> None:
    """CheckpointError for a copy that does not exist."""
    if copy not in COPIES:
        raise CheckpointError("there is no such copy", found=copy, needed=" or ".join(COPIES))


def _copy_in(text: str) -> str | None:
    """The copy that a word in ``text`` names."""
    text = text.lower()
    if "uncond" in text:
        return UNCONDITIONAL
    # a word of its own: "second" is no copy
    return CONDITIONAL if re.search(r"(?<![a-z])cond(?:itional)?(?![a-z])", text) else None


def _by_metadata(container: Container) -> Verdict | None:
    for key in _METADATA_KEYS:
        value = container.metadata.get(key)
        copy = _copy_in(value) if isinstance(value, str) else None
        if copy is not None:
            return Verdict(copy, f"metadata {key} is {printable(value)!r}", certain=True)
    return None


def _by_name(container: Container) -> Verdict | None:
    path = container.path
    copy = _copy_in(path.name)
    if copy is not None:
        return Verdict(copy, f"the name {path.name} says so")
    folder = path if path.is_dir() else path.parent
    exact = {name: copy for copy, name in COPY_FOLDERS.items()}
    copy = exact.get(folder.name)
    if copy is None and path.name.startswith(_NAMES_OF_ANY_MODEL):
        copy = _copy_in(folder.name)
    return Verdict(copy, f"it lies in the folder {folder.name}") if copy else None


def _by_content(names: Collection[str]) -> Verdict:
    if not any(name in names for name in TEXT_ONLY):
        return Verdict(UNCONDITIONAL, "it has no llm_cond_proj, which only text needs")
    return Verdict(
        CONDITIONAL, f"neither metadata nor name nor content tell, so this is assumed; {_OVERRIDE}"
    )
