"""Small good files of every kind, from which the fuzzer and the corpus start."""

from __future__ import annotations

import json
import zlib
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from ideogram4_quant.checkpoint import ModelConfig, write_safetensors
from ideogram4_quant.checkpoint.canonical import canonical_shapes, is_linear
from ideogram4_quant.checkpoint.encoders import encoder_shapes
from ideogram4_quant.gguf_loader import TYPE_NUMBERS, write_gguf
from ideogram4_quant.tests.llama_cpp_names import llama_cpp_name

CONFIG = ModelConfig(
    in_channels=8,
    num_layers=1,
    attention_head_dim=8,
    num_attention_heads=2,
    intermediate_size=32,
    adaln_dim=8,
    llm_features_dim=8,
    mrope_section=(2, 1, 1),
)
ENCODER = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "head_dim": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 1,
    "vocab_size": 8,
}


def transformer(part: int | None = None) -> dict[str, Tensor]:
    """The weights of a transformer with one layer, or one half of them."""
    names = list(canonical_shapes(CONFIG).items())
    chosen = names if part is None else names[part::2]
    return {name: torch.zeros(shape, dtype=torch.bfloat16) for name, shape in chosen}


def encoder() -> dict[str, Tensor]:
    """The weights of a text encoder with one layer."""
    shapes = encoder_shapes(ENCODER)
    return {f"model.{name}": torch.zeros(shape).bfloat16() for name, shape in shapes.items()}


def int8() -> dict[str, Tensor]:
    """ComfyUI's container: int8, a scale a row, a description, one weight rotated."""
    state: dict[str, Tensor] = {}
    for name, tensor in transformer().items():
        if not is_linear(name) or not name.startswith("layers."):
            state[name] = tensor
            continue
        module = name.removesuffix(".weight")
        conf = {"format": "int8_tensorwise"}
        if ".attention.o" in name:
            conf |= {"convrot": True, "convrot_groupsize": 16}
        state[name] = tensor.to(torch.int8)
        state[f"{module}.weight_scale"] = torch.ones(len(tensor), 1)
        state[f"{module}.comfy_quant"] = text(conf)
    return state


def folded() -> dict[str, Tensor]:
    """Smoothing before w2 and before attention.o, this one rotated too."""
    return transformer() | {
        "fold.layers.0.feed_forward.w2.smooth": torch.ones(32),
        "fold.layers.0.attention.o.smooth": torch.ones(16),
        "fold.layers.0.attention.o.rotation": torch.tensor([4], dtype=torch.int32),
    }


