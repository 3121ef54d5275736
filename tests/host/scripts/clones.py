"""LoRAs on every clone of the host's: FILES (JSON: level -> copy -> file), LORAS (folder), MODE.

What is wanted is the dense formula, ``x (W + s up down)^T``, computed here from the file's tensors
on a model loaded apart; and of the model without a LoRA the very output that it had before.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Callable
from pathlib import Path

import inside
from lora import make_inputs, run

ONE = (("fused.safetensors", 0.8),)
TWO = (*ONE, ("second.safetensors", -0.7))


def main() -> None:
    pack, (files, loras, mode) = inside.start()
    import torch

    with torch.inference_mode():
        found = MODES[mode](World(pack, loras), json.loads(files))
    inside.report(found)


class World:
    """The pack, the LoRAs, and how both are loaded and run."""

    def __init__(self, pack: str, loras: str):
        import safetensors.torch

        self.pack = pack
        self.states = {
            path.name: safetensors.torch.load_file(path)
            for path in Path(loras).glob("*.safetensors")
        }
        self.names = inside.load(pack, "checkpoint.loras")
        self.ours = inside.load(pack, "nodes.lora_loading")
        self.loading = inside.load(pack, "nodes.model_loading")
        self.inputs = make_inputs()

    def load(self, path: str, copy: str = "conditional", fused: bool = False):
        source = self.loading.ModelSource(Path(path), copy, fused=fused)
        return as_dynamic(self.loading.load_model(source))

    def add(self, patcher, loras=ONE):
        """Our node, once a LoRA."""
        for name, strength in loras:
            shapes = self.ours.linear_shapes(patcher)
            found = self.names.parse_lora(self.states[name], shapes, name)
            patcher = self.ours.add_lora(patcher, found.for_copy("conditional", "both"), strength)
        return patcher

    def dense(self, path: str, loras=ONE, copy: str = "conditional", fused: bool = False):
        """A model of its own with the dense formula in its linears, none of our code involved."""
        patcher = self.load(path, copy, fused)
        for name, strength in loras:
            add_updates(patcher.model.diffusion_model, self.states[name], strength)
        return patcher

    def run(self, patcher):
        return run(patcher, self.inputs)

    def run_as_it_is(self, patcher):
        """One pass of the model as it lies there; nothing is asked of the host."""
        x, t, context = self.inputs
        return patcher.model.diffusion_model(x, t, context=context).clone()


def add_updates(model, state: dict, strength: float) -> None:
    for key in (k for k in state if k.endswith("lora_A.weight")):
        module = key.removeprefix("diffusion_model.").removesuffix(".lora_A.weight")
        up = state[key.replace("lora_A", "lora_B")]
        add_dense(model.get_submodule(module), strength * up @ state[key])


def add_dense(module, delta) -> None:
    import torch

    own = module.forward
    if type(module.weight.data) is torch.Tensor and module.weight.dtype == torch.float32:
        module.weight.data += delta
        return
    module.forward = lambda x: own(x) + torch.nn.functional.linear(x, delta.to(x.dtype))


def as_dynamic(patcher):
    """A patcher that clones itself as one of the host's dynamic memory, which CPUs do not get."""
    import comfy.model_patcher as host

    class Dynamic(host.ModelPatcher):
        non_dynamic_delegate_model = None
        get_non_dynamic_delegate = host.ModelPatcherDynamic.get_non_dynamic_delegate

        def is_dynamic(self):
            return True

    patcher.__class__ = Dynamic
    return patcher


CLONES: dict[str, Callable] = {
    "clone": lambda patcher: patcher.clone(),
    "disable_dynamic": lambda patcher: patcher.clone(disable_dynamic=True),
    "force_deepcopy": lambda patcher: patcher.clone(force_deepcopy=True),
    "both": lambda patcher: patcher.clone(disable_dynamic=True, force_deepcopy=True),
    "delegate": lambda patcher: patcher.get_non_dynamic_delegate(),
    "multigpu": lambda patcher: patcher.deepclone_multigpu(),
    "clone of a clone": lambda patcher: patcher.clone(disable_dynamic=True).clone(),
}


def every_clone(world: World, files: dict) -> dict:
    found = {}
    for level, paths in files.items():
        for copy, path in paths.items():
            for fused in (False, True):
                kind = f"{level}, {copy}, {'fused' if fused else 'unfused'}"
                found[kind] = clones_of(world, path, copy, fused)
    return found


