"""What open_checkpoint tells of a file: its config, its copies, and how it reads."""

import json
import tracemalloc
import weakref
from pathlib import Path

import pytest
import torch

from ideogram4_quant.checkpoint import ModelConfig, check_pair, open_checkpoint
from ideogram4_quant.checkpoint.canonical import canonical_shapes, is_linear
from ideogram4_quant.errors import CheckpointError, CorruptFileError, PairMismatchError
from ideogram4_quant.tests import fixtures_files as files
from ideogram4_quant.tests.timing import cpu_seconds

# --- names and config -----------------------------------------------------------------------------


def test_canonical_names_are_those_of_diffusers():
    """Fused from diffusers' own class, at the real and at small dimensions."""
    config = ModelConfig(**{**files.CONFIG, "mrope_section": (24, 20, 20)})
    shapes = {name: tuple(tensor.shape) for name, tensor in files.model().items()}
    assert canonical_shapes(config) == shapes
    real = canonical_shapes(ModelConfig())
    linears = [name for name in real if is_linear(name)]
    assert len(linears) == 211
    assert len([name for name in linears if not name.startswith("layers.")]) == 7
    assert {name for name in shapes if is_linear(name)} == set(filter(files.is_linear, shapes))
    assert real["layers.33.attention.qkv.weight"] == (13824, 4608)
    assert real["llm_cond_proj.weight"] == (4608, 53248)


def test_config_from_shapes(tmp_path: Path, state):
    config = open_checkpoint(files.save(tmp_path / "m.safetensors", state)).config
    assert config.to_dict() == files.CONFIG
    assert config.hidden_size == files.HIDDEN


STATED = {**files.CONFIG, "rope_theta": 10_000, "mrope_section": [6, 5, 5], "norm_eps": 1e-4}


def test_config_from_metadata(tmp_path: Path, state):
    metadata = {"config": json.dumps({**STATED, "quantization": {"ignored": 1}})}
    ck = open_checkpoint(files.save(tmp_path / "m.safetensors", state, metadata))
    assert ck.config.to_dict() == STATED


def test_config_from_gguf_metadata(tmp_path: Path, state):
    tensors = {name: (tensor.numpy(), "F32") for name, tensor in state.items()}
    metadata = {"ideogram4.config": json.dumps(STATED)}
    ck = open_checkpoint(files.write_gguf_py(tmp_path / "m.gguf", tensors, metadata))
    assert ck.config.to_dict() == STATED


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_layers": 1}, "num_layers"),
        ({"attention_head_dim": 64}, "attention_head_dim"),
        ({"num_attention_heads": 4}, "hidden size"),
        ({"intermediate_size": 0}, "unusable intermediate_size"),
        ({"num_layers": 10**12}, "unusable num_layers"),
        ({"norm_eps": "small"}, "unusable norm_eps"),
        ({"mrope_section": [1, 2]}, "unusable mrope_section"),
        ({"rope_theta": True}, "unusable rope_theta"),
    ],
)
def test_config_that_contradicts(tmp_path: Path, state, change: dict, message: str):
    metadata = {"config": json.dumps({**files.CONFIG, **change})}
    path = files.save(tmp_path / "m.safetensors", state, metadata)
    with pytest.raises(CorruptFileError, match=message):
        open_checkpoint(path)


@pytest.mark.parametrize("text", ["{", "[]", '"x"', "[" * 100_000])
def test_config_that_is_no_json(tmp_path: Path, state, text: str):
    path = files.save(tmp_path / "m.safetensors", state, {"config": text})
    with pytest.raises(CorruptFileError, match="metadata config"):
        open_checkpoint(path)


