"""Calibration on the host's models: FILES (JSON: part -> path of the pocket model), OUT."""

from __future__ import annotations

import json
from pathlib import Path

import inside
from parity import load_copy


def main() -> None:
    pack, (listing,) = inside.start()
    import torch

    files = {part: Path(path) for part, path in json.loads(listing).items()}
    node = inside.load(pack, "nodes.node_calibrate").Calibrate
    with torch.inference_mode():
        models = {copy: load_copy(pack, files, copy) for copy in ("conditional", "unconditional")}
        clip = inside.load(pack, "nodes.encoder_loading").load_encoder(files["encoder"])
        size = {"preset": "turbo", "steps": 3, "width": 128, "height": 64}

        def run(text: str, seed: int, **more):
            positive = clip.encode_from_tokens_scheduled(clip.tokenize(text))
            done = node.execute(
                positive=positive, seed=seed, pictures=1, filename_prefix="cal/pocket",
                **models, **size, **more,
            )  # fmt: skip
            return done.result

        first, path, report = run(files_text(files), 7)
        merged, second, _ = run("a red word", 8, earlier=first)
        modules = [
            module
            for patcher in models.values()
            for module in patcher.model.diffusion_model.modules()
        ]
        results = {
            "paths": [path, second],
            "report": report,
            "runs": len(merged.provenance),
            "hooks": sum(len(module._forward_pre_hooks) for module in modules),
            "patched": refused(pack, models, run),
        }
    inside.report(results)


def files_text(files: dict) -> str:
    return Path(files["caption"]).read_text(encoding="utf-8")


def refused(pack: str, models: dict, run) -> str:
    """What a run on a model with patched weights says."""
    import torch

    healthy = models["conditional"]
    models["conditional"] = healthy.clone()
    key = "diffusion_model.layers.0.attention.o.weight"
    weight = healthy.model.diffusion_model.layers[0].attention.o.weight
    models["conditional"].add_patches({key: ("diff", (torch.zeros(tuple(weight.shape)),))})
    try:
        run("a red word", 9)
    except inside.load(pack, "ops.errors").OpError as error:
        return str(error)
    return "ran"


main()
