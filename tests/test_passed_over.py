"""Nothing of a weight is passed over: what is beside it, or told of it, is used or refused by name.

Every file is made here by hand, its true weights by the dense formula of its format.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch

from ideogram4_quant.checkpoint import open_checkpoint
from ideogram4_quant.checkpoint.levels import read_catalogue, resolve
from ideogram4_quant.checkpoint.listing import list_files
from ideogram4_quant.errors import CheckpointError, NotIdeogram4Error
from ideogram4_quant.quant.inspect import inspect_file
from ideogram4_quant.quant.quantize import quantize_checkpoint
from ideogram4_quant.quant.verify import verify_file
from ideogram4_quant.tests import fixtures_files as files
from ideogram4_quant.tests import fixtures_storage as storage
from ideogram4_quant.tests.checkpoint_weights import check_weights

PREFIX = "model.diffusion_model."
MODULE = "layers.0.feed_forward.w1"  # [128, 64]
STEM = ("_proj.", "t_embedding", "final_layer")
H4 = torch.tensor([[1.0, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]]) / 2


def hadamard(order: int) -> torch.Tensor:
    """The regular Hadamard matrix by its definition: Kronecker powers of H4."""
    h = torch.ones(1, 1)
    while len(h) < order:
        h = torch.kron(h, H4)
    return h


def rotated(weight: torch.Tensor, group: int) -> tuple[storage.State, torch.Tensor]:
    """(int8 codes and scales of ``W R``, the weight that they stand for), all dense."""
    blocks = weight.reshape(len(weight), -1, group)
    turned = (blocks @ hadamard(group)).reshape(weight.shape)
    q, scale = storage.pack_int8(turned)
    back = (q.float() * scale).reshape(blocks.shape) @ hadamard(group).T
    return {"weight": q, "weight_scale": scale}, back.reshape(weight.shape)


def conf(group: int) -> dict:
    return {"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": group}


def int8_file(path: Path, prefix: str = "", beside=None, metadata=None, **described) -> Path:
    """All block linears int8; ``beside``: more tensors of one of them, by suffix."""
    stored, _ = storage.packed(
        files.model(), lambda w: storage.pack_comfy_int8(w, None), prefix, skip=STEM
    )
    for key in [key for key in stored if key.endswith(".comfy_quant")]:
        stored[key] = storage.as_json({"format": "int8_tensorwise", **described})
    stored |= {f"{prefix}{MODULE}.{suffix}": value for suffix, value in (beside or {}).items()}
    return files.save(path, stored, metadata)


def refused(path: Path, *words: str) -> str:
    """The words in which opening refuses, and every command that reads the file in the same."""
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path)
    said = str(caught.value)
    for word in words:
        assert word in said, said
    assert "incomplete or damaged" not in said
    with pytest.raises(CheckpointError) as again:
        inspect_file(path)
    assert str(again.value) == said
    with pytest.raises(CheckpointError) as again:
        verify_file(path, path)
    assert str(again.value) == said
    with pytest.raises(CheckpointError) as again:
        quantize_checkpoint(path, "Q8_0", path.with_name("out.gguf"))
    assert str(again.value) == said
    return said


# ---- metadata that describes the weights


def rotated_file(path: Path, prefix: str, named: str, *, leave_out=(), add=()) -> tuple:
    """A file whose rotation only the metadata tell, under modules with another prefix."""
    stored, truth = storage.packed(files.model(), lambda w: rotated(w, 64), prefix, skip=STEM)
    modules = [
        key.removeprefix(prefix).removesuffix(".weight_scale")
        for key in stored
        if key.endswith(".weight_scale")
    ]
    layers = {named + m: conf(64) for m in (*modules, *add) if m not in leave_out}
    text = json.dumps({"format_version": "1.0", "layers": layers})
    return files.save(path, stored, {"_quantization_metadata": text}), truth


@pytest.mark.parametrize(
    ("prefix", "named"),
    [
        (PREFIX, PREFIX),
        (PREFIX, ""),
        ("", PREFIX),
        ("transformer.", "diffusion_model."),
        ("", "net."),
        ("unconditional.", "unconditional_transformer."),
    ],
)
def test_a_description_is_found_whatever_stands_before_its_name(tmp_path, prefix, named):
    path, truth = rotated_file(tmp_path / "cond.safetensors", prefix, named)
    ck = open_checkpoint(path)
    assert ck.level == "INT8 W8A8 rotated"
    check_weights(ck, ck.copies[0], truth, ulps=16)


def test_a_description_of_no_tensor_is_an_error(tmp_path):
    path, _ = rotated_file(tmp_path / "m.safetensors", PREFIX, "", add=["layers.7.attention.o"])
    refused(path, "layers.7.attention.o", "describes a weight that is not in the file")
    path, _ = rotated_file(tmp_path / "n.safetensors", PREFIX, "", add=["blocks.0.attn.proj"])
    refused(path, "blocks.0.attn.proj")


def test_two_descriptions_of_one_weight(tmp_path):
    stored, _ = storage.packed(files.model(), lambda w: rotated(w, 64), "", skip=STEM)
    stored[f"{MODULE}.comfy_quant"] = storage.as_json(conf(64))
    layers = {PREFIX + MODULE: conf(16)}
    metadata = {"_quantization_metadata": json.dumps({"layers": layers})}
    refused(files.save(tmp_path / "m.safetensors", stored, metadata), MODULE, "two things")
    layers = {MODULE: conf(64), PREFIX + MODULE: conf(16)}
    metadata = {"_quantization_metadata": json.dumps({"layers": layers})}
    del stored[f"{MODULE}.comfy_quant"]
    refused(files.save(tmp_path / "m.safetensors", stored, metadata), MODULE, "two things")


def test_descriptions_of_another_model_in_the_file(tmp_path):
    """An all-in-one file: its encoder's description is not ours to use."""
    path, truth = rotated_file(tmp_path / "m.safetensors", PREFIX, PREFIX)
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        metadata = file.metadata()
        stored = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    layers = json.loads(metadata["_quantization_metadata"])["layers"]
    name = "text_encoders.qwen3vl_8b.transformer.model.layers.0.mlp.up_proj"
    layers[name] = {"format": "float8_e4m3fn"}
    stored[f"{name}.weight"] = torch.zeros(4, 4).to(torch.float8_e4m3fn)
    metadata["_quantization_metadata"] = json.dumps({"layers": layers})
    ck = open_checkpoint(files.save(tmp_path / "all.safetensors", stored, metadata))
    check_weights(ck, "conditional", truth, ulps=16)


