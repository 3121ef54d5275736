"""Models that do not fit, in the host: FILES (JSON: level -> copy -> file), FUSED (a level).

The flags ``--lowvram`` and ``--novram`` exclude ``--cpu``, and the host never offloads from a CPU.
So what they set is set while it loads, and its own partial loads are called with small budgets.
What is reported is whether latents are the very same as with everything loaded, and how many
modules were left behind.
"""

from __future__ import annotations

import json
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import inside

STATES = ("LOW_VRAM", "NO_VRAM")


def main() -> None:
    pack, (listing, fused) = inside.start()
    import torch

    files = json.loads(listing)
    found = {"flags": refused_flags()}
    with torch.inference_mode():
        for level, paths in files.items():
            found[level] = check(pack, paths, fused=False)
        found[f"{fused}, fused"] = check(pack, files[fused], fused=True)
    inside.report(found)


def refused_flags() -> dict[str, bool]:
    """Whether the host refuses each flag beside ``--cpu``."""
    import comfy.options

    root = Path(comfy.options.__file__).parents[1]
    parse = "import comfy.options; comfy.options.enable_args_parsing(); import comfy.cli_args"

    def refused(flag: str) -> bool:
        command = [sys.executable, "-c", parse, "--cpu", flag]
        done = subprocess.run(command, cwd=root, capture_output=True, text=True)
        return done.returncode == 2 and "not allowed with argument" in done.stderr

    return {flag: refused(flag) for flag in ("--lowvram", "--novram")}


def check(pack: str, paths: dict, fused: bool) -> dict:
    import comfy.model_management as management
    import torch

    copies = [load(pack, path, copy, fused) for copy, path in paths.items()]
    wanted = sample(pack, copies)
    found = {"by budget": by_budget(copies[0])}
    for state in STATES:
        management.unload_all_models()
        with short_of_memory(state):
            same = torch.equal(sample(pack, copies), wanted)
            found[state] = {"same": same, "left": [left_behind(patcher) for patcher in copies]}
    management.unload_all_models()
    return found


def load(pack: str, path: str, copy: str, fused: bool):
    loading = inside.load(pack, "nodes.model_loading")
    return loading.load_model(loading.ModelSource(Path(path), copy, fused=fused))


def sample(pack: str, copies: list, keep: str = "both"):
    """Three guided steps."""
    import comfy.samplers
    import torch

    generator = torch.Generator().manual_seed(5)
    noise = torch.randn(1, 128, 4, 8, generator=generator)
    features = torch.randn(1, 20, 832, generator=generator)
    guidance = inside.load(pack, "nodes.guidance").Guidance(None, (7.0, 7.0, 3.0))
    guider = inside.load(pack, "nodes.guider").DualCopyGuider(
        *copies, [[features, {}]], guidance, keep
    )
    euler = comfy.samplers.sampler_object("euler")
    sigmas = torch.tensor([1.0, 0.7, 0.3, 0.0])
    return guider.sample(noise, torch.zeros_like(noise), euler, sigmas, seed=0)


def by_budget(patcher) -> list[dict]:
    """The host's own partial unloads and loads of a loaded model: what is left, the same result."""
    import comfy.model_management as management
    import torch

    generator = torch.Generator().manual_seed(6)
    x = torch.randn(1, 128, 4, 8, generator=generator)
    context = torch.randn(1, 20, 832, generator=generator)

    def run():
        return patcher.model.diffusion_model(x, torch.tensor([0.6]), context=context)

    management.load_models_gpu([patcher])
    cpu, size, wanted, found = torch.device("cpu"), patcher.model_size(), run(), []
    for change in (
        lambda: patcher.partially_unload(cpu, size // 2),
        lambda: patcher.partially_unload(cpu, size),
        lambda: patcher.partially_load(cpu, size // 2),
        lambda: patcher.partially_load(cpu, 10 * size),
    ):
        change()
        found.append({"left": left_behind(patcher), "same": torch.equal(run(), wanted)})
    return found


def left_behind(patcher) -> int:
    """Modules whose weights come from where they are stored, each time they are used."""
    return sum(hasattr(module, "prev_comfy_cast_weights") for module in patcher.model.modules())


@contextmanager
def short_of_memory(state: str):
    """The host loads as on a full card."""
    import comfy.model_management as management

    load = management.load_models_gpu
    names = ("vram_state", "is_device_cpu", "get_free_memory", "load_models_gpu")
    before = {name: getattr(management, name) for name in names}
    on_a_full_card = {
        "vram_state": management.VRAMState[state],
        "is_device_cpu": lambda device: False,
        "get_free_memory": lambda *_, **__: 1 << 20,
    }

    def loading(*args, **kwargs):
        vars(management).update(on_a_full_card)
        try:
            load(*args, **kwargs)
        finally:
            vars(management).update({name: before[name] for name in on_a_full_card})

    management.load_models_gpu = loading
    try:
        yield
    finally:
        vars(management).update(before)


if __name__ == "__main__":
    main()
