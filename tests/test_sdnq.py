"""Folders of SDNQ: read as sdnq reads them, held in layouts that run, refused in words."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
from comfy_kitchen.tensor import QuantizedTensor
from safetensors import safe_open
from torch.nn import Linear

from ideogram4_quant.checkpoint import anew, open_checkpoint, open_encoder
from ideogram4_quant.checkpoint.grammar import build_entries, parse_key
from ideogram4_quant.checkpoint.statements import matched
from ideogram4_quant.checkpoint.tensor_files import open_tensor_files
from ideogram4_quant.errors import CheckpointError
from ideogram4_quant.ops.fold import Fold
from ideogram4_quant.ops.rotation import rotate
from ideogram4_quant.tests import encoder_weights
from ideogram4_quant.tests import fixtures_files as files
from ideogram4_quant.tests import fixtures_sdnq as sdnq_files
from ideogram4_quant.tests import fixtures_storage as storage

GOLDEN = Path(__file__).parent / "golden" / "sdnq_0_2_8.safetensors"  # a metadata key tells how
EXACT, HELD, ENCODED = 140, 60, 35  # dB: INT8; the same codes, scales in float16; encoded anew


def sqnr(found: torch.Tensor, true: torch.Tensor) -> float:
    error = (found.double() - true.double()).square().sum().clamp(min=1e-300)
    return float(10 * torch.log10(true.double().square().sum() / error))


def entries_of(folder: Path) -> dict:
    """The weights of a file that is no whole model."""
    tensor_files = open_tensor_files(folder)
    keys = {parse_key(name): raw for name, raw in tensor_files.tensors.items()}
    stated = matched(tensor_files, keys.items(), parse_key)
    return build_entries(keys.items(), stated).entries


def dense(entry) -> torch.Tensor:
    stored = [c.read(p) for c, p in zip(entry.codecs, entry.pieces, strict=True)]
    return torch.cat([each.dense(torch.float32) for each in stored])


# ---- as sdnq's own writer leaves them


@pytest.fixture(scope="module")
def golden(tmp_path_factory) -> tuple[dict, dict[str, torch.Tensor]]:
    """(entries, the values that sdnq 0.2.8 dequantizes to) of weights that it wrote."""
    folder = tmp_path_factory.mktemp("golden")
    with safe_open(GOLDEN, "pt") as opened:
        config = opened.metadata()["quantization_config"]
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    truth = {n.removeprefix("truth."): tensors.pop(n) for n in [*tensors] if n.startswith("truth.")}
    sdnq_files.save(folder, tensors, json.loads(config))
    return entries_of(folder), truth


HOLDING = {
    "layers.0.attention.qkv": ("Q4_1", HELD),  # uint4, the published recipe
    "layers.0.attention.o": ("Q8_0", HELD),  # int8 in groups of 64
    "layers.0.feed_forward.w1": ("Q5_0", HELD),  # int5
    "layers.0.feed_forward.w2": ("Q5_1", HELD),  # uint5 in groups of 32
    "layers.0.feed_forward.w3": ("Q8_0", ENCODED),  # float4_e2m1fn
    "layers.1.feed_forward.w1": ("Q4_1", HELD),  # uint3
    "layers.1.feed_forward.w2": (None, EXACT),  # int6, one scale a row
    "layers.1.feed_forward.w3": ("Q8_0", ENCODED),  # uint4 with a low-rank part
    "layers.1.attention.o": (None, EXACT),  # int7, rotated in groups of 64
}


@pytest.mark.parametrize("module", HOLDING)
def test_values_are_those_of_sdnq(golden, module):
    entries, truth = golden
    entry, true = entries[f"{module}.weight"], truth[f"{module}.weight"]
    assert entry.shape == tuple(true.shape)
    torch.testing.assert_close(dense(entry), true, rtol=0, atol=4e-7 * float(true.abs().max()))
    qtype, least = HOLDING[module]
    held = entry.read(torch.float32)
    assert getattr(held._params, "qtype", None) == qtype
    assert sqnr(held.dequantize(), true) > least
    x = torch.randn(3, true.shape[1])
    assert sqnr(torch.nn.functional.linear(x, held), x @ true.T) > min(least, ENCODED)


# ---- sdnq itself, where it is installed

DTYPES = (
    *("uint4", "uint5", "uint3", "uint2", "uint6", "uint8"),
    *("int8", "int7", "int6", "int5", "int4", "int3", "int2"),
    *("float4_e2m1fn", "float5_e2m3fnu", "float6_e3m2fn", "float8_e4m3fn", "fp5", "ufp6"),
)


WAYS = ({}, {"use_hadamard": True, "hadamard_group_size": 128}, {"use_quantized_matmul": True})
CASES = [*((d, way, 4608) for d in DTYPES for way in WAYS), ("uint4", WAYS[1], 12288)]


@pytest.mark.parametrize(("dtype", "way", "columns"), [*CASES, ("int8", WAYS[0], 12288)])
def test_what_sdnq_writes_here(tmp_path, dtype, way, columns):
    sdnq = pytest.importorskip("sdnq", reason="sdnq is not installed; the golden file stands in")
    from sdnq.utils import get_sdnq_params

    torch.manual_seed(0)
    linear = Linear(columns, 16, bias=False)
    linear.weight.data[0, :7] *= 40
    asked = sdnq.SDNQConfig(dtype, quantization_device="cpu", return_device="cpu", **way)
    layer, _ = sdnq.sdnq_quantize_layer(linear, asked, torch_dtype=torch.float32)
    found = {key: p.data for key, p in get_sdnq_params(layer).items() if torch.is_tensor(p)}
    dequantizer = layer.sdnq_dequantizer
    rest = dict.fromkeys(("scale_2", "zero_point", "svd_up", "svd_down", "zero_point_scale"))
    mm = dequantizer.use_quantized_matmul
    true = dequantizer(**rest | found, skip_quantized_matmul=mm, skip_compile=True)
    stored = {f"layers.0.feed_forward.w1.{key}": p.contiguous() for key, p in found.items()}
    said = json.loads(json.dumps(asked.to_dict(), default=str))
    (entry,) = entries_of(sdnq_files.save(tmp_path, stored, said)).values()
    assert entry.shape == (16, columns)
    torch.testing.assert_close(dense(entry), true, rtol=0, atol=4e-7 * float(true.abs().max()))
    assert sqnr(entry.read(torch.float32).dequantize(), true) > ENCODED


# ---- whole folders, by the formulas


KEPT = ["adaln", "input_proj", "llm_cond", "t_embedding", "final_layer", "embed_image"]


def folder_of(tmp_path, dtype, **changes) -> tuple[Path, dict[str, torch.Tensor]]:
    """A transformer's folder with every linear of the blocks packed, and the true weights."""

    def pack(weight):
        return sdnq_files.pack(weight, dtype)

    stored, truth = storage.packed(files.split_model(**files.WIDE), pack, skip=KEPT)
    folder = tmp_path / "transformer"
    return sdnq_files.save(folder, stored, sdnq_files.config(dtype, **changes)), files.fuse(truth)