# ---- tensors beside a quantized weight

SIBLINGS = {
    "scale": torch.rand(128, 1),
    "scales": torch.rand(128, 1),
    "qscale": torch.rand(128),
    "weight.scale": torch.rand(128),
    "weight_zero_point": torch.ones(128, 1, dtype=torch.int8),
    "zero_point": torch.ones(128, 1),
    "smoothquant_factor": torch.rand(64),
    "smooth_factor": torch.rand(64),
    "proj_up": torch.rand(128, 4),
    "proj_down": torch.rand(4, 64),
    "svd_up": torch.rand(128, 4),
    "svd_down": torch.rand(4, 64),
    "quip_s_u": torch.ones(128),
    "quip_s_v": torch.ones(64),
    "orig_shape": torch.tensor([120, 64]),
    "hadamard": torch.eye(4),
    "some.thing.new": torch.ones(1),
    "lora_A.weight": torch.rand(4, 64),
}


@pytest.mark.parametrize("kind", ["int8", "fp8", "bf16"])
@pytest.mark.parametrize("suffix", SIBLINGS)
def test_a_tensor_that_is_not_understood(tmp_path, suffix, kind):
    packs = {
        "int8": lambda w: storage.pack_comfy_int8(w, None),
        "fp8": storage.pack_fp8,
        "bf16": lambda w: ({"weight": w.bfloat16()}, w),
    }
    stored, _ = storage.packed(files.model(), packs[kind], "transformer.", skip=STEM)
    stored[f"transformer.{MODULE}.{suffix}"] = SIBLINGS[suffix]
    path = files.save(tmp_path / "m.safetensors", stored)
    refused(path, f"{MODULE}.{suffix}", "not supported")


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8])
def test_sdnq(tmp_path, dtype):
    """``scale`` for ``weight_scale``: read as unscaled fp8 the weights were 3,450 x off."""

    def pack(weight):
        parts, _ = storage.pack_fp8(weight)
        data = parts["weight"] if dtype is not torch.int8 else storage.pack_int8(weight)[0]
        return {"weight": data, "scale": parts["weight_scale"].reshape(-1, 1)}, weight

    stored, _ = storage.packed(files.split_model(), pack, skip=["adaln"])
    folder = tmp_path / "transformer"
    files.save(folder / "diffusion_pytorch_model.safetensors", stored)
    refused(folder, ".scale", "SDNQ")


