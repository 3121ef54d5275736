"""Text encoder files of every kind in a real ComfyUI, against transformers on the same weights."""

from __future__ import annotations

import copy
import json
import shutil
from functools import partial

import pytest
import torch
from safetensors.torch import load_file

from ideogram4_quant.tests import fixtures_files as files
from ideogram4_quant.tests import fixtures_storage as storage
from ideogram4_quant.tests.llama_cpp_names import llama_cpp_name
from ideogram4_quant.tests.tiny_model import AsVisionLanguageModel

pytestmark = pytest.mark.host
CAPTION = '{"high_level_description":"(a) [red] word: \\"QUARTZ\\", 開"}'
LINEARS = 36 * 7
# ideogram-ai's FP8 has a scale a row, Comfy-Org's one for all; its INT8 is rotated
KINDS = ("BF16", "with vision", "FP8", "FP8 scaled", "INT8", "GGUF Q8_0", "GGUF Q4_0")


@pytest.fixture(scope="module")
def variants(tiny, tmp_path_factory) -> tuple[dict, dict]:
    """kind -> file, and kind -> the weights that its writer meant."""
    folder = tmp_path_factory.mktemp("encoders")
    state = {name: tensor.float() for name, tensor in tiny.text_model.state_dict().items()}
    paths, truths = {"BF16": tiny.encoder_dir}, {"BF16": state}

    def place(kind: str):
        target = folder / kind.replace(" ", "_")
        target.mkdir()
        for name in ("tokenizer.json", "tokenizer_config.json", "config.json"):
            if not (kind.startswith("GGUF") and name == "config.json"):
                shutil.copy(tiny.encoder_dir / name, target / name)
        return target

    vision = {f"model.language_model.{k}": v.bfloat16() for k, v in state.items()}
    vision |= {"model.visual.blocks.0.attn.qkv.weight": torch.ones(4, 4)}
    paths["with vision"] = files.save(place("with vision") / "model.safetensors", vision)
    truths["with vision"] = state
    packers = {
        "FP8": storage.pack_fp8,
        "FP8 scaled": partial(storage.pack_fp8, per_row=False),
        "INT8": storage.pack_comfy_int8,
    }
    for kind, pack in packers.items():
        stored, truths[kind] = {}, dict(state)
        for name, tensor in state.items():
            if files.is_linear(name):
                parts, truths[kind][name] = pack(tensor)
                module = f"model.{name.removesuffix('.weight')}"
                stored |= {f"{module}.{suffix}": value for suffix, value in parts.items()}
            else:
                stored[f"model.{name}"] = tensor.bfloat16()
        paths[kind] = files.save(place(kind) / "model.safetensors", stored)
    for level in ("Q8_0", "Q4_0"):
        kind = f"GGUF {level}"
        paths[kind], truths[kind] = _gguf(place(kind) / "encoder.gguf", state, level)
    return paths, truths


def _gguf(path, state: dict, level: str):
    tensors, truth = {}, dict(state)
    for name, tensor in state.items():
        theirs = llama_cpp_name(name)
        if files.is_linear(name):
            data, truth[name] = storage.gguf_blocks(tensor, level)
            tensors[theirs] = (data, level)
        else:
            tensors[theirs] = (tensor.numpy(), "F32")
    return files.write_gguf_py(path, tensors, {}, arch="qwen3vl"), truth


@pytest.fixture(scope="module")
def host_run(variants, in_host, tmp_path_factory) -> tuple[dict, dict]:
    out = tmp_path_factory.mktemp("features") / "out.safetensors"
    listing = json.dumps({kind: str(path) for kind, path in variants[0].items()})
    result = in_host("encoder.py", listing, out, CAPTION)
    return load_file(out), result


@torch.no_grad()
def reference(tiny, truth: dict) -> torch.Tensor:
    """The taps that diffusers' pipeline reads, with these weights in fp32."""
    pipeline = tiny.pipeline()
    text_model = copy.deepcopy(tiny.text_model)
    text_model.load_state_dict(truth)
    pipeline.text_encoder = AsVisionLanguageModel(text_model)
    message = [{"role": "user", "content": [{"type": "text", "text": CAPTION}]}]
    template = pipeline.tokenizer.apply_chat_template(message, add_generation_prompt=True)
    length = len(template["input_ids"])
    return pipeline.encode_prompt([CAPTION], 1, 1, length, torch.device("cpu"))[0][0, :length]


@pytest.mark.parametrize("kind", KINDS)
def test_features_equal_transformers_on_the_same_weights(tiny, variants, host_run, kind):
    found, wanted = host_run[0][kind], reference(tiny, variants[1][kind])
    assert found.shape == wanted.shape
    # the embeddings and norms are kept in bf16, which holds the small model's exactly
    assert (found - wanted).abs().max() < 1e-5 * wanted.abs().max()


@pytest.mark.parametrize("kind", KINDS)
def test_linears_stay_quantized(host_run, kind):
    quantized = host_run[1]["quantized"][kind]
    assert quantized == (0 if kind in ("BF16", "with vision") else LINEARS)


def test_captions_that_are_too_long_are_refused(host_run):
    assert host_run[1]["too long"].startswith("OpError")
    assert "2048" in host_run[1]["too long"]


def test_host_can_load_a_second_encoder_from_the_source(host_run):
    assert host_run[1]["deep copy"]