@pytest.mark.parametrize("level", sdnq_files.LEVELS)
def test_a_folder(tmp_path, level):
    folder, truth = folder_of(tmp_path, sdnq_files.LEVELS[level])
    found = open_checkpoint(folder, copy="conditional")
    assert (found.level, found.origin) == (level, "SDNQ")
    for name, tensor in found.stream("conditional", dtype=torch.float32):
        values = tensor.dequantize() if isinstance(tensor, QuantizedTensor) else tensor
        assert sqnr(values, truth[name]) > HELD - 10, name  # rows with values 50 times as large


@pytest.mark.parametrize("rotated", [True, False])
def test_pieces_of_several_types(tmp_path, rotated):
    """As *dynamic* files have them: one linear of q, k, v needed more bits. Two rotations, which
    only a config made by hand asks for, leave floats."""
    folder, _ = folder_of(tmp_path, "uint4")
    name = "layers.0.attention.to_v"
    stored = {k: t for k, t in open_tensor_files(folder).load().items() if not k.startswith(name)}
    v = files.split_model(**files.WIDE)[f"{name}.weight"]
    turned = torch.from_numpy(sdnq_files.turn(v.numpy(), 128)) if rotated else v
    parts, _ = sdnq_files.pack(turned, "int8")
    stored |= {f"{name}.{key}": value for key, value in parts.items()}
    own = {} if rotated else {name: {"use_hadamard": False}}
    said = sdnq_files.config(
        "uint4", modules_dtype_dict={"int8": [f"{name}.weight"]}, modules_quant_config=own
    )
    if own:
        own[f"{name}.weight"] = own.pop(name)
    found = open_checkpoint(sdnq_files.save(folder, stored, said), copy="conditional")
    entry = found.entries["conditional"]["layers.0.attention.qkv.weight"]
    assert entry.level == "SDNQ 8-bit"
    whole = entry.read(torch.float32)
    assert isinstance(whole, QuantizedTensor) == rotated
    values = whole.dequantize() if rotated else whole
    assert sqnr(values[2 * len(v) :], v) > 35


