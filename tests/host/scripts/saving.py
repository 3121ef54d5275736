"""ModelSave and CheckpointSave on our models: FILES (JSON: level -> file), LORAS (folder).

With and without a LoRA that the host bakes in. Reports relative errors for each level: of the saved
file read by this pack and by the stock loader against the model that was saved, and of that one
against the model without a LoRA (`effect`); and what the file is read as.
"""

from __future__ import annotations

import json
from pathlib import Path

import inside
from folded import load_stock
from lora import load, make_inputs, run, stock


def main() -> None:
    # weights of mapped files lie at any address, and the CPU's sums then differ in their last bits:
    # `mapped_or_not` proves it
    pack, (files, loras) = inside.start("--disable-mmap")
    import folder_paths
    import torch

    files = json.loads(files)
    out = Path(folder_paths.get_output_directory())
    base = load(pack, files["BF16"])
    found = {}
    with torch.inference_mode():
        inputs = make_inputs()
        for level, path in files.items():
            plain = load(pack, path)
            baked = stock(plain, loras, "fused.safetensors", 1.0)
            for name, model in ((level, plain), (f"{level}, LoRA", baked)):
                found[name] = saved_and_read(pack, model, out, name, inputs, base, plain)
    inside.report(found)


def saved_and_read(pack, model, out: Path, name: str, inputs, base, plain) -> dict:
    from comfy_extras.nodes_model_merging import CheckpointSave, ModelSave

    wanted = run(model, inputs)
    stem = name.replace(" ", "_").replace(",", "")
    ModelSave().save(model, f"{stem}/model")
    CheckpointSave().save(model, None, None, f"{stem}/whole")
    result = {"effect": inside.relative(wanted, run(plain, inputs))}
    run(model, inputs)
    for kind in ("model", "whole"):
        (path,) = (out / stem).glob(f"{kind}*.safetensors")
        again = load_as(pack, path, result)
        result[kind] = inside.relative(run(again, inputs), wanted)
        if name.startswith("INT8 W8A8") and "smooth" not in name:
            result[f"{kind}, stock"] = inside.relative(
                run(load_stock(base, str(path)), inputs), wanted
            )
    if model is plain:
        result["mapped"] = mapped_or_not(pack, path, inputs)
    return result


def mapped_or_not(pack: str, path: Path, inputs) -> dict:
    """One file loaded mapped and copied: tensors whose bytes differ, the error between outputs, and
    the same with the copies moved to addresses like the mapped ones (modulo 64)."""
    import comfy.utils
    import torch

    both = {}
    for mapped in (True, False):
        comfy.utils.DISABLE_MMAP = not mapped
        try:
            both[mapped] = load_as(pack, path, {})
        finally:
            comfy.utils.DISABLE_MMAP = True
    outputs = {mapped: run(patcher, inputs) for mapped, patcher in both.items()}
    holders = [dict(held(patcher.model.diffusion_model)) for patcher in both.values()]
    assert holders[0].keys() == holders[1].keys()
    other, unlike = [], 0
    for name, (there, attribute) in holders[0].items():
        here, _ = holders[1][name]
        a, b = getattr(there, attribute), getattr(here, attribute)
        if not torch.equal(flat(a), flat(b)):
            other.append(name)
        unlike += a.data_ptr() % 64 != b.data_ptr() % 64
        setattr(here, attribute, at_address_of(a, b))
    moved = run(both[False], inputs)
    return {
        "other bytes": other,
        "other addresses": unlike,
        "error": inside.relative(outputs[True], outputs[False]),
        "error, moved": inside.relative(outputs[True], moved),
    }


def held(module):
    """(name, (object, attribute)) of every plain tensor that holds weights."""
    from comfy.quant_ops import QuantizedTensor

    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        quantized = isinstance(tensor, QuantizedTensor)
        yield name, (tensor, "_qdata" if quantized else "data")


def flat(tensor):
    import torch

    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def at_address_of(like, tensor):
    """A copy of ``tensor`` at an address that equals that of ``like`` modulo 64."""
    import torch

    room = torch.empty(tensor.numel() * tensor.itemsize + 64, dtype=torch.uint8)
    start = (like.data_ptr() - room.data_ptr()) % 64
    out = room[start : start + tensor.numel() * tensor.itemsize].view(tensor.dtype)
    return out.view(tensor.shape).copy_(tensor)


def load_as(pack: str, path: Path, result: dict):
    header = inside.load(pack, "checkpoint").open_checkpoint(path)
    result |= {"copy": header.copies[0], "reason": header.copy_reason, "level": header.level}
    result["config"] = header.config.to_dict()
    result["attention"] = header.attention_wish
    loading = inside.load(pack, "nodes.model_loading")
    return loading.load_model(loading.ModelSource(path, header.copies[0]))


if __name__ == "__main__":
    main()
