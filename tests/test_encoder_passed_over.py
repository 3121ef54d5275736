"""Text encoders: what is beside a weight, or told of it, and configs of other models."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch

from ideogram4_quant.checkpoint import open_encoder
from ideogram4_quant.errors import CheckpointError, CorruptFileError, NotIdeogram4Error
from ideogram4_quant.tests import encoder_weights
from ideogram4_quant.tests import fixtures_files as files
from ideogram4_quant.tests import fixtures_storage as storage
from ideogram4_quant.tests.encoder_weights import CONFIG, SIZES, check, sizes_of
from ideogram4_quant.tests.fixtures_passed_over import SIBLINGS, conf, rotated
from ideogram4_quant.tests.llama_cpp_names import llama_cpp_name

MODULE = "layers.1.mlp.up_proj"  # [96, 64]


@pytest.fixture
def state() -> storage.State:
    return encoder_weights.random_weights()


def pack_all(state, pack, prefix="model.") -> tuple[storage.State, storage.State]:
    stored, truth = {}, dict(state)
    for name, tensor in state.items():
        if files.is_linear(name):
            parts, truth[name] = pack(tensor)
            module = prefix + name.removesuffix(".weight")
            stored |= {f"{module}.{suffix}": value for suffix, value in parts.items()}
        else:
            stored[prefix + name] = tensor.bfloat16()
    return stored, truth


def refused(path: Path, *words: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        open_encoder(path)
    for word in (*words,):
        assert word in str(caught.value)
    assert "incomplete or damaged" not in str(caught.value)


# ---- tensors and descriptions


@pytest.mark.parametrize("kind", ["int8", "fp8"])
@pytest.mark.parametrize("suffix", SIBLINGS)
def test_a_tensor_that_is_not_understood(tmp_path, state, suffix, kind):
    pack = storage.pack_fp8 if kind == "fp8" else lambda w: storage.pack_comfy_int8(w, None)
    stored, _ = pack_all(state, pack)
    stored[f"model.{MODULE}.{suffix}"] = SIBLINGS[suffix]
    path = files.save(tmp_path / "te.safetensors", stored)
    refused(path, f"{MODULE}.{suffix}", "not supported")


def test_sdnq(tmp_path, state):
    def pack(weight):
        parts, _ = storage.pack_fp8(weight)
        return {"weight": parts["weight"], "scale": parts["weight_scale"][:, None]}, weight

    stored, _ = pack_all(state, pack)
    refused(files.save(tmp_path / "te.safetensors", stored), ".scale", "SDNQ")


@pytest.mark.parametrize("end", ["weight._data", "_weight_qdata", "qweight", "weight_packed"])
def test_formats_that_name_the_weight_otherwise(tmp_path, state, end):
    stored, _ = pack_all(state, lambda w: ({end: torch.ones(8)}, w))
    refused(files.save(tmp_path / "te.safetensors", stored), end, "not supported")


@pytest.mark.parametrize(
    ("prefix", "named"),
    [("model.", ""), ("", "model."), ("model.language_model.", "model."), ("model.", "model.")],
)
def test_a_description_is_found_whatever_stands_before_its_name(tmp_path, state, prefix, named):
    stored, truth = pack_all(state, lambda w: rotated(w, 16), prefix)
    modules = [
        key.removeprefix(prefix).removesuffix(".weight_scale")
        for key in stored
        if key.endswith(".weight_scale")
    ]
    stored |= {"lm_head.weight": torch.ones(4, 4), "visual.blocks.0.mlp.fc.weight": torch.ones(4)}
    layers = {named + module: conf(16) for module in modules}
    layers |= {"lm_head": {"format": "float8_e4m3fn"}, "model.visual.blocks.0.mlp.fc": {}}
    metadata = {"_quantization_metadata": json.dumps({"layers": layers})}
    ck = open_encoder(files.save(tmp_path / "te.safetensors", stored, metadata))
    assert ck.level == "INT8 W8A8 rotated"
    check(ck, truth, ulps=16)
    layers["layers.5.mlp.up_proj"] = conf(16)
    metadata = {"_quantization_metadata": json.dumps({"layers": layers})}
    refused(files.save(tmp_path / "te.safetensors", stored, metadata), "layers.5.mlp.up_proj")


@pytest.mark.parametrize(
    "config",
    [
        {"quant_method": "sdnq"},
        {"quant_method": "compressed-tensors", "transform_config": {"R1": {"type": "hadamard"}}},
    ],
)
@pytest.mark.parametrize("nested", [True, False])
def test_quantization_config_of_a_folder(tmp_path, state, config, nested):
    stored, _ = pack_all(state, storage.pack_fp8, "model.language_model.")
    files.save(tmp_path / "model.safetensors", stored)
    text = {"model_type": "qwen3_vl_text", **CONFIG}
    values = {"model_type": "qwen3_vl", "text_config": text} if nested else text
    (tmp_path / "config.json").write_text(json.dumps({**values, "quantization_config": config}))
    refused(tmp_path, "transform_config" if "transform_config" in config else "sdnq")


# ---- another model's config, another model


def beside(tmp_path: Path, state, values: dict, name: str = "te.safetensors") -> Path:
    (tmp_path / "config.json").write_text(json.dumps(values))
    return files.save(tmp_path / name, state)


OTHERS = {
    "plain Qwen3 of these sizes": {"model_type": "qwen3", **SIZES, "rope_theta": 1e6},
    "a smaller Qwen3-VL": {"model_type": "qwen3_vl_text", **CONFIG, "hidden_size": 32},
    "a whole smaller Qwen3-VL": {
        "model_type": "qwen3_vl",
        "text_config": {"model_type": "qwen3_vl_text", **CONFIG, "intermediate_size": 48},
    },
    "T5": {"model_type": "t5", "d_model": 4096},
}


@pytest.mark.parametrize("case", OTHERS)
def test_a_config_of_another_model_beside_a_file(tmp_path, state, caplog, case):
    """Its rotary base, a million instead of five, would be used without a sign."""
    with caplog.at_level(logging.WARNING):
        ck = open_encoder(beside(tmp_path, state, OTHERS[case]))
    assert sizes_of(ck) == SIZES
    assert ck.config["rope_theta"] == 5_000_000.0
    assert ck.config["mrope_section"] == [24, 20, 20]
    assert "is of another model" in caplog.text
    assert "config.json" in caplog.text


@pytest.mark.parametrize("case", OTHERS)
def test_a_folder_of_another_model(tmp_path, state, case):
    beside(tmp_path, state, OTHERS[case], "model.safetensors")
    with pytest.raises(NotIdeogram4Error, match=r"config\.json") as caught:
        open_encoder(tmp_path)
    said = str(caught.value)
    assert any(w in said for w in ("model_type", "hidden_size 32", "intermediate_size 48"))


def test_layers_that_are_missing_are_not_another_model(tmp_path, state):
    values = {"model_type": "qwen3_vl_text", **CONFIG, "num_hidden_layers": 3}
    with pytest.raises(CorruptFileError, match="num_hidden_layers"):
        open_encoder(beside(tmp_path, state, values))


def gguf(tmp_path: Path, state, arch: str, metadata: dict) -> Path:
    tensors = {
        llama_cpp_name(name): (t.numpy(), "F32" if t.dim() == 1 else "F16")
        for name, t in state.items()
    }
    return files.write_gguf_py(tmp_path / "te.gguf", tensors, metadata, arch=arch)


@pytest.mark.parametrize(
    ("arch", "metadata", "word"),
    [
        ("qwen3", {"qwen3.rope.freq_base": 1_000_000.0}, "freq_base 1000000"),
        ("llama", {"llama.rope.freq_base": 500_000.0}, "general.architecture llama"),
        ("qwen2vl", {"qwen2vl.rope.dimension_sections": [16, 24, 24, 0]}, "qwen2vl"),
        ("gemma3", {}, "gemma3"),
    ],
)
def test_gguf_of_another_language_model(tmp_path, state, arch, metadata, word):
    with pytest.raises(NotIdeogram4Error, match=word):
        open_encoder(gguf(tmp_path, state, arch, metadata))


def test_gguf_that_was_called_qwen3(tmp_path, state, caplog):
    ck = open_encoder(gguf(tmp_path, state, "qwen3", {"qwen3.rope.freq_base": 5_000_000.0}))
    assert ck.config["rope_theta"] == 5_000_000.0
    assert not caplog.records
    open_encoder(gguf(tmp_path, state, "qwen3", {}))
    assert "qwen3vl" in caplog.text


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda s: [s.pop(name) for name in list(s) if "_norm.weight" in name], "q_norm"),
        (lambda s: s.update({"layers.0.self_attn.q_proj.bias": torch.ones(128)}), "q_proj.bias"),
        (
            lambda s: s.update({"layers.1.pre_feedforward_layernorm.weight": torch.ones(64)}),
            "pre_feedforward_layernorm",
        ),
        (lambda s: s.update({"layers.1.mlp.experts.0.up_proj.weight": torch.ones(4)}), "experts"),
    ],
)
def test_other_language_models_are_not_called_damaged(tmp_path, state, change, word):
    change(state)
    with pytest.raises(NotIdeogram4Error, match=word):
        open_encoder(files.save(tmp_path / "te.safetensors", state))


@pytest.mark.parametrize(
    "key",
    [
        f"quant.{MODULE}.svd_up",
        f"language_model.{MODULE}.weight_zero_point",
        f"lora_te_{MODULE.replace('.', '_')}.lora_up.weight",
    ],
)
def test_a_tensor_of_a_weight_under_another_prefix(tmp_path, state, key):
    stored, _ = pack_all(state, storage.pack_fp8)
    stored[key] = torch.rand(96, 4)
    refused(files.save(tmp_path / "te.safetensors", stored), key, "not supported")


def test_another_model_with_the_same_modules(tmp_path, state):
    stored, _ = pack_all(state, storage.pack_fp8)
    others, _ = pack_all(state, storage.pack_fp8, "other.model.")
    assert open_encoder(files.save(tmp_path / "te.safetensors", stored | others)).level == "FP8"
