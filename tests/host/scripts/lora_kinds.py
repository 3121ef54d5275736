"""LoRA files of every kind in the host: FILES, CASES, STOCK (JSON).

FILES: level -> copy -> model. CASES: name -> {"file": LoRA in models/loras, "merged": strength ->
file of dense weights}. STOCK: files for the host's own node by name, and their dense weights by
strength. Reports relative errors of one pass against the BF16 model with the dense
weights, and whether the models are exact afterwards, stream their weights, and add up two files.
"""

from __future__ import annotations

import json

import inside
import lora
import lowvram

TWO = ("DoRA, fused", "LoHa, rank 4, split")


def main() -> None:
    pack, (files, cases, stock) = inside.start()
    import torch

    files, cases, found = json.loads(files), json.loads(cases), {}
    with torch.inference_mode():
        inputs = lora.make_inputs()
        dense = lora.load(pack, files["BF16"]["conditional"])
        before = lora.run(dense, inputs)
        merged = {
            (name, strength): lora.run(with_weights(dense, file), inputs)
            for name, case in cases.items()
            for strength, file in case["merged"].items()
        }
        found["stock"] = by_stock(dense, *json.loads(stock), inputs, before)
        for level, paths in files.items():
            found[level] = measure(pack, paths, cases, inputs, merged, before)
    inside.report(found)


def by_stock(dense, files: dict, merged: dict, inputs, before) -> dict:
    """What Load LoRA of the host makes of each: how far from the dense weights, and from none."""
    found = {}
    for name, file in files.items():
        for strength, weights in merged[name].items():
            output = lora.run(lora.stock(dense, "", file, float(strength)), inputs)
            wanted = lora.run(with_weights(dense, weights), inputs)
            errors = {"error": inside.relative(output, wanted)}
            errors["effect"] = inside.relative(output, before)
            found.setdefault(name, []).append(errors)
    return found


def with_weights(patcher, file: str):
    """The model with these weights in place of its own, by the host's patches."""
    import safetensors.torch

    clone = patcher.clone()
    weights = safetensors.torch.load_file(file)
    clone.add_patches({f"diffusion_model.{n}": ("set", (w,)) for n, w in weights.items()})
    return clone


def node(pack: str, conditional, file: str, strength: float, **more) -> tuple:
    return (
        inside.load(pack, "nodes.node_lora")
        .LoadLora.execute(conditional, file, strength, **more)
        .args
    )


def measure(pack: str, paths: dict, cases: dict, inputs, merged: dict, before) -> dict:
    import torch

    plain = lora.load(pack, paths["conditional"])
    own = lora.run(plain, inputs)
    found = {"none": inside.relative(own, before), "cases": {}}
    for name, case in cases.items():
        errors, report = {}, ""
        for strength in case["merged"]:
            model, _, report = node(pack, plain, case["file"], float(strength))
            wanted = merged[name, strength]
            errors[strength] = inside.relative(lora.run(model, inputs), wanted)
        zero = lora.run(node(pack, plain, case["file"], 0.0)[0], inputs)
        effect = inside.relative(merged[name, "1.0"], before)
        found["cases"][name] = {"errors": errors, "effect": effect, "report": report}
        found["cases"][name]["zero"] = torch.equal(zero, own)
    found["exact afterwards"] = torch.equal(lora.run(plain, inputs), own)
    found["two"] = two(pack, plain, cases, inputs)
    model = node(pack, plain, cases["DoRA, fused"]["file"], 1.0)[0]
    found["streamed"] = streamed(model, inputs, merged["DoRA, fused", "1.0"])
    found["fused"] = in_fused_blocks(pack, paths["conditional"], cases, inputs, merged)
    found["unconditional"] = other_copy(pack, plain, paths, cases, inputs)
    return found


def streamed(model, inputs, wanted) -> list[dict]:
    """A loaded model of which parts are unloaded and loaded again: what is left, and the error."""
    import comfy.model_management as management
    import torch

    management.load_models_gpu([model])
    cpu, size, found = torch.device("cpu"), model.model_size(), []
    x, t, context = inputs
    for change in (
        lambda: model.partially_unload(cpu, size // 2),
        lambda: model.partially_unload(cpu, size),
        lambda: model.partially_load(cpu, 10 * size),
    ):
        change()
        error = inside.relative(model.model.diffusion_model(x, t, context=context), wanted)
        found.append({"left": lowvram.left_behind(model), "error": error})
    return found


def in_fused_blocks(pack: str, path: str, cases: dict, inputs, merged: dict) -> dict:
    """Errors where the blocks' norms and SwiGLU run inside the kernels: linears, norms, biases."""
    from pathlib import Path

    loading = inside.load(pack, "nodes.model_loading")
    fused = loading.load_model(loading.ModelSource(Path(path), "conditional", fused=True))
    found = {}
    for name in ("diff", "DoRA, fused"):
        model = node(pack, fused, cases[name]["file"], 1.0)[0]
        found[name] = inside.relative(lora.run(model, inputs), merged[name, "1.0"])
    return found


def two(pack: str, plain, cases: dict, inputs) -> float:
    """How far two files in one order are from the same two in the other."""
    outputs = []
    for order in (TWO, TWO[::-1]):
        model = plain
        for name in order:
            model = node(pack, model, cases[name]["file"], 0.7)[0]
        outputs.append(lora.run(model, inputs))
    return inside.relative(*outputs)


def other_copy(pack: str, plain, paths: dict, cases: dict, inputs) -> dict:
    """A file on the unconditional copy alone: that copy is changed, and the other is not."""
    import torch

    other = lora.load(pack, paths["unconditional"], "unconditional")
    own, before = lora.run(plain, inputs), lora.run(other, inputs)
    first, second, _ = node(
        pack,
        plain,
        cases["OFT, split"]["file"],
        1.0,
        unconditional=other,
        apply_to="unconditional",
    )
    return {
        "conditional same": torch.equal(lora.run(first, inputs), own),
        "effect": inside.relative(lora.run(second, inputs), before),
        "exact afterwards": torch.equal(lora.run(other, inputs), before),
    }


if __name__ == "__main__":
    main()
