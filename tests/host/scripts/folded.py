"""Folded files in the host: FILES (JSON: name -> conditional file), LORAS (folder), VAE.

FILES holds `BF16`, the levels, and `LEVEL, folded` for each. All are loaded by this pack, native
ones by the stock loader too. Reports relative errors of one pass: against the BF16 model, between
the loaders, and with a LoRA (`fused.safetensors` of LORAS) by every way to load one, against the
BF16 model with the LoRA merged by the host; `effect` is what the LoRA does. `picture`: PSNR in dB
between the pictures that the host's own sampler makes of the two loaders' models.
"""

from __future__ import annotations

import json
from pathlib import Path

import inside
from lora import load, run, stock
from memory import dynamic_resolve, run_partially
from parity import psnr

LORA = "fused.safetensors"


def main() -> None:
    pack, (files, folder, vae) = inside.start()
    import torch

    files = json.loads(Path(files).read_text())
    found = {}
    with torch.inference_mode():
        inputs = make_inputs()
        decoder = inside.load(pack, "nodes.vae_loading").load_vae(Path(vae))
        base = load(pack, files["BF16"])
        true = run(base, inputs)
        wanted = run(stock(base, folder, LORA, 1.0), inputs)
        for name, path in files.items():
            ours = load(pack, path)
            plain = run(ours, inputs)
            found[name] = {"error": inside.relative(plain, true)}
            found[name] |= with_lora(pack, ours, folder, inputs, wanted)
            if path.endswith(".safetensors"):
                theirs = load_stock(base, path)
                there = run(theirs, inputs)
                found[name]["stock loader"] = inside.relative(there, plain)
                pictures = (picture(each, decoder, inputs) for each in (theirs, ours))
                found[name]["picture"] = psnr(*pictures)
                lora = with_lora(pack, theirs, folder, inputs, wanted)
                found[name] |= {f"stock loader, {key}": value for key, value in lora.items()}
        found["effect"] = inside.relative(wanted, true)
    inside.report(found)


def make_inputs():
    import torch

    generator = torch.Generator().manual_seed(2)
    x = torch.randn(1, 128, 4, 8, generator=generator)
    return x, torch.tensor([0.6]), torch.randn(1, 20, 832, generator=generator)


def load_stock(like, path: str):
    """As UNETLoader does; only the size of the model is told."""
    import comfy.sd
    import comfy.supported_models as supported

    config = like.model.model_config.unet_extra_config

    class Pocket(supported.Ideogram4):
        unet_extra_config = config

    supported.models.insert(0, Pocket)
    try:
        return comfy.sd.load_diffusion_model(path)
    finally:
        supported.models.remove(Pocket)


def picture(patcher, decoder, inputs):
    """Eight Euler steps by the host's sampler, without guidance, decoded."""
    import comfy.samplers
    import torch

    x, _, context = inputs
    guider = comfy.samplers.CFGGuider(patcher)
    guider.set_conds([[context, {}]], [[context, {}]])
    guider.set_cfg(1.0)
    euler = comfy.samplers.sampler_object("euler")
    sigmas = torch.linspace(1, 0, 9)
    return decoder.decode(guider.sample(x, torch.zeros_like(x), euler, sigmas, seed=0))


def with_lora(pack: str, patcher, folder: str, inputs, wanted) -> dict:
    import comfy.model_management as management
    import safetensors.torch
    import torch

    names = inside.load(pack, "checkpoint.loras")
    side = inside.load(pack, "nodes.lora_loading")
    before = run(patcher, inputs)
    state = safetensors.torch.load_file(Path(folder) / LORA)
    updates = names.parse_lora(state, side.linear_shapes(patcher), LORA)
    ours = side.add_lora(patcher, updates.for_copy("conditional", "as in the file"), 1.0)
    patched = stock(patcher, folder, LORA, 1.0)
    errors = {
        "baked": baked(pack, patcher),
        "side path": inside.relative(run(ours, inputs), wanted),
        "patched": inside.relative(run(patched, inputs), wanted),
    }
    management.unload_all_models()
    errors["partial"] = inside.relative(run_partially(patched, inputs), wanted)
    if side.source_of(patcher) is not None:
        errors["dynamic"] = dynamic_resolve(patcher, patched)
    return errors | {"removed": torch.equal(run(patcher, inputs), before)}


def baked(pack: str, patcher) -> str:
    """What a LoRA that changes weights comes to: "taken", or the error's words."""
    import torch

    kinds = inside.load(pack, "checkpoint.loras")
    name = "layers.0.attention_norm1.weight"
    shape = patcher.model.get_parameter(f"diffusion_model.{name}").shape
    changes = {name: [kinds.WeightChange("diff", {"diff": torch.ones(shape)})]}
    try:
        inside.load(pack, "nodes.lora_baking").bake(patcher, changes, 1.0)
    except inside.load(pack, "errors").OpError as error:
        return str(error)
    return "taken"


if __name__ == "__main__":
    main()
