"""Weights that are fetched ahead, in the host: FILES (JSON: level -> copy -> file), LORA (a file).

A CPU has no streams and no memory of its own, so what the host left behind for want of memory (see
lowvram.py) counts as elsewhere, and `HostLane` writes the order of events down. Reported: whether
latents are the very same, that order for each copy, and what mapped files do.
"""

from __future__ import annotations

import json
import os
import shutil
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import inside
import lowvram


def main() -> None:
    pack, (listing, lora) = inside.start()
    import torch

    files = json.loads(listing)
    first = next(iter(files.values()))
    with torch.inference_mode():
        found = {
            f"{level}{', fused' * fused}{', LoRA' * bool(extra)}": check(pack, paths, fused, extra)
            for level, paths in files.items()
            for fused, extra in ((False, None), (True, None), (True, lora))
        }
        found["queue"] = {str(fused): queue(pack, first, fused) for fused in (False, True)}
        found["casts"] = {str(fused): casts(pack, first, fused) for fused in (False, True)}
        found["slices"] = slices(pack, first["conditional"])
        found["cut"] = cut(pack, first["conditional"])
        found["room"] = no_room(pack, first)
        found["oom"] = out_of_memory(pack, first)
    inside.report(found)


def copies_of(pack: str, paths: dict, fused: bool, lora: str | None = None) -> list:
    import comfy.sd
    import comfy.utils

    copies = [lowvram.load(pack, path, copy, fused) for copy, path in paths.items()]
    if lora is None:
        return copies
    state = comfy.utils.load_torch_file(lora)
    return [comfy.sd.load_lora_for_models(copy, None, state, 0.8, 0)[0] for copy in copies]


@contextmanager
def streamed(pack: str):
    """The lanes that were made within."""
    streaming = inside.load(pack, "nodes.streaming")
    lanes_of = inside.load(pack, "ops.lanes")
    lanes, before = [], {n: getattr(streaming, n) for n in ("lane_for", "is_away", "WeightStream")}

    def lane_for(device):
        lanes.append(lanes_of.HostLane())
        return lanes[-1]

    streaming.lane_for = lane_for
    streaming.is_away = lambda device, module, stored: hasattr(module, "prev_comfy_cast_weights")
    streaming.WeightStream = partial(before["WeightStream"], executor=lanes_of.Inline())
    try:
        yield lanes
    finally:
        vars(streaming).update(before)


def check(pack: str, paths: dict, fused: bool, lora: str | None) -> dict:
    import comfy.model_management as management
    import torch

    copies, plain = copies_of(pack, paths, fused, lora), copies_of(pack, paths, fused)
    wanted = {}
    for state in lowvram.STATES:
        management.unload_all_models()
        with lowvram.short_of_memory(state):
            wanted[state] = lowvram.sample(pack, copies)
    found = {"changed": not torch.equal(wanted["NO_VRAM"], lowvram.sample(pack, plain))}
    for state in lowvram.STATES:
        management.unload_all_models()
        with lowvram.short_of_memory(state), streamed(pack) as lanes:
            same = torch.equal(lowvram.sample(pack, copies), wanted[state])
            ahead = [vars(c.model)["ideogram4_quant_streaming"] for c in copies]
            found[state] = {
                "same": same,
                "blocks": len(copies[0].model.diffusion_model.layers),
                "events": [lane.events for lane in lanes],
                "left": [a._stream is not None for a in ahead],
            }
    management.unload_all_models()
    return found


def queue(pack: str, paths: dict, fused: bool) -> list:
    """What the host's own queue is asked for, and when blocks run, in one forward."""
    import comfy.model_management as management
    import comfy.model_prefetch as host
    import torch

    streaming = inside.load(pack, "nodes.streaming")
    patcher = copies_of(pack, paths, fused)[0]
    management.load_models_gpu([patcher])
    model = patcher.model.diffusion_model
    names = {id(block): index for index, block in enumerate(model.layers)}
    events = []

    class Queue:
        make_prefetch_queue = staticmethod(lambda blocks, device, options: [None, *blocks, None])

        @staticmethod
        def prefetch_queue_pop(queue, device, block):
            events.append(["pop", names.get(id(block))])
            host.prefetch_queue_pop(queue, device, block)

    hooks = [
        block.attention.register_forward_pre_hook(
            lambda m, args, i=i: events.append(["attention", i])
        )
        for i, block in enumerate(model.layers)
    ]
    before, streaming.prefetch = streaming.prefetch, Queue
    try:
        x = torch.randn(1, 128, 4, 8, generator=torch.Generator().manual_seed(6))
        model(x, torch.tensor([0.6]), transformer_options={"prefetch_dynamic_vbars": True})
    finally:
        streaming.prefetch = before
        for hook in hooks:
            hook.remove()
    return events