def clones_of(world: World, path: str, copy: str, fused: bool) -> dict:
    """Every clone, made while the original is in use: the LoRA is on it and nowhere else."""
    plain = world.load(path, copy, fused)
    before = world.run(plain)
    wanted = {n: world.run(world.dense(path, loras, copy, fused)) for n, loras in LORAS.items()}
    found = {"effect": inside.relative(wanted["one"], before)}
    for name, loras in LORAS.items():
        original = world.add(plain, loras)
        for kind, clone in CLONES.items():
            first = world.run(original)
            copied = clone(original)
            outputs = {"original": first, "clone": world.run(copied)}
            untouched = [world.run(plain)]
            outputs["original again"] = world.run(original)
            outputs["clone again"] = world.run(copied)
            untouched.append(world.run(plain))
            found[f"{kind}, {name}"] = {
                "errors": {k: inside.relative(out, wanted[name]) for k, out in outputs.items()},
                "untouched": all(bool((out == before).all()) for out in untouched),
                "own model": copied.model is not original.model,
                "hooks": [hooks(world, p) for p in (original, copied)],
                "left": [left(p) for p in (plain, original, copied)],
            }
    return found


LORAS = {"one": ONE, "two": TWO}


def hooks(world: World, patcher) -> int:
    """Side paths on the model of a patcher while it is loaded."""
    world.run(patcher)
    return inside.hooks(patcher.model)


def left(patcher) -> int:
    """What is still in the model when the host has unloaded everything."""
    import comfy.model_management as management

    management.unload_all_models()
    modules = list(patcher.model.modules())
    replaced = sum(getattr(m.forward, "__func__", None) is not type(m).forward for m in modules)
    return sum(len(m._forward_hooks) for m in modules) + replaced


def life(world: World, files: dict) -> dict:
    """Models of one LoRA in memory at once, and clones that end while another one is in use."""
    path = files["BF16"]["conditional"]
    plain = world.load(path)
    before = world.run(plain)
    wanted, both = (world.run(world.dense(path, loras)) for loras in (ONE, TWO))
    original = world.add(plain)
    apart = original.clone(force_deepcopy=True)
    world.run(apart)
    world.run(original)
    alive = [inside.relative(world.run_as_it_is(p), wanted) for p in (apart, original)]
    world.run(plain)  # takes the LoRA out of the model that it shares with the original
    after = world.run_as_it_is(apart)
    world.run(original)
    ending = [original.clone()]
    chained = world.add(original, TWO[1:])
    world.run(chained)
    ending.append(chained.clone())
    ending.clear()
    gc.collect()
    kept = inside.relative(world.run_as_it_is(chained), both)
    waiting = original.clone()  # its list of keys is read while nothing is loaded
    waiting.model_state_dict()
    left(plain)
    waiting.model_state_dict()
    bypassed = bypass(original, world, "second.safetensors")
    error = inside.relative(
        world.run(bypassed), world.run(world.dense(path, (*ONE, ("second.safetensors", 1.0))))
    )
    return {
        "under a bypass": error,
        "left under it": left(bypassed) + sum("forward" in vars(m) for m in linears(plain)),
        "at once": alive,
        "one taken out": inside.relative(after, wanted),
        "after a clone ended": kept,
        "without": bool((world.run(plain) == before).all()),
    }


def several_gpus(world: World, files: dict) -> list[float]:
    """LoRAs that come after the host's MultiGPU node: on the clone that it made before, too."""
    path = files["BF16"]["conditional"]
    main = world.load(path)
    second = main.deepclone_multigpu()
    second.is_multigpu_base_clone = True
    main.set_additional_models("multigpu", [second])
    errors = []
    for loras, patcher in ((ONE, world.add(main)), (TWO, world.add(world.add(main), TWO[1:]))):
        patcher.match_multigpu_clones()
        (matched,) = patcher.get_additional_models_with_key("multigpu")
        wanted = world.run(world.dense(path, loras))
        errors.append(inside.relative(world.run(matched), wanted))
        errors.append(inside.relative(world.run(patcher), wanted))
    return errors


def bypass(patcher, world: World, name: str):
    """The host's own LoRA beside the weights, put over ours: it replaces forwards."""
    import comfy.sd

    return comfy.sd.load_bypass_lora_for_models(patcher, None, world.states[name], 1.0, 0.0)[0]


def linears(patcher) -> list:
    return [m for m in patcher.model.modules() if hasattr(m, "out_features")]


def failures(world: World, files: dict) -> dict:
    """A module is missing where a LoRA goes in: an error in words, and nothing half in."""
    plain = world.load(files["BF16"]["conditional"])
    original = world.add(plain)
    world.run(plain)
    layers = plain.model.diffusion_model.layers
    last = layers[3].adaln_modulation
    del layers[3].adaln_modulation
    try:
        original.inject_model()
        said = "taken"
    except inside.load(world.pack, "errors").Ideogram4QuantError as error:
        said = str(error)
    layers[3].adaln_modulation = last
    return {"said": said, "left": inside.hooks(plain.model)}


def rest(world: World, files: dict) -> dict:
    return {
        "life": life(world, files),
        "several": several_gpus(world, files),
        "failure": failures(world, files),
    }


MODES = {"clones": every_clone, "rest": rest}

if __name__ == "__main__":
    main()
