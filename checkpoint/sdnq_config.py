"""What an SDNQ folder's ``quantization_config.json`` says of each of its weights.

The tensors alone do not tell: ``weight`` is bytes, and which dtype they are, and whether the weight
was rotated, stands in one config for the whole model, with lists of the modules that differ. Its
rules are those of sdnq 0.2.8 (``get_quant_kwargs``, ``check_param_name_in``).
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from ..errors import CorruptFileError, printable
from .tensor_files import TensorFiles, read_json

SDNQ = "sdnq"
"""Format name of these weights, as ``comfy_quant`` has others."""

CONFIG = "quantization_config"
_SCALE = ".scale"
_MAX_PATTERNS = 256  # entries with a star or a leading dot; sdnq writes none of its own for us
_LEAST_BITS = re.compile(r"(?:minimum[-_]?)?(?P<kind>u?int)?(?P<bits>[0-9]{1,2})[-_]?(?:bits?)?")
_SETTINGS = ("use_hadamard", "hadamard_group_size", "use_svd", "use_codebook", "scale_dtype")


def sdnq_layers(tensor_files: TensorFiles) -> dict[str, dict[str, Any]]:
    """Module -> what is told of its weight, for every module with ``weight`` and ``scale``.

    ``{"format": "sdnq", "weights_dtype": ..., ...}``; nothing where no config beside the files is
    SDNQ's. Raises CorruptFileError for a config that is not as sdnq writes it.
    """
    if tensor_files.kind != "safetensors":
        return {}
    modules = [
        name.removesuffix(_SCALE)
        for name in tensor_files.tensors
        if name.endswith(_SCALE) and name.removesuffix(_SCALE) + ".weight" in tensor_files.tensors
    ]
    config = _config(tensor_files) if modules else None
    if config is None:
        return {}
    dtypes = [
        (dtype, _Names(names, tensor_files))
        for dtype, names in _object(config, "modules_dtype_dict", tensor_files).items()
    ]
    others = _object(config, "modules_quant_config", tensor_files)
    own = [(_Names([name], tensor_files), said) for name, said in others.items()]
    result = {}
    for module in modules:
        weight = f"{module}.weight"
        said = next((said for names, said in own if names.has(weight)), {})
        settings = {**config, **(said if isinstance(said, dict) else {})}
        dtype = str(settings.get("weights_dtype"))
        for other, names in dtypes:
            if names.has(weight):
                dtype = _at_least(dtype, other)
                break
        result[module] = {
            "format": SDNQ,
            "weights_dtype": dtype,
            "version": settings.get("sdnq_version"),
            **{key: settings.get(key) for key in _SETTINGS},
        }
    return result


def _config(tensor_files: TensorFiles) -> Mapping[str, Any] | None:
    """SDNQ's config in the weights' folder: a file of its own, or inside ``config.json``."""
    folder = tensor_files.path.parent
    for name, inner in ((f"{CONFIG}.json", None), ("config.json", CONFIG)):
        path = folder / name
        if path.is_file():
            found = read_json(path)
            found = found if inner is None else found.get(inner)
            if isinstance(found, dict) and found.get("quant_method") == SDNQ:
                return found
    return None


def _object(config: Mapping[str, Any], key: str, tensor_files: TensorFiles) -> dict[str, Any]:
    value = config.get(key) or {}
    if not isinstance(value, dict):
        raise _corrupt(tensor_files, key, value)
    return value


def _corrupt(tensor_files: TensorFiles, key: str, value: object) -> CorruptFileError:
    return CorruptFileError(
        f"{CONFIG}: unusable {key}",
        file=tensor_files.path.parent,
        found=printable(str(value)[:80]),
        needed="as sdnq writes it",
        hint="Take the config from the folder that the weights were published in.",
    )


class _Names:
    """SDNQ's list of modules: whole names, parts between dots, ``.beginnings``, ``wild*cards``."""

    def __init__(self, names: object, tensor_files: TensorFiles) -> None:
        names = [names] if isinstance(names, str) else names
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise _corrupt(tensor_files, "list of modules", names)
        patterns = [name for name in names if name.startswith(".") or "*" in name]
        if len(patterns) > _MAX_PATTERNS:
            raise _corrupt(tensor_files, "list of modules", f"{len(patterns)} patterns")
        self._plain = frozenset(names) - frozenset(patterns)
        self._matches: list[Callable[[str], bool]] = [_matcher(name) for name in patterns]

    def has(self, weight: str) -> bool:
        parts: Iterable[str] = (weight, *weight.split("."))
        return any(part in self._plain for part in parts) or any(m(weight) for m in self._matches)


def _matcher(pattern: str) -> Callable[[str], bool]:
    if pattern.startswith("."):
        return lambda weight: weight.startswith(pattern[1:])
    glob = re.sub(r"([\[?])", r"[\1]", pattern) + "*"
    return lambda weight: fnmatch.fnmatchcase(weight, glob)


def _at_least(dtype: str, other: str) -> str:
    """What a key of ``modules_dtype_dict`` makes of ``dtype``: another, or a least width."""
    match = _LEAST_BITS.fullmatch(other.lower())
    if match is None or other.lower() == f"{match['kind']}{match['bits']}":
        return other.lower()
    stored = re.search(r"\d+", dtype)
    bits = int(match["bits"])
    if stored is None or int(stored[0]) >= bits:
        return dtype
    return f"uint{bits}" if match["kind"] == "uint" or bits <= 4 else f"int{bits}"
