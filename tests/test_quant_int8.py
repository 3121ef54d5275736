"""INT8 files: the stored bytes by formula, other programs' readers, our own reader."""

import json
import math

import numpy as np
import pytest
import torch
from comfy_kitchen.tensor import QuantizedTensor, TensorWiseINT8Layout
from safetensors import safe_open
from safetensors.torch import load_file

from ideogram4_quant.checkpoint import open_checkpoint
from ideogram4_quant.quant import QuantOptions, quantize_checkpoint
from ideogram4_quant.tests import quant_model as model

W2 = "layers.0.feed_forward.w2"


@pytest.fixture(scope="module")
def weights():
    """Random weights with what breaks quantizers: a zero row, planted outliers, tiny values."""
    made = model.weights()
    made[f"{W2}.weight"][5] = 0
    made[f"{W2}.weight"][7] *= 1e-30
    made["layers.1.attention.o.weight"][:, 3] *= 100
    return made


@pytest.fixture(scope="module")
def source(tmp_path_factory, weights):
    path = tmp_path_factory.mktemp("source") / "bf16.safetensors"
    return model.write(path, weights, metadata={"license": "ideogram-non-commercial"})


@pytest.fixture(scope="module")
def plain(tmp_path_factory, source):
    path = tmp_path_factory.mktemp("plain") / "int8.safetensors"
    return path, quantize_checkpoint(source, "INT8 W8A8", path)


@pytest.fixture(scope="module")
def rotated(tmp_path_factory, source):
    path = tmp_path_factory.mktemp("rotated") / "rotated.safetensors"
    return path, quantize_checkpoint(source, "INT8 W8A8 rotated", path)


