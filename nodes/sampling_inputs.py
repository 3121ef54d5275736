"""The inputs that the guider, the sampler and the preset share, and what they mean."""

from __future__ import annotations

from comfy_api.latest import io
from torch import Tensor

from ..sampling import LAST_SIGMA, PRESETS, RATIOS, guidance_schedule, sigmas, size_of
from ..sampling import preset as find_preset
from . import one_copy, residency
from .guidance import Guidance, format_guidance, parse_guidance
from .schema import combo_input

PRESET_MU = "preset"
ZERO, NEAR_ZERO = "0", "5.53e-4"
BY_HAND = "width x height"


def model_inputs() -> list:
    """Both copies and the caption."""
    return [
        io.Model.Input("conditional", tooltip="The conditional copy."),
        io.Model.Input(
            "unconditional",
            optional=True,
            tooltip="The unconditional copy. Left out, the picture is made without guidance: half "
            "the time and memory, and clearly less faithful to the caption, unless the model is of "
            "one branch (Instant, Fast), which needs none.",
        ),
        io.Conditioning.Input("positive", tooltip="The encoded caption; JSON captions work best."),
    ]


def preset_input() -> io.Combo.Input:
    """One of the reference's presets, or one for models without guidance."""
    return io.Combo.Input(
        "preset",
        options=list(PRESETS),
        default="default",
        tooltip="quality: 48 steps, default: 20, turbo: 12, each with the reference's sigmas and "
        "guidance. Without guidance, so in half the time a step and without an unconditional copy: "
        "instant: 8 steps and fast: 20, for fal's one-branch models of these names and others like "
        "them; turbotime: 4, for the conditional copy with the TurboTime LoRA.",
    )


def size_inputs(*, optional: bool = False) -> list:
    """Width and height; optional where a latent may take their place."""
    unused = " Not used with an aspect ratio or a connected latent." if optional else ""
    return [
        io.Int.Input(
            side,
            default=1024,
            min=16,
            max=8192,
            step=16,
            optional=optional,
            tooltip=f"{side.capitalize()} in pixels; trained from 256 to 2048. Other numbers are "
            "rounded to the nearest multiple of 16." + unused,
        )
        for side in ("width", "height")
    ]


def ratio_inputs() -> list:
    """A size by its shape and area, in the place of width and height."""
    return [
        combo_input(
            "aspect_ratio",
            [BY_HAND, *RATIOS],
            "Width to height, at the area of megapixels, in multiples of 16. "
            f"{BY_HAND}: those two inputs decide. Not used where a latent is connected.",
            advanced=False,
        ),
        io.Float.Input(
            "megapixels",
            default=1.0,
            min=0.1,
            max=4.0,
            step=0.1,
            optional=True,
            tooltip="The area of a picture with an aspect ratio: 1 is that of 1024x1024, 4 that of "
            f"2048x2048. Not used with {BY_HAND}.",
        ),
    ]


def asked_size(ratio: str, megapixels: float, width: int, height: int) -> tuple[int, int]:
    """(width, height) that those inputs and ``size_inputs`` ask for."""
    return (width, height) if ratio == BY_HAND else size_of(ratio, megapixels)


def steps_input() -> io.Int.Input:
    """Another number of steps than the preset's."""
    return io.Int.Input(
        "steps",
        default=0,
        min=0,
        max=1000,
        optional=True,
        advanced=True,
        tooltip="Another number of steps; 0 takes the preset's.",
    )


def denoise_input() -> io.Float.Input:
    """How much of a given picture is made anew."""
    return io.Float.Input(
        "denoise",
        default=1.0,
        min=0.01,
        max=1.0,
        step=0.01,
        optional=True,
        tooltip="For image to image: how much of the picture is made anew. 1 is all of it.",
    )


def guidance_inputs() -> list:
    """What changes the preset's guidance, and which copies run it and stay on the device."""
    return [
        io.String.Input(
            "guidance",
            default="",
            placeholder="the preset's",
            optional=True,
            tooltip="Your own guidance instead of the preset's: one number for every step, or a "
            "list in the order of the steps, such as 7*18, 3*2. 1 means without guidance, and "
            "skips the unconditional copy. Empty: the preset's.",
        ),
        io.Float.Input(
            "guidance_start",
            default=0.0,
            min=0.0,
            max=1.0,
            step=0.01,
            optional=True,
            advanced=True,
            tooltip="The part of the steps after which guidance begins. Steps without guidance "
            "take half the time, and the picture changes. 0: from the first step.",
        ),
        io.Float.Input(
            "guidance_end",
            default=1.0,
            min=0.0,
            max=1.0,
            step=0.01,
            optional=True,
            advanced=True,
            tooltip="The part of the steps after which guidance ends. 1: it never does.",
        ),
        io.Int.Input(
            "reuse_unconditional",
            default=1,
            min=1,
            max=8,
            optional=True,
            advanced=True,
            tooltip="Use each unconditional prediction for so many steps. 2 saves a quarter of "
            "the time, and the picture changes. 1: off, as in the reference.",
        ),
        combo_input(
            "residency",
            residency.CHOICES,
            "Which copies stay on the device. both: both at once. alternating: one at a "
            "time, in turns, for cards that hold only one. streamed: neither, their weights come "
            "from RAM layer by layer. auto: by the memory there is. The picture is the same.",
        ),
        combo_input(
            "unconditional_from",
            one_copy.CHOICES,
            "Which model runs the unconditional pass. unconditional input: what is "
            "connected there; nothing means no guidance. conditional copy: the conditional copy "
            "runs both passes and is in memory once. With nothing connected its second pass sees "
            "image tokens alone, which was not trained and makes another picture; or connect the "
            "same model with a bypass LoRA.",
        ),
    ]


def unsettled_inputs() -> list:
    """What tools disagree on in the schedule of one-branch models."""
    return [
        combo_input(
            "schedule_mu",
            [PRESET_MU, "0", "0.5"],
            "mu of the schedule. preset: 0.5 for turbo, 0 for all others, as ComfyUI's own "
            "scheduler and diffusers have it. For Instant tools disagree: one list of presets "
            "takes 0.5 for its 8 steps (0 for Fast's 20), the others 0; std is 1.75 in all.",
        ),
        combo_input(
            "last_sigma",
            [ZERO, NEAR_ZERO],
            "Where the schedule ends. 0: as in ComfyUI and diffusers. 5.53e-4: where the "
            "model's own schedule ends; one patch of diffusers for fal's Instant keeps it and "
            "calls it required, the others do not. Which is right is not settled.",
        ),
    ]


def make_guidance(
    preset: str,
    guidance: str = "",
    guidance_start: float = 0.0,
    guidance_end: float = 1.0,
    reuse_unconditional: int = 1,
) -> Guidance:
    """The guidance that those inputs describe."""
    own = guidance.strip()
    return Guidance(
        preset=None if own else preset,
        values=parse_guidance(own) if own else (),
        interval=(guidance_start, guidance_end),
        reuse=reuse_unconditional,
    )


def schedule(
    name: str,
    width: int,
    height: int,
    steps: int,
    denoise: float,
    mu: str = PRESET_MU,
    last: str = ZERO,
) -> tuple[Tensor, str]:
    """(sigmas [steps + 1], guidance as text) of a preset; 0 steps means the preset's own."""
    chosen = find_preset(name)
    count = steps or chosen.steps
    mean = chosen.mu if mu == PRESET_MU else float(mu)
    end = LAST_SIGMA if last == NEAR_ZERO else 0.0
    curve = sigmas(count, width, height, mean, chosen.std, denoise, end)
    return curve, format_guidance(guidance_schedule(chosen, count))