# --- which copy -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "copy"),
    [
        ("ideogram4-unconditional_transformer-q4_0.safetensors", "unconditional"),
        ("ideogram4_uncond-Q4_0.safetensors", "unconditional"),
        ("ideogram4_unconditional-Q8_0.safetensors", "unconditional"),
        ("Ideogram4-UNCOND.safetensors", "unconditional"),
        ("ideogram4_cond-Q4_0.safetensors", "conditional"),
        ("ideogram4-conditional.safetensors", "conditional"),
        ("transformer/model.safetensors", "conditional"),
        ("unconditional_transformer/x.safetensors", "unconditional"),
        ("ideogram-4-unconditional/diffusion_pytorch_model.safetensors", "unconditional"),
        ("cond/x.safetensors", "conditional"),
        ("uncond/x.safetensors", "unconditional"),
        ("Un-Conditional/Q8_0/x.safetensors", "unconditional"),
        ("uncond/ideogram4-cond.safetensors", "conditional"),
        ("Ideogram4-Un-Conditional.safetensors", "unconditional"),
        ("ideogram4_non_cond.safetensors", "unconditional"),
        ("ideogram4-no-cond-Q8_0.safetensors", "unconditional"),
        ("ideogram4 neg cond.safetensors", "unconditional"),
        ("Ideogram4UnConditional.safetensors", "unconditional"),
        ("ideogram4-without-cond.safetensors", "unconditional"),
        ("Ideogram4 Null Conditional.safetensors", "unconditional"),
        ("ideogram4_empty_cond.safetensors", "unconditional"),
        ("ideogram4-ucond.safetensors", "unconditional"),
        ("fun-cond.safetensors", "conditional"),
    ],
)
def test_copy_by_name(tmp_path: Path, state, name: str, copy: str):
    ck = open_checkpoint(files.save(tmp_path / name, state))
    assert ck.copies == (copy,)
    assert any(part in ck.copy_reason for part in Path(name).parts)


@pytest.mark.parametrize(
    "name", ["ideogram4-Q4_0.safetensors", "second.safetensors", "cond-uncond.safetensors"]
)
def test_copy_is_never_guessed_silently(tmp_path: Path, state, name: str):
    ck = open_checkpoint(files.save(tmp_path / name, state))
    assert ck.copies == ("conditional",)
    assert "assumed" in ck.copy_reason
    assert ck.copy_assumed
    assert "copy=" in ck.copy_reason


def without_text(state: dict) -> dict:
    return {name: tensor for name, tensor in state.items() if not name.startswith("llm_cond")}


def test_copy_by_content(tmp_path: Path, state):
    ck = open_checkpoint(files.save(tmp_path / "m.safetensors", without_text(state)))
    assert ck.copies == ("unconditional",)
    assert "llm_cond_proj" in ck.copy_reason
    assert not ck.reads_text("unconditional")
    loaded = ck.load("unconditional")
    assert set(loaded) == set(without_text(state))


def test_conditional_copy_needs_its_text_part(tmp_path: Path, state):
    path = files.save(tmp_path / "m.safetensors", without_text(state))
    ck = open_checkpoint(path, copy="conditional")
    with pytest.raises(CorruptFileError, match=r"3 tensors .* llm_cond_norm\.weight"):
        ck.load("conditional")


def test_metadata_goes_before_name(tmp_path: Path, state):
    metadata = {"model_type": "ideogram4_cond"}
    ck = open_checkpoint(files.save(tmp_path / "uncond.safetensors", state, metadata))
    assert ck.copies == ("conditional",)
    assert "model_type" in ck.copy_reason


def test_gguf_metadata_names_the_copy(tmp_path: Path, state):
    tensors = {name: (tensor.numpy(), "F32") for name, tensor in state.items()}
    metadata = {"ideogram4.copy": "unconditional"}
    ck = open_checkpoint(files.write_gguf_py(tmp_path / "m.gguf", tensors, metadata))
    assert ck.copies == ("unconditional",)


def test_override(tmp_path: Path, state, caplog):
    path = files.save(tmp_path / "ideogram4_uncond.safetensors", state)
    ck = open_checkpoint(path, copy="conditional")
    assert ck.copies == ("conditional",)
    assert ck.copy_reason == "as asked"
    assert "ideogram4_uncond.safetensors says so" in caplog.text
    with pytest.raises(CheckpointError, match="no such copy"):
        open_checkpoint(path, copy="both")