def casts(pack: str, paths: dict, fused: bool) -> list[str]:
    """The linears of one block, in the order in which the host is asked for their weights."""
    import comfy.model_management as management
    import comfy.ops
    import torch

    patcher = copies_of(pack, paths, fused)[0]
    management.load_models_gpu([patcher])
    model = patcher.model.diffusion_model
    names = {id(m): name for name, m in model.layers[1].named_modules()}
    asked, cast = [], comfy.ops.cast_bias_weight

    def noted(module, *args, **kwargs):
        if id(module) in names:
            asked.append(names[id(module)].rpartition(".")[2])
        return cast(module, *args, **kwargs)

    comfy.ops.cast_bias_weight = noted
    try:
        with lowvram.short_of_memory("NO_VRAM"):
            management.unload_all_models()
            management.load_models_gpu([patcher])
        x = torch.randn(1, 128, 4, 8, generator=torch.Generator().manual_seed(6))
        model(x, torch.tensor([0.6]))
    finally:
        comfy.ops.cast_bias_weight = cast
    return asked


def slices(pack: str, path: str) -> dict:
    """What the host reads from the file in place of a weight: (read, the same) of each kind."""
    import comfy.memory_management as memory
    import torch

    model = lowvram.load(pack, path, "conditional", False).model.diffusion_model
    found = {}
    for name in ("layers.0.attention.qkv.weight", "layers.0.adaln_modulation.weight"):
        weight = model.get_parameter(name)
        out = torch.zeros_like(weight) if not hasattr(weight, "_qdata") else weight.clone()
        if hasattr(out, "_qdata"):
            out._qdata.zero_()
        found[name] = [memory.read_tensor_file_slice_into(weight, out), torch.equal(out, weight)]
    return found


def cut(pack: str, path: str) -> dict:
    """A file that is cut after it was loaded: the error; and with copies, that nothing happens."""
    import comfy.model_management as management
    import comfy.utils

    found = {}
    for copies in (False, True):
        comfy.utils.DISABLE_MMAP = copies
        mine = Path(path).with_name(f"cut_{copies}_conditional.safetensors")
        shutil.copy(path, mine)
        patcher = lowvram.load(pack, str(mine), "conditional", True)
        management.load_models_gpu([patcher])
        run(patcher)
        os.truncate(mine, 5000)
        try:
            run(patcher)
            found[str(copies)] = None
        except Exception as error:
            found[str(copies)] = str(error)
        management.unload_all_models()
    comfy.utils.DISABLE_MMAP = False
    return found


def run(patcher):
    import torch

    x = torch.randn(1, 128, 4, 8, generator=torch.Generator().manual_seed(6))
    return patcher.model.diffusion_model(x, torch.tensor([0.6]))


def no_room(pack: str, paths: dict) -> dict:
    """A device without room for the slots: the same latents, and how often that was said."""
    import logging

    import comfy.model_management as management
    import torch

    copies = copies_of(pack, paths, True)
    said = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    logger = logging.getLogger(f"{pack}.nodes.streaming")
    logger.addHandler(handler)
    management.unload_all_models()
    with lowvram.short_of_memory("NO_VRAM"):
        wanted = lowvram.sample(pack, copies)
        management.unload_all_models()
        with streamed(pack):
            streaming = inside.load(pack, "nodes.streaming")

            def refuse(*args, **kwargs):
                raise torch.OutOfMemoryError

            streaming.WeightStream = refuse
            same = torch.equal(lowvram.sample(pack, copies), wanted)
    logger.removeHandler(handler)
    return {"same": same, "said": [line for line in said if "no room" in line]}


def out_of_memory(pack: str, paths: dict) -> dict:
    """A block that runs out of memory once: the latents of the second try, and what was said."""
    import logging

    import comfy.model_management as management
    import torch

    copies = copies_of(pack, paths, True)
    said, raised = [], []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    logger = logging.getLogger(f"{pack}.nodes.streaming")

    def fail(module, args):
        if not raised:
            raised.append(True)
            raise torch.OutOfMemoryError("planted")

    management.unload_all_models()
    with lowvram.short_of_memory("NO_VRAM"):
        wanted = lowvram.sample(pack, copies)
        management.unload_all_models()
        logger.addHandler(handler)
        block = copies[1].model.diffusion_model.layers[1]
        hook = block.attention.o.register_forward_pre_hook(fail)
        with streamed(pack):
            found = lowvram.sample(pack, copies)
        hook.remove()
        logger.removeHandler(handler)
    ahead = vars(copies[1].model)["ideogram4_quant_streaming"]
    return {
        "raised": len(raised),
        "same": torch.equal(found, wanted),
        "said": [line for line in said if "out of device memory" in line],
        "off": ahead.off,
    }


if __name__ == "__main__":
    main()
