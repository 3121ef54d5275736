"""Files for a command that names none, or only a name: those that ``doctor`` knows."""

from __future__ import annotations

import argparse
import logging
from functools import cached_property
from pathlib import Path

from ..checkpoint.level_order import AUTO, AUTO_ORDER, LEVELS, capability
from ..checkpoint.levels import resolve
from ..diagnostics.doctor.comfyui import named_host
from ..diagnostics.doctor.known_files import KnownFiles, known_files
from ..diagnostics.doctor.machine import find_device, ram
from ..errors import CheckpointError
from ..quant import level_names

_log = logging.getLogger(__name__)
_KINDS = {
    "model": "diffusion_models",
    "uncond": "diffusion_models",
    "encoder": "text_encoders",
    "vae": "vae",
}


class FilesHere:
    """The files of the ComfyUI in a folder, or of the one found; looked for when first needed."""

    def __init__(self, comfyui: Path | None = None) -> None:
        self._comfyui = comfyui

    @cached_property
    def known(self) -> KnownFiles:
        """What `doctor` knows; CheckpointError where there is no ComfyUI."""
        return known_files(named_host(self._comfyui))

    def path(self, value: str | Path, kind: str) -> Path:
        """The path itself, or that of the file of this name in ComfyUI's folders; the path as given
        where there is neither, so that whoever opens it says so."""
        path = Path(value)
        if path.exists() or path.is_absolute():
            return path
        try:
            return self.known.listings[kind].paths.get(path.as_posix(), path)
        except CheckpointError:  # no ComfyUI here
            return path


def fill_in(
    args: argparse.Namespace, *, words: tuple[str, ...] = (), one_copy: bool = False
) -> FilesHere:
    """Put paths where ``args`` has names of files in ComfyUI's folders, or nothing.

    A path that exists stays. Left out may be the model (then both copies of ``args.level``), the
    encoder and the VAE. words: what ``--uncond`` may say beside a file; one_copy: the conditional
    copy alone is wanted. CheckpointError says what is not there, and where to put it.
    """
    files = FilesHere(getattr(args, "comfyui", None))
    for name, kind in _KINDS.items():
        value = getattr(args, name, None)
        if value is not None and value not in words:
            setattr(args, name, files.path(value, kind))
    if hasattr(args, "model") and args.model is None:
        _fill_model(args, files.known, one_copy or args.uncond is not None)
    for name, found in (("encoder", "encoders"), ("vae", "vaes")):
        if hasattr(args, name) and getattr(args, name) is None:
            setattr(args, name, _largest(getattr(files.known, found), _KINDS[name], files.known))
            _log.warning("--%s: taken %s", name, getattr(args, name))
    return files


def _fill_model(args: argparse.Namespace, files: KnownFiles, one_copy: bool) -> None:
    level = AUTO
    if args.level != AUTO:
        level, note = level_names.resolve(args.level, LEVELS)
        if level is None:
            near = level_names.nearest(args.level, LEVELS)
            raise CheckpointError(
                "unknown level",
                found=repr(args.level),
                needed="one of " + ", ".join((AUTO, *LEVELS)),
                hint=None if near is None else f"Did you mean {near}?",
            )
        if note is not None:
            _log.warning("%s", note)
    device = find_device()
    memory = device.memory if args.device is None or device.type in args.device else ram()
    order = AUTO_ORDER[capability(device.int8, device.bfloat16, device.fp4)]
    pair = resolve(level, files.models, order, memory or 0, one_copy=one_copy)
    args.model = pair.conditional.path
    second = pair.unconditional
    if args.uncond is None and second is not None and second is not pair.conditional:
        args.uncond = second.path
    _log.warning("--model: taken %s, %s", pair.level, args.model)


def _largest(found: list[tuple], kind: str, files: KnownFiles) -> Path:
    """The file with most bytes, as the nearest to the original."""
    if not found:
        listing = files.listings[kind]
        raise CheckpointError(
            f"no file of {kind} is there that can be used",
            found=", ".join(listing.names) or "none",
            hint=f"ideogram4-quant doctor says what to download into {listing.folder}.",
        )
    return max((path for _, path, _ in found), key=_size)


def _size(path: Path) -> int:
    if path.is_dir():
        return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    return path.stat().st_size
