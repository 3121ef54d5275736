"""Transformer Lab's files of both copies: INT8, whose other tensors come from a base, and GGUF."""

from pathlib import Path

import pytest
import torch

from ideogram4_quant.checkpoint import open_checkpoint
from ideogram4_quant.errors import MissingBaseError, PairMismatchError
from ideogram4_quant.tests import fixtures_files as files
from ideogram4_quant.tests import fixtures_storage as storage
from ideogram4_quant.tests.checkpoint_weights import check_weights, quantized


def transformer_lab_int8(
    path: Path, states: dict[str, storage.State], *, flat: bool, dtype=torch.float32
):
    """Linears only, both copies; ws [N] or [N, 1]; w2 of layer 1 protected, w1 not smoothed."""
    stored, truths = {}, {}
    for copy, state in states.items():
        truths[copy] = dict(state)
        for name in files.linears(state):
            key = f"{copy}.{name.removesuffix('.weight')}"
            if "layers.1.feed_forward.w2" in name:
                stored[f"{key}.weight"] = state[name].bfloat16()
                continue
            parts, truth = storage.pack_smooth_int8(state[name], len(name), scale_dtype=dtype)
            if name.endswith("w1.weight"):
                q, scale = storage.pack_int8(state[name])
                parts = {"wq": q, "ws": scale.to(dtype)}
                truth = q.float() * scale.to(dtype).float()
            truths[copy][name] = truth
            parts["ws"] = parts["ws"].reshape(-1) if flat else parts["ws"].reshape(-1, 1)
            stored |= {f"{key}.{suffix}": value for suffix, value in parts.items()}
            bias = name.replace(".weight", ".bias")
            if bias in state:
                stored[f"{copy}.{bias}"] = state[bias].bfloat16()
    files.save(path, stored)
    return truths


@pytest.mark.parametrize(("flat", "dtype"), [(True, torch.float32), (False, torch.bfloat16)])
def test_transformer_lab_int8(tmp_path: Path, flat: bool, dtype: torch.dtype):
    states = {"conditional": files.model(1), "unconditional": files.model(2)}
    path = tmp_path / "ideogram4-int8-w8a8.safetensors"
    truths = transformer_lab_int8(path, states, flat=flat, dtype=dtype)
    bases = tmp_path / "base"
    files.save_folder(
        bases / "transformer", storage.packed(states["conditional"], storage.pack_fp8)[0]
    )
    files.save_folder(
        bases / "unconditional_transformer",
        storage.packed(states["unconditional"], storage.pack_fp8)[0],
    )
    ck = open_checkpoint(path, bases)
    assert (ck.origin, ck.level) == ("Transformer Lab INT8", "INT8 W8A8")
    assert ck.copies == ("conditional", "unconditional")
    assert "prefix" in ck.copy_reason
    assert ck.config.to_dict() == files.CONFIG
    assert ck.protected == (
        "conditional.layers.1.feed_forward.w2",
        "unconditional.layers.1.feed_forward.w2",
    )
    for copy, truth in truths.items():
        loaded = check_weights(ck, copy, truth, ulps=4)
        assert quantized(loaded) == files.linears(truth) - {"layers.1.feed_forward.w2.weight"}


def test_transformer_lab_int8_with_a_base_for_each_copy(tmp_path: Path):
    """Bases of any layout: a GGUF for one copy, split bf16 for the other."""
    split = {"conditional": files.split_model(1), "unconditional": files.split_model(2)}
    states = {copy: files.fuse(state) for copy, state in split.items()}
    path = tmp_path / "tl.safetensors"
    truths = transformer_lab_int8(path, states, flat=True)
    tensors = {k: (v.numpy(), "F32") for k, v in states["conditional"].items()}
    one = files.write_gguf_py(tmp_path / "cond.gguf", tensors)
    two = files.save(tmp_path / "uncond.safetensors", split["unconditional"])
    ck = open_checkpoint(path, [one, two])
    for copy, truth in truths.items():
        check_weights(ck, copy, truth, ulps=4)
    other = files.save(tmp_path / "other_cond.safetensors", files.model(9))
    for bases in (one, [one, other]):  # the first base counts
        ck = open_checkpoint(path, bases)
        check_weights(ck, "conditional", truths["conditional"], ulps=4)
    with pytest.raises(MissingBaseError, match=r"unconditional copy.*found base .*cond\.gguf"):
        ck.load("unconditional")


def test_transformer_lab_int8_without_base(tmp_path: Path):
    path = tmp_path / "tl.safetensors"
    transformer_lab_int8(path, {"conditional": files.model(1)}, flat=True)
    ck = open_checkpoint(path)
    assert ck.level == "INT8 W8A8"
    with pytest.raises(
        MissingBaseError,
        match=r"tl\.safetensors: 14 tensors .*llm_cond_norm\.weight, embed_image.* 11 more.*base",
    ):
        ck.load("conditional")


def test_base_of_another_model(tmp_path: Path):
    path = tmp_path / "tl.safetensors"
    transformer_lab_int8(path, {"conditional": files.model(1)}, flat=True)
    other = files.save(tmp_path / "other.safetensors", files.model(1, num_layers=3))
    with pytest.raises(PairMismatchError, match=r"other\.safetensors.*num_layers 3 against 2"):
        open_checkpoint(path, other)


def test_transformer_lab_gguf(tmp_path: Path):
    tensors, truths = {}, {}
    for seed, (copy, prefix) in enumerate([("conditional", "cond."), ("unconditional", "uncond.")]):
        part, truths[copy] = storage.gguf_tensors(files.model(seed, **files.WIDE), "Q4_K", prefix)
        tensors |= part
    ck = open_checkpoint(files.write_gguf_py(tmp_path / "ideogram4-q4_k.gguf", tensors))
    assert (ck.origin, ck.level) == ("Transformer Lab GGUF", "Q4_K")
    assert ck.copies == ("conditional", "unconditional")
    for copy, truth in truths.items():
        check_weights(ck, copy, truth)
