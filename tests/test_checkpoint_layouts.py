"""Every layout in: names, copies, level, and each weight as its writer dequantizes it."""

import json
from pathlib import Path

import pytest
import torch
from comfy_kitchen.tensor import QuantizedTensor

from ideogram4_quant.checkpoint import Checkpoint, open_checkpoint
from ideogram4_quant.ops.errors import CorruptFileError, MissingBaseError, PairMismatchError
from ideogram4_quant.tests import fixtures_files as files
from ideogram4_quant.tests import fixtures_storage as storage

State = dict[str, torch.Tensor]


def packed(state: State, pack, prefix: str = "", skip=()) -> tuple[State, State]:
    """(stored tensors, true weights) with every linear packed but those of ``skip``."""
    stored, truth = {}, {}
    for name, tensor in state.items():
        module = name.removesuffix(".weight")
        if files.is_linear(name) and not any(part in name for part in skip):
            parts, truth[name] = pack(tensor)
            stored |= {f"{prefix}{module}.{suffix}": value for suffix, value in parts.items()}
        else:
            stored[prefix + name] = tensor.bfloat16()
            truth[name] = tensor
    return stored, truth


def check_weights(ck: Checkpoint, copy: str, truth: State, ulps: float = 0) -> dict:
    """Loaded in fp32 the weights are ``truth``, in bf16 their rounding; linears are quantized."""
    loaded = ck.load(copy, dtype=torch.float32)
    assert set(loaded) == set(truth)
    assert list(ck.shapes(copy)) == list(loaded)
    for name, tensor in loaded.items():
        assert tensor.shape == truth[name].shape == ck.shapes(copy)[name], name
        assert tensor.dtype == torch.float32
        dense = tensor.dequantize() if isinstance(tensor, QuantizedTensor) else tensor
        error = (dense - truth[name]).abs().max()
        assert error <= ulps * 2**-24 * truth[name].abs().max(), (name, float(error))
    half = ck.load(copy)
    for name, tensor in half.items():
        assert tensor.dtype == torch.bfloat16
        assert isinstance(tensor, QuantizedTensor) == isinstance(loaded[name], QuantizedTensor)
        if not isinstance(tensor, QuantizedTensor):
            assert torch.equal(tensor, loaded[name].bfloat16())
    return loaded


def quantized(loaded: State) -> set[str]:
    return {name for name, tensor in loaded.items() if isinstance(tensor, QuantizedTensor)}


def linears(state: State) -> set[str]:
    return {name for name in state if files.is_linear(name)}


def folder(path: Path, stored: State, config: bool = True) -> Path:
    """A diffusers model folder in two shards with an index."""
    names = sorted(stored)
    shards = [names[::2], names[1::2]]
    index = {}
    for number, part in enumerate(shards, 1):
        file = f"diffusion_pytorch_model-{number:05d}-of-00002.safetensors"
        files.save(path / file, {name: stored[name] for name in part})
        index |= dict.fromkeys(part, file)
    text = json.dumps({"metadata": {"total_size": 1}, "weight_map": index})
    (path / "diffusion_pytorch_model.safetensors.index.json").write_text(text)
    if config:
        values = {"_class_name": "Ideogram4Transformer2DModel", **files.CONFIG}
        (path / "config.json").write_text(json.dumps(values))
    return path


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_plain(tmp_path: Path, dtype: torch.dtype):
    state = files.model()
    path = files.save(tmp_path / "m.safetensors", {k: v.to(dtype) for k, v in state.items()})
    ck = open_checkpoint(path)
    assert (ck.layout, ck.level, ck.copies) == ("safetensors", "BF16", ("conditional",))
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
        stored, truths[copy] = packed(state, lambda w: storage.pack_fp8(w, per_row=per_row))
        folder(tmp_path / name, stored)
    ck = open_checkpoint(tmp_path)
    assert (ck.layout, ck.level) == ("ideogram-ai FP8", "FP8")
    assert ck.copies == ("conditional", "unconditional")
    assert "folder" in ck.copy_reason
    assert len(ck.paths) == 4
    assert ck.config.to_dict() == files.CONFIG
    for copy, truth in truths.items():
        loaded = check_weights(ck, copy, truth)
        assert quantized(loaded) == linears(truth)
    assert open_checkpoint(tmp_path, copy="unconditional").copies == ("unconditional",)


