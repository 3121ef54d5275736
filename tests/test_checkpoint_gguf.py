"""Every GGUF in: levels, architectures and shapes, each weight as gguf-py dequantizes it."""

from pathlib import Path

import pytest
from comfy_kitchen.tensor import QuantizedTensor

from ideogram4_quant.checkpoint import open_checkpoint
from ideogram4_quant.ops.blocks import FORMATS, PACKED
from ideogram4_quant.tests import fixtures_files as files
from ideogram4_quant.tests import fixtures_storage as storage
from ideogram4_quant.tests.checkpoint_weights import check_weights, quantized

KINDS = list(PACKED)


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_K", "IQ4_XS"])
def test_diffusers_layout_in_gguf(tmp_path: Path, kind: str):
    tensors, truth = storage.gguf_tensors(files.split_model(**files.WIDE), kind)
    ck = open_checkpoint(files.write_gguf_py(tmp_path / "m.gguf", tensors))
    loaded = check_weights(ck, "conditional", files.fuse(truth))
    assert isinstance(loaded["layers.0.attention.qkv.weight"], QuantizedTensor)


@pytest.mark.parametrize("kind", KINDS)
def test_gguf_levels(tmp_path: Path, kind: str):
    state = files.model(**(files.WIDE if FORMATS[kind].block_size > 32 else {}))
    tensors, truth = storage.gguf_tensors(state, kind)
    ck = open_checkpoint(files.write_gguf_py(tmp_path / "m.gguf", tensors))
    assert (ck.origin, ck.level, ck.protected) == ("GGUF", kind, ())
    loaded = check_weights(ck, "conditional", truth)
    assert quantized(loaded) == files.linears(truth)


def test_a_file_may_mix_types(tmp_path: Path):
    state = files.model(**files.WIDE)
    kinds = {kind: storage.gguf_tensors(state, kind) for kind in KINDS}
    tensors, truth = {}, {}
    for number, name in enumerate(state):
        of_kind, true = kinds[KINDS[number % len(KINDS)]]
        tensors[name], truth[name] = of_kind[name], true[name]
    assert len({kind for _, kind in tensors.values()} & set(KINDS)) > len(KINDS) / 2
    ck = open_checkpoint(files.write_gguf_py(tmp_path / "m.gguf", tensors))
    loaded = check_weights(ck, "conditional", truth)
    assert quantized(loaded) == files.linears(truth)


@pytest.mark.parametrize("arch", ["ideogram4", "ideogram", None])
def test_community_gguf_architectures(tmp_path: Path, arch: str | None):
    tensors, truth = storage.gguf_tensors(files.model(), "Q4_0")
    path = files.write_gguf_py(tmp_path / "m.gguf", tensors, arch=arch)
    check_weights(open_checkpoint(path), "conditional", truth)


def test_community_gguf_with_everything_quantized(tmp_path: Path):
    """Norms and the two-row embedding in blocks, biases in bf16: non-linears come out dense."""
    tensors, truth = storage.gguf_tensors(files.model(), "Q8_0", everything=True)
    assert tensors["embed_image_indicator.weight"][1] == "Q8_0"
    assert tensors["layers.0.attention.norm_q.weight"][1] == "Q8_0"
    ck = open_checkpoint(files.write_gguf_py(tmp_path / "m.gguf", tensors))
    loaded = check_weights(ck, "conditional", truth)
    assert quantized(loaded) == files.linears(truth)


def test_gguf_with_leading_ones(tmp_path: Path):
    state = files.model()
    tensors, truth = storage.gguf_tensors(state, "Q8_0")
    for name, (data, kind) in tensors.items():
        tensors[name] = (data.reshape((1,) * (3 - data.ndim) + data.shape), kind)
    check_weights(
        open_checkpoint(files.write_gguf_py(tmp_path / "m.gguf", tensors)), "conditional", truth
    )


def test_real_widths(tmp_path: Path):
    """w2 as wide as the real one, in blocks of Q4_K, beside 256-wide heads."""
    wide = {"attention_head_dim": 256, "num_attention_heads": 1, "intermediate_size": 12288}
    state = files.model(3, **{**files.WIDE, **wide})
    tensors, truth = storage.gguf_tensors(state, "Q4_K")
    ck = open_checkpoint(files.write_gguf_py(tmp_path / "m.gguf", tensors))
    assert (ck.config.hidden_size, ck.config.intermediate_size) == (256, 12288)
    check_weights(ck, "conditional", truth)
