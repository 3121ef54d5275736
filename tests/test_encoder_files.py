"""open_encoder on every layout of text encoder files, against their writers and transformers."""

import json
from pathlib import Path

import gguf
import pytest
import torch
from comfy_kitchen.tensor import QuantizedTensor
from transformers import Qwen3VLTextConfig, Qwen3VLTextModel

from ideogram4_quant.checkpoint import EncoderCheckpoint, open_encoder
from ideogram4_quant.ops.errors import CheckpointError, CorruptFileError, NotIdeogram4Error
from ideogram4_quant.tests import fixtures_files as files
from ideogram4_quant.tests import fixtures_storage as storage

SIZES = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "intermediate_size": 96,
    "vocab_size": 160,
}
ROPE = {"rope_type": "default", "rope_theta": 1234567.0, "mrope_section": [6, 5, 5]}
CONFIG = {**SIZES, "rms_norm_eps": 1e-5, "rope_parameters": {**ROPE, "mrope_interleaved": True}}

# Qwen3-VL's parts that are not the language model
EXTRAS = ("lm_head.weight", "model.visual.blocks.0.attn.qkv.weight", "visual.patch_embed.proj.bias")

# llama.cpp's names, written out once more by hand
LLAMA_CPP = {
    "embed_tokens": "token_embd",
    "norm": "output_norm",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}

State = dict[str, torch.Tensor]


@pytest.fixture
def state() -> State:
    """Random weights by transformers' own names and shapes; values that bf16 holds."""
    with torch.device("meta"):
        model = Qwen3VLTextModel(Qwen3VLTextConfig(**CONFIG))
    generator = torch.Generator().manual_seed(0)
    out = {}
    for name, tensor in model.state_dict().items():
        values = torch.randn(tensor.shape, generator=generator)
        scaled = 1 + 0.1 * values if "norm" in name else values / tensor.shape[-1] ** 0.5
        out[name] = scaled.bfloat16().float()
    return out


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


def check(ck: EncoderCheckpoint, truth: State, ulps: float = 0, quantized: bool = True) -> None:
    loaded = ck.load(dtype=torch.float32)
    assert set(loaded) == set(truth)
    assert list(loaded) == list(ck.shapes())
    for name, tensor in loaded.items():
        dense = tensor.dequantize() if isinstance(tensor, QuantizedTensor) else tensor
        assert isinstance(tensor, QuantizedTensor) == (quantized and files.is_linear(name))
        error = (dense - truth[name]).abs().max()
        assert error <= ulps * 2**-24 * truth[name].abs().max(), (name, float(error))
    half = ck.load()
    assert all(tensor.dtype == torch.bfloat16 for tensor in half.values())


def sizes_of(ck: EncoderCheckpoint) -> dict:
    return {key: ck.config[key] for key in SIZES}


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
    assert (ck.layout, ck.level) == ("Hugging Face", "BF16")
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


