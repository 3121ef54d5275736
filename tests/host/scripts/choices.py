"""Attention and measured backends in the host: FILE, a conditional copy at INT8 W8A8; USER.

USER: an empty folder for the host's user files, in which nothing was measured yet. Reports what
each setting of attention installs and computes, what a mask does, and what was measured and kept.
"""

from __future__ import annotations

import logging
from pathlib import Path

import inside

OVERRIDE = "optimized_attention_override"


def main() -> None:
    pack, (file, user) = inside.start()
    import folder_paths
    import torch

    folder_paths.set_user_directory(user)  # as the host does for --user-directory

    records: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())
    logging.getLogger().addHandler(handler)
    found: dict = {"installed": {}, "errors": {}, "refused": {}}
    with torch.inference_mode():
        passes = {}
        for setting in ("host", "sdpa", "auto"):
            patcher = load(pack, file, setting)
            options = patcher.model_options["transformer_options"]
            found["installed"][setting] = OVERRIDE in options
            passes[setting] = one_pass(patcher)
            found["errors"][setting] = inside.relative(passes[setting], passes["host"])
        for setting in ("int8", "flash"):
            try:
                load(pack, file, setting)
            except Exception as error:
                found["refused"][setting] = f"{type(error).__name__}: {error}"
        found["measured"] = [line for line in records if line.startswith("measured on cpu")]
        found["lines"] = [
            str(m) for m in inside.load(pack, "nodes.model_loading").measured([patcher])
        ]
        before = len(records)
        unmasked = one_pass(patcher)
        masked = [one_pass(patcher, torch.ones(1, 6)) for _ in range(2)]
        found["mask_error"] = inside.relative(masked[0], unmasked)
        found["mask_lines"] = [line for line in records[before:] if "with a mask" in line]
        found["pytorch"] = host_backend(patcher)
        found["hooks"] = hooks(pack)
        reloaded, _ = patcher.cached_patcher_init
        again = reloaded(*patcher.cached_patcher_init[1], disable_dynamic=True)
        found["reloaded"] = OVERRIDE in again.model_options["transformer_options"]
    kept = Path(user).rglob("measured-*.json")
    found["kept"] = [p.relative_to(user).as_posix() for p in kept]
    inside.report(found)


def load(pack: str, file: str, attention: str):
    loading = inside.load(pack, "nodes.model_loading")
    return loading.load_model(loading.ModelSource(Path(file), "conditional", attention=attention))


def one_pass(patcher, mask=None):
    """The model's output for fixed noise and text, with the patcher's own options."""
    import comfy.model_management
    import torch

    comfy.model_management.load_models_gpu([patcher])
    model = patcher.model.diffusion_model
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 128, 4, 8, generator=generator)
    features = model.llm_cond_proj.in_features
    context = torch.randn(1, 6, features, generator=generator)
    options = patcher.model_options["transformer_options"].copy()
    return model(x, torch.tensor([0.4]), context, mask, transformer_options=options)


def hooks(pack: str) -> dict:
    """Errors of the layouts' hooks under the host's version of comfy-kitchen, and that version."""
    import importlib.metadata

    import torch
    from comfy.quant_ops import QuantizedTensor

    generator = torch.Generator().manual_seed(0)
    weight, x = (
        torch.randn(40, 512, generator=generator),
        torch.randn(64, 1024, generator=generator),
    )
    gate, up = x.chunk(2, dim=-1)
    gated = torch.nn.functional.silu(gate) * up
    errors = {}
    for layout, options in (("Int8", {"rotation": 64}), ("GGUF", {"qtype": "Q4_K"})):
        packed = QuantizedTensor.from_float(weight, f"Ideogram4Quant{layout}", **options)
        got = packed.layout_cls.linear_input_act(packed, x, None, "swiglu")
        want = inside.load(pack, "ops.linear").linear(gated, packed)
        errors[layout] = inside.relative(got, want)
    return {"errors": errors, "version": importlib.metadata.version("comfy-kitchen")}


def host_backend(patcher) -> bool:
    """Whether a node of the host that comes after ours has the last word."""
    from comfy.ldm.modules.attention import attention_pytorch

    later = patcher.clone()
    later.set_model_optimized_attention(attention_pytorch)
    ours = patcher.model_options["transformer_options"][OVERRIDE]
    return later.model_options["transformer_options"][OVERRIDE] is not ours


if __name__ == "__main__":
    main()
