"""What the guider does to the host's machinery: FILES (JSON: part -> path of the pocket model)."""

from __future__ import annotations

import json
from pathlib import Path

import inside
from parity import load_copy


def main() -> None:
    pack, (listing,) = inside.start()
    import torch

    files = {part: Path(path) for part, path in json.loads(listing).items()}
    with torch.inference_mode():
        world = World(pack, files)
        results = {
            "one request": loads(world),
            "order": order_of_passes(world),
            "turns": in_turns(world),
            "streamed": streamed(world),
            "progress": progress_and_previews(world),
            "refused": refused(world),
            "stock models": stock_models(world, files),
            "patch stays": patch_on_one_copy_stays_there(world),
            "wrapper of the other": wrapper_on_the_unconditional_copy_runs(world),
            "no mask": different_lengths_build_no_mask(world),
            "cfg override": cfg_override_has_its_way(world),
            "marked": unconditional_pass_is_marked(world),
            "clean after failure": clean_after_failure(world),
            "post cfg": post_cfg_hooks_run(world),
            "pre cfg": pre_cfg_functions_run(world),
            "batch": batch_functions_run(world),
            "one copy": functions_run_without_a_second_copy(world),
            "second order": second_order_sampler_follows_the_schedule(world),
        }
    inside.report(results)


class World:
    """The pocket model in the host, and a short run of it."""

    def __init__(self, pack: str, files: dict):
        self.pack = pack
        self.conditional = load_copy(pack, files, "conditional")
        self.unconditional = load_copy(pack, files, "unconditional")
        self.clip = inside.load(pack, "nodes.encoder_loading").load_encoder(files["encoder"])
        self.positive = self.encode("a red word")
        self.guidance = inside.load(pack, "nodes.guidance").Guidance
        self.guider_class = inside.load(pack, "nodes.guider").DualCopyGuider

    def encode(self, text: str) -> list:
        return self.clip.encode_from_tokens_scheduled(self.clip.tokenize(text))

    def sample(self, conditional=None, unconditional=None, positive=None, **settings):
        """Latents after four steps at guidance 7, 7, 7, 3."""
        import comfy.samplers
        import torch

        guidance = settings.pop("guidance", self.guidance(None, (7.0, 7.0, 7.0, 3.0)))
        guider = self.guider_class(
            conditional or self.conditional,
            unconditional or self.unconditional,
            positive or self.positive,
            guidance,
            settings.pop("keep", "auto"),
        )
        sigmas = torch.tensor([1.0, 0.8, 0.5, 0.2, 0.0])
        noise = torch.randn(1, 128, 4, 8, generator=torch.Generator().manual_seed(4))
        name = settings.pop("sampler", "euler")
        sampler = comfy.samplers.sampler_object(name)
        return guider.sample(noise, torch.zeros_like(noise), sampler, sigmas, seed=0, **settings)


def traced(world: World, **arguments) -> list[tuple[str, float, object]]:
    """(copy, sigma, transformer options) of every pass of a run."""
    import comfy.patcher_extension as extension

    passes = []

    def watch(copy: str):
        def wrapper(executor, x, t, *args, **kwargs):
            options = args[3] if len(args) > 3 else kwargs["transformer_options"]
            passes.append((copy, round(float(t.flatten()[0]), 4), options))
            return executor(x, t, *args, **kwargs)

        return wrapper

    watched = []
    for copy in ("conditional", "unconditional"):
        patcher = (arguments.pop(copy, None) or getattr(world, copy)).clone()
        patcher.add_wrapper(extension.WrappersMP.APPLY_MODEL, watch(copy))
        watched.append(patcher)
    world.sample(*watched, **arguments)
    return passes


def loads(world: World, **settings) -> list[list[str]]:
    """Which models each call of the host's loader asks for during a run."""
    return [models for models, _ in requests(world, **settings)]


def requests(world: World, **settings) -> list[tuple[list[str], float]]:
    """(models, bytes to leave free beside them) of each call of the host's loader."""
    import comfy.model_management as management

    calls = []
    original = management.load_models_gpu
    names = {id(world.unconditional.model): "unconditional"}

    def recording(models, *args, **kwargs):
        asked = [names.get(id(m.model), "conditional") for m in models]
        calls.append((asked, kwargs.get("memory_required", 0)))
        return original(models, *args, **kwargs)

    management.load_models_gpu = recording
    try:
        world.sample(**settings)
    finally:
        management.load_models_gpu = original
    return calls


def in_turns(world: World) -> dict:
    """With room for one copy: what is loaded, in which order passes run, and the same picture."""
    import torch

    passes = [copy for copy, *_ in traced(world, keep="alternating")]
    same = torch.equal(world.sample(keep="alternating"), world.sample(keep="both"))
    return {"loads": loads(world, keep="alternating"), "passes": passes, "same": same}


