"""Samples every level in the host from given noise and features: LEVELS (JSON), OUT (safetensors).

LEVELS maps a level to its two files; INPUTS holds `noise` [N, C] and `features` [L, F]. The final
latents come back as tokens, and so does how many of the linears ran on a quantized weight.
"""

from __future__ import annotations

import json
from pathlib import Path

import inside
from parity import from_tokens, to_tokens


def main() -> None:
    pack, (levels, inputs, out, size) = inside.start()
    import torch
    from safetensors.torch import load_file, save_file

    width, height = json.loads(size)
    given = load_file(inputs)
    latents, quantized = {}, {}
    with torch.inference_mode():
        for level, files in json.loads(Path(levels).read_text()).items():
            copies = [load(pack, path, copy) for copy, path in files.items()]
            quantized[level] = count_quantized(copies[0])
            found = sample(pack, copies, given, width, height)
            latents[level] = to_tokens(found).contiguous()
    save_file(latents, out)
    inside.report({"quantized": quantized})


def load(pack: str, path: str, copy: str):
    loading = inside.load(pack, "nodes.model_loading")
    return loading.load_model(loading.ModelSource(Path(path), copy))


def count_quantized(patcher) -> int:
    from comfy.quant_ops import QuantizedTensor

    modules = patcher.model.diffusion_model.modules()
    return sum(isinstance(getattr(m, "weight", None), QuantizedTensor) for m in modules)


def sample(pack: str, copies: list, given: dict, width: int, height: int):
    import comfy.samplers
    import torch

    nodes = inside.load(pack, "nodes.sampling_inputs")
    positive = [[given["features"][None], {}]]
    guider_class = inside.load(pack, "nodes.guider").DualCopyGuider
    guider = guider_class(*copies, positive, nodes.make_guidance("default"))
    sigmas, _ = nodes.schedule("default", width, height, 0, 1.0)
    noise = from_tokens(given["noise"], (1, 128, height // 16, width // 16))
    euler = comfy.samplers.sampler_object("euler")
    return guider.sample(noise, torch.zeros_like(noise), euler, sigmas, seed=0)


if __name__ == "__main__":
    main()
