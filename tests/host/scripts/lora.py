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

    found = {}
    with torch.inference_mode():
        inputs = make_inputs()
        merged = merge_with_host(pack, json.loads(Path(files).read_text())["BF16"], loras, inputs)
        for level, path in json.loads(Path(files).read_text()).items():
            found[level] = measure(pack, path, loras, inputs, merged)
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


def load(pack: str, path: str):
    loading = inside.load(pack, "nodes.model_loading")
    return loading.load_model(loading.ModelSource(Path(path), "conditional"))


def stock(patcher, loras: str, name: str, strength: float):
    import comfy.sd
    import comfy.utils

    state = comfy.utils.load_torch_file(str(Path(loras) / name))
    return comfy.sd.load_lora_for_models(patcher, None, state, strength, 0.0)[0]


def merge_with_host(pack: str, path: str, loras: str, inputs) -> dict:
    plain = load(pack, path)
    once = stock(plain, loras, "fused.safetensors", 1.0)
    return {
        "none": run(plain, inputs),
        "one": run(once, inputs),
        "half": run(stock(plain, loras, "fused.safetensors", 0.5), inputs),
        "two": run(stock(once, loras, "second.safetensors", -0.7), inputs),
    }


def measure(pack: str, path: str, loras: str, inputs, merged: dict) -> dict:
    import safetensors.torch
    import torch

    names = inside.load(pack, "nodes.lora_files")
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
    return errors | {
        "effect": inside.relative(merged["one"], merged["none"]),
        "split": inside.relative(split, merged["one"]),
        "patched": inside.relative(patched, merged["one"]),
        "removed": torch.equal(run(plain, inputs), before),
        "hooks left": sum(len(m._forward_hooks) for m in plain.model.modules()),
    }


if __name__ == "__main__":
    main()
