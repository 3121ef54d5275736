"""Stored forms of a linear, made by independent code, each with the weight that it stands for.

A packer of one linear returns (stored tensors by suffix, the true weight in fp32); those of a
whole model return (stored tensors by name, the true weights by name).
"""

from __future__ import annotations

import json

import gguf
import numpy as np
import torch
from comfy_kitchen.tensor import QuantizedTensor, get_layout_class

from ideogram4_quant.tests import fixtures_files as files

State = dict[str, torch.Tensor]
Packed = tuple[State, torch.Tensor]


def as_json(value: object) -> torch.Tensor:
    return torch.tensor(list(json.dumps(value).encode()), dtype=torch.uint8)


def pack_fp8(weight: torch.Tensor, *, per_row: bool = True) -> Packed:
    """e4m3 times a scale for each row, fp32 [out], or one for all, fp32 []."""
    largest = weight.abs().amax(dim=1, keepdim=True) if per_row else weight.abs().max()
    scale = (largest / 448).clamp_min(1e-12)
    data = (weight / scale).to(torch.float8_e4m3fn)
    stored = {"weight": data, "weight_scale": scale.reshape(-1) if per_row else scale}
    return stored, data.float() * scale


def pack_int8(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(int8 [N, K], scale [N, 1]): absmax of each row."""
    scale = (weight.abs().amax(dim=1, keepdim=True) / 127).clamp_min(1e-12)
    return (weight / scale).round().clamp(-127, 127).to(torch.int8), scale


def pack_comfy_int8(weight: torch.Tensor, group: int | None = 64, *, nested=False) -> Packed:
    """ComfyUI's container, quantized and undone by comfy-kitchen itself."""
    group = group if group and weight.shape[1] % group == 0 else None
    conf: dict[str, object] = {"format": "int8_tensorwise"}
    rotation = {"convrot": True, "convrot_groupsize": group} if group else {}
    if nested:
        conf["params"] = rotation
    else:
        conf |= rotation
    quantized = QuantizedTensor.from_float(
        weight,
        "TensorWiseINT8Layout",
        per_channel=True,
        convrot=bool(group),
        convrot_groupsize=group or 64,
    )
    stored = {
        "weight": quantized._qdata,
        "weight_scale": quantized._params.scale.reshape(-1, 1),
        "comfy_quant": as_json(conf),
    }
    return stored, quantized.dequantize()


NF4_CODE = torch.tensor(
    [
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
        *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
        *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
        *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ]
)


def nearest(values: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """uint8 indices into ``table``, ascending, of the entries next to ``values``."""
    return torch.bucketize(values, (table[1:] + table[:-1]) / 2).to(torch.uint8)


def pack_nf4(weight: torch.Tensor, *, double: bool = False, block: int = 64) -> Packed:
    """bitsandbytes' bytes by its formulas: code[nibble] * absmax[block], first nibble high."""
    flat = weight.reshape(-1)
    count = flat.numel()
    blocks = torch.cat([flat, torch.zeros(-count % block)]).reshape(-1, block)
    absmax = blocks.abs().amax(dim=1)
    state = {
        "quant_type": "nf4",
        "blocksize": block,
        "dtype": "bfloat16",
        "shape": list(weight.shape),
    }
    extra = {}
    stored_absmax = absmax
    if double:
        offset = absmax.mean()
        table = torch.linspace(-1, 1, 256) ** 3
        groups = torch.cat([absmax - offset, torch.zeros(-len(absmax) % 256)]).reshape(-1, 256)
        largest = groups.abs().amax(dim=1)
        relative = groups / largest[:, None].clamp_min(1e-12)
        stored_absmax = nearest(relative, table).reshape(-1)[: len(absmax)]
        scales = largest.repeat_interleave(256)[: len(absmax)]
        absmax = table[stored_absmax.int()] * scales + float(offset)
        state |= {"nested_blocksize": 256, "nested_dtype": "float32"}
        state["nested_offset"] = float(offset)
        extra = {"weight.nested_absmax": largest, "weight.nested_quant_map": table}
    codes = nearest(blocks / absmax[:, None].clamp_min(1e-12), NF4_CODE)
    truth = (NF4_CODE[codes.int()] * absmax[:, None]).reshape(-1)[:count].reshape(weight.shape)
    codes = codes.reshape(-1)[: count + count % 2]
    stored = {
        "weight": (codes[0::2] << 4 | codes[1::2]).reshape(-1, 1),
        "weight.absmax": stored_absmax,
        "weight.quant_map": NF4_CODE.clone(),
        "weight.quant_state.bitsandbytes__nf4": as_json(state),
        **extra,
    }
    return stored, truth


def pack_smooth_int8(weight: torch.Tensor, seed: int, *, scale_dtype=torch.float32) -> Packed:
    """Transformer Lab: ``wq = round(W * smooth / ws)``, the activations divided by ``smooth``."""
    generator = torch.Generator().manual_seed(seed)
    smooth = 0.25 + 2 * torch.rand(weight.shape[1], generator=generator)
    q, scale = pack_int8(weight * smooth)
    scale = scale.to(scale_dtype)
    return {"wq": q, "ws": scale, "smooth": smooth}, q.float() * scale.float() / smooth


def packed(state: State, pack, prefix: str = "", skip=()) -> tuple[State, State]:
    """(stored tensors, true weights) with every linear packed but those of ``skip``."""
    stored, truth = {}, {}
    for name, tensor in state.items():
        module = name.removesuffix(".weight")
        if files.is_linear(name) and not any(part in name for part in skip):
            parts, truth[name] = pack(tensor)
            stored |= {f"{prefix}{module}.{suffix}": value for suffix, value in parts.items()}
        else:
            stored[prefix + name] = tensor.bfloat16()
            truth[name] = tensor
    return stored, truth


# --- GGUF -----------------------------------------------------------------------------------------

# Where the fp16 factors of a block lie, for random bytes that decode to sane numbers
_FACTORS = {"Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,), "Q2_K": (80, 82), "Q3_K": (108,)}
_FACTORS |= {"IQ4_NL": (0,), "IQ4_XS": (0,)}


def gguf_blocks(weight: torch.Tensor, kind: str, seed: int = 0) -> tuple[np.ndarray, torch.Tensor]:
    """(bytes [N, row bytes], the weight that gguf-py decodes from them).

    gguf-py has no encoder for the K and IQ formats: those get random bytes, which exercise every
    bit.
    """
    qtype = gguf.GGMLQuantizationType[kind]
    if kind in _FACTORS:
        block, size = gguf.GGML_QUANT_SIZES[qtype]
        rng = np.random.default_rng(seed)
        rows, columns = weight.shape
        data = rng.integers(0, 256, (rows, columns // block, size), dtype=np.uint8)
        for at in _FACTORS[kind]:
            factors = (rng.random((rows, columns // block, 1)) * 0.01).astype(np.float16)
            data[..., at : at + 2] = factors.view(np.uint8)
        data = data.reshape(rows, -1)
    else:
        data = gguf.quants.quantize(weight.numpy(), qtype)
    return data, torch.from_numpy(gguf.quants.dequantize(data, qtype).copy()).float()


def gguf_tensors(state: State, kind: str, prefix: str = "", everything: bool = False):
    """Linears in ``kind`` (Q8_0 where blocks do not fit), the rest F16, or ``kind`` as well."""
    tensors, truth = {}, {}
    for number, (name, tensor) in enumerate(state.items()):
        matrix = tensor.reshape(1, -1) if tensor.dim() == 1 else tensor
        columns = matrix.shape[1]
        if files.is_linear(name) or (everything and name.endswith(".weight")):
            fits = columns % gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]][0] == 0
            used = kind if fits else "Q8_0"
            data, true = gguf_blocks(matrix, used, number)
            data = data.reshape(-1) if tensor.dim() == 1 else data
            tensors[prefix + name] = (data, used)
            truth[name] = true.reshape(tensor.shape)
        else:
            used = "BF16" if everything else "F16"
            tensors[prefix + name] = (tensor.numpy(), used)
            truth[name] = tensor if everything else tensor.half().float()
    return tensors, truth


STOCK = {  # level -> comfy-kitchen's layout, how it is asked, what the host writes of it
    "W4A8": (
        "AsymW4A8Int8Layout",
        {},
        {"format": "asym_w4a8_int8", "group_size": 16, "convrot_groupsize": 256},
    ),
    "W6A8": (
        "AsymW4A8Int8Layout",
        {"bits": 6},
        {"format": "asym_w4a8_int8", "group_size": 16, "convrot_groupsize": 256},
    ),
    "INT4 W4A4": (
        "TensorCoreConvRotW4A4Layout",
        {},
        {"format": "convrot_w4a4", "convrot_groupsize": 256},
    ),
    "NVFP4": ("TensorCoreNVFP4Layout", {}, {"format": "nvfp4"}),
    "MXFP8": ("TensorCoreMXFP8Layout", {}, {"format": "mxfp8"}),
}


def pack_stock(weight: torch.Tensor, level: str) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """``weight`` by comfy-kitchen's own writer, and the values that it decodes to."""
    name, options, said = STOCK[level]
    layout = get_layout_class(name)
    data, params = layout.quantize(weight, **options)
    parts = {
        f"weight{suffix}": value.contiguous()
        for suffix, value in layout.state_dict_tensors(data, params).items()
    }
    values = QuantizedTensor(data, name, params).dequantize()
    return {**parts, "comfy_quant": as_json(said)}, values


def pack_awq(weight: torch.Tensor, group: int = 64) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """AWQ W4A16 by its formula: codes of 0 to 15 above the least of each group, in bf16 scales."""
    grouped = weight.double().unflatten(1, (-1, group))
    least = grouped.amin(2)
    scale = ((grouped.amax(2) - least) / 15).clamp(min=1e-8).bfloat16()
    zeros = (least + 8 * scale.double()).bfloat16()
    wide = [each.double()[..., None] for each in (scale, zeros)]
    codes = ((grouped - wide[1]) / wide[0]).round().add(8).clamp(0, 15)
    values = ((codes - 8) * wide[0] + wide[1]).flatten(1).float()
    codes = codes.flatten(1).to(torch.uint8)
    parts = {
        "weight": (codes[:, 0::2] | codes[:, 1::2] << 4).view(torch.int8),
        "weight_scale": scale.t().contiguous(),
        "weight_zeros": zeros.t().contiguous(),
        "comfy_quant": as_json({"format": "awq_w4a16"}),
    }
    return parts, values


def pack_svdquant(weight: torch.Tensor, rank: int = 16) -> Packed:
    """SVDQuant by its formula: int4 codes, in groups of 64 columns, of what a low rank leaves."""
    smooth = 0.5 + torch.rand(weight.shape[1], generator=torch.Generator().manual_seed(6)).double()
    u, sizes, v = torch.linalg.svd(weight.double(), full_matrices=False)
    up, down = (u[:, :rank] * sizes[:rank]).float(), v[:rank].t().contiguous().float()
    rest = (weight.double() - up.double() @ down.double().t()) * smooth
    grouped = rest.unflatten(1, (-1, 64))
    scale = (grouped.abs().amax(2) / 7).clamp(min=1e-8).float()
    codes = (grouped / scale.double()[..., None]).round().clamp(-8, 7)
    values = (codes * scale.double()[..., None]).flatten(1) / smooth.float().double()
    codes = codes.flatten(1).to(torch.int8) & 15
    parts = {
        "weight": codes[:, 0::2] | codes[:, 1::2] << 4,
        "weight_scale": scale.t().contiguous(),
        "weight_proj_down": down,
        "weight_proj_up": up.contiguous(),
        "weight_smooth_factor": smooth.float(),
        "comfy_quant": as_json({"format": "svdquant_w4a4"}),
    }
    return parts, (values + up.double() @ down.double().t()).float()
