"""The user's cache folder for this pack."""

from __future__ import annotations

import os
import sys
from pathlib import Path


def user_folder() -> Path:
    """The user's cache folder for this pack; nothing is created. ComfyUI has a folder of its own,
    which the nodes give."""
    if os.name == "nt":
        root = os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local"
    elif sys.platform == "darwin":
        root = Path.home() / "Library" / "Caches"
    else:
        root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "ideogram4_quant"
