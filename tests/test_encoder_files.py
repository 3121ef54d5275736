"""open_encoder on every layout of safetensors files, and what it refuses."""

import json
from pathlib import Path

import pytest
import torch
from transformers import Qwen3VLTextConfig, Qwen3VLTextModel

from ideogram4_quant.checkpoint import open_encoder
from ideogram4_quant.errors import CorruptFileError, NotIdeogram4Error
from ideogram4_quant.tests import encoder_weights
from ideogram4_quant.tests import fixtures_files as files
from ideogram4_quant.tests import fixtures_storage as storage
from ideogram4_quant.tests.encoder_weights import CONFIG, SIZES, check, sizes_of
from ideogram4_quant.tests.fixtures_storage import State

# Qwen3-VL's parts that are not the language model
EXTRAS = ("lm_head.weight", "model.visual.blocks.0.attn.qkv.weight", "visual.patch_embed.proj.bias")


@pytest.fixture
def state() -> State:
    return encoder_weights.random_weights()


def with_extras(stored: State) -> State:
    return stored | {name: torch.ones(4, 4) for name in EXTRAS}


def pack_all(state: State, pack, prefix: str, also=()) -> tuple[State, State]:
    """(stored, truth): linears packed, and the tensors of ``also``."""
    stored, truth = {}, dict(state)
    for name, tensor in state.items():
        if files.is_linear(name) or name in also:
            parts, truth[name] = pack(tensor)
            module = prefix + name.removesuffix(".weight")
            stored |= {f"{module}.{suffix}": value for suffix, value in parts.items()}
        else:
            stored[prefix + name] = tensor.bfloat16()
    return stored, truth


def hf_folder(path: Path, stored: State, *, nested: bool) -> Path:
    """As save_pretrained leaves it: one file, config.json."""
    files.save(path / "model.safetensors", stored)
    text = {"model_type": "qwen3_vl_text", **CONFIG}
    values = {"model_type": "qwen3_vl", "text_config": text} if nested else text
    (path / "config.json").write_text(json.dumps(values))
    return path


@pytest.mark.parametrize("nested", [True, False])
def test_hugging_face_folder(tmp_path: Path, state: State, nested: bool):
    prefix = "model.language_model."
    stored = with_extras({prefix + k: v.bfloat16() for k, v in state.items()})
    ck = open_encoder(hf_folder(tmp_path, stored, nested=nested))
    assert (ck.origin, ck.level) == ("Hugging Face", "BF16")
    assert sizes_of(ck) == SIZES
    assert ck.config["rope_theta"] == 1234567.0
    assert ck.config["mrope_section"] == [6, 5, 5]
    assert ck.config["rms_norm_eps"] == 1e-5
    assert ck.size == (tmp_path / "model.safetensors").stat().st_size
    check(ck, state, quantized=False)


def test_config_makes_the_same_model(tmp_path: Path, state: State):
    """transformers' config class takes it, rotary table and all."""
    ck = open_encoder(hf_folder(tmp_path, state, nested=False))
    config = Qwen3VLTextConfig(**ck.config)
    oracle = Qwen3VLTextConfig(**CONFIG)
    assert config.rope_parameters == oracle.rope_parameters
    model = Qwen3VLTextModel(config)
    model.load_state_dict(ck.load(dtype=torch.float32))
    other = Qwen3VLTextModel(oracle)
    other.load_state_dict(state)
    ids = torch.arange(7)[None]
    with torch.no_grad():
        assert torch.equal(
            model(input_ids=ids).last_hidden_state, other(input_ids=ids).last_hidden_state
        )


def test_older_rope_scaling(tmp_path: Path, state: State):
    files.save(tmp_path / "model.safetensors", state)
    values = {"model_type": "qwen3_vl_text", **SIZES, "rope_theta": 777.0}
    values["rope_scaling"] = {"rope_type": "default", "mrope_section": [8, 4, 4]}
    (tmp_path / "config.json").write_text(json.dumps(values))
    config = open_encoder(tmp_path).config
    assert (config["rope_theta"], config["mrope_section"]) == (777.0, [8, 4, 4])


@pytest.mark.parametrize(
    "prefix",
    [
        "",
        "model.",
        "model.language_model.",
        "language_model.",
        "language_model.model.",
        "text_encoders.qwen3vl_8b.transformer.model.",
    ],
)
def test_single_file_with_any_prefix(tmp_path: Path, state: State, prefix: str):
    path = files.save(
        tmp_path / "te.safetensors", with_extras({prefix + k: v for k, v in state.items()})
    )
    ck = open_encoder(path)
    assert sizes_of(ck) == SIZES  # off the shapes
    assert ck.config["rope_theta"] == 5_000_000.0
    assert ck.config["mrope_section"] == [24, 20, 20]
    check(ck, state, quantized=False)


