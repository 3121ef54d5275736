"""Start-up of the scripts that run inside the host's Python, without its server.

A script is called as ``script.py COMFYUI PACK BASE ...``; it calls `start`, does its checks within
`torch.inference_mode()` as the server does, and hands numbers back with `report`.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import logging
import sys
from pathlib import Path

RESULT = "RESULT "


def start(*flags: str) -> tuple[str, list[str]]:
    """Sets the host up on the CPU and loads the pack as the host does: by path, under its path.

    Returns the pack's module name and the script's remaining arguments.
    """
    comfy_root, pack, base, *rest = sys.argv[1:]
    sys.path.insert(0, comfy_root)
    sys.argv = ["main.py", "--cpu", "--base-directory", base, *flags]
    import comfy.options

    comfy.options.enable_args_parsing()
    logging.basicConfig(level=logging.INFO, stream=sys.stderr)
    import torch

    torch.set_num_threads(1)
    # the host puts this in front of the path before it loads custom nodes
    sys.path.insert(0, str(Path(comfy_root) / "comfy"))
    name = pack.replace(".", "_x_")
    spec = importlib.util.spec_from_file_location(name, str(Path(pack) / "__init__.py"))
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return name, rest


def load(pack: str, module: str):
    """A module of the pack, such as ``nodes.guider``."""
    return importlib.import_module(f"{pack}.{module}")


def report(values: dict) -> None:
    """Hands the result to the test."""
    print(RESULT + json.dumps(values), flush=True)


def hooks(model, kind: str = "_forward_hooks") -> int:
    """Hooks of one kind on a model's modules, but for those that fetch its weights, which are there
    for as long as it is loaded.

    kind: ``_forward_hooks`` or ``_forward_pre_hooks``.
    """
    ahead = vars(model).get("ideogram4_quant_streaming")
    found = [hook for module in model.modules() for hook in getattr(module, kind).values()]
    return sum(getattr(hook, "__self__", hook) is not ahead for hook in found)


def relative(found, wanted) -> float:
    """|found - wanted| / |wanted|, in double precision."""
    found, wanted = found.double(), wanted.double()
    return ((found - wanted).norm() / wanted.norm()).item()