def streamed(world: World) -> dict:
    """Both copies in RAM: the one request leaves no room for weights; the same picture."""
    import torch

    ((models, memory),) = requests(world, keep="streamed")
    same = torch.equal(world.sample(keep="streamed"), world.sample(keep="both"))
    ((_, after),) = requests(world, keep="both")
    return {"models": models, "memory": memory, "after": after, "same": same}


def refused(world: World) -> dict[str, str]:
    """What the guider says of a model and of a conditioning that are of something else."""
    import torch

    other = world.conditional.clone()
    other.model = torch.nn.Linear(1, 1)
    narrow = [[torch.zeros(1, 5, 7), {}]]
    long = [[torch.zeros(1, 2049, world.positive[0][0].shape[-1]), {}]]
    tries = {
        "model": (other, None, world.positive),
        "unconditional": (world.conditional, other, world.positive),
        "encoder": (world.conditional, None, narrow),
        "long": (world.conditional, None, long),
    }
    found = {}
    for name, parts in tries.items():
        try:
            world.guider_class(*parts, world.guidance())
            found[name] = "taken"
        except inside.load(world.pack, "errors").Ideogram4QuantError as error:
            found[name] = str(error)
    return found


def progress_and_previews(world: World) -> list:
    """(step, steps, kind of preview) as the host's page gets them from the sampler node."""
    import comfy.utils
    from comfy.cli_args import LatentPreviewMethod, args

    seen = []

    def hook(value, total, preview, **_):
        seen.append((value, total, preview and preview[0]))

    before, args.preview_method = args.preview_method, LatentPreviewMethod.Latent2RGB
    comfy.utils.set_progress_bar_global_hook(hook)
    try:
        node = inside.load(world.pack, "nodes.node_sampler").Sampler
        models = {"conditional": world.conditional, "unconditional": world.unconditional}
        size = {"width": 128, "height": 64, "steps": 3}
        node.execute(**models, positive=world.positive, preset="turbo", seed=0, **size)
    finally:
        comfy.utils.set_progress_bar_global_hook(None)
        args.preview_method = before
    return seen


def order_of_passes(world: World) -> list:
    return [(copy, sigma) for copy, sigma, _ in traced(world)]


def stock_models(world: World, files: dict) -> dict[str, bool]:
    """Models of the host's own loader give the same latents in our guider and in our sampler."""
    import comfy.sd
    import comfy.supported_models as supported
    import torch

    config = world.conditional.model.model_config.unet_extra_config

    class Pocket(supported.Ideogram4):
        unet_extra_config = config

    supported.models.insert(0, Pocket)
    try:
        options = {"dtype": torch.float32}
        stock = [
            comfy.sd.load_diffusion_model(str(files[copy]), options)
            for copy in ("conditional", "unconditional")
        ]
    finally:
        supported.models.remove(Pocket)
    node = inside.load(world.pack, "nodes.node_sampler").Sampler
    settings = {"positive": world.positive, "preset": "turbo", "seed": 0, "steps": 3}
    settings |= {"width": 128, "height": 64}
    theirs, ours = (
        node.execute(conditional=first, unconditional=second, **settings).args[0]["samples"]
        for first, second in (stock, (world.conditional, world.unconditional))
    )
    return {
        "guider": torch.equal(world.sample(*stock), world.sample()),
        "sampler": torch.equal(theirs, ours),
    }


def patch_on_one_copy_stays_there(world: World) -> dict:
    """An attention override on one copy is called for its passes only."""
    import torch

    found = {}
    for copy in ("conditional", "unconditional"):
        calls = []

        def override(function, *args, calls=calls, **kwargs):
            calls.append(args[0].shape)
            return function(*args, **kwargs)

        patcher = getattr(world, copy).clone()
        options = patcher.model_options["transformer_options"]
        options["optimized_attention_override"] = override
        same = torch.equal(world.sample(**{copy: patcher}), world.sample())
        lengths = {shape[2] for shape in calls}
        found[copy] = {"calls": len(calls), "lengths": sorted(lengths), "same": same}
    return found


def wrapper_on_the_unconditional_copy_runs(world: World) -> int:
    return sum(copy == "unconditional" for copy, _, _ in traced(world))


def different_lengths_build_no_mask(world: World) -> dict:
    """Two prompts of different lengths in one run: separate passes, none of them masked."""
    import comfy.ldm.ideogram4.model as host_model

    masks, lengths = [], []
    original = host_model.Ideogram4Attention.forward

    def spy(self, x, attn_mask, *args, **kwargs):
        masks.append(attn_mask is not None)
        lengths.append(x.shape[1])
        return original(self, x, attn_mask, *args, **kwargs)

    host_model.Ideogram4Attention.forward = spy
    try:
        world.sample(positive=world.positive + world.encode("a much longer blue word"))
    finally:
        host_model.Ideogram4Attention.forward = original
    return {"masked": sum(masks), "lengths": len(set(lengths))}