@pytest.mark.parametrize(
    ("parts", "whose"),
    [
        ({"weight._data": torch.int8, "weight._scale": torch.float32}, "optimum-quanto"),
        ({"_weight_qdata": torch.int8, "_weight_scale": torch.float32}, "torchao"),
        ({"qweight": torch.int32, "qzeros": torch.int32, "scales": torch.float16}, "GPTQ"),
        ({"weight_packed": torch.int32, "weight_scale": torch.float16}, "compressed-tensors"),
        ({"W_q": torch.uint8, "meta": torch.uint8}, "HQQ"),
    ],
)
@pytest.mark.parametrize("all_of_them", [True, False])
def test_formats_that_name_the_weight_otherwise(tmp_path, parts, whose, all_of_them):
    """They were called no Ideogram 4, or said to be incomplete."""
    stored = {}
    for name, tensor in files.model().items():
        if files.is_linear(name) and (all_of_them or name.endswith("w2.weight")):
            module = name.removesuffix(".weight")
            stored |= {f"{module}.{end}": torch.ones(8).to(dtype) for end, dtype in parts.items()}
        else:
            stored[name] = tensor.bfloat16()
    refused(files.save(tmp_path / "m.safetensors", stored), whose, "not supported")


def test_a_lora_is_still_a_lora(tmp_path):
    module = "diffusion_model.layers.0.attention.qkv"
    stored = {f"{module}.lora_A.weight": torch.ones(4, 64)}
    stored[f"{module}.lora_B.weight"] = torch.ones(192, 4)
    with pytest.raises(NotIdeogram4Error, match="a LoRA"):
        open_checkpoint(files.save(tmp_path / "m.safetensors", stored))


HARMLESS = {
    "input_scale": torch.ones(()),
    "scale_input": torch.ones(128, 1),
    "output_scale": torch.ones(()),
    "input_amax": torch.ones(64),
    "input_quantizer._amax": torch.ones(()),
}


