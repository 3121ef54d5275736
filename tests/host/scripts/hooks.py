"""Hook LoRAs of the host through the guider: FILES (JSON: level -> copy -> file), LORAS (folder),
ENCODER.

What is wanted is the dense formula on the conditional copy, as in clones.py.
"""

from __future__ import annotations

import json
from pathlib import Path

import inside
from clones import TWO, World, add_updates, left

COPIES = ("conditional", "unconditional")
NAME = "fused.safetensors"


def main() -> None:
    pack, (files, loras, encoder) = inside.start("--use-pytorch-cross-attention")
    import torch

    with torch.inference_mode():
        world = World(pack, loras)
        found = {level: check(world, paths) for level, paths in json.loads(files).items()}
        found["others"] = others(world, json.loads(files)["INT8 W8A8 rotated"])
        found["others"]["encoder"] = encoder_hook(world, encoder)
    inside.report(found)


def check(world: World, paths: dict) -> dict:
    plain = [world.load(paths[copy], copy) for copy in COPIES]
    other = plain[1]
    before = sample(world, plain, caption())
    wanted = sample(world, [world.dense(paths["conditional"]), other], caption())
    found = {"effect": inside.relative(wanted, before)}
    for keep in ("both", "alternating", "streamed"):
        hooked = sample(world, plain, caption(hooks(world, NAME, 0.8)), keep=keep)
        found[keep] = inside.relative(hooked, wanted)
    hooked = sample(world, plain, caption(hooks(world, "split.safetensors", 0.8)))
    found["other names"] = inside.relative(hooked, wanted)
    hooked = sample(world, plain, caption(by_step(hooks(world, NAME, 1.6), 0.5)))
    found["by step"] = inside.relative(hooked, wanted)
    hooked = sample(world, [not_dynamic(plain[0]), other], caption(hooks(world, NAME, 0.8)))
    found["not dynamic"] = inside.relative(hooked, wanted)

    both = sample(world, [world.dense(paths["conditional"], TWO), other], caption())
    chained = world.add(plain[0], TWO[1:])
    hooked = sample(world, [chained, other], caption(hooks(world, NAME, 0.8)))
    found["beside our node's"] = inside.relative(hooked, both)
    combined = hooks(world, NAME, 0.8).clone_and_combine(hooks(world, *TWO[1]))
    found["two hooks"] = inside.relative(sample(world, plain, caption(combined)), both)

    # one step is linear in the predictions, and the host takes the mean of two conditionings
    one_step = (1.0, 0.0)
    dense = sample(world, [world.dense(paths["conditional"]), other], caption(), one_step)
    mean = (dense + sample(world, plain, caption(seed=8), one_step)) / 2
    positive = caption(hooks(world, NAME, 0.8)) + caption(seed=8)
    found["one of two"] = inside.relative(sample(world, plain, positive, one_step), mean)
    found["without"] = bool((sample(world, plain, caption()) == before).all())
    return found | {"left": left(plain[0]), "kept": len(plain[0].get_nested_additional_models())}


def not_dynamic(patcher):
    """As the host has it where there is no dynamic memory: the hooks go onto the model itself."""
    import comfy.model_patcher

    clone = patcher.clone()
    clone.__class__ = comfy.model_patcher.ModelPatcher
    return clone


def by_step(hooks, factor: float):
    """The host's keyframes: for the whole run, at a factor."""
    import comfy.hooks

    keyframes = comfy.hooks.HookKeyframeGroup()
    keyframes.add(comfy.hooks.HookKeyframe(strength=factor))
    hooks.set_keyframes_on_hooks(keyframes)
    return hooks


def others(world: World, paths: dict) -> dict:
    """What cannot go beside the weights, the host's own guider, and torch.compile."""
    import comfy.hooks
    import torch

    plain = [world.load(paths[copy], copy) for copy in COPIES]
    whole = comfy.hooks.create_hook_model_as_lora({"diffusion_model.x": torch.ones(1)}, None, 1, 1)
    lokr = {"diffusion_model.layers.0.attention.qkv.lokr_w1": torch.ones(2, 2)}
    kinds = {"whole": whole, "lokr": comfy.hooks.create_hook_lora(lokr, 1.0, 0.0)}
    foreign = {"diffusion_model.blocks.0.lora_A.weight": torch.ones(1, 2)}
    norm = plain[0].model.diffusion_model.layers[0].attention_norm1.weight
    diff = {"diffusion_model.layers.0.attention_norm1.diff": torch.ones(norm.shape)}
    kinds["diff"] = comfy.hooks.create_hook_lora(diff, 1.0, 0.0)
    kinds["foreign"] = comfy.hooks.create_hook_lora(foreign, 1.0, 0.0)
    found = {}
    for name, hook in kinds.items():
        try:
            sample(world, plain, caption(hook))
            found[name] = "taken"
        except inside.load(world.pack, "errors").Ideogram4QuantError as error:
            found[name] = str(error)

    dense = world.dense(paths["conditional"])
    # 2 * conditional - 1 * negative, in one step: the LoRA acts on the first term only
    first, second = stock_guider(dense, caption()), stock_guider(plain[0], caption(seed=9))
    hooked = stock_guider(plain[0], caption(hooks(world, NAME, 0.8)), cfg=2.0)
    found["stock guider"] = inside.relative(hooked, 2 * first - second)
    found["stock loader"] = on_stock_models(world, paths["conditional"], plain)
    return found | {"compiled": compiled(world, paths)}