def test_nvfp4_is_refused(tmp_path: Path, state: State):
    def pack(weight: torch.Tensor):
        rows, columns = weight.shape
        return {
            "weight": torch.zeros(rows, columns // 2, dtype=torch.uint8),
            "weight_scale": torch.ones(rows, columns // 16).to(torch.float8_e4m3fn),
            "weight_scale_2": torch.ones(()),
            "comfy_quant": storage.as_json({"format": "nvfp4"}),
        }, weight

    stored, _ = pack_all(state, pack, "model.")
    path = files.save(tmp_path / "qwen3vl_8b_nvfp4.safetensors", stored)
    with pytest.raises(CheckpointError, match=r"not supported \(found nvfp4\)\. Use a file in FP8"):
        open_encoder(path)


def llama_cpp_names(state: State) -> dict[str, str]:
    """Our name -> llama.cpp's."""
    names = {}
    for name in state:
        module, parameter = name.rsplit(".", 1)
        if module.startswith("layers."):
            _, number, module = module.split(".", 2)
            names[name] = f"blk.{number}.{LLAMA_CPP[module]}.{parameter}"
        else:
            names[name] = f"{LLAMA_CPP[module]}.{parameter}"
    return names


def gguf_metadata(arch: str) -> dict:
    return {
        f"{arch}.block_count": SIZES["num_hidden_layers"],
        f"{arch}.embedding_length": SIZES["hidden_size"],
        f"{arch}.feed_forward_length": SIZES["intermediate_size"],
        f"{arch}.attention.head_count": SIZES["num_attention_heads"],
        f"{arch}.attention.head_count_kv": SIZES["num_key_value_heads"],
        f"{arch}.attention.key_length": SIZES["head_dim"],
        f"{arch}.attention.layer_norm_rms_epsilon": 2.0**-17,
        f"{arch}.rope.freq_base": 7654321.0,
        f"{arch}.rope.dimension_sections": [6, 5, 5, 0],
        "tokenizer.ggml.tokens": [f"t{i}" for i in range(SIZES["vocab_size"])],
    }


def test_llama_cpp_names_are_those_of_gguf_py(state: State):
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN3VL, SIZES["num_hidden_layers"])
    for ours, theirs in llama_cpp_names(state).items():
        assert names.get_name(f"model.{ours}", try_suffixes=(".weight",)) == theirs


@pytest.mark.parametrize("arch", ["qwen3vl", "qwen3"])
@pytest.mark.parametrize("stated", [True, False])
def test_llama_cpp_gguf(tmp_path: Path, state: State, arch: str, stated: bool):
    tensors, truth = {"output.weight": (torch.ones(160, 64).numpy(), "F16")}, {}
    for number, (name, theirs) in enumerate(llama_cpp_names(state).items()):
        if state[name].dim() == 2:
            data, truth[name] = storage.gguf_blocks(state[name], "Q8_0", number)
            tensors[theirs] = (data, "Q8_0")
        else:
            tensors[theirs] = (state[name].numpy(), "F32")
            truth[name] = state[name]
    metadata = gguf_metadata(arch) if stated else {}
    path = files.write_gguf_py(tmp_path / "te.gguf", tensors, metadata, arch=arch)
    ck = open_encoder(path)
    assert (ck.layout, ck.level) == ("llama.cpp GGUF", "Q8_0")
    assert sizes_of(ck) == SIZES
    if stated:
        assert ck.config["rope_theta"] == 7654321.0
        assert ck.config["mrope_section"] == [6, 5, 5]
        assert ck.config["rms_norm_eps"] == 2.0**-17
    check(ck, truth)


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


def test_a_real_header_opens_at_once(tmp_path: Path):
    """8 B parameters as holes, the whole vocabulary in the metadata."""
    shapes = {"token_embd.weight": (151_936, 4096), "output_norm.weight": (4096,)}
    for i in range(36):
        for name, shape in {
            "attn_norm": (4096,),
            "ffn_norm": (4096,),
            "attn_q_norm": (128,),
            "attn_k_norm": (128,),
            "attn_q": (4096, 4096),
            "attn_k": (1024, 4096),
            "attn_v": (1024, 4096),
            "attn_output": (4096, 4096),
            "ffn_gate": (12288, 4096),
            "ffn_up": (12288, 4096),
            "ffn_down": (4096, 12288),
        }.items():
            shapes[f"blk.{i}.{name}.weight"] = shape
    metadata = {
        "tokenizer.ggml.tokens": [f"token{i}" for i in range(151_936)],
        "tokenizer.ggml.merges": [f"to ken{i}" for i in range(151_387)],
        "qwen3vl.rope.dimension_sections": [24, 20, 20, 0],
    }
    path = tmp_path / "Qwen3VL-8B-Q8_0.gguf"
    files.write_sparse_gguf(path, shapes, metadata, arch="qwen3vl")
    ck = open_encoder(path)
    assert (ck.config["hidden_size"], ck.config["num_attention_heads"]) == (4096, 32)
    assert ck.config["mrope_section"] == [24, 20, 20]
    assert len(ck.shapes()) == 2 + 11 * 36
    assert files.cpu_time(lambda: open_encoder(path)) < 0.3
