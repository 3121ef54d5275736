"""Every safetensors layout in: names, copies, level, weights as their writers dequantize them."""

import json
from pathlib import Path

import pytest
import torch
from comfy_kitchen.tensor import QuantizedTensor

from ideogram4_quant.checkpoint import open_checkpoint
from ideogram4_quant.errors import CorruptFileError
from ideogram4_quant.tests import fixtures_files as files
from ideogram4_quant.tests import fixtures_storage as storage
from ideogram4_quant.tests.checkpoint_weights import check_weights, quantized
from ideogram4_quant.tests.host.level_files import PACKERS


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_plain(tmp_path: Path, dtype: torch.dtype):
    state = files.model()
    path = files.save(tmp_path / "m.safetensors", {k: v.to(dtype) for k, v in state.items()})
    ck = open_checkpoint(path)
    assert (ck.origin, ck.level, ck.copies) == ("safetensors", "BF16", ("conditional",))
    assert ck.protected == ()
    assert ck.paths == (path,)
    assert ck.size == path.stat().st_size
    check_weights(ck, "conditional", {k: v.to(dtype).float() for k, v in state.items()})


@pytest.mark.parametrize("per_row", [True, False])
def test_ideogram_ai_fp8_folder(tmp_path: Path, per_row: bool):
    """Both folders, sharded, names fused, a scale for each row (or one for all)."""
    truths = {}
    for seed, (copy, name) in enumerate(
        [("conditional", "transformer"), ("unconditional", "unconditional_transformer")]
    ):
        state = files.model(seed)
        stored, truths[copy] = storage.packed(state, lambda w: storage.pack_fp8(w, per_row=per_row))
        files.save_folder(tmp_path / name, stored)
    ck = open_checkpoint(tmp_path)
    assert (ck.origin, ck.level) == ("ideogram-ai FP8", "FP8")
    assert ck.copies == ("conditional", "unconditional")
    assert "folder" in ck.copy_reason
    assert len(ck.paths) == 4
    assert ck.config.to_dict() == files.CONFIG
    for copy, truth in truths.items():
        loaded = check_weights(ck, copy, truth)
        assert quantized(loaded) == files.linears(truth)
    assert open_checkpoint(tmp_path, copy="unconditional").copies == ("unconditional",)


def test_one_folder_or_shard_of_it(tmp_path: Path):
    stored, truth = storage.packed(files.model(), storage.pack_fp8)
    path = files.save_folder(tmp_path / "unconditional_transformer", stored)
    for part in (path, next(path.glob("*.index.json")), *path.glob("*.safetensors")):
        ck = open_checkpoint(part)
        assert ck.copies == ("unconditional",)
        assert "unconditional_transformer" in ck.copy_reason
        assert len(ck.paths) == 2
    check_weights(ck, "unconditional", truth)
    next(path.glob("*.index.json")).unlink()  # shards without an index
    assert len(open_checkpoint(path).paths) == 2
    assert len(open_checkpoint(next(path.glob("*.safetensors"))).paths) == 2


def test_fp8_without_scales(tmp_path: Path):
    """A file cast to fp8 as it is, norms and biases too."""
    state = {k: v.to(torch.float8_e4m3fn) for k, v in files.model().items()}
    ck = open_checkpoint(files.save(tmp_path / "m.safetensors", state))
    assert ck.level == "FP8"
    check_weights(ck, "conditional", {k: v.float() for k, v in state.items()})


@pytest.mark.parametrize("double", [False, True])
def test_nf4(tmp_path: Path, double: bool):
    stored, truth = storage.packed(files.model(), lambda w: storage.pack_nf4(w, double=double))
    ck = open_checkpoint(files.save(tmp_path / "m.safetensors", stored))
    assert (ck.origin, ck.level) == ("bitsandbytes NF4", "NF4")
    assert ck.config.to_dict() == files.CONFIG
    loaded = check_weights(ck, "conditional", truth)
    assert quantized(loaded) == files.linears(truth)


