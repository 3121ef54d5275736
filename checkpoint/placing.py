"""Tensors of a file that have no place in the model: refused in it, told of beside it."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence

import torch

from ..errors import CheckpointError, printable
from .canonical import canonical_shapes
from .config import ModelConfig
from .entries import Entry
from .grammar import MARKERS, PREFIXES, parse_fold_key, parse_key
from .tensor_files import TensorFiles

logger = logging.getLogger(__name__)

_MAX_BIAS = 1 << 24  # bytes
_PREFIX = "|".join(re.escape(prefix) for prefix in sorted(PREFIXES, key=len, reverse=True))
_IN_LAYER = re.compile(rf"(?:{_PREFIX})layers\.\d+\.(?P<rest>.+)", re.DOTALL)
# In a layer and not of its weights: a wish for the host's attention; frequencies of the rotary
# embedding, which follow from the config.
_NO_WEIGHTS = re.compile(r"attention\.comfy_attention\.config|(?:attention\.)?rotary_emb\.inv_freq")


def check_placed(
    opened: Sequence[TensorFiles],
    entries: Mapping[str, Mapping[str, Entry]],
    config: ModelConfig,
) -> None:
    """CheckpointError for a tensor in the model that the model has no use for.

    Zeros, as a bias that a tool adds everywhere, change nothing: they, and what is of another model
    in the file, are passed over with a warning.
    """
    known = canonical_shapes(config)
    ignored = []
    for entry in (e for part in entries.values() for e in part.values()):
        if entry.name in known:
            continue
        key = entry.pieces[0].key
        if entry.nbytes > _MAX_BIAS or bool(entry.read(torch.float32).count_nonzero()):
            raise _no_place(entry.pieces[0].weight.file.path, key, "its values are not zero")
        ignored.append(key)
    for tensor_files in opened:
        for key, raw in tensor_files.tensors.items():
            if parse_key(key) is not None or parse_fold_key(key) is not None:
                continue
            inside = _IN_LAYER.fullmatch(key)
            if inside and not _NO_WEIGHTS.fullmatch(inside["rest"]):
                raise _no_place(raw.file.path, key, "it is not understood")
            if not inside and key.rpartition(".")[2] not in MARKERS:
                ignored.append(key)
    if ignored:
        logger.warning(
            "%s: ignored %d tensors that are not of Ideogram 4's transformer, such as %s",
            opened[0].path,
            len(ignored),
            printable(ignored[0]),
        )


def _no_place(path: object, key: str, why: str) -> CheckpointError:
    return CheckpointError(
        f"Ideogram 4 has no such tensor there, and {why}",
        file=path,
        tensor=key,
        hint="Without it the picture could be wrong: use another file.",
    )
