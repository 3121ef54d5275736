"""Guidance from one resident copy: FILES (JSON: level -> copy -> file), LORAS (folder), MODE.

What is wanted comes from two models that are loaded apart, with the dense formula in their linears.
"""

from __future__ import annotations

import json

import inside
from clones import World, bypass, left
from lowvram import STATES, left_behind, short_of_memory

STYLE, OTHER = ("fused.safetensors", 0.8), ("second.safetensors", -0.7)
# name -> LoRAs of the conditional pass, LoRAs of the unconditional one
CASES = {
    "unconditional LoRA": ((), (OTHER,)),
    "a LoRA on either": ((STYLE,), (OTHER,)),
    "one on both": ((STYLE,), (STYLE, OTHER)),
    "image tokens alone": ((STYLE,), (STYLE,)),
}


def main() -> None:
    pack, (files, loras, mode) = inside.start("--use-pytorch-cross-attention")
    import torch

    with torch.inference_mode():
        found = MODES[mode](World(pack, loras), json.loads(files))
    inside.report(found)


def sample(world: World, copies, keep: str = "both", source: str = "conditional copy"):
    """Three guided steps."""
    import comfy.samplers
    import torch

    generator = torch.Generator().manual_seed(5)
    noise = torch.randn(1, 128, 4, 8, generator=generator)
    features = torch.randn(1, 20, 832, generator=generator)
    guidance = inside.load(world.pack, "nodes.guidance").Guidance(None, (7.0, 7.0, 3.0))
    guider_class = inside.load(world.pack, "nodes.guider").DualCopyGuider
    guider = guider_class(*copies, [[features, {}]], guidance, keep, source)
    euler = comfy.samplers.sampler_object("euler")
    sigmas = torch.tensor([1.0, 0.7, 0.3, 0.0])
    return guider.sample(noise, torch.zeros_like(noise), euler, sigmas, seed=0)


def wanted(world: World, path: str, case: str, fused: bool = False):
    """Latents of two models loaded apart, of the conditional file both."""
    copies = [world.dense(path, loras, fused=fused) for loras in CASES[case]]
    copies[1] = apart(world, copies[1])
    return sample(world, copies, source="unconditional input")


def apart(world: World, patcher):
    """A model of the conditional file that says that it is the unconditional copy."""
    from dataclasses import replace

    attachment = inside.load(world.pack, "nodes.model_source").ATTACHMENT
    source = patcher.get_attachment(attachment)
    patcher.set_attachments(attachment, replace(source, copy="unconditional"))
    return patcher


def pair(world: World, plain, case: str) -> list:
    """Two patchers of one model, our LoRAs on them; None where the sampler makes the second."""
    first, second = (world.add(plain, loras) for loras in CASES[case])
    return [first, None if case == "image tokens alone" else second]


def runs(world: World, files: dict) -> dict:
    import comfy.model_management as management

    found = {}
    for level, paths in files.items():
        path = paths["conditional"]
        for fused in (False, True):
            plain = world.load(path, fused=fused)
            alone = sample(world, [plain, None])
            for case in CASES:
                name = f"{level}, {'fused' if fused else 'unfused'}, {case}"
                right = wanted(world, path, case, fused)
                copies = pair(world, plain, case)
                errors = found[name] = {"effect": inside.relative(alone, right)}
                for keep in ("auto", "both", "alternating", "streamed"):
                    errors[keep] = inside.relative(sample(world, copies, keep), right)
                for state in STATES:
                    management.unload_all_models()
                    with short_of_memory(state):
                        errors[state] = inside.relative(sample(world, copies), right)
                    errors[f"{state}, left"] = left_behind(plain)
                errors["left"] = left(plain)
            found[f"{level}, {fused}, without"] = bool(
                (sample(world, [plain, None]) == alone).all()
            )
    return found


def compiled(world: World, files: dict) -> dict:
    """The host's torch.compile of the whole transformer and of each block, on both clones."""
    import torch
    from comfy_api.torch_helpers import set_torch_compile_wrapper

    blocks = [f"diffusion_model.layers.{i}" for i in range(4)]
    found = {}
    path = files["BF16"]["conditional"]
    for fused in (False, True):
        for what, keys in (("whole", ["diffusion_model"]), ("blocks", blocks)):
            for case in ("unconditional LoRA", "a LoRA on either"):
                right = wanted(world, path, case, fused)
                torch._dynamo.reset()
                torch._dynamo.utils.counters.clear()
                plain = world.load(path, fused=fused).clone(disable_dynamic=True)
                set_torch_compile_wrapper(plain, backend="aot_eager", keys=keys)
                copies = pair(world, plain, case)
                errors, frames = [], []
                for _ in range(2):
                    errors.append(inside.relative(sample(world, copies), right))
                    frames.append(torch._dynamo.utils.counters["frames"]["total"])
                found[f"{what}, {case}, {'fused' if fused else 'unfused'}"] = {
                    "errors": errors,
                    "frames": frames,
                    "breaks": list(torch._dynamo.utils.counters["graph_break"]),
                }
    return found


