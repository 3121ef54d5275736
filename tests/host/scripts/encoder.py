"""Encoder files in the host: FILES (JSON: name -> path), OUT (safetensors), CAPTION.

Writes the features of every file, and reports which linears stay quantized and what a caption that
is too long brings.
"""

from __future__ import annotations

import json
from pathlib import Path

import inside


def main() -> None:
    pack, (listing, out, caption) = inside.start()
    import torch
    from safetensors.torch import save_file

    loading = inside.load(pack, "nodes.encoder_loading")
    features, quantized = {}, {}
    with torch.inference_mode():
        for name, path in json.loads(listing).items():
            clip = loading.load_encoder(Path(path))
            found = clip.encode_from_tokens_scheduled(clip.tokenize(caption))
            features[name] = found[0][0][0].contiguous()
            quantized[name] = count_quantized(clip)
        message = too_long(clip)
        copied = clip.patcher.clone(disable_dynamic=True, force_deepcopy=True)
    save_file(features, out)
    inside.report(
        {
            "quantized": quantized,
            "too long": message,
            "deep copy": copied.model is not clip.patcher.model,
        }
    )


def count_quantized(clip) -> int:
    from comfy.quant_ops import QuantizedTensor

    modules = clip.cond_stage_model.modules()
    return sum(isinstance(getattr(m, "weight", None), QuantizedTensor) for m in modules)


def too_long(clip) -> str:
    try:
        clip.tokenize("word " * 3000)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


if __name__ == "__main__":
    main()