def test_pipelines_folder(tmp_path):
    for copy in ("transformer", "unconditional_transformer"):
        folder_of(tmp_path / copy, "uint4")[0].rename(tmp_path / f"made-{copy}")
    pair = tmp_path / "pair"
    pair.mkdir()
    for copy in ("transformer", "unconditional_transformer"):
        (tmp_path / f"made-{copy}").rename(pair / copy)
    found = open_checkpoint(pair)
    assert found.copies == ("conditional", "unconditional")
    assert found.level == "SDNQ 4-bit"


def test_the_config_inside_config_json(tmp_path):
    """Where diffusers itself saved the model."""
    folder, _ = folder_of(tmp_path, "uint4")
    config = {"_class_name": "Ideogram4Transformer2DModel", **files.CONFIG, **files.WIDE}
    said = (folder / "quantization_config.json").read_text()
    (folder / "quantization_config.json").unlink()
    (folder / "config.json").write_text(
        json.dumps({**config, "quantization_config": json.loads(said)})
    )
    assert open_checkpoint(folder, copy="conditional").level == "SDNQ 4-bit"


def test_an_encoders_folder(tmp_path):
    state = encoder_weights.random_weights()
    stored, truth = {}, {}
    for name, tensor in state.items():
        module = f"model.language_model.{name.removesuffix('.weight')}"
        if name.endswith("_proj.weight"):
            parts, truth[name] = sdnq_files.pack(tensor, "uint4")
            stored |= {f"{module}.{key}": value for key, value in parts.items()}
        else:
            stored[f"{module}.weight"] = truth[name] = tensor
    files.save(tmp_path / "model.safetensors", stored)
    (tmp_path / "quantization_config.json").write_text(json.dumps(sdnq_files.config("uint4")))
    found = open_encoder(tmp_path)
    assert found.level == "SDNQ 4-bit"
    for name, tensor in found.stream(dtype=torch.float32):
        values = tensor.dequantize() if isinstance(tensor, QuantizedTensor) else tensor
        assert sqnr(values, truth[name]) > HELD - 10, name


# ---- refused


def refused(folder: Path, *words: str) -> None:
    """When it is opened, by the headers."""
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(folder, copy="conditional")
    for word in words:
        assert word in str(caught.value)


def test_without_its_config(tmp_path):
    folder, _ = folder_of(tmp_path, "uint4")
    (folder / "quantization_config.json").unlink()
    refused(
        folder,
        "to_q",
        "SDNQ's, whose quantization_config.json does not lie beside the file",
        "Copy quantization_config.json of the model's page into this folder.",
    )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"weights_dtype": "uint9"}, ("SDNQ uint9 (sdnq 0.2.8)", "to_q.weight")),
        ({"weights_dtype": "float4_e9m9"}, ("SDNQ float4_e9m9",)),
        ({"weights_dtype": None}, ("SDNQ None",)),
        ({"modules_dtype_dict": {"int11": ["*feed_forward.w2*"]}}, ("SDNQ int11", "w2.weight")),
        ({"use_codebook": True}, ("use_codebook True",)),
        ({"scale_dtype": "uint8"}, ("scale_dtype uint8",)),
        ({"hadamard_group_size": "many"}, ("unusable hadamard_group_size",)),
        ({"modules_dtype_dict": ["uint4"]}, ("unusable modules_dtype_dict",)),
        ({"modules_dtype_dict": {"int8": [3]}}, ("unusable list of modules",)),
        ({"weights_dtype": "uint5"}, ("to_q",)),
    ],
)
def test_an_unusable_config(tmp_path, changes, words):
    folder, _ = folder_of(tmp_path, "uint4", **changes)
    refused(folder, *words)