def split_packers():
    return {
        "bf16": (None, "BF16", 0),
        "fp8 rows": (storage.pack_fp8, "FP8", 0),
        "fp8 tensor": (lambda w: storage.pack_fp8(w, per_row=False), "FP8", 0),
        "nf4": (storage.pack_nf4, "NF4", 0),
        "nf4 double": (lambda w: storage.pack_nf4(w, double=True), "NF4", 0),
        "int8": (lambda w: storage.pack_comfy_int8(w, None), "INT8 W8A8", 0),
        "int8 rotated": (storage.pack_comfy_int8, "INT8 W8A8 rotated", 16),
    }


@pytest.mark.parametrize("case", split_packers())
def test_diffusers_layout(tmp_path: Path, case: str):
    """q, k, v stored apart become one weight, still quantized."""
    pack, level, ulps = split_packers()[case]
    state = files.split_model()
    if pack is None:
        stored, truth = {k: v.bfloat16() for k, v in state.items()}, state
    else:
        stored, truth = storage.packed(state, pack)
    ck = open_checkpoint(files.save_folder(tmp_path / "transformer", stored))
    assert (ck.origin, ck.level) == ("diffusers", level)
    truth = files.fuse(truth)
    loaded = check_weights(ck, "conditional", truth, ulps)
    qkv = loaded["layers.1.attention.qkv.weight"]
    assert qkv.shape == (3 * files.HIDDEN, files.HIDDEN)
    assert isinstance(qkv, QuantizedTensor) == (pack is not None)


def test_split_pieces_of_different_formats_become_dense(tmp_path: Path, caplog):
    def mixed(weight: torch.Tensor):
        mixed.count += 1
        return storage.pack_fp8(weight) if mixed.count % 2 else storage.pack_comfy_int8(weight)

    mixed.count = 0
    state = files.split_model()
    stored, truth = storage.packed(state, mixed)
    ck = open_checkpoint(files.save(tmp_path / "m.safetensors", stored))
    loaded = check_weights(ck, "conditional", files.fuse(truth), ulps=16)
    qkv = "layers.0.attention.qkv"
    assert type(loaded[f"{qkv}.weight"]) is torch.Tensor
    assert qkv in ck.protected
    assert "different formats" in caplog.text


def test_split_pieces_with_different_smoothing_become_dense(tmp_path: Path):
    def smooth(weight: torch.Tensor):
        smooth.seed += 1
        parts, truth = storage.pack_smooth_int8(weight, smooth.seed)
        return parts, truth

    smooth.seed = 0
    stored, truth = storage.packed(files.split_model(), smooth)
    ck = open_checkpoint(files.save(tmp_path / "m.safetensors", stored))
    check_weights(ck, "conditional", files.fuse(truth), ulps=4)


@pytest.mark.parametrize("where", ["tensors", "metadata", "older"])
def test_comfy_fp8(tmp_path: Path, where: str):
    """fp8_scaled: a scalar scale, described in a tensor, in metadata, or by the older names."""
    prefix = "model.diffusion_model."
    stored, truth = storage.packed(
        files.model(), lambda w: storage.pack_fp8(w, per_row=False), prefix, skip=["adaln_proj"]
    )
    modules = [key.removesuffix(".weight_scale") for key in stored if key.endswith("weight_scale")]
    conf = {"format": "float8_e4m3fn"}
    metadata = {"model_type": "ideogram4_uncond"}
    if where == "tensors":
        stored |= {f"{module}.comfy_quant": storage.as_json(conf) for module in modules}
    elif where == "metadata":
        layers = dict.fromkeys(modules, conf)
        metadata["_quantization_metadata"] = json.dumps({"layers": layers})
    else:
        for module in modules:
            stored[f"{module}.scale_weight"] = stored.pop(f"{module}.weight_scale")
            stored[f"{module}.scale_input"] = torch.ones(())
        stored[f"{prefix}scaled_fp8"] = torch.empty(0, dtype=torch.float8_e4m3fn)
    ck = open_checkpoint(files.save(tmp_path / "m.safetensors", stored, metadata))
    names = {"older": "ComfyUI FP8, older names"}
    assert (ck.origin, ck.level) == (names.get(where, "ComfyUI"), "FP8")
    assert ck.copies == ("unconditional",)
    assert "model_type" in ck.copy_reason
    assert ck.protected == ("adaln_proj",)
    assert ck.metadata["model_type"] == "ideogram4_uncond"
    check_weights(ck, "unconditional", truth)


