"""What files say of their quantization outside the tensors, and whether the tensors bear it out.

ComfyUI keeps a description of every module in the metadata ``_quantization_metadata``; other tools
put one ``quantization_config`` for all into the metadata or into ``config.json``. Whatever changes
the arithmetic must have been understood: a rotation that is told and not undone, or a description
that belongs to no tensor, spoils every weight without a sign.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

from ..errors import CheckpointError, CorruptFileError, printable
from .canonical import TEXT_ONLY
from .entries import Entry
from .files import RawTensor
from .grammar import Key, module_of
from .level_order import MIXED
from .sdnq_config import sdnq_layers
from .tensor_files import TensorFiles, json_object, read_json

METADATA = "_quantization_metadata"
_CONFIG = "quantization_config"
_RECORDS = ("quantization", "ideogram4.quantization")  # of this pack's quantizer
_LONGEST_JSON = 1 << 20  # characters; a config takes some hundred
_TAIL, _LONG = 12, 400  # components and characters of a name that are compared; ours have 6 and 60

# Words for what is done to weights beside rounding them. A value of these keys that is not "off"
# must show in the tensors.
_ROTATION = re.compile(
    r"rotat|convrot|hadamard|quarot|spinquant|(?<![a-z])quip|transform_config", re.IGNORECASE
)
_ADDED = re.compile(r"use_svd|svd_rank|low_rank|lora_rank|zero_point$", re.IGNORECASE)
_OFF = ("", "0", "false", "no", "none", "null", "off", "{}", "[]", "identity")
_UNUSED_SIZES = ("hadamard_group_size", "svd_rank")  # SDNQ states them in use or not

# Methods of quantization_config whose tensors tell all there is to know.
_TOLD_BY_TENSORS = re.compile(r"bitsandbytes|compressed.tensors|.*(?:fp8|float8).*", re.IGNORECASE)


def told_mix(opened: Sequence[TensorFiles]) -> str | None:
    """One of ``level_order.MIXED`` where the quantizer's own record says that a size was asked for:
    the level of most weights would part the two copies of one choice."""
    for tensor_files in opened:
        for text in map(tensor_files.metadata.get, _RECORDS):
            try:
                record = json.loads(text) if isinstance(text, str) else text
            except (ValueError, RecursionError):
                continue
            if isinstance(record, dict) and record.get("level") in MIXED:
                return record["level"]
    return None


def stated_quantization(tensor_files: TensorFiles) -> dict[str, Any]:
    """Module -> description, from the metadata in which ComfyUI may keep it instead of tensors.

    Of shards each may describe its own; CheckpointError if two say different things of one weight.
    SDNQ's config beside the files describes its weights alike.
    """
    result: dict[str, Any] = sdnq_layers(tensor_files)
    for metadata in tensor_files.stated():
        text = metadata.get(METADATA)
        if not isinstance(text, str):
            continue
        layers = json_object(text, METADATA, tensor_files.path).get("layers")
        if not isinstance(layers, dict) or not all(isinstance(v, dict) for v in layers.values()):
            raise CorruptFileError(f"metadata {METADATA} has no layers", file=tensor_files.path)
        for module, description in layers.items():
            if result.setdefault(module, description) != description:
                raise _two_things(tensor_files, module, description, result[module])
    return result


def matched(
    tensor_files: TensorFiles,
    tensors: Collection[tuple[Key, RawTensor]],
    parse: Callable[[str], Key | None],
    copy_of: Callable[[str], str | None] = lambda prefix: None,
) -> dict[str, Mapping[str, Any]]:
    """Module, as the keys of the tensors name it -> what the metadata says of it.

    Writers disagree whether these names carry the prefix that the keys have, so that a name that is
    no key's is matched by its module, ``parse`` taking any prefix off; ``copy_of`` says which copy
    a prefix names. Raises CheckpointError for a statement that belongs to no tensor of the file, or
    two of one tensor that differ.
    """
    weights: dict[str, list[tuple[Key, str]]] = {}
    for key, raw in tensors:
        if key.role == "weight" and key.name.endswith(".weight"):
            weights.setdefault(key.name, []).append((key, module_of(raw)))
    exact = {module for found in weights.values() for _, module in found}
    tails = None
    result: dict[str, Mapping[str, Any]] = {}
    for name, description in stated_quantization(tensor_files).items():
        if name not in exact and f"{name}.weight" in tensor_files.tensors:
            continue  # of another model in the file
        key = _parsed(name, parse)
        modules = [name] if name in exact else _meant(key, weights, copy_of)
        if not modules:
            if tails is None:  # those of this model's own names would excuse any description
                tails = _tails(tensor_files.tensors.keys() - {raw.key for _, raw in tensors})
            if not _belongs_elsewhere(name, key, tails):
                raise _unmatched(tensor_files, name)
        for module in modules:
            if result.setdefault(module, description) != description:
                raise _two_things(tensor_files, module, description, result[module])
    return result


def _two_things(
    tensor_files: TensorFiles, module: str, first: object, second: object
) -> CheckpointError:
    return CheckpointError(
        f"metadata {METADATA} says two things of one weight",
        file=tensor_files.path,
        tensor=module,
        found=f"{first} and {second}",
    )


def _meant(
    key: Key | None,
    weights: Mapping[str, list[tuple[Key, str]]],
    copy_of: Callable[[str], str | None],
) -> list[str]:
    """The modules of the tensors that a statement with other prefixes can mean."""
    if key is None:
        return []
    copy = copy_of(key.prefix)
    return [
        module
        for other, module in weights.get(key.name, ())
        if key.piece in (None, other.piece)
        and (copy is None or copy_of(other.prefix) in (None, copy))
    ]


def _parsed(name: str, parse: Callable[[str], Key | None]) -> Key | None:
    """The key of a module's weight, whatever stands before its name."""
    parts = name.split(".")
    tried = (parse(".".join(parts[i:]) + ".weight") for i in range(min(len(parts), _TAIL)))
    return next((key for key in tried if key is not None), None)


