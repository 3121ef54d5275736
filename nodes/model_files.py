"""Listings of the host's model folders."""

from __future__ import annotations

from ..checkpoint.listing import Listing, list_files, stamp


def host_listing(kind: str) -> Listing:
    """The listing of one of the host's folder kinds, such as ``diffusion_models``."""
    import folder_paths

    return list_files(kind, folder_paths.get_folder_paths(kind))


def host_stamp(kind: str, name: str | None) -> str:
    """For a node's fingerprint: what changes when the named file does."""
    path = host_listing(kind).paths.get(name)
    return repr(path and stamp(path))