def nf4() -> dict[str, Tensor]:
    """One linear in NF4 with double quantization, the rest in floats."""
    state = transformer()
    rows, columns = state.pop("adaln_proj.weight").shape
    description = {
        "quant_type": "nf4",
        "blocksize": 64,
        "shape": [rows, columns],
        "nested_blocksize": 256,
        "nested_offset": 0.5,
    }
    parts = {
        "weight": torch.zeros(rows * columns // 2, 1, dtype=torch.uint8),
        "weight.absmax": torch.zeros(rows * columns // 64, dtype=torch.uint8),
        "weight.quant_map": torch.linspace(-1, 1, 16),
        "weight.nested_absmax": torch.ones(1),
        "weight.nested_quant_map": torch.linspace(-1, 1, 256),
        "weight.quant_state.bitsandbytes__nf4": text(description),
    }
    return state | {f"adaln_proj.{suffix}": tensor for suffix, tensor in parts.items()}


def lora() -> dict[str, Tensor]:
    """Two spellings of one LoRA."""
    return {
        "diffusion_model.layers.0.attention.qkv.lora_A.weight": torch.zeros(2, 16),
        "diffusion_model.layers.0.attention.qkv.lora_B.weight": torch.zeros(48, 2),
        "transformer.layers.0.attention.to_out.0.lora_down.weight": torch.zeros(2, 16),
        "transformer.layers.0.attention.to_out.0.lora_up.weight": torch.zeros(16, 2),
        "transformer.layers.0.attention.to_out.0.alpha": torch.ones(()),
    }


def calibration(path: Path) -> Path:
    """Statistics of two linears over three steps."""
    from ideogram4_quant.quant import Calibration, LayerStats, Run

    stats = replace(
        LayerStats.of(torch.ones(2, 8), torch.ones(4, 8)),
        peaks=torch.ones(3, 3).double(),
        signal=torch.ones(3).double(),
        noise={"int8": torch.ones(3).double()},
    )
    run = Run({"conditional": "aa"}, "bb", 2, (0, 1), 4, 64, 64, {"torch": "2"})
    layers = {f"conditional.layers.0.attention.{name}": stats for name in ("qkv", "o")}
    Calibration(layers, (0.0, 0.5, 0.9), (run,)).save(path)
    return path


def text(value: object) -> Tensor:
    """JSON as a uint8 tensor."""
    return torch.tensor(list(json.dumps(value).encode()), dtype=torch.uint8)


def gguf(path: Path) -> Path:
    """A transformer as GGUF: Q8_0 where rows allow it, with metadata of several types."""
    tensors = []
    for name, tensor in transformer().items():
        blocks = tensor.ndim == 2 and tensor.shape[1] % 32 == 0
        kind = "Q8_0" if blocks else "F32"
        size = tensor.numel() // 32 * 34
        data = torch.zeros(size, dtype=torch.uint8) if blocks else tensor.float()
        tensors.append((name, tuple(tensor.shape), TYPE_NUMBERS[kind], data))
    metadata = {
        "general.architecture": "ideogram4",
        "general.alignment": 32,
        "ideogram4.config": json.dumps(CONFIG.to_dict()),
        "a.list": [1, 2, 3],
        "a.texts": ["one", "two"],
        "a.number": 0.5,
    }
    write_gguf(path, tensors, metadata)
    return path


def encoder_gguf(path: Path) -> Path:
    """A text encoder by llama.cpp's names."""
    tensors = [
        (llama_cpp_name(name), shape, TYPE_NUMBERS["F32"], torch.zeros(shape))
        for name, shape in encoder_shapes(ENCODER).items()
    ]
    sections = [24, 20, 20, 0]
    metadata = {"general.architecture": "qwen3vl", "qwen3vl.rope.dimension_sections": sections}
    write_gguf(path, tensors, metadata)
    return path


def write_all(folder: Path) -> dict[str, Path]:
    """Name -> file, one of every kind."""
    found = {
        "gguf": gguf(folder / "good.gguf"),
        "gguf encoder": encoder_gguf(folder / "encoder.gguf"),
    }
    metadata = {"config": json.dumps(CONFIG.to_dict()), "model_type": "ideogram4_cond"}
    for name, state in (
        ("bf16", transformer()),
        ("int8", int8()),
        ("nf4", nf4()),
        ("folded", folded()),
        ("encoder", encoder()),
        ("lora", lora()),
    ):
        found[name] = folder / f"{name}.safetensors"
        write_safetensors(found[name], state, metadata if name == "bf16" else None)
    return found


def record() -> bytes:
    """What an unfinished file of zeros tells: one of its two parts is done, and a note."""
    lines = (
        {"size": 16, "fingerprint": "fingerprint"},
        {"part": "first", "crc": zlib.crc32(bytes(8))},
        {"note": "smoothed", "value": [1, 2]},
    )
    return b"".join(json.dumps(line).encode() + b"\n" for line in lines)


def inputs(folder: Path) -> dict[str, bytes]:
    """The fuzzer's first corpus: name -> input."""
    from ideogram4_quant.tests.fuzz.targets import join, number, split

    files = write_all(folder)
    first = {name: bytes([number(name)]) for name in ("gguf", "safetensors", "header", "lora")}
    found = {
        "gguf": first["gguf"] + files["gguf"].read_bytes(),
        "gguf-encoder": first["gguf"] + files["gguf encoder"].read_bytes(),
        "lora": first["lora"] + join(*split(files["lora"])),
    }
    for name in ("bf16", "int8", "nf4", "folded", "encoder"):
        found[f"safetensors-{name}"] = first["safetensors"] + files[name].read_bytes()
        found[f"header-{name}"] = first["header"] + join(*split(files[name]))
    statistics = split(calibration(folder / "calibration.safetensors"))
    found["calibration"] = bytes([number("calibration")]) + join(*statistics)
    found["cached"] = bytes([number("cached")]) + join(*split(files["bf16"]))
    entry = {"op": "gguf_linear", "n": 64, "k": 32, "tokens": 512, "dtype": "bfloat16"}
    entry |= {
        "detail": "Q4_K",
        "estimated": [],
        "seconds": {"w8a8": 0.5, "dense": 1},
        "errors": {"w8a8": 1e-3},
    }
    measured = json.dumps({"about": {}, "measurements": [entry]}).encode()
    found["choices"] = bytes([number("choices")]) + measured
    found["unfinished"] = bytes([number("unfinished")]) + record()
    row = {"prompt": '{"high_level_description": "a \\"sign\\""}', "seed": 1, "text": "sign"}
    found["prompts"] = bytes([number("prompts")]) + json.dumps(row | {"width": 64}).encode()
    shards = [f"m-{i + 1:05d}-of-00002.safetensors" for i in (0, 1)]
    weight_map = {name: shards[part] for part in (0, 1) for name in transformer(part)}
    found["index"] = bytes([number("index")]) + json.dumps({"weight_map": weight_map}).encode()
    config = {"model_type": "qwen3_vl", "text_config": {**ENCODER, "model_type": "qwen3_vl_text"}}
    config["text_config"]["rope_scaling"] = {"rope_theta": 5e6, "mrope_section": [2, 1, 1]}
    found["config"] = bytes([number("config")]) + json.dumps(config).encode()
    return found
