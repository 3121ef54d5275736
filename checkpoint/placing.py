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
_IN_MODEL = re.compile(
    rf"(?:{_PREFIX})(?:layers\.\d+\.|final_layer\.|t_embedding\.|input_proj|llm_cond_|adaln_proj"
    r"|embed_image_indicator)(?P<rest>.+)",
    re.DOTALL,
)
# Of all layers together, as a tool's own tensors may be
_OF_ALL = re.compile(rf"(?:{_PREFIX})[^.]*(?:smooth|svd|low_?rank|zero_?point)[^.]*", re.IGNORECASE)
# A layer's module anywhere in a name, with dots or as LoRA files write it
_MODULE = re.compile(
    r"layers[._]\d{1,4}[._](?:attention[._](?:qkv|o|to_[qkv]|to_out[._]0)|feed_forward[._]w[123]"
    r"|adaln_modulation)(?![A-Za-z0-9])"
)
_LONG = 400  # characters of a name that are looked at; ours have 60
# In a layer and not of its weights: a wish for the host's attention; frequencies of the rotary
# embedding, which follow from the config.
_NO_WEIGHTS = re.compile(r"attention\.comfy_attention\.config|(?:attention\.)?rotary_emb\.inv_freq")


def check_placed(
    opened: Sequence[TensorFiles],
    entries: Mapping[str, Mapping[str, Entry]],
    config: ModelConfig,
) -> None:
    """CheckpointError for a tensor in the model that the model has no use for.

    So is one that names a module of the model and stands under no weight of that name, as a tool's
    that keeps what it adds under a prefix of its own. Zeros, as a bias that a tool adds everywhere,
    change nothing: they, and what is of another model in the file, are passed over with a warning.
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
            inside = _IN_MODEL.fullmatch(key)
            meant = inside or _OF_ALL.fullmatch(key) or _beside(key, tensor_files)
            if meant and not (inside and _NO_WEIGHTS.fullmatch(inside["rest"])):
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


def _beside(key: str, tensor_files: TensorFiles) -> bool:
    """Whether a tensor under another prefix is of a module here: no weight has that prefix too.

    One that has is another model's in the file, such as an average of the weights.
    """
    module = _MODULE.search(key[:_LONG])
    return module is not None and f"{key[: module.end()]}.weight" not in tensor_files.tensors


def _no_place(path: object, key: str, why: str) -> CheckpointError:
    return CheckpointError(
        f"Ideogram 4 has no such tensor there, and {why}",
        file=path,
        tensor=key,
        hint="Without it the picture could be wrong: use another file.",
    )
