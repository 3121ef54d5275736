"""The dimensions of an Ideogram 4 transformer: stated by a file, or read off its shapes."""

from __future__ import annotations

import dataclasses
import math
import os
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import CorruptFileError

_MAX_SIZE = 1 << 24  # bounds what an untrusted file can make us list or allocate
_MAX_LAYERS = 1 << 10


@dataclass(frozen=True)
class ModelConfig:
    """Names and defaults are those of diffusers' Ideogram4Transformer2DModel (the real model's)."""

    in_channels: int = 128
    num_layers: int = 34
    attention_head_dim: int = 256
    num_attention_heads: int = 18
    intermediate_size: int = 12288
    adaln_dim: int = 512
    llm_features_dim: int = 53248
    rope_theta: int = 5_000_000
    mrope_section: tuple[int, int, int] = (24, 20, 20)
    norm_eps: float = 1e-5

    @property
    def hidden_size(self) -> int:
        return self.attention_head_dim * self.num_attention_heads

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; the keyword arguments of diffusers' class."""
        return {**dataclasses.asdict(self), "mrope_section": list(self.mrope_section)}


# Sizes that follow from shapes: field -> (tensor, dimension) pairs, the first one found counts
_FROM_SHAPES: dict[str, tuple[tuple[str, int], ...]] = {
    "hidden_size": (
        ("layers.0.attention_norm1.weight", 0),
        ("layers.0.attention.o.weight", 0),
    ),
    "attention_head_dim": (("layers.0.attention.norm_q.weight", 0),),
    "in_channels": (("final_layer.linear.weight", 0), ("input_proj.weight", 1)),
    "intermediate_size": (("layers.0.feed_forward.w1.weight", 0),),
    "adaln_dim": (("adaln_proj.bias", 0), ("adaln_proj.weight", 0)),
    "llm_features_dim": (("llm_cond_norm.weight", 0), ("llm_cond_proj.weight", 1)),
}
_LAYER = re.compile(r"layers\.(\d+)\.")


def sizes_from_shapes(
    names: Collection[str], shape_of: Callable[[str], tuple[int, ...]]
) -> dict[str, int]:
    """``hidden_size`` and the fields of ModelConfig that the tensors ``names`` determine.

    ``shape_of(name)`` is asked for a few of them.
    """
    found: dict[str, int] = {}
    for field, places in _FROM_SHAPES.items():
        for name, dimension in places:
            if name in names and len(shape := shape_of(name)) > dimension:
                found[field] = shape[dimension]
                break
    layers = {int(match[1]) for match in map(_LAYER.match, names) if match}
    if layers:
        found["num_layers"] = max(layers) + 1
    return found


def config_from(
    stated: Mapping[str, Any] | None, sizes: Mapping[str, int], path: str | os.PathLike[str]
) -> ModelConfig:
    """The config that a file states, checked against ``sizes``, or these with defaults.

    Raises CorruptFileError if the two disagree or a value is unusable.
    """
    fields = {field.name for field in dataclasses.fields(ModelConfig)}
    values = {key: value for key, value in (stated or {}).items() if key in fields}
    for key, value in values.items():
        _check_value(key, value, path)
    sizes = dict(sizes)
    hidden = sizes.pop("hidden_size", None)
    for key, size in sizes.items():
        _check_value(key, size, path)
        _check_agree(key, size, values.setdefault(key, size), path)
    if hidden is not None:
        _check_value("hidden size", hidden, path)
        # Files of linears alone do not tell the head dim. 256 is the real model's.
        head_dim = values.setdefault(
            "attention_head_dim", math.gcd(hidden, ModelConfig.attention_head_dim)
        )
        heads = values.setdefault("num_attention_heads", hidden // head_dim)
        _check_agree("hidden size", hidden, heads * head_dim, path)
    if "mrope_section" in values:
        values["mrope_section"] = tuple(values["mrope_section"])
    return ModelConfig(**values)


def _check_agree(key: str, found: int, stated: int, path: str | os.PathLike[str]) -> None:
    if found != stated:
        raise CorruptFileError(
            f"the stated {key} is not that of the tensors",
            file=path,
            found=found,
            needed=stated,
            hint="The config, in its metadata or in config.json beside it, belongs to another "
            "model, or tensors are missing.",
        )


def _check_value(key: str, value: Any, path: str | os.PathLike[str]) -> None:
    if key == "mrope_section":
        usable = isinstance(value, list | tuple) and len(value) == 3 and all(map(_is_size, value))
    elif key == "norm_eps":
        usable = isinstance(value, float) and 0 < value < 1
    elif key == "rope_theta":
        usable = isinstance(value, int | float) and 1 < value < 1e12
    else:
        usable = _is_size(value) and value <= (_MAX_LAYERS if key == "num_layers" else _MAX_SIZE)
    if not usable:
        raise CorruptFileError(
            f"unusable {key} in the model's config", file=path, found=repr(value)
        )


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 < value <= _MAX_SIZE


def same_model(first: ModelConfig, second: ModelConfig, *, ignore: tuple[str, ...] = ()) -> str:
    """What differs, as text for an error; empty if nothing does."""
    one, two = first.to_dict(), second.to_dict()
    differing = [key for key in one if one[key] != two[key] and key not in ignore]
    return ", ".join(f"{key} {one[key]} against {two[key]}" for key in differing)
