"""Memory in the host: FILES (JSON: level -> conditional file), LORA (safetensors).

What the host does where a GPU is short of memory, as far as a CPU can be made to do it: partial
loads with patches applied on the fly, the resolve step of dynamic VRAM, a second model from the
first one's source, unloading and loading again, two levels side by side, and torch.compile.
"""

from __future__ import annotations

import gc
import json

import inside
from lora import load, make_inputs, run, stock

QKV = "diffusion_model.layers.0.attention.qkv.weight"


def main() -> None:
    pack, (files, folder) = inside.start()
    import torch

    files = json.loads(files)
    with torch.inference_mode():
        inputs = make_inputs()
        found = {level: check(pack, path, folder, inputs) for level, path in files.items()}
        found["side by side"] = side_by_side(pack, files, inputs)
    for level, path in files.items():
        found[level]["graph breaks"] = graph_breaks(pack, path, inputs)
    inside.report(found)


def check(pack: str, path: str, folder: str, inputs) -> dict:
    import comfy.model_management as management
    import torch

    plain = load(pack, path)
    full = run(plain, inputs)
    patched = stock(plain, folder, "fused.safetensors", 1.0)
    merged = run(patched, inputs)
    management.unload_all_models()
    partial = run_partially(patched, inputs)
    dynamic = dynamic_resolve(plain, patched)
    copy = plain.clone(disable_dynamic=True, force_deepcopy=True)
    apart = copy.model is not plain.model and torch.equal(run(copy, inputs), full)
    management.unload_all_models()
    return {
        "again": torch.equal(run(plain, inputs), full),
        "partial": inside.relative(partial, merged),
        "dynamic": dynamic,
        "deep copy": apart,
        "freed": freed_by_unloading(pack, path, inputs),
    }


def run_partially(patcher, inputs):
    """All linears left where they are, patches applied as they are used."""
    import torch

    cpu = torch.device("cpu")
    patcher.patch_model(cpu, lowvram_model_memory=1)
    x, t, context = inputs
    out = patcher.model.diffusion_model(x, t, context=context).clone()
    modules = patcher.model.diffusion_model.modules()
    assert any(getattr(m, "weight_function", None) for m in modules)
    patcher.unpatch_model(cpu)
    return out


def dynamic_resolve(plain, patched) -> dict:
    """Weights through a byte buffer as dynamic VRAM moves them, then patched and requantized."""
    import comfy.memory_management as memory
    import comfy.model_management as management
    import comfy.ops
    import torch
    from comfy.model_patcher import LowVramPatch

    module = plain.model.diffusion_model.layers[0].attention.qkv
    true = dense(module.weight)
    patch = LowVramPatch(QKV, patched.patches)
    wanted = patch(true.clone())
    errors = {}
    for requantize in (True, False):
        geometry = memory.tensors_to_geometries([module.weight, module.bias])
        buffer = torch.empty(
            memory.vram_aligned_size([module.weight, module.bias]), dtype=torch.uint8
        )
        management.cast_to_gathered([module.weight, module.bias], buffer)
        module.weight_function, module.bias_function = [], []
        module.weight_lowvram_function, module.bias_lowvram_function = patch, None
        module.seed_key = "layers.0.attention.qkv"
        module._prefetch = {
            "signature": object(),
            "resident": False,
            "xfer_dest": buffer,
            "cast_dest": None,
            "cast_geometry": geometry,
            "needs_cast": False,
        }
        arguments = (module, torch.float32, torch.device("cpu"), torch.float32, torch.float32)
        first, _ = comfy.ops.resolve_cast_module_with_vbar(*arguments, requantize)
        first = dense(first).clone()
        resident, _ = comfy.ops.resolve_cast_module_with_vbar(*arguments, requantize)
        key = "requantized" if requantize else "dense"
        errors[key] = inside.relative(first, wanted)
        errors[f"{key}, resident"] = inside.relative(dense(resident), wanted)
        del module._prefetch
    module.weight_lowvram_function = None
    return errors


def dense(weight):
    return (
        weight.dequantize()
        if hasattr(weight, "dequantize") and hasattr(weight, "_qdata")
        else weight
    )


def freed_by_unloading(pack: str, path: str, inputs) -> bool:
    import weakref

    import comfy.model_management as management

    patcher = load(pack, path)
    run(patcher, inputs)
    watched = weakref.ref(patcher.model.diffusion_model.layers[0].attention.qkv)
    management.unload_all_models()
    del patcher
    gc.collect()
    management.cleanup_models_gc()
    return watched() is None


def side_by_side(pack: str, files: dict, inputs) -> bool:
    """Two levels with other options in one process do not disturb each other."""
    import torch

    first, second = (load(pack, files[level]) for level in list(files)[:2])
    alone = run(first, inputs), run(second, inputs)
    again = run(first, inputs), run(second, inputs)
    return all(torch.equal(*pair) for pair in zip(alone, again, strict=True)) and not torch.equal(
        *alone
    )


def graph_breaks(pack: str, path: str, inputs) -> int:
    """Graph breaks of torch.compile over one linear of every kind in a block."""
    import comfy.model_management as management
    import torch

    with torch.no_grad():
        patcher = load(pack, path)
        management.load_models_gpu([patcher])
        block = patcher.model.diffusion_model.layers[0]
        x = torch.randn(1, 5, 256)
        breaks = 0
        for module in (block.attention.qkv, block.attention.o, block.feed_forward.w1):
            torch._dynamo.reset()
            breaks += torch._dynamo.explain(module)(x).graph_break_count
    return breaks


if __name__ == "__main__":
    main()