def on_stock_models(world: World, path: str, plain: list) -> float:
    """Quantized by the host's own loader, in our sampler."""
    import comfy.sd
    import comfy.supported_models as supported

    class Small(supported.Ideogram4):
        unet_extra_config = plain[0].model.model_config.unet_extra_config

    supported.models.insert(0, Small)
    try:
        stock, dense = (comfy.sd.load_diffusion_model(path) for _ in range(2))
    finally:
        supported.models.remove(Small)
    add_updates(dense.model.diffusion_model, world.states[NAME], 0.8)
    wanted = sample(world, [dense, plain[1]], caption())
    hooked = sample(world, [stock, plain[1]], caption(hooks(world, NAME, 0.8)))
    return inside.relative(hooked, wanted)


def encoder_hook(world: World, path: str) -> str:
    """What the host's Set CLIP Hooks node gets from our encoder for a LoRA of its weights."""
    import torch
    from comfy_extras.nodes_hooks import SetClipHooks

    clip = inside.load(world.pack, "nodes.encoder_loading").load_encoder(Path(path))
    key = next(k for k in clip.patcher.model.state_dict() if k.endswith("q_proj.weight"))
    n, k = clip.patcher.model.state_dict()[key].shape
    module = key.removesuffix(".weight")
    halves = {f"text_encoders.{module}.lora_A.weight": torch.ones(1, k)}
    halves[f"text_encoders.{module}.lora_B.weight"] = torch.ones(n, 1)
    hook = comfy_hook(halves)
    try:
        SetClipHooks().apply_hooks(clip, False, True, hook)
    except inside.load(world.pack, "errors").Ideogram4QuantError as error:
        return str(error)
    return "taken"


def comfy_hook(state: dict):
    import comfy.hooks

    return comfy.hooks.create_hook_lora(state, 1.0, 1.0)


def stock_guider(patcher, positive: list, cfg: float = 1.0):
    import comfy.samplers
    import torch

    guider = comfy.samplers.CFGGuider(patcher)
    guider.set_conds(positive, caption(seed=9))
    guider.set_cfg(cfg)
    noise = torch.randn(1, 128, 4, 8, generator=torch.Generator().manual_seed(6))
    euler, sigmas = comfy.samplers.sampler_object("euler"), torch.tensor([1.0, 0.0])
    return guider.sample(noise, torch.zeros_like(noise), euler, sigmas, seed=0)


def compiled(world: World, paths: dict) -> dict:
    """One compiled model, with and without a hook and a LoRA of our node, in turns."""
    import torch
    from comfy_api.torch_helpers import set_torch_compile_wrapper

    plain = world.load(paths["conditional"])
    wanted = {
        loras: sample(world, [world.dense(paths["conditional"], loras), None], caption())
        for loras in ((), TWO[:1], TWO[1:], TWO)
    }
    copy = plain.clone(disable_dynamic=True)
    set_torch_compile_wrapper(copy, backend="aot_eager")
    ours = world.add(copy, TWO[1:])
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    errors, frames = [], []
    for _ in range(2):
        for patcher, hook, loras in (
            (copy, None, ()),
            (copy, TWO[0], TWO[:1]),
            (ours, None, TWO[1:]),
            (ours, TWO[0], TWO),
        ):
            positive = caption(hook and hooks(world, *hook))
            out = sample(world, [patcher, None], positive)
            errors.append(inside.relative(out, wanted[loras]))
        frames.append(torch._dynamo.utils.counters["frames"]["total"])
    breaks = list(torch._dynamo.utils.counters["graph_break"])
    return {"errors": errors, "frames": frames, "breaks": breaks}


def hooks(world: World, name: str, strength: float):
    import comfy.hooks

    return comfy.hooks.create_hook_lora(world.states[name], strength, 0.0)


def caption(hooks=None, seed: int = 5) -> list:
    import comfy.hooks
    import torch

    features = torch.randn(1, 20, 832, generator=torch.Generator().manual_seed(seed))
    return comfy.hooks.set_hooks_for_conditioning([[features, {}]], hooks)


def sample(world: World, copies: list, positive: list, sigmas=(1.0, 0.7, 0.3, 0.0), keep="both"):
    import comfy.samplers
    import torch

    noise = torch.randn(1, 128, 4, 8, generator=torch.Generator().manual_seed(6))
    guidance = inside.load(world.pack, "nodes.guidance").Guidance(None, (7.0,))
    guider_class = inside.load(world.pack, "nodes.guider").DualCopyGuider
    guider = guider_class(*copies, positive, guidance, keep)
    euler = comfy.samplers.sampler_object("euler")
    return guider.sample(noise, torch.zeros_like(noise), euler, torch.tensor(sigmas), seed=0)


if __name__ == "__main__":
    main()