def _tails(names: Iterable[str]) -> set[str]:
    """Each module among ``names``, and what is left of it without its first components."""
    found = set()
    for name in names:
        if len(name) > _LONG:
            continue
        parts = name.split(".")[:-1][-_TAIL:]
        found |= {".".join(parts[i:]) for i in range(len(parts))}
    return found


def _belongs_elsewhere(name: str, key: Key | None, tails: Collection[str]) -> bool:
    """Whether a statement is of another model in the file, or of a part that copies leave out."""
    if key is not None:
        return key.name in TEXT_ONLY
    parts = name.split(".")[-_TAIL:]
    return any(".".join(parts[i:]) in tails for i in range(max(1, len(parts) - 1)))


def _unmatched(tensor_files: TensorFiles, name: str) -> CheckpointError:
    return CheckpointError(
        f"metadata {METADATA} describes a weight that is not in the file",
        file=tensor_files.path,
        tensor=name,
        found=f"no {printable(name)}.weight among {len(tensor_files.tensors)} tensors, "
        "with or without a prefix",
        hint="What it says would be lost and the picture wrong: use the file as its tool wrote it.",
    )


def check_heeded(
    tensor_files: TensorFiles, entries: Collection[Entry], config: Mapping[str, Any] | None
) -> None:
    """CheckpointError for a quantization that is told for the whole file and not in its tensors.

    ``config``: that of the model, beside the weights, if it is this model's.
    """
    # Where the tensors tell of a rotation, what the file says of one is a summary.
    linears = [entry for entry in entries if entry.linear]
    rotated = any(c.rotated(p) for e in linears for c, p in zip(e.codecs, e.pieces, strict=True))
    mark = next((key for key in tensor_files.tensors if _marks(key)), None)
    if mark is not None and not rotated:
        raise _not_undone(tensor_files, "tensor", mark)
    for metadata in tensor_files.stated():
        own = str(metadata.get("software", metadata.get("ideogram4.software", "")))
        for key, value in metadata.items() if not own.startswith("ideogram4-quant") else ():
            if key == METADATA and isinstance(value, str):  # its layers are matched, see above
                value = json_object(value, METADATA, tensor_files.path) | {"layers": {}}
            said = _unheeded(key, value, rotated, inside="quant" in key.lower())
            if said:
                raise _not_undone(tensor_files, f"metadata {printable(key)}", said)
    quantized = [entry for entry in entries if entry.linear and entry.level != "BF16"]
    described = all(parts.quantization() for entry in quantized for parts in entry.pieces)
    if quantized and described:
        return
    for where, stated in _configs(tensor_files, config):
        said = _unheeded(_CONFIG, stated, rotated, inside=True)
        if said:
            raise _not_undone(tensor_files, where, said)
        method = stated.get("quant_method")
        if quantized and method is not None and not _TOLD_BY_TENSORS.fullmatch(str(method)):
            raise CheckpointError(
                "this storage format is not supported",
                file=tensor_files.path,
                tensor=quantized[0].pieces[0].key,
                found=f"{where}: {printable(str(method))}",
                hint="Use a file in FP8 (fp8_scaled), INT8 (int8_convrot), GGUF or BF16; or, if "
                "the config belongs to another model, a folder of its own.",
            )