@pytest.mark.parametrize("level", ["MXFP8", "NVFP4", "AWQ W4A16"])
def test_a_container_of_the_host_is_called_comfyuis_and_its_level_is_its_own(tmp_path, level):
    stem = ["_proj.", "t_embedding", "final_layer"]
    stored, _ = storage.packed(files.model(), lambda w: PACKERS[level](w), skip=stem)
    ck = open_checkpoint(files.save(tmp_path / "m.safetensors", stored))
    assert (ck.origin, ck.level) == ("ComfyUI", level)


@pytest.mark.parametrize("nested", [False, True])
def test_comfy_int8_convrot(tmp_path: Path, nested: bool):
    """204 block linears rotated, the stem in bf16; comfy-kitchen is the oracle."""
    stem = ["_proj.", "t_embedding", "final_layer"]
    stored, truth = storage.packed(
        files.model(), lambda w: storage.pack_comfy_int8(w, nested=nested), skip=stem
    )
    ck = open_checkpoint(files.save(tmp_path / "m.safetensors", stored))
    assert (ck.origin, ck.level) == ("ComfyUI", "INT8 W8A8 rotated")
    assert len(ck.protected) == 7
    loaded = check_weights(ck, "conditional", truth, ulps=16)
    assert loaded["layers.0.feed_forward.w2.weight"]._params.rotation == 64


def test_pre_quant_scale_is_not_dropped(tmp_path: Path):
    """The activations' factor that ComfyUI's loader only warns about."""

    def pack(weight: torch.Tensor):
        parts, truth = storage.pack_smooth_int8(weight, 5)
        return {
            "weight": parts["wq"],
            "weight_scale": parts["ws"],
            "pre_quant_scale": 1 / parts["smooth"],
        }, truth

    stored, truth = storage.packed(files.model(), pack)
    ck = open_checkpoint(files.save(tmp_path / "m.safetensors", stored))
    check_weights(ck, "conditional", truth, ulps=4)


@pytest.mark.parametrize(
    "prefix", ["", "model.diffusion_model.", "diffusion_model.", "transformer."]
)
def test_prefixes(tmp_path: Path, prefix: str):
    state = files.model()
    path = files.save(tmp_path / "m.safetensors", {prefix + k: v for k, v in state.items()})
    check_weights(open_checkpoint(path), "conditional", state)


def test_sd_cpp_file_with_both_copies(tmp_path: Path):
    prefix = "model.diffusion_model."
    states = {"conditional": files.model(1), "unconditional": files.model(2)}
    stored = {prefix + k: v for k, v in states["conditional"].items()}
    stored |= {f"{prefix}uncond.{k}": v for k, v in states["unconditional"].items()}
    ck = open_checkpoint(files.save(tmp_path / "m.safetensors", stored))
    assert ck.copies == ("conditional", "unconditional")
    for copy, state in states.items():
        check_weights(ck, copy, state)
    assert open_checkpoint(tmp_path / "m.safetensors", copy="conditional").copies == (
        "conditional",
    )


def test_groups_of_256(tmp_path: Path):
    """The rotation of the released int8_convrot file."""
    state = files.model(3, **files.WIDE)
    stored, truth = storage.packed(state, lambda w: storage.pack_comfy_int8(w, 256))
    ck = open_checkpoint(files.save(tmp_path / "m.safetensors", stored))
    loaded = check_weights(ck, "conditional", truth, ulps=16)
    assert loaded["layers.0.feed_forward.w2.weight"]._params.rotation == 256


def test_incomplete_split(tmp_path: Path):
    state = files.split_model()
    del state["layers.1.attention.to_k.weight"]
    with pytest.raises(CorruptFileError, match=r"found no to_k"):
        open_checkpoint(files.save(tmp_path / "m.safetensors", state))
