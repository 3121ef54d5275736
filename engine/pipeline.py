"""diffusers' own ``Ideogram4Pipeline`` on our files: its loop and its masks, our linears."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import torch
from comfy_kitchen.tensor import QuantizedTensor
from diffusers import FlowMatchEulerDiscreteScheduler, Ideogram4Pipeline
from torch import Tensor, nn
from transformers import Qwen3VLTextModel

from ..checkpoint.copies import CONDITIONAL, UNCONDITIONAL
from ..errors import OpError
from ..ops.attention import SDPA
from ..ops.tuning.autotune import Measure
from ..sampling import Preset, preset
from . import loras
from .encoder import TextEncoder, load_encoder
from .linear import LinearOptions
from .loading import load_pair, open_pair, preset_for
from .transformer import PackTransformer
from .vae import Vae, load_vae

if TYPE_CHECKING:
    from typing_extensions import Self

PathArg = str | PathLike[str]

# Qwen3-VL's turns. The template in a tokenizer's folder is a program that anyone may have written,
# so this one is run in its place.
TURNS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.content is string %}{{ m.content }}"
    "{% else %}{% for part in m.content %}{{ part.text }}{% endfor %}{% endif %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


class PackPipeline(Ideogram4Pipeline):
    """diffusers' pipeline; what it cannot do with our modules is refused before anything changes.

    A quantized weight is several tensors (codes, scales) that move as one: ``.to`` and
    ``enable_model_cpu_offload`` do that.
    """

    def to(self, *args: object, **kwargs: object) -> Self:
        """Moves every model; OpError for another dtype than the compute dtype."""
        self.transformer.check_dtype(*args, **kwargs)
        return super().to(*args, **kwargs)

    def enable_sequential_cpu_offload(self, *args: object, **kwargs: object) -> None:
        """diffusers' own on unquantized files; OpError where a weight is quantized."""
        self._refuse_by_weight("enable_sequential_cpu_offload")
        super().enable_sequential_cpu_offload(*args, **kwargs)

    def enable_group_offload(self, *args: object, **kwargs: object) -> None:
        """diffusers' own on unquantized files; OpError where a weight is quantized."""
        self._refuse_by_weight("enable_group_offload")
        super().enable_group_offload(*args, **kwargs)

    def load_lora_weights(
        self, file: PathArg, *, strength: float = 1.0, apply_to: str = loras.APPLY_TO[0]
    ) -> list[str]:
        """A LoRA file beside the linears of either copy, on top of those that are loaded.

        Reads every trainer's names. apply_to: "as in the file" (one that does not say: the
        conditional copy), "conditional", "unconditional" or "both". Returns what was understood.
        CheckpointError for a file that does not fit, or that changes the weights themselves.
        """
        second = self.unconditional_transformer
        copies = {
            CONDITIONAL: self.transformer,
            UNCONDITIONAL: None if isinstance(second, _NoCopy) else second,
        }
        return loras.add(copies, Path(file), strength, apply_to)

    def unload_lora_weights(self) -> None:
        """Takes every LoRA off; the models are as they were, to the bit."""
        loras.remove(self.transformer)
        loras.remove(self.unconditional_transformer)

    def fuse_lora(self, *_args: object, **_kwargs: object) -> NoReturn:
        """OpError: a fused LoRA would have to be quantized with the weights."""
        raise OpError(
            "fuse_lora would quantize the weights again",
            hint="A LoRA beside them, as load_lora_weights adds it, costs a few per cent.",
        )

    def set_adapters(self, *_args: object, **_kwargs: object) -> NoReturn:
        """OpError: LoRAs have no names here."""
        raise OpError(
            "set_adapters needs adapters with names",
            hint="Use unload_lora_weights, and load_lora_weights with another strength.",
        )

    def save_pretrained(self, *_args: object, **_kwargs: object) -> NoReturn:
        """OpError: the files that the pipeline was made of are its saved form."""
        raise OpError(
            "save_pretrained cannot write these weights",
            hint="The files they were loaded from stay usable; quantize_checkpoint writes others.",
        )

    def _refuse_by_weight(self, method: str) -> None:
        """OpError where a weight of any model is quantized, or has a LoRA beside it."""
        if any(map(loras.has_loras, (self.transformer, self.unconditional_transformer))):
            raise OpError(
                f"{method} moves each layer alone, and a LoRA is beside them",
                hint="Use enable_model_cpu_offload(), or unload_lora_weights() first.",
            )
        for name, part in self.components.items():
            weights = part.parameters() if isinstance(part, nn.Module) else ()
            if any(isinstance(weight, QuantizedTensor) for weight in weights):
                raise OpError(
                    f"{method} moves each weight as a single tensor",
                    found=f"quantized weights in {name}, of codes and scales",
                    hint="Use enable_model_cpu_offload(), which moves one whole model at a time.",
                )