def test_override_cannot_contradict_the_file(tmp_path: Path, state):
    path = files.save(tmp_path / "m.safetensors", state, {"model_type": "ideogram4_cond"})
    with pytest.raises(PairMismatchError, match=r"m\.safetensors.*model_type"):
        open_checkpoint(path, copy="unconditional")
    path = files.save(tmp_path / "c.safetensors", {f"cond.{k}": v for k, v in state.items()})
    with pytest.raises(PairMismatchError, match=r"found conditional"):
        open_checkpoint(path, copy="unconditional")


def test_asking_for_the_other_copy(tmp_path: Path, state):
    ck = open_checkpoint(files.save(tmp_path / "m.safetensors", state))
    for method in (ck.load, ck.stream, ck.shapes):
        with pytest.raises(CheckpointError, match="unconditional copy is not in this file"):
            method("unconditional")


def test_check_pair(tmp_path: Path, state):
    cond = open_checkpoint(files.save(tmp_path / "a_cond.safetensors", state))
    uncond = open_checkpoint(files.save(tmp_path / "a_uncond.safetensors", without_text(state)))
    check_pair(cond, uncond)
    with pytest.raises(PairMismatchError, match="not the unconditional copy"):
        check_pair(cond, cond)
    with pytest.raises(PairMismatchError, match="not the conditional copy"):
        check_pair(uncond, uncond)
    deeper = files.save(tmp_path / "b_uncond.safetensors", files.model(num_layers=3))
    with pytest.raises(PairMismatchError, match="num_layers 2 against 3"):
        check_pair(cond, open_checkpoint(deeper))


# --- how it reads ---------------------------------------------------------------------------------


def test_stream_holds_one_tensor(tmp_path: Path, state):
    ck = open_checkpoint(files.save(tmp_path / "m.safetensors", state))
    seen = []
    stream = ck.stream("conditional", progress=lambda done, total: seen.append((done, total)))
    assert iter(stream) is stream
    names, earlier = [], None
    for name, tensor in stream:
        assert earlier is None or earlier() is None, "the stream keeps what it gave"
        names.append(name)
        earlier = weakref.ref(tensor)
        del tensor
    assert names == list(ck.shapes("conditional"))
    total = sum(tensor.nbytes for tensor in state.values())
    assert seen[-1] == (total, total)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert len(seen) == len(names)


def sparse_safetensors(path: Path, tensors: dict[str, tuple[str, tuple[int, ...]]]) -> int:
    """A header for ``name -> (dtype, shape)`` and holes for data; the file's size."""
    bits = {"I8": 8, "F32": 32, "BF16": 16}
    header, end = {}, 0
    for name, (dtype, shape) in tensors.items():
        size = torch.Size(shape).numel() * bits[dtype] // 8
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    return 8 + len(text) + end


def test_a_20_gb_file_opens_at_once(tmp_path: Path):
    """Transformer Lab's two copies at the real size, as holes."""
    tensors = {}
    for copy in ("conditional", "unconditional"):
        for name, shape in canonical_shapes(ModelConfig()).items():
            if not is_linear(name):
                continue
            module = f"{copy}.{name.removesuffix('.weight')}"
            tensors[f"{module}.wq"] = ("I8", shape)
            tensors[f"{module}.ws"] = ("F32", (shape[0], 1))
            tensors[f"{module}.smooth"] = ("F32", (shape[1],))
    path = tmp_path / "large.safetensors"
    assert sparse_safetensors(path, tensors) > 18e9
    ck = open_checkpoint(path)
    assert (ck.origin, ck.level) == ("Transformer Lab INT8", "INT8 W8A8")
    assert ck.config == ModelConfig()
    assert cpu_seconds(lambda: open_checkpoint(path)) < 0.05
    tracemalloc.start()
    open_checkpoint(path)
    assert tracemalloc.get_traced_memory()[1] < 50e6
    tracemalloc.stop()


def test_a_large_gguf_opens_at_once(tmp_path: Path):
    shapes = {
        f"{prefix}{name}": shape
        for prefix in ("cond.", "uncond.")
        for name, shape in canonical_shapes(ModelConfig()).items()
        if shape[-1] % 32 == 0
    }
    path = tmp_path / "large.gguf"
    assert files.write_sparse_gguf(path, shapes) > 19e9
    assert open_checkpoint(path).level == "Q8_0"
    assert cpu_seconds(lambda: open_checkpoint(path)) < 0.05
