"""The files of a ComfyUI that this pack can use: models, encoders and VAEs, by what they hold."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ...checkpoint import Checkpoint, EncoderCheckpoint, open_checkpoint, open_encoder
from ...checkpoint.levels import Catalogue, read_catalogue
from ...checkpoint.listing import Listing, list_files
from ...checkpoint.safetensors_header import read_safetensors_header
from ...checkpoint.vae_files import check_vae
from ...errors import CheckpointError, NotIdeogram4Error
from .comfyui import Host, model_folders


@dataclass(frozen=True)
class KnownFiles:
    """What lies in the folders. encoders, vaes: (name, path, what opening it gave); broken: name ->
    why a file that looks like one of them cannot be read; notes: folders that were not read."""

    folders: dict[str, list[str]]
    listings: dict[str, Listing]
    models: Catalogue
    encoders: list[tuple[str, Path, EncoderCheckpoint]]
    vaes: list[tuple[str, Path, None]]
    broken: dict[str, str]
    notes: list[str]


def known_files(host: Host) -> KnownFiles:
    """Every file's header read once; nothing else of them is."""
    folders, notes = model_folders(host.root)
    listings = {kind: list_files(kind, roots) for kind, roots in folders.items()}
    models = read_catalogue(listings["diffusion_models"], _open_model)
    encoders, bad_encoders = _open_all(listings["text_encoders"], open_encoder)
    vaes, bad_vaes = _open_all(listings["vae"], _open_vae)
    broken = models.broken | bad_encoders | bad_vaes
    return KnownFiles(folders, listings, models, encoders, vaes, broken, notes)


def _open_all(listing: Listing, open_file: Callable) -> tuple[list, dict[str, str]]:
    """([(name, path, what opening it gave)], name -> why it is broken); others are passed over."""
    opened, broken = [], {}
    for name in listing.names:
        try:
            opened.append((name, listing.paths[name], open_file(listing.paths[name])))
        except NotIdeogram4Error:
            continue
        except (CheckpointError, OSError) as error:
            broken[name] = str(error)
    return opened, broken


def _open_vae(path: Path) -> None:
    """NotIdeogram4Error unless the header is that of a FLUX.2 VAE, CheckpointError for one that the
    loaders refuse."""
    tensors = {} if path.is_dir() else read_safetensors_header(path)[1]
    check_vae({name: tensor.shape for name, tensor in tensors.items()}, path)


def _open_model(path: Path) -> Checkpoint:
    """The header, and the record of what was folded, which may be broken too."""
    header = open_checkpoint(path)
    for copy in header.copies:
        header.folding(copy)
    return header
