"""The host's merging and saving nodes on our models: FILES (JSON: level -> both copies), ENCODER,
VAE.

A BF16 model merged into one of each level: relative errors of a weight against the sum of dense
values, and of outputs; the other way round; a CLIP and a whole checkpoint, saved and read again.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import inside
from lora import make_inputs, run


def main() -> None:
    pack, (files, encoder, vae) = inside.start()
    import folder_paths
    import torch

    out = Path(folder_paths.get_output_directory())
    found = {}
    with torch.inference_mode():
        inputs = make_inputs()
        pairs = {level: both(pack, paths) for level, paths in json.loads(files).items()}
        other = pairs["BF16"][1]
        for level, (first, second) in pairs.items():
            found[level] = merged((first, other), inputs)
            found[f"{level} second"] = attempt(lambda f=first, s=second: merged((f, s), inputs))
        clip = inside.load(pack, "nodes.encoder_loading").load_encoder(Path(encoder))
        loaded_vae = inside.load(pack, "nodes.vae_loading").load_vae(Path(vae))
        found["saved"] = saved(pack, clip, encoder, loaded_vae, pairs["Q4_K"][0], out, inputs)
    inside.report(found)


def both(pack: str, paths: list[str]):
    loading = inside.load(pack, "nodes.model_loading")
    names = ("conditional", "unconditional")
    return [
        loading.load_model(loading.ModelSource(Path(path), copy))
        for path, copy in zip(paths, names, strict=True)
    ]


def weight(patcher):
    found = patcher.model.diffusion_model.layers[0].attention.qkv.weight
    return found.dequantize().float() if hasattr(found, "dequantize") else found.float()


def merged(pair, inputs) -> dict:
    import comfy.model_management as management
    from comfy_extras.nodes_model_merging import ModelMergeSimple

    alone = [run(patcher, inputs) for patcher in pair]
    wanted = 0.25 * weight(pair[0]) + 0.75 * weight(pair[1])
    (mixed,) = ModelMergeSimple().merge(*pair, 0.25)
    output = run(mixed, inputs)
    result = {
        "error": inside.relative(weight(mixed), wanted),
        "apart": min(inside.relative(output, one) for one in alone),
        "finite": bool(output.isfinite().all()),
    }
    management.unload_all_models()
    mixed.unpatch_model()
    result["gone"] = inside.relative(run(pair[0], inputs), alone[0])
    return result


def saved(pack: str, clip, encoder: str, vae, model, out: Path, inputs) -> dict:
    from comfy_extras.nodes_model_merging import CheckpointSave, CLIPSave

    wanted = encoded(clip)
    result = {}
    CLIPSave().save(clip, "clip/alone")
    CheckpointSave().save(model, clip, vae, "whole/model")
    for folder in ("clip", "whole"):
        (path,) = (out / folder).glob("*.safetensors")
        result[f"{folder}, alone"] = attempt(lambda path=path: encoder_again(pack, path, wanted))
        shutil.copy(Path(encoder) / "tokenizer.json", path.parent)
        shutil.copy(Path(encoder) / "tokenizer_config.json", path.parent)
        result[folder] = attempt(lambda path=path: encoder_again(pack, path, wanted))
    result["model"] = attempt(lambda: model_again(pack, path, model, inputs))
    return result


def model_again(pack: str, path: Path, model, inputs) -> float:
    loading = inside.load(pack, "nodes.model_loading")
    again = loading.load_model(loading.ModelSource(path, "conditional"))
    return inside.relative(run(again, inputs), run(model, inputs))


def attempt(what):
    try:
        return what()
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def encoder_again(pack: str, path: Path, wanted) -> float:
    again = inside.load(pack, "nodes.encoder_loading").load_encoder(path)
    return inside.relative(encoded(again), wanted)


def encoded(clip):
    return clip.encode_from_tokens_scheduled(clip.tokenize('{"a": "b"}'))[0][0]


if __name__ == "__main__":
    main()
