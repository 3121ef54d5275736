"""Which of the two copies a file holds: the rules, in order, each able to say that it decided."""

from __future__ import annotations

import logging
import re
from collections.abc import Collection
from dataclasses import dataclass

from ..errors import CheckpointError, PairMismatchError, printable
from .canonical import TEXT_ONLY
from .copy_names import CONDITIONAL, COPIES, UNCONDITIONAL
from .tensor_files import TensorFiles

logger = logging.getLogger(__name__)

COPY_FOLDERS = {CONDITIONAL: "transformer", UNCONDITIONAL: "unconditional_transformer"}
_METADATA_KEYS = ("ideogram4.copy", "model_type", "copy")
_FOLDERS_ABOVE = 2  # whose names count where the file's own says nothing: cond/Q8_0/x.gguf
# words of their own ("second" is no copy); what stands before "cond" may turn it around
_NEGATED = re.compile(
    r"uncond|(?<![a-z])(?:un?|non|not?|neg(?:ative)?|without|null|empty|zero|minus)[-_. ]*"
    r"cond(?:itional)?(?![a-z])"
)
_PLAIN = re.compile(r"(?<![a-z])cond(?:itional)?(?![a-z])")
_WORD_INSIDE = re.compile(r"(?<=[a-z])(?=[A-Z])")
_OVERRIDE = "say copy='unconditional' if it is the other one"


@dataclass(frozen=True)
class Verdict:
    """A copy and the rule that told it; ``certain``: the file itself says so; ``assumed``: nothing
    told it."""

    copy: str
    reason: str
    certain: bool = False
    assumed: bool = False


def tell_copy(tensor_files: TensorFiles, names: Collection[str], copy: str | None) -> Verdict:
    """The copy of a file whose keys name none: metadata, then file name, then content.

    ``copy`` is the user's word and wins over name and content. Raises PairMismatchError if it
    contradicts the file's metadata.
    """
    verdict = _by_metadata(tensor_files) or _by_name(tensor_files) or _by_content(names)
    if copy is None:
        return verdict
    check_copy_name(copy)
    if verdict.copy != copy:
        if verdict.certain:
            raise PairMismatchError(
                "the file is the other copy",
                file=tensor_files.path,
                found=f"{verdict.copy} ({verdict.reason})",
                needed=copy,
            )
        logger.warning(
            "%s: taken as the %s copy as asked, though %s", tensor_files.path, copy, verdict.reason
        )
    return Verdict(copy, "as asked")


def check_copy_name(copy: str) -> None:
    """CheckpointError for a copy that does not exist."""
    if copy not in COPIES:
        raise CheckpointError("there is no such copy", found=copy, needed=" or ".join(COPIES))


def _copy_in(text: str) -> str | None:
    """The copy that the words in ``text`` name; None where they name none, or both."""
    text = _WORD_INSIDE.sub(" ", text).lower()
    rest, negated = _NEGATED.subn("", text)
    plain = _PLAIN.search(rest) is not None
    if negated:
        return None if plain else UNCONDITIONAL
    return CONDITIONAL if plain else None


def without_copy_words(text: str) -> str:
    """``text`` in lower case without the words for a copy: what the names of a pair share."""
    text = _NEGATED.sub("", _WORD_INSIDE.sub(" ", text).lower())
    return re.sub(r"itional|transformer|model", "", _PLAIN.sub("", text))


def _by_metadata(tensor_files: TensorFiles) -> Verdict | None:
    for key in _METADATA_KEYS:
        value = tensor_files.metadata.get(key)
        copy = _copy_in(value) if isinstance(value, str) else None
        if copy is not None:
            return Verdict(copy, f"metadata {key} is {printable(value)!r}", certain=True)
    return None


def _by_name(tensor_files: TensorFiles) -> Verdict | None:
    path = tensor_files.path
    copy = _copy_in(path.name)
    if copy is not None:
        return Verdict(copy, f"the name {path.name} says so")
    if path.is_dir() and path.name == COPY_FOLDERS[CONDITIONAL]:
        return Verdict(CONDITIONAL, f"it is the folder {path.name}")
    for folder in list(path.parents)[:_FOLDERS_ABOVE]:
        copy = _copy_in(folder.name)
        if copy is None and folder.name == COPY_FOLDERS[CONDITIONAL]:
            copy = CONDITIONAL
        if copy is not None:
            return Verdict(copy, f"it lies in the folder {folder.name}")
    return None


def _by_content(names: Collection[str]) -> Verdict:
    if not any(name in names for name in TEXT_ONLY):
        return Verdict(UNCONDITIONAL, "it has no llm_cond_proj, which only text needs")
    return Verdict(
        CONDITIONAL,
        f"neither metadata nor name nor content tell, so this is assumed; {_OVERRIDE}",
        assumed=True,
    )
