"""Model files written by independent code: the safetensors library, gguf-py, and bytes by hand.

Nothing here uses the package's own readers or writers, so that a shared mistake cannot hide.
"""

from __future__ import annotations

import json
import os
from functools import cache
from pathlib import Path

import gguf
import numpy as np
import torch
from diffusers import Ideogram4Transformer2DModel
from safetensors.torch import save_file


def write_gguf_py(
    path: Path,
    tensors: dict[str, tuple[np.ndarray, str]],
    metadata: dict[str, object] | None = None,
    *,
    arch: str | None = "ideogram4",
) -> Path:
    """A GGUF file by gguf-py: name -> (array, type name); uint8 arrays are blocks already."""
    writer = gguf.GGUFWriter(str(path), arch or "none")
    if arch is None:
        del writer.kv_data[0]["general.architecture"]
    for key, value in (metadata or {}).items():
        add_gguf_value(writer, key, value)
    for name, (array, kind) in tensors.items():
        qtype = gguf.GGMLQuantizationType[kind]
        if array.dtype == np.uint8:
            writer.add_tensor(name, array, raw_dtype=qtype)
        elif kind in ("F32", "F16"):
            dtype = np.float32 if kind == "F32" else np.float16
            writer.add_tensor(name, array.astype(dtype))
        else:
            writer.add_tensor(name, gguf.quants.quantize(array, qtype), raw_dtype=qtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add_gguf_value(writer: gguf.GGUFWriter, key: str, value: object) -> None:
    """bool, int, float, str or list with the type that gguf-py chooses for it."""
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


def write_sparse_gguf(
    path: Path,
    shapes: dict[str, tuple[int, ...]],
    metadata: dict[str, object] | None = None,
    *,
    arch: str = "ideogram4",
) -> int:
    """A GGUF file of Q8_0 tensors whose data are holes: a real header, no disk space. Its size."""
    writer = gguf.GGUFWriter(str(path), arch)
    for key, value in (metadata or {}).items():
        add_gguf_value(writer, key, value)
    qtype = gguf.GGMLQuantizationType.Q8_0
    total = 0
    for name, shape in shapes.items():
        row = gguf.quants.quant_shape_to_byte_shape(shape, qtype)
        nbytes = int(np.prod(row))
        writer.add_tensor_info(name, row, np.dtype(np.uint8), nbytes, raw_dtype=qtype)
        total += nbytes + -nbytes % 32
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    size = os.path.getsize(path)
    size += -size % 32 + total
    os.truncate(path, size)
    return size


# --- a small Ideogram 4 ---------------------------------------------------------------------------

CONFIG = {
    "in_channels": 32,
    "num_layers": 2,
    "attention_head_dim": 32,
    "num_attention_heads": 2,
    "intermediate_size": 128,
    "adaln_dim": 64,
    "llm_features_dim": 96,
    "rope_theta": 5_000_000,
    "mrope_section": [24, 20, 20],
    "norm_eps": 1e-5,
}
HIDDEN = 64
# One layer whose rows fill the super-blocks of K quants and the rotation's groups of 256
WIDE = {
    "num_layers": 1,
    "attention_head_dim": 128,
    "intermediate_size": 512,
    "adaln_dim": 256,
}


@cache
def _shapes(**changes: int) -> dict[str, tuple[int, ...]]:
    """diffusers' names and shapes, from diffusers' own class."""
    with torch.device("meta"):
        model = Ideogram4Transformer2DModel(**{**CONFIG, **changes})
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def split_model(seed: int = 0, **changes: int) -> dict[str, torch.Tensor]:
    """Random weights by diffusers' names: values that bf16 holds, outliers, a row of zeros."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, shape in _shapes(**changes).items():
        values = torch.randn(shape, generator=generator)
        if "norm" in name:
            values = 1 + 0.1 * values
        elif len(shape) == 2:
            values = values / shape[1] ** 0.5
            values[shape[0] // 2] = 0
            values[0, :3] *= 50
        state[name] = values.bfloat16().float()
    return state


def fuse(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """diffusers' names to canonical ones: q, k, v as rows of one weight."""
    out = {}
    for name, tensor in state.items():
        if ".to_q." in name:
            parts = [state[name.replace(".to_q.", f".to_{part}.")] for part in "qkv"]
            out[name.replace(".to_q.", ".qkv.")] = torch.cat(parts)
        elif ".to_out.0." in name:
            out[name.replace(".to_out.0.", ".o.")] = tensor
        elif ".to_k." not in name and ".to_v." not in name:
            out[name] = tensor
    return out


def model(seed: int = 0, **changes: int) -> dict[str, torch.Tensor]:
    """Random weights by canonical names."""
    return fuse(split_model(seed, **changes))


def is_linear(name: str) -> bool:
    """By exclusion, other than the package does it: matrices but the one embedding."""
    module = name.rsplit(".", 1)[0].rsplit(".", 1)[-1]
    return name.endswith(".weight") and module in {
        *("qkv", "o", "to_q", "to_k", "to_v", "0", "w1", "w2", "w3", "adaln_modulation", "linear"),
        *("input_proj", "llm_cond_proj", "mlp_in", "mlp_out", "adaln_proj"),
        *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    }


def linears(state: dict[str, torch.Tensor]) -> set[str]:
    """The names of the weights of linears."""
    return {name for name in state if is_linear(name)}


def save(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None):
    """A safetensors file by the safetensors library."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({k: v.contiguous() for k, v in tensors.items()}, path, metadata=metadata)
    return path


def save_folder(path: Path, stored: dict[str, torch.Tensor]) -> Path:
    """A diffusers model folder in two shards with an index."""
    names = sorted(stored)
    shards = [names[::2], names[1::2]]
    index = {}
    for number, part in enumerate(shards, 1):
        file = f"diffusion_pytorch_model-{number:05d}-of-00002.safetensors"
        save(path / file, {name: stored[name] for name in part})
        index |= dict.fromkeys(part, file)
    text = json.dumps({"metadata": {"total_size": 1}, "weight_map": index})
    (path / "diffusion_pytorch_model.safetensors.index.json").write_text(text)
    values = {"_class_name": "Ideogram4Transformer2DModel", **CONFIG}
    (path / "config.json").write_text(json.dumps(values))
    return path
