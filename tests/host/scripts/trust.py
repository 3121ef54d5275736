"""Faults and long runs in the host: FILES (JSON: part -> path of the pocket model), LEVELS (JSON:
level -> conditional file), LORA (path)."""

from __future__ import annotations

import contextlib
import gc
import json
import socket
from pathlib import Path

import inside
from guider import World

CYCLES = 10


def main() -> None:
    pack, (listing, levels, lora) = inside.start()
    import torch

    files = {part: Path(path) for part, path in json.loads(listing).items()}
    with torch.inference_mode():
        world = World(pack, files)
        results = {
            "out of memory": out_of_memory(world),
            "alone": out_of_memory_alone(world),
            "with a LoRA": out_of_memory_with_a_lora(world, Path(lora)),
            "reuse": out_of_memory_while_reusing(world),
            "heun": out_of_memory_in_heun(world),
            "twice": out_of_memory_twice(world),
            "other errors": other_errors_pass(world),
            "cancelled": cancelled_in_a_step(world),
            "offline": offline(world, pack, files, Path(lora)),
            "cycles": load_and_unload(pack, json.loads(levels)),
        }
    inside.report(results)


def short(module, calls: set[int], make=None):
    """A hook that raises what a full device raises, in the given calls of a module."""
    import torch

    count = 0

    def hook(*_):
        nonlocal count
        count += 1
        if count in calls:
            raise make() if make else torch.OutOfMemoryError("CUDA out of memory. Tried to ...")

    return module.register_forward_pre_hook(hook)


@contextlib.contextmanager
def running_out(patcher, calls: set[int], make=None):
    """In the middle of a pass, in its third layer."""
    handle = short(patcher.model.diffusion_model.layers[2], calls, make)
    try:
        yield
    finally:
        handle.remove()


def used(world: World, **settings):
    """(latents, the guider) of a run."""
    guiders = []
    made = world.guider_class

    def remember(*arguments):
        guiders.append(made(*arguments))
        return guiders[-1]

    world.guider_class = remember
    try:
        return world.sample(**settings), guiders[0]
    finally:
        world.guider_class = made


def out_of_memory(world: World) -> dict:
    """Each residency, each copy, at the first and at a later step."""
    import torch

    wanted = world.sample()
    found = {}
    for keep in ("both", "alternating"):
        for copy in ("conditional", "unconditional"):
            for call in (1, 3):
                with running_out(getattr(world, copy), {call}):
                    latents, guider = used(world, keep=keep)
                found[f"{keep}, {copy}, pass {call}"] = [torch.equal(latents, wanted), guider.kept]
    found["after"] = torch.equal(world.sample(), wanted)
    return found


def out_of_memory_alone(world: World) -> list:
    """Without an unconditional copy."""
    import comfy.samplers
    import torch

    def run():
        guider = world.guider_class(
            world.conditional, None, world.positive, world.guidance(None, (7.0,))
        )
        noise = torch.randn(1, 128, 4, 8, generator=torch.Generator().manual_seed(4))
        sampler = comfy.samplers.sampler_object("euler")
        sigmas = torch.tensor([1.0, 0.5, 0.0])
        return guider.sample(noise, torch.zeros_like(noise), sampler, sigmas, seed=0), guider

    wanted, _ = run()
    with running_out(world.conditional, {2}):
        latents, guider = run()
    return [torch.equal(latents, wanted), guider.kept]


def with_lora(world: World, lora: Path):
    names = inside.load(world.pack, "checkpoint.loras")
    loading = inside.load(world.pack, "nodes.lora_loading")
    shapes = loading.linear_shapes(world.conditional)
    found = names.parse_lora(names.read_lora(lora), shapes, lora.name)
    return loading.add_lora(world.conditional, found.for_copy("conditional", "both"), 1.0)


def out_of_memory_with_a_lora(world: World, lora: Path) -> dict:
    """The side path is there after the models left the device and came back; then it is gone."""
    import torch

    plain, patched = world.sample(), with_lora(world, lora)
    wanted = world.sample(patched)
    found = {"acts": not torch.equal(plain, wanted)}
    for keep in ("both", "alternating"):
        with running_out(world.conditional, {2}):
            found[keep] = torch.equal(world.sample(patched, keep=keep), wanted)
    found["gone"] = torch.equal(world.sample(), plain)
    return found


