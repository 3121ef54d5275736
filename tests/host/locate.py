"""Where a real ComfyUI lies on this machine, and which Python runs it."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path

PACK = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Host:
    """A ComfyUI checkout and the interpreter that has its requirements."""

    root: Path
    python: Path


def find_host() -> Host | str:
    """The host, or the reason why there is none.

    Looked for: COMFYUI_PATH, the folder this pack's custom_nodes lies in, ~/comfy/ComfyUI. Its
    Python: COMFYUI_PYTHON, a .venv or venv inside it, else the running one.
    """
    candidates = []
    if "COMFYUI_PATH" in os.environ:
        candidates.append(Path(os.environ["COMFYUI_PATH"]))
    if PACK.parent.name == "custom_nodes":
        candidates.append(PACK.parent.parent)
    candidates.append(Path.home() / "comfy" / "ComfyUI")
    for root in candidates:
        if (root / "main.py").is_file() and (root / "comfy_api").is_dir():
            return Host(root.resolve(), _python(root))
    return f"no ComfyUI found in {', '.join(map(str, candidates))} (set COMFYUI_PATH)"


def _python(root: Path) -> Path:
    if "COMFYUI_PYTHON" in os.environ:
        return Path(os.environ["COMFYUI_PYTHON"])
    for name in (".venv", "venv"):
        for inside in ("bin/python", "Scripts/python.exe"):
            if (root / name / inside).is_file():
                return root / name / inside
    return Path(sys.executable)
