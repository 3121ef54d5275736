"""The fused blocks in the host: FILES (JSON: level -> conditional file), LORAS (folder).

Fused against unfused at every level, alone and with what else may act on a model: patches, LoRAs,
hooks, replaced forwards, partial loads, weights that arrive dense, clones. What comes back is
relative errors against the same thing unfused, and how often the fused quantizers ran.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import inside
from lora import make_inputs, run, stock
from memory import run_partially


def main() -> None:
    pack, (files, loras) = inside.start()
    import torch

    with torch.inference_mode():
        inputs = make_inputs()
        found = {
            level: check(pack, path, loras, inputs) for level, path in json.loads(files).items()
        }
        found["server's own"] = others(pack, json.loads(files)["INT8 W8A8 rotated"], inputs)
    inside.report(found)


def load(pack: str, path: str, fused: bool):
    loading = inside.load(pack, "nodes.model_loading")
    # GGUF through int8 whatever this machine measures as faster
    options = inside.load(pack, "ops.linear").LinearOptions(gguf_compute="w8a8")
    source = loading.ModelSource(Path(path), "conditional", options=options, fused=fused)
    return loading.load_model(source)


def check(pack: str, path: str, loras: str, inputs) -> dict:
    import comfy.model_management as management
    import torch

    plain, fused = (load(pack, path, on) for on in (False, True))
    wanted = run(plain, inputs)
    counted = Counter(pack)
    out = run(fused, inputs)
    without = fused.clone()
    without.remove_injections(inside.load(pack, "nodes.fused_blocks").KEY)
    found = {
        "plain": inside.relative(out, wanted),
        "quantizers": counted.take(),
        "removed": torch.equal(run(without, inputs), wanted),
        "forwards left": count_foreign(without),
        "again": torch.equal(run(fused, inputs), out),
    }
    with rope_kernel(pack) as errors:
        found["rope"] = inside.relative(run(fused, inputs), wanted)
        found["rope, each"] = errors
    with kitchen_norms(pack) as made, exact_norms(pack) as errors:
        if made is not None:
            found["kitchen"] = inside.relative(run(fused, inputs), wanted)
            found["kitchen, norms"] = made.count("rms_norm")
            found["kitchen, each"] = list(errors)
            changed = [run(side_path(pack, model, loras), inputs) for model in (plain, fused)]
            found["kitchen, side path"] = inside.relative(*reversed(changed))
    changes = {
        "patches": lambda model: stock(model, loras, "fused.safetensors", 1.0),
        "side path": lambda model: side_path(pack, model, loras),
        "bypass": lambda model: bypass(model, loras),
    }
    untouched = wanted
    for name, change in changes.items():
        wanted = run(change(plain), inputs)
        found[f"{name}, effect"] = inside.relative(wanted, untouched)
        counted.take()
        found[name] = inside.relative(run(change(fused), inputs), wanted)
        found[f"{name}, quantizers"] = counted.take()
    partly = [run_partially(changes["patches"](model), inputs) for model in (plain, fused)]
    found["partial"] = inside.relative(partly[1], partly[0])
    management.unload_all_models()
    copy = fused.clone(disable_dynamic=True, force_deepcopy=True)
    own = copy.model.diffusion_model.layers[0]
    found["copy"] = torch.equal(run(copy, inputs), out)
    found["follows"] = own.forward.block is own
    counted.close()
    return found


@contextmanager
def compared(module, name: str, exact: Callable[..., tuple]) -> Iterator[list[float]]:
    """Relative errors of each call of ``module.name`` against ``exact`` of the same arguments."""
    own, errors = getattr(module, name), []

    def comparing(*args, **kwargs):
        found = own(*args, **kwargs)
        results = found if isinstance(found, tuple) else (found,)
        pairs = zip(results, exact(*args, **kwargs), strict=True)
        errors.append(max(inside.relative(*pair) for pair in pairs))
        return found

    setattr(module, name, comparing)
    try:
        yield errors
    finally:
        setattr(module, name, own)


def normed(x, weight, eps: float):
    """RMSNorm over the last dimension in double precision."""
    import torch

    x = x.double()
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight.double()


@contextmanager
def rope_kernel(pack: str) -> Iterator[list[float]]:
    """q/k norms and rotary embedding as on a device where the pack's kernel is the faster one.

    Yields the errors of its calls against double precision on the host's own table.
    """
    import torch

    def turned(x, table, weight, eps):
        low, high = normed(x, weight, eps).chunk(2, -1)
        table = table.double()
        rows = (table[..., i, 0] * low + table[..., i, 1] * high for i in (0, 1))
        return torch.cat(tuple(rows), -1)

    def exact(q, k, freqs_cis, q_scale, k_scale=None, epsilon=1e-6, rot_dim=0):
        scales = (q_scale, q_scale if k_scale is None else k_scale)
        pairs = zip((q, k), scales, strict=True)
        return tuple(turned(x, freqs_cis, scale, epsilon) for x, scale in pairs)

    module = inside.load(pack, "ops.kitchen_rope")
    pays, module.pays = module.pays, lambda *_: True
    try:
        with compared(module, "rms_rope_split_half", exact) as errors:
            yield errors
    finally:
        module.pays = pays


def exact_norms(pack: str) -> AbstractContextManager[list[float]]:
    """Errors of linears that make their norm, against the norm in double precision before them."""
    reference = inside.load(pack, "ops.reference")

    def exact(x, norm_weight, scale, eps, weight, weight_scale, bias, rotation, backend):
        y = (normed(x, norm_weight, eps) * scale.double()).float()
        return (
            reference.int8_linear(y, weight, weight_scale.reshape(-1), bias, rotation=rotation),
        )

    return compared(inside.load(pack, "ops.prequantized"), "normed_linear", exact)


@contextmanager
def kitchen_norms(pack: str) -> Iterator[list | None]:
    """As on a card without Triton: comfy-kitchen's eager backend in the place of its CUDA one.

    None where the host's comfy-kitchen makes no norms.
    """
    from comfy_kitchen.registry import registry

    names = ("adapters", "dispatch", "fused")
    adapters, dispatch, fused = (inside.load(pack, f"ops.{name}") for name in names)
    makes_norms = fused._makes_norms
    choices, cpu = inside.load(pack, "ops.tuning.choices"), "cpu"
    measured = choices.table(cpu)
    own = adapters.kitchen_backend, dispatch._PROBES, dispatch._ORDER, registry.get_implementation
    made: list = []

    def watching(name, backend=None, kwargs=None):
        if name == "int8_linear" and kwargs:
            made.append(kwargs.get("input_act"))
        return own[3](name, backend, kwargs)

    adapters.kitchen_backend = lambda: "eager"
    backend = dispatch.Backend("comfy_kitchen", adapters.kitchen_ops())
    dispatch._PROBES = {**own[1], "comfy_kitchen": lambda device: (backend, "eager")}
    dispatch._ORDER = {"cpu": ("comfy_kitchen", "int_mm")}
    registry.get_implementation = watching
    # the pocket's rows are too short for groups of 256, which CUDA's quantizer wants
    fused._makes_norms = lambda *args: args[4] is not None
    choices.remember(cpu, choices.Table())  # at load it was not there
    try:
        yield made if backend.fuses else None
    finally:
        adapters.kitchen_backend, dispatch._PROBES, dispatch._ORDER = own[:3]
        fused._makes_norms = makes_norms
        choices.remember(cpu, measured)
        del registry.get_implementation


def others(pack: str, path: str, inputs) -> dict:
    """Hooks, replaced forwards and modules, weights that arrive dense, a poisoned model option."""
    plain, fused = (load(pack, path, on) for on in (False, True))
    blocks = inside.load(pack, "nodes.fused_blocks")
    counted = Counter(pack)
    found = {}
    for name, change in CHANGES.items():
        outputs = []
        for model in (plain, fused):
            untouched = run(model, inputs)
            undo = change(model.model.diffusion_model.layers)
            counted.take()
            outputs.append(run(model, inputs))
            if model is fused:
                quantizers = counted.take()
                model.pre_run()
                status = blocks.status(model)
            undo()
        found[name] = {
            "error": inside.relative(outputs[1], outputs[0]),
            "effect": inside.relative(outputs[1], untouched),
            "quantizers": quantizers,
            "status": status,
        }
    counted.close()
    return found


def hook(name: str) -> Callable:
    """A forward hook that turns the output around, and insists on tensors."""

    def change(layers):
        def flip(module, args, output):
            args[0].mul(1.0)
            return output.flip(-1)

        handle = layers[0].get_submodule(name).register_forward_hook(flip)
        return handle.remove

    return change


def global_hook(layers):
    import torch

    def look(module, args):
        if "Linear" in type(module).__name__:
            args[0].mul(1.0)

    return torch.nn.modules.module.register_module_forward_pre_hook(look).remove


def replaced(name: str) -> Callable:
    """Another forward on one module, as a bypass or an object patch of another node sets it."""

    def change(layers):
        module = layers[0].get_submodule(name)
        own = module.forward
        module.forward = lambda x, *args, **kwargs: own(x.flip(-1), *args, **kwargs)

        def undo():
            module.forward = own

        return undo

    return change


def dense_weight(layers):
    """The host's cast API gives a plain weight, as it does where a patch is applied on the fly."""
    module = layers[0].feed_forward.w1
    module.weight_function = [lambda weight: weight.flip(0)]

    def undo():
        module.weight_function = []

    return undo