def out_of_memory_while_reusing(world: World) -> bool:
    """The velocity that the next step reuses is that of the repeated pass."""
    import torch

    guidance = world.guidance(None, (7.0, 7.0, 7.0, 3.0), reuse=2)
    wanted = world.sample(guidance=guidance)
    with running_out(world.conditional, {2}):
        return torch.equal(world.sample(guidance=guidance), wanted)


def out_of_memory_in_heun(world: World) -> bool:
    """Between the two evaluations of a step of second order."""
    import torch

    wanted = world.sample(sampler="heun")
    with running_out(world.unconditional, {4}):
        return torch.equal(world.sample(sampler="heun"), wanted)


def out_of_memory_twice(world: World) -> dict:
    """The second time is an error that says what to change, and the host knows it for one."""
    import comfy.model_management as management
    import torch

    wanted, found = world.sample(), {}
    for keep, calls in (("both", {2, 3}), ("alternating", {2, 4}), ("streamed", {2})):
        try:
            with running_out(world.conditional, calls):
                world.sample(keep=keep)
        except Exception as error:
            found[keep] = [str(error), management.is_oom(error)]
    found["after"] = torch.equal(world.sample(), wanted)
    return found


def other_errors_pass(world: World) -> str:
    """What is no lack of memory is raised as it is, once."""
    try:
        with running_out(world.conditional, {2}, lambda: RuntimeError("shapes differ")):
            world.sample()
    except RuntimeError as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def cancelled_in_a_step(world: World) -> dict:
    """The host's cancel, seen inside a pass: nothing is left, and the next picture is the same."""
    import comfy.model_management as management
    import torch

    wanted = world.sample()
    try:
        with running_out(world.conditional, {3}, management.InterruptProcessingException):
            world.sample()
        raised = False
    except management.InterruptProcessingException:
        raised = True
    left = [p.model.current_patcher for p in (world.conditional, world.unconditional)]
    return {
        "raised": raised,
        "left": sum(patcher is not None for patcher in left),
        "same": torch.equal(world.sample(), wanted),
    }


def offline(world: World, pack: str, files: dict, lora: Path) -> dict:
    """Load, encode, sample with a LoRA and decode, where every socket is an error."""
    import comfy.model_management as management
    import torch

    wanted = world.sample(with_lora(world, lora))
    tried = []
    before = socket.socket, socket.getaddrinfo, socket.create_connection

    class Refused(socket.socket):
        def __init__(self, *arguments, **keywords):
            tried.append("socket")
            raise OSError("no network in this test")

    def refuse(*arguments, **keywords):
        tried.append(str(arguments))
        raise OSError("no network in this test")

    socket.socket, socket.getaddrinfo, socket.create_connection = Refused, refuse, refuse
    try:
        management.unload_all_models()
        fresh = World(pack, files)
        latents = fresh.sample(with_lora(fresh, lora))
        vae = inside.load(pack, "nodes.vae_loading").load_vae(files["vae"])
        picture = vae.decode(latents)
    finally:
        socket.socket, socket.getaddrinfo, socket.create_connection = before
    return {
        "tried": tried,
        "same": torch.equal(latents, wanted),
        "picture": list(picture.shape),
    }


def resident() -> int:
    """Bytes of this process in memory."""
    import psutil

    return psutil.Process().memory_info().rss


def load_and_unload(pack: str, levels: dict) -> list[int]:
    """Resident memory after each cycle of loading, running and unloading every level."""
    import comfy.model_management as management
    import torch

    loading = inside.load(pack, "nodes.model_loading")
    x, t = torch.zeros(1, 128, 8, 8), torch.tensor([0.7])
    found = []
    for _ in range(CYCLES + 2):
        for path in levels.values():
            patcher = loading.load_model(loading.ModelSource(Path(path), "conditional"))
            width = patcher.model.model_config.unet_config["llm_features_dim"]
            management.load_models_gpu([patcher])
            patcher.model.diffusion_model(x, t, context=torch.zeros(1, 9, width))
            del patcher
            management.unload_all_models()
            management.cleanup_models_gc()
        gc.collect()
        found.append(resident())
    return found


if __name__ == "__main__":
    main()