def _marks(key: str) -> bool:
    """Whether a tensor outside all modules, such as ``hadamard``, tells of a rotation."""
    return len(key) <= _LONG and "fold." not in key and bool(_ROTATION.search(key))


def _not_undone(tensor_files: TensorFiles, where: str, said: str) -> CheckpointError:
    return CheckpointError(
        "the file tells of a change to its weights that its tensors do not describe",
        file=tensor_files.path,
        found=f"{where}: {printable(said)}",
        needed="comfy_quant beside each weight",
        hint="Loaded so, every picture would come out wrong: use another file of this model.",
    )


def _configs(
    tensor_files: TensorFiles, config: Mapping[str, Any] | None
) -> list[tuple[str, Mapping[str, Any]]]:
    """(where it stands, the description) of one method for the whole file."""
    found = []
    for metadata in tensor_files.stated():
        value = metadata.get(_CONFIG)
        if isinstance(value, str):
            value = json_object(value, _CONFIG, tensor_files.path)
        if isinstance(value, dict):  # the metadata of an index are no strings
            found.append((f"metadata {_CONFIG}", value))
    if config is None:
        return found
    if isinstance(config.get(_CONFIG), dict):
        found.append((f"{_CONFIG} in config.json", config[_CONFIG]))
    beside = tensor_files.path.parent / f"{_CONFIG}.json"  # SDNQ
    if beside.is_file():
        found.append((beside.name, read_json(beside)))
    return found


def _unheeded(key: str, value: object, rotated: bool, *, inside: bool) -> str:
    """``KEY VALUE`` of a statement in ``value`` that changes weights; empty if there is none.

    ``rotated``: a rotation has been understood. ``inside``: it speaks of quantization, so that what
    is in it does too.
    """
    words = [*(() if rotated else (_ROTATION,)), *((_ADDED,) if inside else ())]
    if isinstance(value, str) and inside and value[:1] == "{" and len(value) <= _LONGEST_JSON:
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return ""
    waiting = [(key, value)]
    while waiting:
        name, item = waiting.pop()
        if isinstance(item, dict) and inside and item:
            if not rotated and _ROTATION.search(name):
                return f"{name} {json.dumps(item)[:80]}"
            waiting += [(str(k), v) for k, v in item.items()]
        elif isinstance(item, list) and inside:
            waiting += [(name, v) for v in item if isinstance(v, dict)]
        elif any(word.search(name) for word in words) and not _is_off(name, item):
            return f"{name} {item}"
    return ""


def _is_off(name: str, value: object) -> bool:
    return name in _UNUSED_SIZES or str(value).strip().lower() in _OFF
