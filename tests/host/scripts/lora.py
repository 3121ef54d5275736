"""LoRAs in the host at every level: FILES (JSON: level -> conditional file), LORAS (folder).

LORAS holds the same update twice, `fused.safetensors` and `split.safetensors`, and another one,
`second.safetensors`. Reports relative errors of one pass against the BF16 model with the update
merged by the host, and whether removal leaves no trace.
"""

from __future__ import annotations

import json
from pathlib import Path

import inside


def main() -> None:
    pack, (files, loras) = inside.start()
    import torch

    found = {"work": work_added(pack)}
    with torch.inference_mode():
        inputs = make_inputs()
        merged = merge_with_host(pack, json.loads(Path(files).read_text())["BF16"], loras, inputs)
        whole = json.loads(Path(files).read_text())["BF16"]
        for level, path in json.loads(Path(files).read_text()).items():
            found[level] = measure(pack, path, loras, inputs, merged)
            alone = with_errors(pack, whole, path, loras, inputs)
            found[level]["patched alone"] = inside.relative(alone, merged["one"])
    inside.report(found)


def make_inputs():
    import torch

    generator = torch.Generator().manual_seed(2)
    x = torch.randn(1, 128, 8, 8, generator=generator)
    return x, torch.tensor([0.7]), torch.randn(1, 9, 832, generator=generator)


def run(patcher, inputs):
    """One pass of a patched model, loaded as the sampler would."""
    import comfy.model_management

    x, t, context = inputs
    comfy.model_management.load_models_gpu([patcher])
    return patcher.model.diffusion_model(x, t, context=context).clone()


def load(pack: str, path: str, copy: str = "conditional"):
    loading = inside.load(pack, "nodes.model_loading")
    return loading.load_model(loading.ModelSource(Path(path), copy))


def stock(patcher, loras: str, name: str, strength: float):
    import comfy.sd
    import comfy.utils

    state = comfy.utils.load_torch_file(str(Path(loras) / name))
    return comfy.sd.load_lora_for_models(patcher, None, state, strength, 0.0)[0]


def bypass(patcher, loras: str, name: str):
    """The host's own way beside the weights, of its Load LoRA (Bypass) nodes."""
    import comfy.sd
    import comfy.utils

    state = comfy.utils.load_torch_file(str(Path(loras) / name))
    return comfy.sd.load_bypass_lora_for_models(patcher, None, state, 1.0, 0.0)[0]


def work_added(pack: str) -> dict[str, float]:
    """Products of the side path over those of the linears, in a block of the real model."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    config = inside.load(pack, "checkpoint").ModelConfig()
    canonical = inside.load(pack, "checkpoint.canonical").canonical_shapes(config)
    names = inside.load(pack, "checkpoint.loras")
    low_rank = inside.load(pack, "nodes.low_rank_model")
    shapes = {
        name.removesuffix(".weight"): shape
        for name, shape in canonical.items()
        if name.startswith("layers.0.") and len(shape) == 2
    }

    def flops(ranks: dict[str, int]) -> int:
        counter = FlopCounterMode(display=False)
        with counter:
            for module, (n, k) in shapes.items():
                linear = torch.nn.Linear(k, n, bias=False, device="meta")
                rank = ranks.get(module, 0)
                if rank:
                    halves = (torch.empty(shape, device="meta") for shape in ((rank, k), (n, rank)))
                    path = low_rank.SidePath(names.LowRank(*halves), torch.float32)
                    linear.ideogram4_quant_side_paths = (path.tag,)
                    linear.register_forward_hook(path.hook)
                linear(torch.empty(16, k, device="meta"))
        return counter.get_total_flops()

    def ranks(*files: dict) -> dict[str, int]:
        parsed = [names.parse_lora(state, shapes, "f").updates[None] for state in files]
        return {
            module: names.stack([(p[module], 1.0) for p in parsed if module in p]).rank
            for module in shapes
        }

    def halves(module: str, n: int, k: int) -> dict:
        return {
            f"{module}.lora_A.weight": torch.zeros(64, k),
            f"{module}.lora_B.weight": torch.zeros(n, 64),
        }

    fused, split = {}, {}
    for module, (n, k) in shapes.items():
        fused |= halves(module, n, k)
        if module.endswith("qkv"):
            for part in ("to_q", "to_k", "to_v"):
                split |= halves(module.replace("qkv", part), n // 3, k)
        else:
            split |= halves(module, n, k)
    plain = flops({})
    cases = {"rank 64": (fused,), "split, rank 64": (split,), "two of rank 64": (fused, fused)}
    return {name: flops(ranks(*files)) / plain - 1 for name, files in cases.items()}


def merge_with_host(pack: str, path: str, loras: str, inputs) -> dict:
    plain = load(pack, path)
    once = stock(plain, loras, "fused.safetensors", 1.0)
    return {
        "none": run(plain, inputs),
        "one": run(once, inputs),
        "half": run(stock(plain, loras, "fused.safetensors", 0.5), inputs),
        "two": run(stock(once, loras, "second.safetensors", -0.7), inputs),
    }


def with_errors(pack: str, whole: str, path: str, loras: str, inputs):
    """The merged full model with the errors of a level's file in the patched weights, no others."""
    import safetensors

    model, level = load(pack, whole), load(pack, path)
    merged = stock(model, loras, "fused.safetensors", 1.0)
    true, coded = (patcher.model.diffusion_model for patcher in (model, level))
    with safetensors.safe_open(Path(loras) / "fused.safetensors", "pt") as file:
        names = sorted({name.split(".lora_")[0] for name in file.keys()})  # noqa: SIM118
    errors = {}
    for name in (name.removeprefix("diffusion_model.") for name in names):
        weights = (each.get_submodule(name).weight.float() for each in (coded, true))
        decoded, exact = (getattr(w, "dequantize", lambda w=w: w)() for w in weights)
        errors[f"diffusion_model.{name}.weight"] = ("diff", (decoded - exact,))
    merged.add_patches(errors, 1.0)
    return run(merged, inputs)


def measure(pack: str, path: str, loras: str, inputs, merged: dict) -> dict:
    import safetensors.torch
    import torch

    names = inside.load(pack, "checkpoint.loras")
    ours = inside.load(pack, "nodes.lora_loading")
    plain = load(pack, path)

    def with_lora(patcher, name: str, strength: float):
        state = safetensors.torch.load_file(Path(loras) / name)
        found = names.parse_lora(state, ours.linear_shapes(patcher), name)
        return ours.add_lora(patcher, found.for_copy("conditional", "as in the file"), strength)

    before = run(plain, inputs)
    one = with_lora(plain, "fused.safetensors", 1.0)
    outputs = {
        "none": before,
        "one": run(one, inputs),
        "half": run(with_lora(plain, "fused.safetensors", 0.5), inputs),
        "two": run(with_lora(one, "second.safetensors", -0.7), inputs),
    }
    errors = {key: inside.relative(out, merged[key]) for key, out in outputs.items()}
    split = run(with_lora(plain, "split.safetensors", 1.0), inputs)
    patched = run(stock(plain, loras, "fused.safetensors", 1.0), inputs)
    bypassed = run(bypass(plain, loras, "fused.safetensors"), inputs)
    return errors | {
        "bypass": inside.relative(bypassed, merged["one"]),
        "effect": inside.relative(merged["one"], merged["none"]),
        "split": inside.relative(split, merged["one"]),
        "patched": inside.relative(patched, merged["one"]),
        "removed": torch.equal(run(plain, inputs), before),
        "hooks left": inside.hooks(plain.model),
    }


if __name__ == "__main__":
    main()