def training(layers):
    import comfy.model_management as management

    management.in_training = True

    def undo():
        management.in_training = False

    return undo


CHANGES = {
    "nothing": lambda layers: lambda: None,
    "hook on w1": hook("feed_forward.w1"),
    "hook on qkv": hook("attention.qkv"),
    "hook on o": hook("attention.o"),
    "hook on attention": hook("attention"),
    "hook on a norm": hook("ffn_norm1"),
    "hook on the feed-forward": hook("feed_forward"),
    "hook on everything": global_hook,
    "another forward of w2": replaced("feed_forward.w2"),
    "another forward of attention": replaced("attention"),
    "another forward of a norm": replaced("attention_norm2"),
    "dense weight": dense_weight,
    "training": training,
}


def side_path(pack: str, model, loras: str):
    import safetensors.torch

    names, ours = (inside.load(pack, name) for name in ("checkpoint.loras", "nodes.lora_loading"))
    state = safetensors.torch.load_file(Path(loras) / "fused.safetensors")
    found = names.parse_lora(state, ours.linear_shapes(model), "fused.safetensors")
    return ours.add_lora(model, found.for_copy("conditional", "as in the file"), 1.0)


def bypass(model, loras: str):
    import comfy.sd
    import comfy.utils

    state = comfy.utils.load_torch_file(str(Path(loras) / "fused.safetensors"))
    return comfy.sd.load_bypass_lora_for_models(model, None, state, 1.0, 0.0)[0]


def count_foreign(patcher) -> int:
    """Modules whose forward is not that of their class."""
    modules = patcher.model.diffusion_model.modules()
    return sum(getattr(m.forward, "__func__", None) is not type(m).forward for m in modules)


class Counter:
    """Counts calls of the fused quantizers: norms of qkv and of w1 and w3, SwiGLU of w2."""

    def __init__(self, pack: str):
        self._module = inside.load(pack, "ops.prequantized")
        self._own = {name: getattr(self._module, name) for name in ("normed_rows", "gated_rows")}
        self._count = 0
        for name, function in self._own.items():
            setattr(self._module, name, self._counting(function))

    def _counting(self, function: Callable) -> Callable:
        def counting(*args):
            self._count += 1
            return function(*args)

        return counting

    def take(self) -> int:
        count, self._count = self._count, 0
        return count

    def close(self) -> None:
        for name, function in self._own.items():
            setattr(self._module, name, function)


if __name__ == "__main__":
    main()