def test_one_folder_or_shard_of_it(tmp_path: Path):
    stored, truth = packed(files.model(), storage.pack_fp8)
    path = folder(tmp_path / "unconditional_transformer", stored)
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
    stored, truth = packed(files.model(), lambda w: storage.pack_nf4(w, double=double))
    ck = open_checkpoint(files.save(tmp_path / "m.safetensors", stored))
    assert (ck.layout, ck.level) == ("bitsandbytes NF4", "NF4")
    assert ck.config.to_dict() == files.CONFIG
    loaded = check_weights(ck, "conditional", truth)
    assert quantized(loaded) == linears(truth)


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
        stored, truth = packed(state, pack)
    ck = open_checkpoint(folder(tmp_path / "transformer", stored))
    assert (ck.layout, ck.level) == ("diffusers", level)
    truth = files.fuse(truth)
    loaded = check_weights(ck, "conditional", truth, ulps)
    qkv = loaded["layers.1.attention.qkv.weight"]
    assert qkv.shape == (3 * files.HIDDEN, files.HIDDEN)
    assert isinstance(qkv, QuantizedTensor) == (pack is not None)


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_K"])
def test_diffusers_layout_in_gguf(tmp_path: Path, kind: str):
    tensors, truth = gguf_tensors(files.split_model(**files.WIDE), kind)
    ck = open_checkpoint(files.write_gguf_py(tmp_path / "m.gguf", tensors))
    loaded = check_weights(ck, "conditional", files.fuse(truth))
    assert isinstance(loaded["layers.0.attention.qkv.weight"], QuantizedTensor)


def test_split_pieces_of_different_formats_become_dense(tmp_path: Path, caplog):
    def mixed(weight: torch.Tensor):
        mixed.count += 1
        return storage.pack_fp8(weight) if mixed.count % 2 else storage.pack_comfy_int8(weight)

    mixed.count = 0
    state = files.split_model()
    stored, truth = packed(state, mixed)
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
    stored, truth = packed(files.split_model(), smooth)
    ck = open_checkpoint(files.save(tmp_path / "m.safetensors", stored))
    check_weights(ck, "conditional", files.fuse(truth), ulps=4)