def cfg_override_has_its_way(world: World) -> bool:
    """The host's CFG Override on the conditional model goes before the schedule."""
    import torch
    from comfy_extras.nodes_custom_sampler import CFGOverride

    overridden = CFGOverride.execute(world.conditional, 2.0, 0.0, 1.0).args[0]
    constant = world.sample(guidance=world.guidance(None, (2.0,)))
    return torch.equal(world.sample(overridden), constant)


def unconditional_pass_is_marked(world: World) -> list:
    marks = {copy: options["cond_or_uncond"] for copy, _, options in traced(world)}
    sigmas = {copy: len(options["sample_sigmas"]) for copy, _, options in traced(world)}
    return [marks, sigmas]


def clean_after_failure(world: World) -> dict:
    """A failure in the middle leaves no patcher behind, and the next run is as before."""
    import torch

    before = world.sample()

    def fail(step, *_):
        if step == 1:
            raise RuntimeError("interrupted")

    try:
        world.sample(callback=fail)
        raised = False
    except RuntimeError:
        raised = True
    left = [p.model.current_patcher for p in (world.conditional, world.unconditional)]
    return {
        "raised": raised,
        "left": sum(patcher is not None for patcher in left),
        "same": torch.equal(world.sample(), before),
    }


def post_cfg_hooks_run(world: World) -> int:
    """The hook by which other nodes change guided predictions, on the conditional model."""
    calls = []

    def hook(arguments):
        calls.append(arguments["cond_scale"])
        return arguments["denoised"]

    patcher = world.conditional.clone()
    patcher.set_model_sampler_post_cfg_function(hook)
    world.sample(patcher)
    return calls


def pre_cfg_functions_run(world: World) -> dict:
    """Where one makes both predictions alike, guidance has nothing to move away from."""
    scales, alike = [], []

    def hook(arguments):
        scales.append(arguments["cond_scale"])
        conditional, unconditional = arguments["conds_out"]
        alike.append(bool((conditional == unconditional).all()))
        return [conditional, conditional]

    patcher = world.conditional.clone()
    patcher.set_model_sampler_pre_cfg_function(hook)
    found = world.sample(patcher)
    alone = world.sample(guidance=world.guidance(None, (1.0,) * 4))
    return {
        "scales": scales,
        "alike before": any(alike),
        "error": inside.relative(found, alone),
        "effect": inside.relative(world.sample(), alone),
    }


def batch_functions_run(world: World) -> dict:
    """A function in place of the host's predictions: each copy's own, for its own conditioning."""
    import comfy.samplers

    asked = []

    def twice(copy: str):
        def function(a):
            asked.append([copy, [cond is not None for cond in a["conds"]]])
            found = comfy.samplers.calc_cond_batch(
                a["model"], a["conds"], a["input"], a["sigma"], a["model_options"]
            )
            return [2 * each for each in found] if copy == "conditional" else found

        return function

    patchers = {c: getattr(world, c).clone() for c in ("conditional", "unconditional")}
    for copy, patcher in patchers.items():
        patcher.set_model_sampler_calc_cond_batch_function(twice(copy))
    found = world.sample(**patchers)

    def post(a):
        return 2 * a["cond_denoised"] * a["cond_scale"] + a["uncond_denoised"] * (
            1 - a["cond_scale"]
        )

    same = world.conditional.clone()
    same.set_model_sampler_post_cfg_function(post)
    return {"asked": asked, "error": inside.relative(found, world.sample(same))}


def functions_run_without_a_second_copy(world: World) -> dict:
    """At guidance 1: called as the host calls them, with zeros in place of a second prediction."""
    seen, after = [], []

    def before(arguments):
        seen.append([arguments["cond_scale"], float(arguments["conds_out"][1].abs().max())])
        return arguments["conds_out"]

    def post(arguments):
        after.append(arguments["cond_scale"])
        return arguments["denoised"]

    single = world.guidance(None, (1.0,) * 4)
    patcher = world.conditional.clone()
    patcher.set_model_sampler_pre_cfg_function(before)
    patcher.set_model_sampler_post_cfg_function(post)
    error = inside.relative(world.sample(patcher, guidance=single), world.sample(guidance=single))
    return {"before": seen, "after": after, "error": error}


def second_order_sampler_follows_the_schedule(world: World) -> list:
    """Heun asks between the steps: each of its passes has the guidance of its sigma."""
    calls = []

    def hook(arguments):
        calls.append((round(float(arguments["sigma"][0]), 4), arguments["cond_scale"]))
        return arguments["denoised"]

    patcher = world.conditional.clone()
    patcher.set_model_sampler_post_cfg_function(hook)
    world.sample(patcher, sampler="heun")
    return calls


if __name__ == "__main__":
    main()
