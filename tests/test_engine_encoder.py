"""The text encoder against diffusers' encode_prompt on the same weights."""

import copy
import json
import shutil
from contextlib import suppress
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from comfy_kitchen.tensor import QuantizedTensor
from safetensors.torch import load_file, save_file

from ideogram4_quant.engine import encoder as engine
from ideogram4_quant.engine.encoder import MAX_TOKENS, TAPS, load_encoder
from ideogram4_quant.engine.linear import QuantLinear
from ideogram4_quant.errors import CheckpointError, OpError
from ideogram4_quant.ops.blocks import quantize
from ideogram4_quant.ops.layouts import gguf_tensor

PROMPTS = [
    '{"high_level_description":"a word","elements":[{"type":"text","text":"HELLO"}]}',
    "x",
    "Ein längerer Satz mit Umlauten, 漢字 und 🙂, damit die Längen verschieden sind.",
]


def test_taps_are_the_pipelines():
    from diffusers.pipelines.ideogram4 import pipeline_ideogram4 as reference

    assert TAPS == reference.QWEN3_VL_ACTIVATION_LAYERS


@torch.no_grad()
def test_features_equal_the_pipelines(tiny):
    """The pipeline pads and masks; taps grow through 36 layers, so errors are relative."""
    ours = load_encoder(tiny.encoder_dir, device="cpu")
    found = ours.encode(PROMPTS)
    width = 200
    wanted = tiny.pipeline().encode_prompt(PROMPTS, 2, 2, width, torch.device("cpu"))[0]
    for row, features in zip(wanted, found, strict=True):
        length = len(features)
        assert features.shape == (length, 13 * 64)
        assert features.dtype == torch.float32
        text = row[width - length : width]
        assert (features - text).abs().max() < 1e-5 * text.abs().max()
        assert (row[: width - length] == 0).all()


@torch.no_grad()
def test_features_of_all_taps_lie_together(tiny):
    ours = load_encoder(tiny.encoder_dir, device="cpu")
    ids = torch.tensor([ours.token_ids("x")])
    first = tiny.text_model.layers[0]
    seen = []
    hook = first.register_forward_hook(lambda module, args, out: seen.append(out))
    tiny.text_model(ids)
    hook.remove()
    features = ours.encode(["x"])[0]
    assert torch.allclose(features[:, ::13], seen[0][0], atol=1e-5)


def test_the_template_ends_with_the_generation_prompt(tiny):
    ours = load_encoder(tiny.encoder_dir, device="cpu")
    text = ours.tokenizer.decode(ours.token_ids("Hi"))
    assert text == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"


