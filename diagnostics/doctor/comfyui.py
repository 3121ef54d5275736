"""Where a ComfyUI lies on this machine, which Python runs it, and where its models are."""

from __future__ import annotations

import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path

from ...errors import CheckpointError

PACK = Path(__file__).resolve().parents[2]
# kind of model -> folders below ComfyUI's models, the documented one last
MODEL_FOLDERS = {
    "diffusion_models": ("unet", "diffusion_models"),
    "text_encoders": ("clip", "text_encoders"),
    "vae": ("vae",),
    "loras": ("loras",),
}
_EXTRA = "extra_model_paths.yaml"
_PYTHONS = (
    ".venv/bin/python",
    "venv/bin/python",
    ".venv/Scripts/python.exe",
    "venv/Scripts/python.exe",
    "../python_embeded/python.exe",  # spelled so in the portable build
)


@dataclass(frozen=True)
class Host:
    """A ComfyUI checkout and the interpreter that has its requirements."""

    root: Path
    python: Path

    @classmethod
    def at(cls, root: Path) -> Host:
        """The one in that folder."""
        return cls(root.resolve(), _python(root))

    @property
    def version(self) -> str | None:
        """As its own file says; None where it does not."""
        try:
            text = (self.root / "comfyui_version.py").read_text(encoding="utf-8")
        except OSError:
            return None
        found = re.search(r'__version__\s*=\s*"([^"]+)"', text)
        return found and found[1]


def find_host() -> Host | str:
    """The host, or the reason why there is none.

    Looked for: COMFYUI_PATH, the folder this pack's custom_nodes lies in, ~/comfy/ComfyUI. Its
    Python: COMFYUI_PYTHON, a .venv or venv inside it, the portable build's, else the running one.
    """
    candidates = []
    if "COMFYUI_PATH" in os.environ:
        candidates.append(Path(os.environ["COMFYUI_PATH"]))
    if PACK.parent.name == "custom_nodes":
        candidates.append(PACK.parent.parent)
    candidates.append(Path.home() / "comfy" / "ComfyUI")
    for root in candidates:
        if (root / "main.py").is_file() and (root / "comfy_api").is_dir():
            return Host.at(root)
    return f"no ComfyUI found in {', '.join(map(str, candidates))} (set COMFYUI_PATH)"


def named_host(folder: Path | None) -> Host:
    """The ComfyUI in a folder, or the one found; CheckpointError says where was looked."""
    if folder is None:
        found = find_host()
        if isinstance(found, str):
            raise CheckpointError(found, hint="Name its folder with --comfyui.")
        return found
    if not (folder / "models").is_dir():
        raise CheckpointError(
            "this is not ComfyUI's folder",
            file=folder,
            found="no folder named models in it",
            hint="Name the folder that holds ComfyUI's models folder.",
        )
    return Host.at(folder)


def _python(root: Path) -> Path:
    if "COMFYUI_PYTHON" in os.environ:
        return Path(os.environ["COMFYUI_PYTHON"])
    return next((root / p for p in _PYTHONS if (root / p).is_file()), Path(sys.executable))


def model_folders(root: Path) -> tuple[dict[str, list[str]], list[str]]:
    """(kind -> the folders that ComfyUI in `root` reads, notes on what could not be read).

    With those of extra_model_paths.yaml, where PyYAML is there to read it.
    """
    folders = {
        kind: [str(root / "models" / name) for name in names]
        for kind, names in MODEL_FOLDERS.items()
    }
    extra = root / _EXTRA
    if not extra.is_file():
        return folders, []
    try:
        for kind, path in _extra_paths(extra):
            folders[kind].append(path)
    except ImportError:
        return folders, [f"{extra} was not read: PyYAML is not installed in this Python"]
    except (OSError, ValueError) as error:
        return folders, [f"{extra} was not read: {error}"]
    return folders, []


def _extra_paths(file: Path) -> list[tuple[str, str]]:
    """(kind, folder) of each line of the host's file, read as the host reads it."""
    import yaml

    try:
        sections = yaml.safe_load(file.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"it is no valid YAML ({error})") from error
    found = []
    for section in (sections or {}).values() if isinstance(sections, dict) else ():
        if not isinstance(section, dict):
            continue
        base = os.path.expandvars(os.path.expanduser(str(section.get("base_path", ""))))
        for kind, lines in section.items():
            # the two kinds' older names
            kind = {"unet": "diffusion_models", "clip": "text_encoders"}.get(kind, kind)
            if kind not in MODEL_FOLDERS or not isinstance(lines, str):
                continue
            for line in filter(None, map(str.strip, lines.splitlines())):
                found.append((kind, os.path.normpath(file.parent / base / line)))
    return found
