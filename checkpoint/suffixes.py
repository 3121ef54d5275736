"""The last part of a key: what a stored tensor is to its weight, or whose format it belongs to.

A tensor under a linear's module changes what the weight means until the contrary is known, so that
one that stands in none of these tables is refused by name (``Entry.codecs``).
"""

from __future__ import annotations

import re

_BITSANDBYTES = {
    "absmax": "absmax",
    "quant_map": "quant_map",
    "quant_state.bitsandbytes__nf4": "quant_state",
    "quant_state.bitsandbytes__fp4": "quant_state",
    "nested_absmax": "nested_absmax",
    "nested_quant_map": "nested_quant_map",
}

SDNQ_CONFIG = "quantization_config.json"
"""The file without which nothing tells how an SDNQ folder's codes are read."""

OTHER = "other"
"""Role of a tensor that is not understood."""

# Suffix -> (parameter, role of the stored tensor). Role None: known, not needed.
SUFFIXES: dict[str, tuple[str, str | None]] = {
    "weight": ("weight", "weight"),
    "bias": ("bias", "weight"),
    # Transformer Lab INT8
    "wq": ("weight", "weight"),
    "ws": ("weight", "scale"),
    "smooth": ("weight", "smooth"),
    # ideogram-ai FP8; ComfyUI
    "weight_scale": ("weight", "scale"),
    "comfy_quant": ("weight", "conf"),
    "pre_quant_scale": ("weight", "pre_quant_scale"),
    # what ComfyUI's save nodes write from models of this pack, see saved
    "weight_smooth": ("weight", "smooth"),
    "weight_fold_smooth": ("weight", "fold_smooth"),
    "weight_fold_rows": ("weight", "fold_rows"),
    # ComfyUI's NVFP4, W4A8 and W6A8; comfy-kitchen's AWQ
    "weight_scale_2": ("weight", "scale_2"),
    "weight_scalar": ("weight", "scalar"),  # of hybrid MXFP8
    "weight_s_rel": ("weight", "s_rel"),
    "weight_s_channel": ("weight", "s_channel"),
    "weight_codebook": ("weight", "codebook"),
    "weight_zeros": ("weight", "zeros"),
    "weight_correction": ("weight", "zeros"),
    # SVDQuant in ComfyUI's container, under comfy-kitchen's names and comfy-quants'
    "weight_proj_down": ("weight", "proj_down"),
    "weight_proj_up": ("weight", "proj_up"),
    "weight_smooth_factor": ("weight", "smooth_factor"),
    "proj_down": ("weight", "proj_down"),
    "proj_up": ("weight", "proj_up"),
    "smooth_factor": ("weight", "smooth_factor"),
    "weight_scale_inv": ("weight", "scale"),  # FP8 in blocks; it is what is multiplied by
    # ComfyUI's older name
    "scale_weight": ("weight", "scale"),
    # bitsandbytes, with and without the parameter's name in between
    **{f"weight.{suffix}": ("weight", role) for suffix, role in _BITSANDBYTES.items()},
    **{suffix: ("weight", role) for suffix, role in _BITSANDBYTES.items()},
    # Static ranges of activations: a host that quantizes these in fp8 or int8 with a fixed step
    # needs them; here activations are quantized token by token, or not at all.
    "input_scale": ("weight", None),
    "scale_input": ("weight", None),  # ComfyUI's older name
    "output_scale": ("weight", None),  # optimum-quanto
    "input_zero_point": ("weight", None),  # compressed-tensors
    "output_zero_point": ("weight", None),
    # Statistics of calibrations, which only make such ranges
    "input_amax": ("weight", None),
    "input_absmax": ("weight", None),
    "input_quantizer._amax": ("weight", None),  # NVIDIA ModelOpt
    "output_quantizer._amax": ("weight", None),
}

# What other tools store beside a weight, or in its place: (end of the key, whose it is).
_FOREIGN = tuple(
    (re.compile(rf"(?:{pattern})"), what)
    for pattern, what in (
        (r"(?:weight|input)_global_scale", "NVFP4's (compressed-tensors)"),
        (r"SCB|weight_format", "LLM.int8's (bitsandbytes)"),
        (
            r"weight\._data|weight\._scale|weight\._shift|weight\.(?:scale|qtype)",
            "optimum-quanto's",
        ),
        (r"_weight_\w+", "torchao's"),
        (r"weight_packed|weight_shape|weight_zero_point|weight_g_idx", "compressed-tensors'"),
        (r"qweight|qzeros|scales|g_idx|wscales|wzeros|wtscale", "GPTQ's, AWQ's or Nunchaku's"),
        (r"lora_(?:up|down)|smooth_factor_orig", "SVDQuant's (Nunchaku)"),
        (
            r"svd_(?:up|down)|zero_point(?:_2|_scale)?|scale|scale_2|scale_zero_point",
            f"SDNQ's, whose {SDNQ_CONFIG} does not lie beside the file",
        ),
        (r"quip_s_[uv]|quip_\w+|SU|SV|Qidxs\w*|codebook_id", "QuIP's"),
        (r"W_q|meta", "HQQ's"),
        (r"lora_[AB](?:\.\w+)?\.weight|lora_magnitude_vector.*", "a LoRA beside the weight"),
    )
)


def whose(suffix: str) -> str | None:
    """The tool or format that stores such a tensor, for people; None if none is known."""
    return next((what for pattern, what in _FOREIGN if pattern.fullmatch(suffix)), None)