@pytest.mark.parametrize("where", ["tensors", "metadata", "older"])
def test_comfy_fp8(tmp_path: Path, where: str):
    """fp8_scaled: a scalar scale, described in a tensor, in metadata, or by the older names."""
    prefix = "model.diffusion_model."
    stored, truth = packed(
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
    assert (ck.layout, ck.level) == (names.get(where, "ComfyUI FP8"), "FP8")
    assert ck.copies == ("unconditional",)
    assert "model_type" in ck.copy_reason
    assert ck.protected == ("adaln_proj",)
    assert ck.metadata["model_type"] == "ideogram4_uncond"
    check_weights(ck, "unconditional", truth)


@pytest.mark.parametrize("nested", [False, True])
def test_comfy_int8_convrot(tmp_path: Path, nested: bool):
    """204 block linears rotated, the stem in bf16; comfy-kitchen is the oracle."""
    stem = ["_proj.", "t_embedding", "final_layer"]
    stored, truth = packed(
        files.model(), lambda w: storage.pack_comfy_int8(w, nested=nested), skip=stem
    )
    ck = open_checkpoint(files.save(tmp_path / "m.safetensors", stored))
    assert (ck.layout, ck.level) == ("ComfyUI INT8", "INT8 W8A8 rotated")
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

    stored, truth = packed(files.model(), pack)
    ck = open_checkpoint(files.save(tmp_path / "m.safetensors", stored))
    check_weights(ck, "conditional", truth, ulps=4)


# --- Transformer Lab ------------------------------------------------------------------------------


def transformer_lab_int8(path: Path, states: dict[str, State], *, flat: bool, dtype=torch.float32):
    """Linears only, both copies; ws [N] or [N, 1]; w2 of layer 1 protected, w1 not smoothed."""
    stored, truths = {}, {}
    for copy, state in states.items():
        truths[copy] = dict(state)
        for name in linears(state):
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
    folder(bases / "transformer", packed(states["conditional"], storage.pack_fp8)[0])
    folder(
        bases / "unconditional_transformer", packed(states["unconditional"], storage.pack_fp8)[0]
    )
    ck = open_checkpoint(path, bases)
    assert (ck.layout, ck.level) == ("Transformer Lab INT8", "INT8 W8A8")
    assert ck.copies == ("conditional", "unconditional")
    assert "prefix" in ck.copy_reason
    assert ck.config.to_dict() == files.CONFIG
    assert ck.protected == (
        "conditional.layers.1.feed_forward.w2",
        "unconditional.layers.1.feed_forward.w2",
    )
    for copy, truth in truths.items():
        loaded = check_weights(ck, copy, truth, ulps=4)
        assert quantized(loaded) == linears(truth) - {"layers.1.feed_forward.w2.weight"}


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


# --- GGUF -----------------------------------------------------------------------------------------


def gguf_tensors(state: State, kind: str, prefix: str = "", everything: bool = False):
    """Linears in ``kind`` (Q8_0 where blocks do not fit), the rest F16, or ``kind`` as well."""
    tensors, truth = {}, {}
    for number, (name, tensor) in enumerate(state.items()):
        matrix = tensor.reshape(1, -1) if tensor.dim() == 1 else tensor
        columns = matrix.shape[1]
        if files.is_linear(name) or (everything and name.endswith(".weight")):
            used = kind if columns % (256 if kind.endswith("_K") else 32) == 0 else "Q8_0"
            data, true = storage.gguf_blocks(matrix, used, number)
            data = data.reshape(-1) if tensor.dim() == 1 else data
            tensors[prefix + name] = (data, used)
            truth[name] = true.reshape(tensor.shape)
        else:
            used = "BF16" if everything else "F16"
            tensors[prefix + name] = (tensor.numpy(), used)
            truth[name] = tensor if everything else tensor.half().float()
    return tensors, truth


KINDS = ["Q8_0", "Q6_K", "Q5_K", "Q5_1", "Q5_0", "Q4_K", "Q4_1", "Q4_0"]


@pytest.mark.parametrize("kind", KINDS)
def test_gguf_levels(tmp_path: Path, kind: str):
    state = files.model(**(files.WIDE if kind.endswith("_K") else {}))
    tensors, truth = gguf_tensors(state, kind)
    ck = open_checkpoint(files.write_gguf_py(tmp_path / "m.gguf", tensors))
    assert (ck.layout, ck.level, ck.protected) == ("GGUF", kind, ())
    loaded = check_weights(ck, "conditional", truth)
    assert quantized(loaded) == linears(truth)


def test_transformer_lab_gguf(tmp_path: Path):
    tensors, truths = {}, {}
    for seed, (copy, prefix) in enumerate([("conditional", "cond."), ("unconditional", "uncond.")]):
        part, truths[copy] = gguf_tensors(files.model(seed, **files.WIDE), "Q4_K", prefix)
        tensors |= part
    ck = open_checkpoint(files.write_gguf_py(tmp_path / "ideogram4-q4_k.gguf", tensors))
    assert (ck.layout, ck.level) == ("Transformer Lab GGUF", "Q4_K")
    assert ck.copies == ("conditional", "unconditional")
    for copy, truth in truths.items():
        check_weights(ck, copy, truth)


@pytest.mark.parametrize("arch", ["ideogram4", "ideogram", None])
def test_community_gguf_architectures(tmp_path: Path, arch: str | None):
    tensors, truth = gguf_tensors(files.model(), "Q4_0")
    path = files.write_gguf_py(tmp_path / "m.gguf", tensors, arch=arch)
    check_weights(open_checkpoint(path), "conditional", truth)


def test_community_gguf_with_everything_quantized(tmp_path: Path):
    """Norms and the two-row embedding in blocks, biases in bf16: non-linears come out dense."""
    tensors, truth = gguf_tensors(files.model(), "Q8_0", everything=True)
    assert tensors["embed_image_indicator.weight"][1] == "Q8_0"
    assert tensors["layers.0.attention.norm_q.weight"][1] == "Q8_0"
    ck = open_checkpoint(files.write_gguf_py(tmp_path / "m.gguf", tensors))
    loaded = check_weights(ck, "conditional", truth)
    assert quantized(loaded) == linears(truth)


def test_gguf_with_leading_ones(tmp_path: Path):
    state = files.model()
    tensors, truth = gguf_tensors(state, "Q8_0")
    for name, (data, kind) in tensors.items():
        tensors[name] = (data.reshape((1,) * (3 - data.ndim) + data.shape), kind)
    check_weights(
        open_checkpoint(files.write_gguf_py(tmp_path / "m.gguf", tensors)), "conditional", truth
    )


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
    stored, truth = packed(state, lambda w: storage.pack_comfy_int8(w, 256))
    ck = open_checkpoint(files.save(tmp_path / "m.safetensors", stored))
    loaded = check_weights(ck, "conditional", truth, ulps=16)
    assert loaded["layers.0.feed_forward.w2.weight"]._params.rotation == 256


def test_real_widths(tmp_path: Path):
    """w2 as wide as the real one, in blocks of Q4_K, beside 256-wide heads."""
    wide = {"attention_head_dim": 256, "num_attention_heads": 1, "intermediate_size": 12288}
    state = files.model(3, **{**files.WIDE, **wide})
    tensors, truth = gguf_tensors(state, "Q4_K")
    ck = open_checkpoint(files.write_gguf_py(tmp_path / "m.gguf", tensors))
    assert (ck.config.hidden_size, ck.config.intermediate_size) == (256, 12288)
    check_weights(ck, "conditional", truth)


def test_incomplete_split(tmp_path: Path):
    state = files.split_model()
    del state["layers.1.attention.to_k.weight"]
    with pytest.raises(CorruptFileError, match=r"found no to_k"):
        open_checkpoint(files.save(tmp_path / "m.safetensors", state))
