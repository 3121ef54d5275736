"""A workflow of the pack on the pocket model: what runs in seconds on a CPU."""

from __future__ import annotations

import copy

from ideogram4_quant.pocket.data import HELD_OUT, PocketPrompt
from ideogram4_quant.pocket.paths import dit_path, encoder_dir, vae_dir

BY_LEVEL = "by level"
ENCODER = f"pocket/{encoder_dir().name}/model.safetensors"
VAE = f"pocket/{vae_dir().name}/diffusion_pytorch_model.safetensors"
COPIES = {
    "conditional_file": f"pocket/{dit_path('cond').name}",
    "unconditional_file": f"pocket/{dit_path('uncond').name}",
}
ONE_BRANCH = {"conditional_file": f"pocket/{dit_path('one_branch').name}"}


def set_values(node: dict, **values) -> None:
    """Widgets of a node in a workflow's file, by name."""
    names = list(node["widgets_values_named"])
    for name, value in values.items():
        node["widgets_values"][names.index(name)] = value
        node["widgets_values_named"][name] = value


def value(node: dict, name: str):
    return node["widgets_values_named"][name]


def pocket_variant(
    workflow: dict,
    prompt: PocketPrompt = HELD_OUT[0],
    *,
    lora: str | None = None,
    seed: int = 1,
    **sampler,
) -> dict:
    """The workflow with the pocket model's files, caption and size; levels of their own stay."""
    changed = copy.deepcopy(workflow)
    for node in changed["nodes"]:
        kind = node["type"]
        if kind == "Ideogram4QuantLoad":
            files = ONE_BRANCH if value(node, "branches") == "one" else COPIES
            named = {n for n in files if value(node, n) != BY_LEVEL} or files
            if value(node, "level") == "auto":
                set_values(node, **{name: files[name] for name in named if name in files})
        elif kind == "Ideogram4QuantLoadEncoder":
            set_values(node, encoder=ENCODER)
        elif kind in ("VAELoader", "Ideogram4QuantLoadVAE"):
            node |= {"type": "Ideogram4QuantLoadVAE", "widgets_values": [VAE]}
            node["widgets_values_named"] = {"vae": VAE}
            node["inputs"][0] |= {"name": "vae", "widget": {"name": "vae"}}
            node["outputs"][0] |= {"name": "vae", "localized_name": "vae"}
        elif kind == "Ideogram4QuantLoadLora" and lora is not None:
            set_values(node, lora=lora)
        elif kind == "Ideogram4QuantCaption":
            set_values(node, text=prompt.caption, aspect_ratio="2:1", size="pocket")
        elif kind == "PrimitiveInt":
            set_values(node, value=seed)
        elif kind == "Ideogram4QuantSampler":
            set_values(node, seed=seed, control_after_generate="fixed", **sampler)
        node["properties"].pop("models", None)
    return changed
