"""torch.compile in the host: FILES (JSON: level -> conditional file), MODE.

``blocks``: a block of every level as one graph, fused and unfused, and the whole model of one.
``breaks``: where the host's own attention for CPUs breaks a graph. ``node``: the host's
TorchCompileModel node, inductor and all, through the guider.
"""

from __future__ import annotations

import json

import inside
from fused import load
from lora import make_inputs

WHOLE = "INT8 W8A8 rotated"


def main() -> None:
    flags = [] if "breaks" in inside.sys.argv else ["--use-pytorch-cross-attention"]
    pack, (files, mode) = inside.start(*flags)
    inside.report(MODES[mode](pack, json.loads(files)))


def blocks(pack: str, files: dict) -> dict:
    import torch

    found = {}
    with torch.no_grad():
        for level, path in files.items():
            for fused in (False, True):
                model = diffusion_model(pack, path, fused)
                key = f"{level}, {'fused' if fused else 'unfused'}"
                found[key] = one_graph(model.layers[0], *block_inputs(model))
                if fused and level == WHOLE:
                    x, t, context = make_inputs()
                    found["whole model"] = one_graph(model, x, t, context=context)
    return found


def breaks(pack: str, files: dict) -> dict:
    """Files, beside torch's own, in which a graph of the whole model breaks; and how many do."""
    import torch

    with torch.no_grad():
        model = diffusion_model(pack, files[WHOLE], fused=True)
        x, t, context = make_inputs()
        torch._dynamo.reset()
        found = torch._dynamo.explain(model)(x, t, context=context)
    stacks = [[frame.filename for frame in r.user_stack] for r in found.break_reasons]
    return {"count": found.graph_break_count, "innermost": sorted({s[-1] for s in stacks})}


def node(pack: str, files: dict) -> dict:
    import torch
    from comfy_extras.nodes_torch_compile import TorchCompileModel

    found = {}
    for fused in (False, True):
        with torch.inference_mode():  # as the server runs nodes
            patcher = load(pack, files[WHOLE], fused)
            compiled = TorchCompileModel.execute(patcher, "inductor").result[0]
            eager = sample(pack, patcher)
            torch._dynamo.reset()
            torch._dynamo.utils.counters.clear()
            latents = sample(pack, compiled)
        counters = torch._dynamo.utils.counters
        found["fused" if fused else "unfused"] = {
            "error": inside.relative(latents, eager),
            "frames": counters["frames"]["ok"],
            "breaks": list(counters["graph_break"]),
        }
    return found


MODES = {"blocks": blocks, "breaks": breaks, "node": node}


def diffusion_model(pack: str, path: str, fused: bool):
    import comfy.model_management as management

    patcher = load(pack, path, fused)
    management.load_models_gpu([patcher])
    return patcher.model.diffusion_model


def block_inputs(model) -> tuple:
    """Of one block: x, no mask, the rotary matrices of 70 tokens, the condition."""
    import torch
    from comfy.ldm.ideogram4 import model as host

    generator = torch.Generator().manual_seed(3)
    positions = torch.arange(70)[:, None].expand(70, 3).transpose(0, 1)
    freqs = host.precompute_freqs_cis(
        model.head_dim,
        positions,
        model.rope_theta,
        rope_dims=model.mrope_section,
        interleaved_mrope=True,
        device="cpu",
    )
    width = model.input_proj.out_features
    x = torch.randn(1, 70, width, generator=generator)
    condition = torch.randn(1, 1, model.adaln_proj.out_features, generator=generator)
    return x, None, host._split_half_rope_matrix(freqs), condition


def one_graph(module, *args, **kwargs) -> float:
    """Relative difference of the compiled result; raises where the graph breaks."""
    import torch

    wanted = module(*args, **kwargs)
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    return inside.relative(compiled(*args, **kwargs), wanted)


def sample(pack: str, patcher):
    """Two steps of the conditional copy alone."""
    import comfy.samplers
    import torch

    guidance = inside.load(pack, "nodes.sampling_inputs").make_guidance("default")
    noise, _, context = make_inputs()
    guider_class = inside.load(pack, "nodes.guider").DualCopyGuider
    guider = guider_class(patcher, None, [[context, {}]], guidance)
    euler = comfy.samplers.sampler_object("euler")
    sigmas = torch.tensor([1.0, 0.6, 0.0])
    return guider.sample(noise, torch.zeros_like(noise), euler, sigmas, seed=0)


if __name__ == "__main__":
    main()
