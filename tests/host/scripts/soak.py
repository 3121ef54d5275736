"""Many pictures in one host process: FILES, LEVELS, LORA, COUNT.

FILES: JSON, part -> path of the pocket model. LEVELS: JSON, level -> both files. LORA: a path.
Reports resident memory along the way, and pictures that differ from the first of their kind.
"""

from __future__ import annotations

import gc
import hashlib
import json
from pathlib import Path

import inside
from guider import World
from trust import resident, running_out, with_lora

EVERY = 10


def main() -> None:
    pack, (listing, levels, lora, count) = inside.start()
    import torch

    files = {part: Path(path) for part, path in json.loads(listing).items()}
    with torch.inference_mode():
        world = World(pack, files)
        vae = inside.load(pack, "nodes.vae_loading").load_vae(files["vae"])
        inside.report(soak(world, vae, json.loads(levels), Path(lora), int(count)))


def soak(world: World, vae, levels: dict, lora: Path, count: int) -> dict:
    import comfy.model_management as management

    loading = inside.load(world.pack, "nodes.model_loading")
    first: dict[str, str] = {}
    wrong, memory, cancelled, made = [], [], 0, 0
    for number in range(count):
        level = list(levels)[number % len(levels)]
        for copy, path in zip(("conditional", "unconditional"), levels[level], strict=True):
            source = loading.ModelSource(Path(path), copy)
            setattr(world, copy, loading.load_model(source))
        if number % 7 == 6:
            cancelled += cancel(world)
        model = with_lora(world, lora) if number % 3 == 0 else world.conditional
        keep = ("both", "alternating", "streamed")[number % 5 % 3]
        picture = vae.decode(world.sample(model, keep=keep))
        digest = hashlib.sha256(picture.numpy().tobytes()).hexdigest()
        kind = f"{level}, {'LoRA' if number % 3 == 0 else 'plain'}"
        made += 1
        if first.setdefault(kind, digest) != digest:
            wrong.append([number, kind])
        if number % EVERY == EVERY - 1:
            gc.collect()
            management.cleanup_models_gc()
            memory.append(resident())
            print(f"{number + 1} pictures, {memory[-1] / 1e6:.1f} MB", flush=True)
    return {
        "pictures": made,
        "cancelled": cancelled,
        "kinds": len(first),
        "wrong": wrong,
        "memory": memory,
    }


def cancel(world: World) -> bool:
    """A run that the host's cancel ends inside its second pass."""
    import comfy.model_management as management

    try:
        with running_out(world.conditional, {2}, management.InterruptProcessingException):
            world.sample()
    except management.InterruptProcessingException:
        return True
    return False


if __name__ == "__main__":
    main()
