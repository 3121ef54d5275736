"""diffusers' own ``Ideogram4Pipeline`` on our files: its loop and its masks, our linears."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from typing import TYPE_CHECKING, NoReturn

import torch
from comfy_kitchen.tensor import QuantizedTensor
from diffusers import FlowMatchEulerDiscreteScheduler, Ideogram4Pipeline
from torch import Tensor, nn
from transformers import Qwen3VLTextModel

from ..errors import OpError
from ..ops.attention import SDPA
from ..ops.tuning.autotune import Measure
from .encoder import TextEncoder, load_encoder
from .linear import LinearOptions
from .loading import load_pair, open_pair
from .transformer import PackTransformer
from .vae import Vae, load_vae

if TYPE_CHECKING:
    from typing_extensions import Self

PathArg = str | PathLike[str]

# Qwen3-VL's turns. The template in a tokenizer's folder is a program that anyone may have written,
# so this one is run in its place.
_TURNS = (
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

    def load_lora_weights(self, *_args: object, **_kwargs: object) -> NoReturn:
        """OpError: diffusers' LoRAs want separate q, k and v linears of torch's own class."""
        raise OpError(
            "load_lora_weights needs separate q, k and v linears of torch's own class",
            found="fused, quantized linears",
            hint="Use this pack's LoRA node in ComfyUI.",
        )

    def save_pretrained(self, *_args: object, **_kwargs: object) -> NoReturn:
        """OpError: the files that the pipeline was made of are its saved form."""
        raise OpError(
            "save_pretrained cannot write these weights",
            hint="The files they were loaded from stay usable; quantize_checkpoint writes others.",
        )

    def _refuse_by_weight(self, method: str) -> None:
        """OpError where a weight of any model is quantized."""
        for name, part in self.components.items():
            weights = part.parameters() if isinstance(part, nn.Module) else ()
            if any(isinstance(weight, QuantizedTensor) for weight in weights):
                raise OpError(
                    f"{method} moves each weight as a single tensor",
                    found=f"quantized weights in {name}, of codes and scales",
                    hint="Use enable_model_cpu_offload(), which moves one whole model at a time.",
                )


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

    ``unconditional`` is None where ``model`` holds both copies; ``encoder`` and ``vae`` as in
    `load_encoder` and `load_vae`; ``base`` gives a linears-only file its other tensors; the rest as
    in `load_transformer`. The pipeline's arguments and defaults are diffusers'; fp32 pictures equal
    those of the dequantized weights in diffusers' own modules, but for the quantized inputs of
    W8A8. Works: ``.to(device)`` and ``enable_model_cpu_offload``. Refused with OpError: another
    compute dtype by ``.to``, and what `PackPipeline` says. Raises what the loaders raise.
    """
    pair = open_pair(model, unconditional, base=base)
    if pair[1] is None:
        raise OpError(
            "diffusers' pipeline runs both copies, and this model is of one branch",
            found=f"{model} ({pair[0].one_branch.reason})",
            hint="Use engine.generate, or ideogram4-quant generate --preset instant.",
        )
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
    return as_pipeline(models.conditional, models.unconditional, text, decoder)


def as_pipeline(
    conditional: PackTransformer, unconditional: PackTransformer, encoder: TextEncoder, vae: Vae
) -> Ideogram4Pipeline:
    """The pipeline around loaded models, which it takes over: the unconditional copy gets modules
    in place of its text projection, the VAE its statistics in diffusers' order, in fp32."""
    unconditional.llm_cond_norm = nn.Identity()
    unconditional.llm_cond_proj = _NoText(unconditional.hidden_size)
    vae.model.bn.running_mean = vae.mean
    vae.model.bn.running_var = vae.std.square() - vae.model.config.batch_norm_eps
    encoder.tokenizer.chat_template = _TURNS
    return PackPipeline(
        FlowMatchEulerDiscreteScheduler(),
        vae.model,
        _Vision2Text(encoder.model),
        encoder.tokenizer,
        conditional,
        unconditional,
    )
