"""open_encoder on text encoders as llama.cpp stores them, against gguf-py."""

from pathlib import Path

import gguf
import pytest
import torch

from ideogram4_quant.checkpoint import open_encoder
from ideogram4_quant.tests import encoder_weights
from ideogram4_quant.tests import fixtures_files as files
from ideogram4_quant.tests import fixtures_storage as storage
from ideogram4_quant.tests.encoder_weights import SIZES, check, sizes_of
from ideogram4_quant.tests.fixtures_storage import State
from ideogram4_quant.tests.llama_cpp_names import llama_cpp_name
from ideogram4_quant.tests.timing import cpu_seconds


@pytest.fixture
def state() -> State:
    return encoder_weights.random_weights()


def llama_cpp_names(state: State) -> dict[str, str]:
    """Our name -> llama.cpp's."""
    return {name: llama_cpp_name(name) for name in state}


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
    assert (ck.origin, ck.level) == ("llama.cpp GGUF", "Q8_0")
    assert sizes_of(ck) == SIZES
    if stated:
        assert ck.config["rope_theta"] == 7654321.0
        assert ck.config["mrope_section"] == [6, 5, 5]
        assert ck.config["rms_norm_eps"] == 2.0**-17
    check(ck, truth)


def test_llama_cpp_gguf_of_mixed_types(tmp_path: Path, state: State):
    kinds = ("IQ4_NL", "MXFP4", "Q8_0", "IQ4_NL", "Q5_1")
    tensors, truth, used = {}, {}, set()
    for number, (name, theirs) in enumerate(llama_cpp_names(state).items()):
        if state[name].dim() == 2:
            kind = kinds[number % len(kinds)]
            data, truth[name] = storage.gguf_blocks(state[name], kind, number)
            tensors[theirs] = (data, kind)
            used.add(kind)
        else:
            tensors[theirs] = (state[name].numpy(), "F32")
            truth[name] = state[name]
    assert used == set(kinds)
    metadata = gguf_metadata("qwen3vl")
    path = files.write_gguf_py(tmp_path / "te.gguf", tensors, metadata, arch="qwen3vl")
    ck = open_encoder(path)
    assert ck.level in kinds
    check(ck, truth)


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
    assert cpu_seconds(lambda: open_encoder(path)) < 0.3