def test_a_folders_own_template_and_code_are_not_run(tiny, tmp_path, monkeypatch):
    """Both are programs; and the library would ask at the terminal whether to run the code."""
    folder = shutil.copytree(tiny.encoder_dir, tmp_path / "e")
    (folder / "chat_template.jinja").write_text("{{ raise_exception('run') }}")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["chat_template"] = "{{ raise_exception('run') }}"
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    usual = load_encoder(tiny.encoder_dir, device="cpu").token_ids("Hi")
    assert load_encoder(folder, device="cpu").token_ids("Hi") == usual
    config = {"auto_map": {"AutoTokenizer": ["evil.Tokenizer", "evil.Tokenizer"]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "evil.py").write_text("raise SystemExit('run')")
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    (folder / "config.json").unlink()  # which names a class of the library
    with suppress(CheckpointError):  # the library may do without the folder's class, or refuse
        words = load_encoder(tiny.encoder_dir, tokenizer=folder, device="cpu")
        assert words.token_ids("Hi") == usual


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize(
    "text", ["", "[]", "[" * 100_000, '{"model": 7}', "\udcff"], ids=lambda text: repr(text[:12])
)
def test_a_tokenizer_that_is_none_is_named(tiny, tmp_path, name, text):
    folder = shutil.copytree(tiny.encoder_dir, tmp_path / "e")
    (folder / name).write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(CheckpointError, match="no tokenizer can be read") as caught:
        load_encoder(folder, device="cpu")
    assert caught.value.file == str(folder)


def test_long_prompts_fail_and_the_longest_fits(tiny):
    ours = load_encoder(tiny.encoder_dir, device="cpu")
    frame = len(ours.token_ids(""))
    assert len(ours.token_ids("a" * (MAX_TOKENS - frame))) == MAX_TOKENS
    with pytest.raises(OpError, match="found 2049 tokens, needed at most 2048"):
        ours.token_ids("a" * (MAX_TOKENS - frame + 1))


def test_linears_keep_their_storage_and_the_final_norm_is_not_needed(tiny, tmp_path):
    shutil.copytree(tiny.encoder_dir, tmp_path / "e")
    file = tmp_path / "e" / "model.safetensors"
    state = {
        k: v for k, v in load_file(file).items() if not k.endswith("language_model.norm.weight")
    }
    save_file(state, file, {"format": "pt"})
    ours = load_encoder(tmp_path / "e", device="cpu")
    linears = [m for m in ours.model.modules() if isinstance(m, QuantLinear)]
    assert len(linears) == 7 * 36
    assert {m.weight.dtype for m in linears} == {torch.bfloat16}
    wanted = load_encoder(tiny.encoder_dir, device="cpu").encode(["x"])[0]
    assert torch.equal(ours.encode(["x"])[0], wanted)


def test_quantized_weights_are_those_they_decode_to(tiny, monkeypatch):
    """A GGUF encoder at Q8_0 against transformers' model with the decoded weights."""
    ck = engine.open_encoder(tiny.encoder_dir)
    packed, dense = {}, {}
    for name, tensor in ck.stream(dtype=torch.float32):
        packed[name] = dense[name] = tensor
        if tensor.ndim == 2:
            blocks = quantize(tensor, "Q8_0")
            packed[name] = gguf_tensor(blocks, "Q8_0", tuple(tensor.shape), dtype=torch.float32)
            dense[name] = packed[name].dequantize()
    stored = SimpleNamespace(
        config=ck.config,
        tokenizer_dir=ck.tokenizer_dir,
        entries=ck.entries,
        stream=lambda **_: packed.items(),
    )
    monkeypatch.setattr(engine, "open_encoder", lambda path: stored)
    ours = load_encoder("packed", device="cpu")
    assert isinstance(ours.model.layers[5].mlp.up_proj.weight, QuantizedTensor)
    reference = copy.deepcopy(tiny.text_model)
    reference.load_state_dict(dense)
    wanted = replace(tiny, text_model=reference).pipeline()
    width = len(ours.token_ids(PROMPTS[0]))
    features = wanted.encode_prompt(PROMPTS[:1], 1, 1, width, torch.device("cpu"))[0][0, :width]
    assert (ours.encode(PROMPTS[:1])[0] - features).abs().max() < 1e-5 * features.abs().max()


def test_bf16_compute_is_close(tiny):
    exact = load_encoder(tiny.encoder_dir, device="cpu").encode(PROMPTS[:1])[0]
    half = load_encoder(tiny.encoder_dir, device="cpu", dtype=torch.bfloat16).encode(PROMPTS[:1])[0]
    assert (half - exact).norm() < 0.05 * exact.norm()


def test_wrong_encoders_are_named(tiny, tmp_path):
    shutil.copytree(tiny.encoder_dir, tmp_path / "e")
    with pytest.raises(CheckpointError, match="not a tokenizer folder"):
        load_encoder(tmp_path / "e", tokenizer=tmp_path / "none", device="cpu")
    config = json.loads((tmp_path / "e" / "config.json").read_text())
    config["text_config"]["num_hidden_layers"] = 28
    config["text_config"].pop("layer_types", None)
    (tmp_path / "e" / "config.json").write_text(json.dumps(config))
    deep = tuple(f"language_model.layers.{i}." for i in range(28, 36))
    state = load_file(tmp_path / "e" / "model.safetensors")
    state = {name: t for name, t in state.items() if not name.startswith(deep)}
    save_file(state, tmp_path / "e" / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match="found 28, needed at least 36"):
        load_encoder(tmp_path / "e", device="cpu")
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("model.safetensors", "config.json"):
        shutil.copy(tiny.encoder_dir / name, bare / name)
    with pytest.raises(CheckpointError, match="--tokenizer"):
        load_encoder(bare, device="cpu")
    ours = load_encoder(bare, tokenizer=tiny.encoder_dir, device="cpu")
    assert len(ours.encode(["x"])) == 1