def test_pipeline_folder_with_shards_and_tokenizer(tmp_path: Path, state: State):
    folder = tmp_path / "text_encoder"
    names = sorted(state)
    index = {}
    for number, part in enumerate((names[::2], names[1::2]), 1):
        file = f"model-{number:05d}-of-00002.safetensors"
        files.save(folder / file, {f"language_model.{name}": state[name] for name in part})
        index |= {f"language_model.{name}": file for name in part}
    text = json.dumps({"weight_map": index})
    (folder / "model.safetensors.index.json").write_text(text)
    assert open_encoder(tmp_path).tokenizer_dir is None
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "tokenizer.json").write_text("{}")
    for path in (tmp_path, folder):
        ck = open_encoder(path)
        assert ck.tokenizer_dir == tmp_path / "tokenizer"
        assert len(ck.paths) == 2
    check(ck, state, quantized=False)
    (folder / "tokenizer.json").write_text("{}")
    assert open_encoder(folder).tokenizer_dir == folder


@pytest.mark.parametrize("per_row", [True, False])
def test_fp8(tmp_path: Path, state: State, per_row: bool):
    """Weight-only fp8; the embedding too, which comes out dense."""
    stored, truth = pack_all(
        state,
        lambda w: storage.pack_fp8(w, per_row=per_row),
        "model.language_model.",
        also=["embed_tokens.weight"],
    )
    ck = open_encoder(files.save(tmp_path / "te.safetensors", with_extras(stored)))
    assert ck.level == "FP8"
    check(ck, truth)


def test_comfy_fp8_scaled(tmp_path: Path, state: State):
    def pack(weight: torch.Tensor):
        parts, truth = storage.pack_fp8(weight, per_row=False)
        return parts | {"comfy_quant": storage.as_json({"format": "float8_e4m3fn"})}, truth

    stored, truth = pack_all(state, pack, "model.")
    check(open_encoder(files.save(tmp_path / "te.safetensors", stored)), truth)


def test_comfy_int8_convrot(tmp_path: Path, state: State):
    """The embedding in rotated int8 as well."""
    stored, truth = pack_all(
        state,
        lambda w: storage.pack_comfy_int8(w, 16),
        "model.",
        also=["embed_tokens.weight"],
    )
    ck = open_encoder(files.save(tmp_path / "te.safetensors", stored))
    assert ck.level == "INT8 W8A8 rotated"
    check(ck, truth, ulps=16)


@pytest.mark.parametrize("level", ["NVFP4", "MXFP8"])
def test_the_hosts_small_floats(tmp_path: Path, state: State, level: str):
    """qwen3vl_8b_nvfp4 is such a file."""
    stored, truth = pack_all(state, lambda w: storage.pack_stock(w, level), "model.")
    ck = open_encoder(files.save(tmp_path / f"qwen3vl_8b_{level}.safetensors", stored))
    assert ck.level == level
    check(ck, truth, ulps=1)


def test_without_final_norm(tmp_path: Path, state: State):
    del state["norm.weight"]
    check(open_encoder(files.save(tmp_path / "te.safetensors", state)), state, quantized=False)


def test_missing_tensor(tmp_path: Path, state: State):
    del state["layers.1.mlp.up_proj.weight"]
    ck = open_encoder(files.save(tmp_path / "te.safetensors", state))
    with pytest.raises(CorruptFileError, match=r"1 tensors .*layers\.1\.mlp\.up_proj\.weight"):
        ck.load()


@pytest.mark.parametrize("change", [{"num_hidden_layers": 3}, {"head_dim": 16}, {"vocab_size": 9}])
def test_config_of_another_model(tmp_path: Path, state: State, change: dict):
    hf_folder(tmp_path, state, nested=False)
    values = {"model_type": "qwen3_vl_text", **CONFIG, **change}
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(CorruptFileError, match=next(iter(change))):
        open_encoder(tmp_path)


def test_config_of_something_else_is_not_read(tmp_path: Path, state: State):
    files.save(tmp_path / "te.safetensors", state)
    values = {"_class_name": "Ideogram4Transformer2DModel", "num_layers": 34, "hidden_size": 1}
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert sizes_of(open_encoder(tmp_path / "te.safetensors")) == SIZES


def test_other_files(tmp_path: Path):
    path = files.save(tmp_path / "dit.safetensors", files.model())
    with pytest.raises(NotIdeogram4Error, match="no Qwen3-VL text encoder"):
        open_encoder(path)
    tensors = {"v.blk.0.attn_q.weight": (torch.ones(2, 2).numpy(), "F32")}
    path = files.write_gguf_py(tmp_path / "mmproj.gguf", tensors, arch="clip")
    with pytest.raises(NotIdeogram4Error, match="mmproj"):
        open_encoder(path)