def expected(weight: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """absmax / 127 a row and round half to even, in numpy."""
    rows = weight.float().numpy()
    scale = np.maximum(np.abs(rows).max(axis=1) / np.float32(127), np.float32(1e-30))
    return np.rint(rows / scale[:, None]).astype(np.int8), scale


def sqnr(true: torch.Tensor, stored: torch.Tensor) -> float:
    noise = (true.double() - stored.double()).square().sum()
    return 10 * math.log10((true.double().square().sum() / noise).item())


def test_stored_integers_and_scales_are_the_formula(plain, weights):
    stored = load_file(plain[0])
    for name in model.linear_names():
        q, scale = expected(weights[f"{name}.weight"])
        assert stored[f"{name}.weight"].dtype == torch.int8
        assert stored[f"{name}.weight_scale"].dtype == torch.float32
        assert stored[f"{name}.weight_scale"].shape == (len(scale), 1)
        np.testing.assert_array_equal(stored[f"{name}.weight"].numpy(), q)
        np.testing.assert_array_equal(stored[f"{name}.weight_scale"][:, 0].numpy(), scale)


def test_everything_else_is_the_source_in_bf16(plain, weights):
    stored = load_file(plain[0])
    quantized = {f"{name}.weight" for name in model.linear_names()}
    for name in weights.keys() - quantized:
        assert stored[name].dtype == torch.bfloat16
        assert torch.equal(stored[name], weights[name]), name
    extra = {f"{n}.{s}" for n in model.linear_names() for s in ("weight_scale", "comfy_quant")}
    assert stored.keys() == weights.keys() | extra


def test_comfy_quant_is_the_hosts_own_json(plain, rotated):
    def text(path):
        return bytes(load_file(path)[f"{W2}.comfy_quant"].tolist()).decode()

    assert text(plain[0]) == '{"format": "int8_tensorwise"}'
    assert text(rotated[0]) == (
        '{"format": "int8_tensorwise", "convrot": true, "convrot_groupsize": 256}'
    )


@pytest.mark.parametrize("which", ["plain", "rotated"])
def test_comfy_kitchen_decodes_the_parts_to_the_source(which, request, weights):
    path, report = request.getfixturevalue(which)
    stored = load_file(path)
    figures = {t.name: t for t in report.tensors}
    for name in model.linear_names():
        config = json.loads(bytes(stored[f"{name}.comfy_quant"].tolist()))
        true = weights[f"{name}.weight"].float()
        params = TensorWiseINT8Layout.Params(
            scale=stored[f"{name}.weight_scale"],
            orig_dtype=torch.float32,
            orig_shape=tuple(true.shape),
            convrot=config.get("convrot", False),
            convrot_groupsize=config.get("convrot_groupsize", 256),
        )
        tensor = QuantizedTensor(stored[f"{name}.weight"], "TensorWiseINT8Layout", params)
        back = tensor.dequantize()
        # half a step of a row's grid; the rotation spreads an error over its group
        step = stored[f"{name}.weight_scale"] * (0.5 if which == "plain" else 0.5 * 256**0.5)
        assert ((back - true).abs() <= step * 1.001).all(), name
        measured = figures[f"{name}.weight"]
        assert sqnr(true, back) == pytest.approx(measured.sqnr_db, abs=0.01)
        assert (true - back).abs().max().item() == pytest.approx(measured.max_abs_error, rel=1e-3)


@pytest.mark.parametrize("which", ["plain", "rotated"])
def test_our_reader_gives_back_what_was_encoded(which, request, weights):
    path, report = request.getfixturevalue(which)
    checkpoint = open_checkpoint(path)
    assert checkpoint.level == report.level
    assert tuple(checkpoint.copies) == ("conditional",)
    assert checkpoint.config == open_checkpoint(report_source(request)).config
    loaded = checkpoint.load("conditional", dtype=torch.float32)
    assert loaded.keys() == weights.keys()
    figures = {t.name: t for t in report.tensors}
    for name, tensor in loaded.items():
        true = weights[name].float()
        if figures[name].sqnr_db == math.inf:
            assert torch.equal(tensor.float(), true), name
        else:
            assert isinstance(tensor, QuantizedTensor), name
            assert sqnr(true, tensor.dequantize()) == pytest.approx(figures[name].sqnr_db, abs=0.01)


def report_source(request):
    return request.getfixturevalue("source")


def test_gaussian_rows_reach_the_known_figure(tmp_path):
    """41.2 dB at 4608 inputs; a shorter row has a smaller absmax and so a finer grid."""
    generator = torch.Generator().manual_seed(3)
    tensors = model.weights()
    tensors["layers.0.feed_forward.w2.weight"] = torch.randn(256, 768, generator=generator)
    path = model.write(tmp_path / "s.safetensors", tensors)
    report = quantize_checkpoint(path, "INT8 W8A8", tmp_path / "q.safetensors")
    figure = next(t for t in report.tensors if t.name == "layers.0.feed_forward.w2.weight")
    grid = (torch.randn(4096, 768, generator=generator).abs().amax(1) / 127).double()
    ideal = -10 * math.log10((grid.square() / 12).mean().item())
    assert figure.sqnr_db == pytest.approx(ideal, abs=0.15)
    assert 41 < figure.sqnr_db < 43.5


def test_rotation_repairs_an_outlier_column(plain, rotated):
    def figure(report):
        name = "layers.1.attention.o.weight"
        return next(t.sqnr_db for t in report.tensors if t.name == name)

    # the SQNR counts the outlier as signal; what matters is the error of all the other columns
    def rest(report):
        name = "layers.1.attention.o.weight"
        return next(t.max_abs_error for t in report.tensors if t.name == name)

    assert rest(rotated[1]) < rest(plain[1])
    assert figure(rotated[1]) > figure(plain[1]) + 6


def test_protected_linears_are_bf16_without_comfy_quant(tmp_path, source, weights):
    path = tmp_path / "p.safetensors"
    options = QuantOptions(protect=("layers.*.feed_forward.w2",))
    report = quantize_checkpoint(source, "INT8 W8A8", path, options=options)
    stored = load_file(path)
    for i in range(2):
        name = f"layers.{i}.feed_forward.w2"
        assert torch.equal(stored[f"{name}.weight"], weights[f"{name}.weight"])
        assert f"{name}.comfy_quant" not in stored
        assert f"{name}.weight_scale" not in stored
    assert [t.name for t in report.tensors if t.protected] == [
        f"layers.{i}.feed_forward.w2.weight" for i in range(2)
    ]
    assert {t.name for t in report.worst(100)}.isdisjoint({f"{W2}.weight"})
    protected = open_checkpoint(path).protected
    assert {name.removesuffix(".weight") for name in protected} >= {W2}


def test_metadata_says_what_from_what_and_how(rotated, source):
    import hashlib

    with safe_open(rotated[0], "pt") as file:
        metadata = file.metadata()
    digest = hashlib.sha256(source.read_bytes()).hexdigest()
    assert metadata["model_type"] == "ideogram4_cond"
    assert metadata["license"] == "ideogram-non-commercial"
    assert metadata["source_sha256"] == digest
    assert json.loads(metadata["source"]) == [
        {"name": "bf16.safetensors", "size": source.stat().st_size, "sha256": digest}
    ]
    recipe = json.loads(metadata["quantization"])
    assert recipe["level"] == "INT8 W8A8 rotated"
    assert recipe["rotation"] == 256
    assert recipe["protected"] == []
    config = json.loads(metadata["config"])
    assert config["num_layers"] == 2
    assert config["attention_head_dim"] == 128
    assert metadata["software"].startswith("ideogram4-quant ")
    assert rotated[1].metadata == metadata


@pytest.mark.parametrize("level", ["INT8 W8A8", "INT8 W8A8 rotated"])
def test_same_input_same_bytes(tmp_path, source, level):
    files = [tmp_path / f"{i}.safetensors" for i in range(2)]
    for file in files:
        quantize_checkpoint(source, level, file)
    assert files[0].read_bytes() == files[1].read_bytes()


def test_unconditional_files_say_so(tmp_path, weights):
    path = model.write(tmp_path / "u.safetensors", weights, "unconditional")
    quantize_checkpoint(path, "INT8 W8A8", tmp_path / "q.safetensors")
    with safe_open(tmp_path / "q.safetensors", "pt") as file:
        assert file.metadata()["model_type"] == "ideogram4_uncond"
    assert tuple(open_checkpoint(tmp_path / "q.safetensors").copies) == ("unconditional",)


@pytest.fixture(scope="module")
def lab_pair(tmp_path_factory):
    """The files of two copies, and their weights by copy."""
    folder = tmp_path_factory.mktemp("pair")
    cond, uncond = model.weights(1), model.weights(2)
    return (
        model.write(folder / "cond.safetensors", cond),
        model.write(folder / "uncond.safetensors", uncond, "unconditional"),
        {"conditional": cond, "unconditional": uncond},
    )


@pytest.fixture(scope="module")
def lab_smooth():
    generator = torch.Generator().manual_seed(5)
    return torch.rand(768, generator=generator) * 3 + 0.2


@pytest.fixture(scope="module")
def lab(tmp_path_factory, lab_pair, lab_smooth):
    """Transformer Lab's container: both copies, one linear smoothed, one protected."""
    path = tmp_path_factory.mktemp("lab") / "both.safetensors"
    options = QuantOptions(
        "transformer-lab", smooth={W2: lab_smooth}, protect=("unconditional.layers.1.*.o",)
    )
    report = quantize_checkpoint(lab_pair[0], "INT8 W8A8", path, pair=lab_pair[1], options=options)
    return path, report


def test_lab_keys_are_those_of_the_format(lab):
    stored = load_file(lab[0])
    linears = [*model.linear_names(), *model.STEM_LINEARS]
    protected = "unconditional.layers.1.attention.o"
    wanted = set()
    for copy in ("conditional", "unconditional"):
        for name in (f"{copy}.{linear}" for linear in linears):
            parts = ("weight",) if name == protected else ("wq", "ws")
            wanted |= {f"{name}.{part}" for part in parts}
            if f"{name.removeprefix(f'{copy}.')}.bias" in model.shapes():
                wanted.add(f"{name}.bias")
        wanted.add(f"{copy}.{W2}.smooth")
    assert stored.keys() == wanted
    assert stored[f"conditional.{W2}.ws"].shape == (256,)


def test_lab_smooth_multiplies_the_weight_before_it_is_rounded(lab, lab_pair, lab_smooth):
    stored = load_file(lab[0])
    for copy in ("conditional", "unconditional"):
        q, scale = expected(lab_pair[2][copy][f"{W2}.weight"].float() * lab_smooth)
        np.testing.assert_array_equal(stored[f"{copy}.{W2}.wq"].numpy(), q)
        np.testing.assert_array_equal(stored[f"{copy}.{W2}.ws"].numpy(), scale)
        assert torch.equal(stored[f"{copy}.{W2}.smooth"], lab_smooth)


def test_our_reader_undoes_the_smoothing(lab, lab_pair):
    figures = {t.name: t for t in lab[1].tensors}
    for copy, base in zip(("conditional", "unconditional"), lab_pair[:2], strict=True):
        checkpoint = open_checkpoint(lab[0], base, copy=copy)
        loaded = checkpoint.load(copy, dtype=torch.float32)
        assert loaded.keys() == lab_pair[2][copy].keys()
        true = lab_pair[2][copy][f"{W2}.weight"].float()
        back = loaded[f"{W2}.weight"].dequantize()
        wanted = figures[f"{copy}.{W2}.weight"].sqnr_db
        assert sqnr(true, back) == pytest.approx(wanted, abs=0.01)
        assert wanted > 30


def test_one_copy_alone_may_be_written(tmp_path, lab_pair):
    path = tmp_path / "one.safetensors"
    options = QuantOptions("transformer-lab")
    report = quantize_checkpoint(lab_pair[1], "INT8 W8A8", path, options=options)
    assert report.copies == ("unconditional",)
    assert all(name.startswith("unconditional.") for name in load_file(path))
