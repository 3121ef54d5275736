"""Main memory of a load: FILES (JSON: name -> [kind, path, small]), kind ``model`` or ``encoder``.

Each is loaded in a process of its own, split off after the host's imports and after ``small``, a
file of its kind, was loaded there once: bytes that the load adds at most and that stay when it is
done, and what the host counts for the model.
"""

from __future__ import annotations

import gc
import json
import os
from pathlib import Path

import inside


def main() -> None:
    pack, (listing,) = inside.start()
    inside.load(pack, "nodes.model_loading"), inside.load(pack, "nodes.encoder_loading")
    found = {name: apart(pack, *what) for name, what in json.loads(listing).items()}
    inside.report(found)


def apart(pack: str, kind: str, path: str, small: str) -> dict:
    read, write = os.pipe()
    child = os.fork()
    if not child:
        try:
            result = measure(pack, kind, path, small)
        except BaseException as error:
            result = {"failed": repr(error)}
        os.write(write, json.dumps(result).encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        result = json.loads(pipe.read())
    os.waitpid(child, 0)
    return result


def measure(pack: str, kind: str, path: str, small: str) -> dict:
    import torch

    with torch.inference_mode():
        load(pack, kind, small)  # what the first load of a process imports
        gc.collect()
        before = status("RssAnon")
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        start = status("VmHWM")
        loaded = load(pack, kind, path)
        peak = status("VmHWM") - start
        gc.collect()
        after = status("RssAnon") - before
        return {"peak": peak, "loaded": after, "counted": loaded.model_size()}


def load(pack: str, kind: str, path: str):
    import torch

    if kind == "encoder":
        return inside.load(pack, "nodes.encoder_loading").load_encoder(Path(path)).patcher
    loading = inside.load(pack, "nodes.model_loading")
    loading.compute_dtype = lambda device: torch.bfloat16  # as on a GPU
    loading.tune = lambda *_, **__: None  # timing products takes up to 300 MB for ten seconds
    return loading.load_model(loading.ModelSource(Path(path), "conditional", trusted=True))


def status(field: str) -> int:
    """A line of /proc/self/status, in bytes."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith(field + ":"))) * 1024


if __name__ == "__main__":
    main()