class OneBranchPipeline(PackPipeline):
    """The same around a model that holds its guidance in itself: one pass a step."""

    own: Preset

    def __call__(
        self,
        prompt: str | list[str] | None = None,
        height: int = 2048,
        width: int = 2048,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        guidance_schedule: Sequence[float] | Tensor | None = None,
        mu: float | None = None,
        std: float | None = None,
        **more: object,
    ) -> object:
        """diffusers' arguments; steps, ``mu`` and ``std`` are those of the model's preset where
        they are left out. OpError for guidance other than 1."""
        given = () if guidance_scale is None else (guidance_scale,)
        factors = [
            float(g) for g in (*given, *(() if guidance_schedule is None else guidance_schedule))
        ]
        if any(factor != 1.0 for factor in factors):
            raise OpError(
                "guidance is asked of a model of one branch, which holds it in itself",
                found=factors[0],
                needed="no guidance, or 1",
            )
        steps = self.own.steps if num_inference_steps is None else num_inference_steps
        curve = (self.own.mu if mu is None else mu, self.own.std if std is None else std)
        return super().__call__(prompt, height, width, steps, 1.0, None, *curve, **more)


class _NoCopy(nn.Module):
    """In the unconditional copy's place: zeros, which a guidance of 1 weighs with 0."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        self.place = nn.Parameter(torch.empty(0), requires_grad=False)

    @property
    def device(self) -> torch.device:
        """Where it is: diffusers and accelerate ask every module of a pipeline."""
        return self.place.device

    def forward(self, hidden_states: Tensor, **_: object) -> tuple[Tensor]:
        return (torch.zeros_like(hidden_states),)


class _Vision2Text(nn.Module):
    """The text model where diffusers looks for it: ``.language_model`` of a Qwen3-VL."""

    def __init__(self, language_model: Qwen3VLTextModel) -> None:
        super().__init__()
        self.language_model = language_model
        self.config = language_model.config

    @property
    def device(self) -> torch.device:
        """Where inputs go: under accelerate's hooks the device that computes, not the storage."""
        table = self.language_model.embed_tokens
        hooked = getattr(getattr(table, "_hf_hook", None), "execution_device", None)
        return table.weight.device if hooked is None else torch.device(hooked)

    @property
    def dtype(self) -> torch.dtype:
        return self.language_model.embed_tokens.weight.dtype


class _NoText(nn.Module):
    """Zero [..., features] for any text: what the unconditional copy adds of it at image tokens."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.features = features

    def forward(self, x: Tensor) -> Tensor:
        return x.new_zeros(*x.shape[:-1], self.features)


def load_pipeline(
    model: PathArg,
    unconditional: PathArg | None,
    encoder: PathArg,
    vae: PathArg,
    *,
    base: PathArg | Sequence[PathArg] | None = None,
    tokenizer: PathArg | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    options: LinearOptions | None = None,
    attention: str = SDPA,
    measure: Measure | None = None,
) -> Ideogram4Pipeline:
    """diffusers' ``Ideogram4Pipeline`` from files of any level that the pack reads.

    ``unconditional`` is None where ``model`` holds both copies, or is of one branch: the pipeline
    then makes one pass a step, with the steps of the model's preset. ``encoder`` and ``vae`` as in
    `load_encoder` and `load_vae`; ``base`` gives a linears-only file its other tensors; the rest as
    in `load_transformer`. The pipeline's arguments and defaults are diffusers'; fp32 pictures equal
    those of the dequantized weights in diffusers' own modules, but for the quantized inputs of
    W8A8. Works: ``.to(device)`` and ``enable_model_cpu_offload``. Refused with OpError: another
    compute dtype by ``.to``, and what `PackPipeline` says. Raises what the loaders raise.
    """
    pair = open_pair(model, unconditional, base=base)
    text = load_encoder(encoder, tokenizer=tokenizer, device=device, dtype=dtype, options=options)
    decoder = load_vae(vae, device=device, dtype=dtype)
    models = load_pair(
        pair,
        text,
        decoder,
        device=device,
        dtype=dtype,
        options=options,
        attention=attention,
        measure=measure,
    )
    own = preset(preset_for(None, pair[0]))
    return as_pipeline(models.conditional, models.unconditional, text, decoder, own)


def as_pipeline(
    conditional: PackTransformer,
    unconditional: PackTransformer | None,
    encoder: TextEncoder,
    vae: Vae,
    own: Preset,
) -> Ideogram4Pipeline:
    """The pipeline around loaded models, which it takes over: the unconditional copy gets modules
    in place of its text projection, the VAE its statistics in diffusers' order, in fp32. Without an
    unconditional copy it runs one branch, by its ``own`` preset."""
    if unconditional is not None:
        unconditional.llm_cond_norm = nn.Identity()
        unconditional.llm_cond_proj = _NoText(unconditional.hidden_size)
    vae.model.bn.running_mean = vae.mean
    vae.model.bn.running_var = vae.std.square() - vae.model.config.batch_norm_eps
    encoder.tokenizer.chat_template = TURNS
    kind = PackPipeline if unconditional is not None else OneBranchPipeline
    pipe = kind(
        FlowMatchEulerDiscreteScheduler(),
        vae.model,
        _Vision2Text(encoder.model),
        encoder.tokenizer,
        conditional,
        _NoCopy(conditional.dtype) if unconditional is None else unconditional,
    )
    if unconditional is None:
        pipe.own = own
    return pipe