def low_rank(stored: dict, module: str, up: int, down: int) -> dict[str, torch.Tensor]:
    rows = stored[f"{module}.scale"].shape[0]
    columns = stored[f"{module}.weight"].numel() * 2 // rows
    return {
        f"{module}.svd_up": torch.ones(rows, up),
        f"{module}.svd_down": torch.ones(down, columns),
    }


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t, m: t.pop(f"{m}.zero_point"), "without its zero_point"),
        (lambda t, m: t.update({f"{m}.scale": t[f"{m}.scale"][:, :1].clone()}), "zero_point of"),
        (lambda t, m: t.update({f"{m}.weight": t[f"{m}.weight"][:-1].clone()}), "do not fill"),
        (lambda t, m: t.update({f"{m}.svd_up": torch.ones(256, 2)}), "half a low-rank part"),
        (lambda t, m: t.update(low_rank(t, m, 2, 3)), "low-rank part does not fit"),
        (
            lambda t, m: t.update({**low_rank(t, m, 2, 2), f"{m}.svd_up": torch.ones(7, 2)}),
            "[7, 2]",
        ),
        (lambda t, m: t.update({f"{m}.scale_2": torch.ones(1)}), "scale_2 beside U8"),
        (lambda t, m: t.update({f"{m}.weight": t[f"{m}.weight"].int()}), "codes are bytes"),
    ],
)
def test_parts_that_do_not_fit(tmp_path, change, words):
    folder, _ = folder_of(tmp_path, "uint4")
    stored = open_tensor_files(folder).load()
    change(stored, "layers.0.feed_forward.w1")
    files.save(folder / "diffusion_pytorch_model.safetensors", stored)
    refused(folder, words, "layers.0.feed_forward.w1")


def test_scales_that_are_no_numbers(tmp_path):
    folder, _ = folder_of(tmp_path, "uint4")
    stored = open_tensor_files(folder).load()
    stored["layers.0.feed_forward.w1.scale"] *= torch.nan
    files.save(folder / "diffusion_pytorch_model.safetensors", stored)
    found = open_checkpoint(folder, copy="conditional")
    with pytest.raises(CheckpointError, match=r"layers\.0\.feed_forward\.w1.*holds NaN"):
        found.load("conditional")


def test_a_cut_file(tmp_path):
    folder, _ = folder_of(tmp_path, "uint4")
    path = folder / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    refused(folder, path.name)


# ---- the rotation


@pytest.mark.parametrize("order", [2, 8, 32, 128, 512])
def test_rotation_by_sylvesters_matrices(order):
    x = torch.randn(5, 3 * order, dtype=torch.float64)
    found = rotate(x, order)
    torch.testing.assert_close(found, torch.from_numpy(sdnq_files.turn(x.numpy(), order)))
    torch.testing.assert_close(rotate(found, order), x)
    weight = torch.randn(4, 3 * order)
    fold = Fold(rotation=order)
    torch.testing.assert_close(fold.unfold(fold.fold(weight)), weight, rtol=1e-4, atol=1e-5)


def test_what_is_encoded_anew_is_said_once(caplog, golden):
    anew._say.cache_clear()
    entry = golden[0]["layers.0.feed_forward.w3.weight"]
    with caplog.at_level(logging.WARNING):
        entry.read(torch.float32)
        entry.read(torch.float32)
    assert caplog.text.count("float4_e2m1fn") == 1
