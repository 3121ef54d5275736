"""The files of a combo: those that fit first, told by their headers, then all others."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, lru_cache
from pathlib import Path

from ..checkpoint import ModelConfig, open_encoder
from ..checkpoint.canonical import canonical_shapes
from ..checkpoint.copies import CONDITIONAL
from ..checkpoint.encoder_writing import is_head
from ..checkpoint.level_order import LEVELS
from ..checkpoint.levels import read_catalogue
from ..checkpoint.listing import stamp
from ..checkpoint.loras import names as lora_names
from ..checkpoint.tensor_files import open_tensor_files
from ..checkpoint.vae_files import check_vae
from ..errors import Ideogram4QuantError
from .headers import open_header
from .model_files import host_listing, pocket_listing

_NAMED = "ideogram"


def fitting_first(kind: str) -> list[str]:
    """Names in one of the host's folders: files for Ideogram 4, the others, each in order; heads
    of encoders, which no list loads by themselves, at the end.

    A header is read once for each state of its file. One that cannot be read goes by its name.
    """
    listing = host_listing(kind)
    ranks = {
        name: _rank(kind, listing.paths[name], stamp(listing.paths[name])) for name in listing.names
    }
    return sorted(listing.names, key=ranks.__getitem__)


def choices(kind: str) -> list[str]:
    """The same for a list that is never empty: where to put a file if there is none. The pocket
    model's file comes last."""
    return [*(fitting_first(kind) or host_listing(kind).choices), *pocket_listing(kind).names]


def levels_here() -> list[str]:
    """The levels of which there is a conditional copy."""
    found = read_catalogue(host_listing("diffusion_models"), open_header).candidates
    there = {c.header.level for c in found if CONDITIONAL in c.header.copies}
    return [level for level in LEVELS if level in there]


@lru_cache(maxsize=4096)
def _rank(kind: str, path: Path, _: tuple) -> int:
    if kind == "text_encoders" and is_head(path):
        return 2
    try:
        fits = _LOOKS[kind](path)
    except (Ideogram4QuantError, OSError):
        fits = _NAMED in path.name.casefold()
    return 0 if fits else 1


def _is_model(path: Path) -> bool:
    try:
        open_header(path)
    except Ideogram4QuantError:
        return _NAMED in path.name.casefold()
    return True


def _is_encoder(path: Path) -> bool:
    open_encoder(path)
    return True


def _is_vae(path: Path) -> bool:
    check_vae({name: raw.shape for name, raw in open_tensor_files(path).tensors.items()}, path)
    return True


def _is_lora(path: Path) -> bool:
    names = open_tensor_files(path).tensors
    return any(lora_names.locate(name, _spellings()) is not None for name in names)


@cache
def _spellings() -> dict[str, str]:
    shapes = canonical_shapes(ModelConfig())
    return lora_names.spellings(n.removesuffix(".weight") for n in shapes if n.endswith(".weight"))


_LOOKS: dict[str, Callable[[Path], bool]] = {
    "diffusion_models": _is_model,
    "text_encoders": _is_encoder,
    "vae": _is_vae,
    "loras": _is_lora,
}
