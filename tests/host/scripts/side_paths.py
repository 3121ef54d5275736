"""LoRAs of our node through the guider: FILES (JSON: level -> copy -> file), LORAS, MODE.

``runs``: latents of three guided steps with a LoRA on both copies, in every residency and on a full
card, against the dense formula. ``memory``: what the host counts, loads and frees for a LoRA.
``compiled``: the host's torch.compile on a model with a LoRA.
"""

from __future__ import annotations

import json

import inside
from clones import ONE, World, left
from lowvram import STATES, left_behind, sample, short_of_memory

COPIES = ("conditional", "unconditional")


def main() -> None:
    pack, (files, loras, mode) = inside.start("--use-pytorch-cross-attention")
    import torch

    with torch.inference_mode():
        found = MODES[mode](World(pack, loras), json.loads(files))
    inside.report(found)


def runs(world: World, files: dict) -> dict:
    found = {}
    for level, paths in files.items():
        dense = [world.dense(paths[copy], ONE, copy) for copy in COPIES]
        wanted = sample(world.pack, dense)
        plain = [world.load(paths[copy], copy) for copy in COPIES]
        before = sample(world.pack, plain)
        patched = [world.add(patcher) for patcher in plain]
        for keep in ("both", "alternating", "streamed"):
            found[f"{level}, {keep}"] = inside.relative(
                sample(world.pack, patched, keep=keep), wanted
            )
        for state in STATES:
            left(plain[0])
            with short_of_memory(state):
                error = inside.relative(sample(world.pack, patched), wanted)
            found[f"{level}, {state}"] = error
            found[f"{level}, {state}, modules left"] = [
                left_behind(p) for one in patched for p in (one, *beside(one))
            ]
        left(plain[0])
        found[f"{level}, effect"] = inside.relative(before, wanted)
        found[f"{level}, without"] = bool((sample(world.pack, plain) == before).all())
    return found


def beside(patcher) -> list:
    return [m for models in patcher.additional_models.values() for m in models]


def memory(world: World, files: dict) -> dict:
    import comfy.model_management as management
    import comfy.model_patcher

    paths = files["BF16"]
    plain = [world.load(paths[copy], copy) for copy in COPIES]
    patched = [world.add(patcher) for patcher in plain]
    small = [beside(patcher)[0] for patcher in patched]
    state = world.states[ONE[0][0]]
    found = {"bytes": [m.model_size() for m in small], "elements": count(state)}
    watched = {id(m.model): f"LoRA of {copy}" for m, copy in zip(small, COPIES, strict=True)}
    watched |= {id(p.model): copy for p, copy in zip(plain, COPIES, strict=True)}
    asked, moved = [], []
    own_request, own_load = management.load_models_gpu, comfy.model_patcher.ModelPatcher.load

    def request(models, *args, **kwargs):
        asked.append(sorted(watched[id(m.model)] for m in models))
        return own_request(models, *args, **kwargs)

    def load(self, *args, **kwargs):
        moved.append(watched[id(self.model)])
        return own_load(self, *args, **kwargs)

    management.load_models_gpu = request
    comfy.model_patcher.ModelPatcher.load = load
    try:
        for keep in ("both", "alternating", "streamed"):
            sample(world.pack, patched, keep=keep)
            found[f"asked, {keep}"] = asked[:]
            found[f"moved, {keep}"] = moved[:]
            asked.clear()
            moved.clear()
    finally:
        management.load_models_gpu = own_request
        comfy.model_patcher.ModelPatcher.load = own_load
    found["loaded"] = [m.loaded_size() for m in small]
    counted = {m.model.model.__class__.__name__ for m in management.current_loaded_models}
    found["counted"] = sorted(counted)
    management.load_models_gpu([patched[0], *beside(patched[0])])
    patched[0].detach()
    found["detached"] = [m.loaded_size() for m in small]
    management.unload_all_models()
    found["unloaded"] = [m.loaded_size() for m in small]
    return found | {"freed": freed(world, paths["conditional"])}


def freed(world: World, path: str) -> list[bool]:
    """Whether a model and its LoRA go as soon as nothing holds them, without the collector."""
    import gc
    import weakref

    gc.collect()
    gc.disable()
    try:
        patched = world.add(world.load(path, fused=True))
        world.run(patched.clone())
        watched = [weakref.ref(p.model) for p in (patched, *beside(patched))]
        del patched
        return [model() is None for model in watched]
    finally:
        gc.enable()


def count(state: dict) -> int:
    return sum(tensor.numel() for tensor in state.values())


def compiled(world: World, files: dict) -> dict:
    """The host's wrapper, on a clone that owns its model as the host's node makes it."""
    import torch
    from comfy_api.torch_helpers import set_torch_compile_wrapper

    found = {}
    for level, paths in files.items():
        for fused in (False, True):
            plain = world.load(paths["conditional"], fused=fused)
            before = sample(world.pack, [plain, None])
            dense = world.dense(paths["conditional"], fused=fused)
            wanted = sample(world.pack, [dense, None])
            original = world.add(plain)
            sample(world.pack, [original, None])
            copy = original.clone(disable_dynamic=True)
            set_torch_compile_wrapper(copy, backend="aot_eager")
            torch._dynamo.reset()
            torch._dynamo.utils.counters.clear()
            outputs, frames = [], []
            for _ in range(3):
                outputs.append(sample(world.pack, [copy, None]))
                frames.append(torch._dynamo.utils.counters["frames"]["total"])
            found[f"{level}, {'fused' if fused else 'unfused'}"] = {
                "errors": [inside.relative(out, wanted) for out in outputs],
                "effect": inside.relative(before, wanted),
                "own model": copy.model is not plain.model,
                "frames": frames,
                "breaks": list(torch._dynamo.utils.counters["graph_break"]),
                "without": bool((sample(world.pack, [plain, None]) == before).all()),
            }
    return found


MODES = {"runs": runs, "memory": memory, "compiled": compiled}

if __name__ == "__main__":
    main()
