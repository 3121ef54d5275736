"""Listings of the host's model folders, and of the pocket model inside the pack."""

from __future__ import annotations

from ..checkpoint.listing import Listing, list_files, stamp
from ..pocket.paths import WEIGHTS

_POCKET = "pocket/"


def host_listing(kind: str) -> Listing:
    """The listing of one of the host's folder kinds, such as ``diffusion_models``."""
    import folder_paths

    return list_files(kind, folder_paths.get_folder_paths(kind))


def pocket_listing(kind: str) -> Listing:
    """The pocket model's files of a folder kind, under names that begin with ``pocket/``."""
    root = WEIGHTS / kind
    paths = list_files(kind, [str(root)]).paths
    return Listing(kind, (str(root),), {_POCKET + name: path for name, path in paths.items()})


def known_listing(kind: str) -> Listing:
    """What a file picked by name may be: the host's files, then the pocket model's.

    Levels are looked for in `host_listing` alone: nobody gets the pocket model unasked.
    """
    here = host_listing(kind)
    return Listing(kind, here.roots, pocket_listing(kind).paths | here.paths)


def listing_around(kind: str, name: str) -> Listing:
    """Where the other copy of a file picked by name is looked for: among its own kind."""
    pocket = pocket_listing(kind)
    return pocket if name in pocket.paths else host_listing(kind)


def host_stamp(kind: str, name: str | None) -> str:
    """For a node's fingerprint: what changes when the named file does."""
    path = known_listing(kind).paths.get(name)
    return repr(path and stamp(path))
