"""Calibration on the host's models: FILES (JSON: part -> path of the pocket model), OUT."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import inside
from parity import load_copy


def main() -> None:
    pack, (listing,) = inside.start()
    import comfy.hooks
    import torch

    files = {part: Path(path) for part, path in json.loads(listing).items()}
    node = inside.load(pack, "nodes.node_calibrate").Calibrate
    with torch.inference_mode():
        models = {copy: load_copy(pack, files, copy) for copy in ("conditional", "unconditional")}
        clip = inside.load(pack, "nodes.encoder_loading").load_encoder(files["encoder"])
        size = {"preset": "turbo", "steps": 3, "width": 128, "height": 64}

        def run(text: str, seed: int, hooks=None, **more):
            positive = clip.encode_from_tokens_scheduled(clip.tokenize(text))
            positive = comfy.hooks.set_hooks_for_conditioning(positive, hooks)
            settings = {"pictures": 1, "filename_prefix": "cal/pocket", **size, **models, **more}
            return node.execute(positive=positive, seed=seed, **settings).result

        before = hooks(models)
        first, path, report = run(files_text(files), 7)
        merged, second, _ = run("a red word", 8, earlier=first)
        usual = {"pictures": 1, "filename_prefix": "cal/usual", **size, **models, "seed": 7}
        _, shipped_path, _ = node.execute(clip=clip, captions=2, **usual).result
        try:
            node.execute(**usual)
        except inside.load(pack, "errors").OpError as error:
            nothing = str(error)
        results = {
            "paths": [path, second],
            "report": report,
            "runs": len(merged.provenance),
            "shipped_path": str(shipped_path),
            "nothing": nothing,
            "hooks": hooks(models) - before,
            "refused": refused(pack, models, run),
        }
    inside.report(results)


def hooks(models: dict) -> int:
    return sum(inside.hooks(patcher.model, "_forward_pre_hooks") for patcher in models.values())


def files_text(files: dict) -> str:
    return Path(files["caption"]).read_text(encoding="utf-8")


def refused(pack: str, models: dict, run) -> dict[str, str]:
    """What a run says where a copy is changed, by every way to change it."""
    import comfy.hooks

    tries = {
        f"{copy}, {way}": {copy: change(pack, models[copy])}
        for copy, (way, change) in itertools.product(models, WAYS.items())
    }
    state = host_lora(models["conditional"])
    tries["caption"] = {"hooks": comfy.hooks.create_hook_lora(state, 1.0, 0.0)}
    found = {}
    for name, changed in tries.items():
        try:
            run("a red word", 9, **changed)
            found[name] = "ran"
        except inside.load(pack, "errors").OpError as error:
            found[name] = str(error)
    return found


def lora(patcher) -> dict:
    """A LoRA on one linear, by its canonical name."""
    import torch

    linear = patcher.model.diffusion_model.layers[0].attention.o
    return {
        "layers.0.attention.o.lora_A.weight": torch.ones(2, linear.in_features),
        "layers.0.attention.o.lora_B.weight": torch.ones(linear.out_features, 2),
    }


def host_lora(patcher) -> dict:
    """The same by the host's name."""
    return {f"diffusion_model.{name}": tensor for name, tensor in lora(patcher).items()}


def side_path(pack: str, patcher):
    """As Load LoRA for Ideogram 4 does."""
    loading = inside.load(pack, "nodes.lora_loading")
    names = inside.load(pack, "checkpoint.loras")
    updates = names.parse_lora(lora(patcher), loading.linear_shapes(patcher), "lora").updates[None]
    return loading.add_lora(patcher, updates, 1.0)


def patched(pack: str, patcher):
    """As the host's Load LoRA does."""
    import comfy.sd

    state = host_lora(patcher)
    return comfy.sd.load_lora_for_models(patcher, None, state, 1.0, 0.0)[0]


def bypassed(pack: str, patcher):
    """As the host's Load LoRA (Bypass) does."""
    import comfy.sd

    state = host_lora(patcher)
    return comfy.sd.load_bypass_lora_for_models(patcher, None, state, 1.0, 0.0)[0]


WAYS = {"side path": side_path, "patched": patched, "bypassed": bypassed}


main()
