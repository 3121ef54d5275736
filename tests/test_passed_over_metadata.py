"""What metadata and configs tell of the weights is used or refused by name, wherever it stands."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from ideogram4_quant.checkpoint import open_checkpoint
from ideogram4_quant.tests import fixtures_files as files
from ideogram4_quant.tests import fixtures_storage as storage
from ideogram4_quant.tests.checkpoint_weights import check_weights
from ideogram4_quant.tests.fixtures_passed_over import (
    MODULE,
    PREFIX,
    STEM,
    conf,
    int8_file,
    refused,
    rotated,
)


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


# ---- said elsewhere


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


# ---- what stands for the whole file


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


def test_a_config_without_a_class_is_of_its_folder(tmp_path):
    folder = tmp_path / "transformer"
    stored, _ = storage.packed(files.split_model(), storage.pack_fp8, skip=["adaln"])
    files.save(folder / "diffusion_pytorch_model.safetensors", stored)
    (folder / "quantization_config.json").write_text('{"quant_method": "sdnq"}')
    refused(folder, "sdnq")
    (folder / "quantization_config.json").unlink()
    (folder / "config.json").write_text('{"quantization_config": {"use_hadamard": true}}')
    refused(folder, "use_hadamard")