def test_ranges_of_activations_change_nothing(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        ck = open_checkpoint(int8_file(tmp_path / "m.safetensors", beside=HARMLESS))
    assert ck.level == "INT8 W8A8"
    assert not caplog.records


def test_smoothing_beside_fp8_is_not_dropped(tmp_path):
    stored, _ = storage.packed(files.model(), storage.pack_fp8, skip=STEM)
    stored[f"{MODULE}.pre_quant_scale"] = torch.rand(64) + 0.5
    refused(files.save(tmp_path / "m.safetensors", stored), f"{MODULE}.pre_quant_scale")


@pytest.mark.parametrize("described", [True, False])
def test_floats_that_are_told_to_be_scaled(tmp_path, described):
    state = files.model()
    parts = {"weight_scale": torch.full((128, 1), 0.5)}
    if described:
        parts = {"comfy_quant": storage.as_json({"format": "int8_tensorwise"})}
    state |= {f"{MODULE}.{suffix}": value for suffix, value in parts.items()}
    refused(files.save(tmp_path / "m.safetensors", state), MODULE, "F32 values")


# ---- what a description says


@pytest.mark.parametrize(
    "more",
    [
        {"hadamard": True},
        {"rotation": 256},
        {"quarot_groupsize": 64},
        {"zero_point": 3},
        {"smoothquant": {"alpha": 0.5}},
        {"group_size": 32},
        {"per_row": True, "params": {"hadamard": 64}},
        {"orig_shape": [128, 60]},
        {"transposed": True},
    ],
)
def test_more_in_a_description_than_is_understood(tmp_path, more):
    word = "hadamard" if "params" in more else next(iter(more))
    refused(int8_file(tmp_path / "m.safetensors", **more), word, "not supported")


def test_what_changes_nothing_in_a_description(tmp_path):
    state = {"full_precision_matrix_mult": True, "orig_dtype": "torch.bfloat16", "per_row": True}
    off = {"hadamard": False, "smoothquant": None, "zero_point": 0, "convrot": False}
    ck = open_checkpoint(int8_file(tmp_path / "m.safetensors", **state, **off))
    assert ck.level == "INT8 W8A8"


def test_a_rotation_of_fp8(tmp_path):
    def pack(weight):
        parts, truth = storage.pack_fp8(weight)
        told = {"format": "float8_e4m3fn", "convrot": True, "convrot_groupsize": 64}
        return parts | {"comfy_quant": storage.as_json(told)}, truth

    stored, _ = storage.packed(files.model(), pack, skip=STEM)
    refused(files.save(tmp_path / "m.safetensors", stored), "float8_e4m3fn with convrot")


@pytest.mark.parametrize(
    ("metadata", "word"),
    [
        ({"rotation": "hadamard, groups of 64"}, "rotation"),
        ({"convrot_groupsize": "64"}, "convrot_groupsize"),
        ({"use_hadamard": "true"}, "use_hadamard"),
        ({"quantization": json.dumps({"method": {"rotate": True}})}, "rotate"),
        ({"quantization_config": json.dumps({"quant_method": "fp8", "use_svd": True})}, "use_svd"),
    ],
)
def test_a_rotation_told_in_the_metadata(tmp_path, metadata, word):
    stored, _ = storage.packed(files.model(), lambda w: rotated(w, 64), skip=STEM)
    path = files.save(tmp_path / "m.safetensors", stored, metadata)
    refused(path, word, "tells of a change to its weights")


@pytest.mark.parametrize("key", ["hadamard_matrix", f"{PREFIX}rotation.weight", "quarot"])
def test_a_rotation_told_by_a_tensor_of_its_own(tmp_path, key):
    stored, _ = storage.packed(files.model(), lambda w: rotated(w, 64), PREFIX, skip=STEM)
    path = files.save(tmp_path / "m.safetensors", stored | {key: torch.eye(4)})
    refused(path, key, "tells of a change to its weights")


@pytest.mark.parametrize(
    "key", ["layers.0.attention.qkv_smooth", "layers.1.ffn_smooth", "layers.0.experts.0.w1.weight"]
)
def test_a_tensor_in_a_layer_that_is_of_no_module(tmp_path, key):
    stored, _ = storage.packed(files.model(), storage.pack_fp8, PREFIX, skip=STEM)
    path = files.save(tmp_path / "m.safetensors", stored | {PREFIX + key: torch.rand(4)})
    refused(path, key, "Ideogram 4 has no such tensor")


def test_a_wish_for_the_hosts_attention_is_no_weight(tmp_path, caplog):
    key = "layers.0.attention.comfy_attention.config"
    state = files.model() | {key: storage.as_json({"attention": "comfy_kitchen_int8"})}
    assert open_checkpoint(files.save(tmp_path / "m.safetensors", state)).level == "BF16"
    assert not caplog.records


def test_metadata_that_sum_up_what_the_tensors_tell(tmp_path):
    def pack(weight):
        parts, truth = rotated(weight, 64)
        return parts | {"comfy_quant": storage.as_json(conf(64))}, truth

    stored, truth = storage.packed(files.model(), pack, skip=STEM)
    summary = {"convrot_groupsize": "64", "quantization": json.dumps({"convrot": True})}
    path = files.save(tmp_path / "m.safetensors", stored, summary)
    check_weights(open_checkpoint(path), "conditional", truth, ulps=16)
    summary = {"quantization": json.dumps({"convrot": True, "use_svd": True})}
    refused(files.save(tmp_path / "n.safetensors", stored, summary), "use_svd")


@pytest.mark.parametrize(
    "metadata", [{"rotation": "none"}, {"convrot": "false"}, {"lora_rank": "16"}]
)
def test_metadata_that_tell_of_no_rotation(tmp_path, metadata):
    assert open_checkpoint(int8_file(tmp_path / "m.safetensors", metadata=metadata)).level


CLASS = {"_class_name": "Ideogram4Transformer2DModel", **files.CONFIG}


@pytest.mark.parametrize(
    ("config", "word"),
    [
        ({"quant_method": "sdnq", "weights_dtype": "int8"}, "sdnq"),
        ({"quant_method": "torchao"}, "torchao"),
        ({"quant_method": "fp8", "use_hadamard": True, "hadamard_group_size": 128}, "use_hadamard"),
        ({"quant_method": "compressed-tensors", "transform_config": {"R1": {}}}, "transform"),
    ],
)
@pytest.mark.parametrize("where", ["config.json", "quantization_config.json"])
def test_quantization_config_of_a_folder(tmp_path, config, word, where):
    folder = tmp_path / "transformer"
    stored, _ = storage.packed(files.split_model(), storage.pack_fp8, skip=["adaln"])
    files.save(folder / "diffusion_pytorch_model.safetensors", stored)
    whole = {**CLASS, "quantization_config": config} if where == "config.json" else CLASS
    (folder / "config.json").write_text(json.dumps(whole))
    if where != "config.json":
        (folder / where).write_text(json.dumps(config))
    refused(folder, word)


@pytest.mark.parametrize("method", ["fp8", "float8_weight_only", "bitsandbytes"])
def test_quantization_config_that_the_tensors_bear_out(tmp_path, method):
    folder = tmp_path / "transformer"
    pack = storage.pack_nf4 if method == "bitsandbytes" else storage.pack_fp8
    stored, truth = storage.packed(files.split_model(), pack, skip=["adaln"])
    files.save(folder / "diffusion_pytorch_model.safetensors", stored)
    whole = {**CLASS, "quantization_config": {"quant_method": method}}
    (folder / "config.json").write_text(json.dumps(whole))
    check_weights(open_checkpoint(folder), "conditional", files.fuse(truth), ulps=4)


# ---- good files are read, or refused by name, and never called damaged


def test_long_rotations(tmp_path):
    """The largest power of 4 that divides K, as convert_to_quant's dynamic groups are."""
    sizes = {"num_layers": 1, "attention_head_dim": 512, "intermediate_size": 4096}
    state = files.model(**sizes)

    def pack(weight):
        group = 4096 if weight.shape[1] % 4096 == 0 else 1024
        parts, truth = rotated(weight, group)
        return parts | {"comfy_quant": storage.as_json(conf(group))}, truth

    stored, truth = storage.packed(state, pack, skip=(*STEM, "adaln_modulation"))
    ck = open_checkpoint(files.save(tmp_path / "m.safetensors", stored))
    assert ck.level == "INT8 W8A8 rotated"
    loaded = ck.load("conditional", dtype=torch.float32)
    assert loaded["layers.0.feed_forward.w2.weight"]._params.rotation == 4096
    for name, tensor in truth.items():
        dense = loaded[name].dequantize() if files.is_linear(name) else loaded[name]
        assert torch.allclose(dense.float(), tensor, atol=1e-5 * float(tensor.abs().max())), name


def test_a_rotation_of_no_power_of_four(tmp_path):
    refused(
        int8_file(tmp_path / "m.safetensors", convrot=True, convrot_groupsize=32),
        "groups of 32",
        "not supported",
    )


BLOCKS = {
    "another dtype's format": ("int8_blockwise", torch.rand(4, 2), "fp8"),
    "another block": ("int8_blockwise", torch.rand(8, 4), "int8"),
    "block3d": (None, torch.rand(128, 2, 1), "int8"),
    "block3d of fp8": (None, torch.rand(128, 2, 1), "fp8"),
    "input channels": (None, torch.rand(1, 64), "int8"),
    "input channels of fp8": (None, torch.rand(1, 64), "fp8"),
}


@pytest.mark.parametrize("case", BLOCKS)
def test_scales_of_blocks_are_told_by_the_header(tmp_path, case):
    """Those that are read are in ``test_layout_blockwise.py``."""
    told, scale, kind = BLOCKS[case]
    pack = storage.pack_fp8 if kind == "fp8" else lambda w: storage.pack_comfy_int8(w, None)
    stored, _ = storage.packed(files.model(), pack, skip=STEM)
    stored[f"{MODULE}.weight_scale"] = scale
    stored.pop(f"{MODULE}.comfy_quant", None)
    if told:
        stored[f"{MODULE}.comfy_quant"] = storage.as_json({"format": told, "group_size": 32})
    said = refused(files.save(tmp_path / "m.safetensors", stored), MODULE, "not supported")
    assert told is None or told in said


def test_fp8_of_scaled_rows_is_read(tmp_path):
    def pack(weight):
        parts, truth = storage.pack_fp8(weight)
        return parts | {"comfy_quant": storage.as_json({"format": "float8_e4m3fn_rowwise"})}, truth

    stored, truth = storage.packed(files.model(), pack, skip=STEM)
    check_weights(
        open_checkpoint(files.save(tmp_path / "m.safetensors", stored)), "conditional", truth
    )


def test_a_value_that_cannot_be_used_is_no_broken_download(tmp_path):
    """A scale that underflowed to zero: the tool that wrote the file made it so."""
    stored, _ = storage.packed(files.model(), lambda w: storage.pack_comfy_int8(w, None), skip=STEM)
    stored[f"{MODULE}.weight_scale"][3] = 0
    ck = open_checkpoint(files.save(tmp_path / "m.safetensors", stored))
    with pytest.raises(CheckpointError, match=r"w1.*bad scale.*row 3") as caught:
        ck.load("conditional")
    assert "incomplete or damaged" not in str(caught.value)


def test_auto_tells_of_a_file_that_it_cannot_read(tmp_path):
    path = int8_file(tmp_path / "m.safetensors", beside={"svd_up": torch.rand(128, 4)})
    catalogue = read_catalogue(list_files("diffusion_models", [str(tmp_path)]), open_checkpoint)
    assert not catalogue.candidates
    said = refused(path, "svd_up")
    assert catalogue.broken == {"m.safetensors": said}
    int8_file(tmp_path / "cond.safetensors")
    int8_file(tmp_path / "uncond.safetensors")
    catalogue = read_catalogue(list_files("diffusion_models", [str(tmp_path)]), open_checkpoint)
    pair = resolve("auto", catalogue, ["INT8 W8A8"], 1 << 40)
    assert (pair.conditional.name, pair.unconditional.name) == (
        "cond.safetensors",
        "uncond.safetensors",
    )
    assert any(said in note for note in pair.notes)


# ---- the same, said elsewhere


@pytest.mark.parametrize(
    "rename",
    [
        lambda module: module.replace("layers.", "transformer_blocks."),
        lambda module: ".".join(module.split(".")[-2:]),
        lambda module: module.rpartition(".")[2],
        lambda module: "re:.*" + module,
    ],
)
def test_the_end_of_a_modules_name_alone_is_no_other_model(tmp_path, rename):
    """It was taken for a description of another model in the file, and the rotation was lost."""
    stored, _ = storage.packed(files.model(), lambda w: rotated(w, 64), skip=STEM)
    modules = [key.removesuffix(".weight_scale") for key in stored if key.endswith("_scale")]
    layers = {rename(module): conf(64) for module in modules}
    metadata = {"_quantization_metadata": json.dumps({"layers": layers})}
    path = files.save(tmp_path / "m.safetensors", stored, metadata)
    refused(path, next(iter(layers)), "describes a weight that is not in the file")


@pytest.mark.parametrize("more", [{"default": conf(64)}, {"convrot": True}])
def test_a_description_for_all_beside_that_of_modules(tmp_path, more):
    metadata = {"_quantization_metadata": json.dumps({"layers": {}, **more})}
    refused(int8_file(tmp_path / "m.safetensors", metadata=metadata), "convrot")


def shards(folder: Path, said: list[dict | None], index: dict | None = None) -> tuple:
    """A model of two shards, rotated int8, each with its own metadata."""
    stored, truth = storage.packed(files.model(), lambda w: rotated(w, 64), skip=STEM)
    keys = sorted(stored)
    names = [f"m-0000{number}-of-00002.safetensors" for number in (1, 2)]
    halves = dict(zip(names, (keys[: len(keys) // 2], keys[len(keys) // 2 :]), strict=True))
    for (name, half), metadata in zip(halves.items(), said, strict=True):
        files.save(folder / name, {key: stored[key] for key in half}, metadata)
    weight_map = {key: name for name, half in halves.items() for key in half}
    text = json.dumps({"weight_map": weight_map, **(index or {})})
    (folder / "m.safetensors.index.json").write_text(text)
    return folder / names[0], truth, [list(half) for half in halves.values()]


def described(keys: list[str], group: int = 64) -> dict[str, str]:
    modules = [key.removesuffix(".weight_scale") for key in keys if key.endswith("_scale")]
    layers = {module: conf(group) for module in modules}
    return {"_quantization_metadata": json.dumps({"layers": layers})}


def test_each_shard_describes_its_own(tmp_path):
    """The second one's description was dropped, and half of the weights stayed rotated."""
    _, _, halves = shards(tmp_path, [None, None])
    path, truth, _ = shards(tmp_path, [described(half) for half in halves])
    check_weights(open_checkpoint(path), "conditional", truth, ulps=16)
    of_all = {"metadata": described([*halves[0], *halves[1]])}
    path, truth, _ = shards(tmp_path, [None, None], of_all)
    check_weights(open_checkpoint(path), "conditional", truth, ulps=16)
    path, _, _ = shards(tmp_path, [described(halves[0]), described(halves[0], 16)])
    refused(path, "two things of one weight")


@pytest.mark.parametrize(
    ("said", "index"),
    [
        ([{"rotation": "none"}, {"rotation": "64"}], None),
        ([None, None], {"metadata": {"hadamard": True}}),
        ([None, None], {"metadata": {"quantization_config": {"use_hadamard": True}}}),
        ([None, None], {"quantization_config": {"quant_method": "sdnq"}}),
    ],
)
def test_what_a_later_shard_or_the_index_tells(tmp_path, said, index):
    path, _, _ = shards(tmp_path, said, index)
    refused(path)


def test_one_linear_under_both_of_its_names(tmp_path):
    """The later one won, without a word."""
    state = files.model()
    both = state | {"layers.0.attention.to_out.0.weight": state["layers.0.attention.o.weight"] + 1}
    refused(files.save(tmp_path / "m.safetensors", both), "attention.o.weight", "stored twice")


@pytest.mark.parametrize(
    "key",
    [
        f"model.{MODULE}.weight_zero_point",
        f"quant.{MODULE}.svd_up",
        f"smooth.{MODULE}",
        f"base_model.model.{MODULE}.lora_A.weight",
        f"lora_unet_{MODULE.replace('.', '_')}.lora_up.weight",
        "final_layer.smooth",
        "input_proj_smooth",
        "smoothquant_factors",
    ],
)
def test_a_tensor_of_a_weight_under_another_prefix(tmp_path, key):
    """A line in the log said that it was ignored, and the picture was wrong."""
    stored, _ = storage.packed(files.model(), storage.pack_fp8, skip=STEM)
    stored[key] = torch.rand(128, 4)
    refused(files.save(tmp_path / "m.safetensors", stored), key, "it is not understood")


def test_other_weights_in_the_file_are_none_of_ours(tmp_path, caplog):
    stored, truth = storage.packed(files.model(), storage.pack_fp8, PREFIX, skip=STEM)
    others, _ = storage.packed(files.model(), storage.pack_fp8, "average.", skip=STEM)
    with caplog.at_level(logging.WARNING):
        ck = open_checkpoint(files.save(tmp_path / "m.safetensors", stored | others))
    check_weights(ck, "conditional", truth)
    assert "ignored" in caplog.text


def test_a_config_without_a_class_is_of_its_folder(tmp_path):
    folder = tmp_path / "transformer"
    stored, _ = storage.packed(files.split_model(), storage.pack_fp8, skip=["adaln"])
    files.save(folder / "diffusion_pytorch_model.safetensors", stored)
    (folder / "quantization_config.json").write_text('{"quant_method": "sdnq"}')
    refused(folder, "sdnq")
    (folder / "quantization_config.json").unlink()
    (folder / "config.json").write_text('{"quantization_config": {"use_hadamard": true}}')
    refused(folder, "use_hadamard")