def others(world: World, files: dict) -> dict:
    """The host's bypass, its patches of weights, and what is refused."""
    path = files["BF16"]["conditional"]
    plain = world.load(path)
    right = {case: wanted(world, path, case) for case in CASES}
    second = bypass(plain, world, OTHER[0])  # at strength 1
    state = world.states[OTHER[0]]
    world.states["at one"] = state
    CASES["bypass"] = ((STYLE,), (("at one", 1.0),))
    found = {
        "bypass": inside.relative(
            sample(world, [world.add(plain, (STYLE,)), second]), wanted(world, path, "bypass")
        ),
        "left": left(plain),
    }
    found["refused"] = refused(world, plain)
    patched = stock(plain, world, STYLE)
    copies = [patched, world.add(patched, (OTHER,))]
    found["weights alike"] = inside.relative(sample(world, copies), right["one on both"])
    found["interrupted"] = interrupted(world, plain, right["unconditional LoRA"])
    found["asked"] = asked(world, plain)
    found["stock guider"] = in_the_stock_guider(world, plain)
    return found


def stock(patcher, world: World, lora: tuple[str, float]):
    """The host's own patches of weights."""
    import comfy.sd

    name, strength = lora
    return comfy.sd.load_lora_for_models(patcher, None, world.states[name], strength, 0.0)[0]


def refused(world: World, plain) -> dict[str, str]:
    objects = plain.clone()
    objects.add_object_patch("model_sampling", plain.get_model_object("model_sampling"))
    stranger = world.load(plain.cached_patcher_init[1][0].path)
    tries = {
        "weights": ([plain, stock(plain, world, OTHER)], "conditional copy"),
        "other weights": ([stock(plain, world, STYLE), stock(plain, world, OTHER)], None),
        "objects": ([plain, objects], "conditional copy"),
        "by accident": ([plain, plain], None),
        "a clone by accident": ([plain, world.add(plain, (OTHER,))], None),
        "another model": ([plain, stranger], "conditional copy"),
    }
    found = {}
    for name, (copies, source) in tries.items():
        try:
            sample(world, copies, source=source or "unconditional input")
            found[name] = "taken"
        except inside.load(world.pack, "errors").Ideogram4QuantError as error:
            found[name] = str(error)
    return found


def in_the_stock_guider(world: World, plain) -> str:
    """What the host's own guider over two models says of a stand-in."""
    import comfy.samplers
    import torch
    from comfy_extras.nodes_custom_sampler import DualModelGuider

    make = inside.load(world.pack, "nodes.one_copy").stand_in
    second = make(world.add(plain, (OTHER,)), "a stand-in").clone()
    positive = [[torch.zeros(1, 20, 832), {}]]
    guider = DualModelGuider.execute(plain, positive, 7.0, second).args[0]
    noise = torch.zeros(1, 128, 4, 8)
    euler = comfy.samplers.sampler_object("euler")
    try:
        guider.sample(noise, noise, euler, torch.tensor([1.0, 0.0]), seed=0)
    except inside.load(world.pack, "errors").Ideogram4QuantError as error:
        return str(error)
    return "taken"


def interrupted(world: World, plain, right) -> dict:
    """A failure within the unconditional pass: nothing is left, and the next run is right."""
    copies = pair(world, plain, "unconditional LoRA")
    module = plain.model.diffusion_model.final_layer
    calls = []

    def fail(*_):
        calls.append(1)
        if len(calls) == 2:  # of the first step the second pass
            raise RuntimeError("interrupted")

    handle = module.register_forward_hook(fail)
    try:
        sample(world, copies)
        raised = False
    except RuntimeError:
        raised = True
    handle.remove()
    return {
        "raised": raised,
        "patcher left": plain.model.current_patcher is not None,
        "again": inside.relative(sample(world, copies), right),
        "left": left(plain),
    }


def asked(world: World, plain) -> list[list[str]]:
    """Which models the host's loader is asked for: one copy, and the LoRAs of either pass."""
    import comfy.model_management as management

    calls, own = [], management.load_models_gpu

    def request(models, *args, **kwargs):
        calls.append(sorted(m.model.__class__.__name__ for m in models))
        return own(models, *args, **kwargs)

    management.load_models_gpu = request
    try:
        sample(world, pair(world, plain, "a LoRA on either"))
    finally:
        management.load_models_gpu = own
    return calls


MODES = {"runs": runs, "compiled": compiled, "others": others}

if __name__ == "__main__":
    main()
