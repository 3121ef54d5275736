"""A LoRA of ``ideogram4-quant delta`` in the host's own loader: COND, LORA (a safetensors file).

Both on a model that the host loaded itself and on this pack's. Reports the file's modules, how many
of them the host patched, and the relative errors of one pass against the weights with the products
of the halves added by hand; `effect` is what the LoRA does.
"""

from __future__ import annotations

from pathlib import Path

import inside
from folded import load_stock, make_inputs
from lora import load, run, stock


def main() -> None:
    pack, (cond, lora) = inside.start()
    import torch
    from safetensors.torch import load_file, save_file

    weights, halves = load_file(cond), load_file(lora)
    modules = {key.rpartition(".lora_")[0] for key in halves}
    for module in modules:
        down, up = (halves[f"{module}.lora_{half}.weight"].float() for half in "AB")
        name = f"{module.removeprefix('diffusion_model.')}.weight"
        weights[name] = weights[name].float() + up @ down
    folder = Path(lora).parent
    merged_file = folder / "merged_conditional.safetensors"
    save_file(weights, merged_file)
    found = {"modules": len(modules)}
    with torch.inference_mode():
        inputs = make_inputs()
        base = load(pack, cond)
        plain = run(base, inputs)
        merged = run(load_stock(base, str(merged_file)), inputs)
        found["effect"] = inside.relative(merged, plain)
        for name, model in (("stock", load_stock(base, cond)), ("ours", base)):
            patched = stock(model, str(folder), Path(lora).name, 1.0)
            found[name] = {
                "patched": len(patched.patches),
                "error": inside.relative(run(patched, inputs), merged),
            }
    inside.report(found)


if __name__ == "__main__":
    main()
