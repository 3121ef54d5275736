"""Loading an INT8 copy at real width: this pack's loader and ComfyUI's own, in turns, on the CPU.

    python benchmarks/bench_loading.py --comfyui ~/ComfyUI --layers 3

Writes a copy with random weights (a third of a gigabyte a block at INT8, the double meanwhile),
then loads it in processes of ComfyUI's Python, each fresh, after the host's imports: seconds, and
what the load adds at most to the memory of the process that belongs to no file (RssAnon). A mapped
file is read when its weights are first used, which is not in these seconds. Linux.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parents[1]
LOADERS = ("this pack", "ComfyUI's own")
_INSIDE = "--inside"


def anonymous() -> int:
    """Bytes of this process that no file holds."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("RssAnon:"))) * 1024


def load_here(loader: str, file: Path) -> dict[str, float]:
    """One load in this process, which is ComfyUI's: ``seconds`` and ``peak`` in bytes."""
    sys.path.insert(0, str(ROOT / "tests" / "host" / "scripts"))
    import inside

    pack, _ = inside.start()
    import comfy.sd
    import torch

    loading = inside.load(pack, "nodes.model_loading")
    loading.compute_dtype = lambda device: torch.bfloat16  # as on a GPU
    loading.tune = lambda *_, **__: None  # timing of products is no loading
    ways = {
        "this pack": lambda: loading.load_model(
            loading.ModelSource(file, "conditional", trusted=True)
        ),
        "ComfyUI's own": lambda: comfy.sd.load_diffusion_model(
            str(file), model_options={"dtype": torch.bfloat16}
        ),
    }
    before, most, done = anonymous(), [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.002):
            most[0] = max(most[0], anonymous() - before)

    watcher = threading.Thread(target=watch)
    watcher.start()
    with torch.inference_mode():
        started = time.perf_counter()
        model = ways[loader]()
        seconds = time.perf_counter() - started
    most[0] = max(most[0], anonymous() - before)
    done.set()
    watcher.join()
    assert model is not None
    return {"seconds": seconds, "peak": most[0]}


def load_apart(comfyui: Path, loader: str, file: Path, base: Path) -> dict[str, float]:
    """`load_here` in a process of ComfyUI's Python."""
    python = comfyui / ".venv" / "bin" / "python"
    arguments = [str(comfyui), str(ROOT), str(base), _INSIDE, loader, str(file)]
    command = [str(python if python.exists() else sys.executable), __file__, *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    return json.loads(done.stdout.splitlines()[-1])


def write_int8(folder: Path, layers: int) -> Path:
    """An INT8 copy with random weights, as `quantize` writes it."""
    from bench_making import write_model

    from ideogram4_quant.quant import quantize_checkpoint

    source, file = folder / "source.safetensors", folder / "ideogram4-int8.safetensors"
    write_model(source, layers)
    quantize_checkpoint(source, "INT8 W8A8 rotated", file)
    source.unlink()
    return file


def main() -> None:
    if _INSIDE in sys.argv:  # behind what `inside.start` takes: ComfyUI, the pack and a folder
        loader, file = sys.argv[sys.argv.index(_INSIDE) + 1 :]
        print(json.dumps(load_here(loader, Path(file))))
        return
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--comfyui", type=Path, required=True)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--turns", type=int, default=3)
    options = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).parent))
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        file = write_int8(folder, options.layers)
        found: dict[str, list[dict[str, float]]] = {loader: [] for loader in LOADERS}
        for _ in range(options.turns):
            for loader in LOADERS:
                found[loader].append(load_apart(options.comfyui, loader, file, folder / "base"))
        print(f"{options.layers} blocks, {file.stat().st_size / 1e9:.2f} GB, {options.turns} turns")
    for loader, runs in found.items():
        seconds, peak = (median(run[what] for run in runs) for what in ("seconds", "peak"))
        print(f"{loader:<14} {seconds:8.3f} s  {peak / 1e9:8.3f} GB of memory of its own at most")


if __name__ == "__main__":
    main()
