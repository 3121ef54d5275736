"""GGUF files: gguf-py reads them and decodes the same weights; our reader agrees."""

import hashlib
import json
import math

import gguf
import numpy as np
import pytest
import torch

from ideogram4_quant.checkpoint import open_checkpoint
from ideogram4_quant.quant import RECIPES, QuantOptions, TypeRule, quantize_checkpoint
from ideogram4_quant.tests import quant_model as model

LEVELS = tuple(recipe.level for recipe in RECIPES.values() if recipe.file_format == "gguf")


@pytest.fixture(scope="module")
def weights():
    made = model.weights(7)
    made["layers.0.feed_forward.w1.weight"][3] = 0
    return made


@pytest.fixture(scope="module")
def source(tmp_path_factory, weights):
    path = tmp_path_factory.mktemp("source") / "bf16.safetensors"
    return model.write(path, weights, metadata={"license": "ideogram-non-commercial"})


@pytest.fixture(scope="module", params=LEVELS)
def written(request, tmp_path_factory, source):
    path = tmp_path_factory.mktemp("gguf") / "q.gguf"
    return request.param, path, quantize_checkpoint(source, request.param, path)


def decoded(path) -> dict[str, np.ndarray]:
    """Every tensor as gguf-py dequantizes it, in torch's order."""
    reader = gguf.GGUFReader(path)
    return {
        t.name: gguf.quants.dequantize(t.data, t.tensor_type).reshape(t.shape[::-1].tolist())
        for t in reader.tensors
    }


def sqnr(true: np.ndarray, stored: np.ndarray) -> float:
    noise = np.square(true.astype(np.float64) - stored).sum()
    return 10 * math.log10(np.square(true.astype(np.float64)).sum() / noise)


def test_gguf_py_decodes_what_the_report_measured(written, weights):
    level, path, report = written
    figures = {t.name: t for t in report.tensors}
    found = decoded(path)
    assert found.keys() == weights.keys()
    for name, tensor in found.items():
        true = weights[name].float().numpy()
        assert tensor.shape == true.shape
        if figures[name].type in ("F32", "BF16"):
            np.testing.assert_array_equal(tensor, true)
        else:
            assert figures[name].type == level
            assert sqnr(true, tensor) == pytest.approx(figures[name].sqnr_db, abs=1e-3)
            worst = np.abs(true - tensor).max()
            assert worst == pytest.approx(figures[name].max_abs_error, rel=1e-5)


def test_our_reader_decodes_the_same(written):
    level, path, _ = written
    checkpoint = open_checkpoint(path)
    assert checkpoint.level == level
    assert tuple(checkpoint.copies) == ("conditional",)
    loaded = checkpoint.load("conditional", dtype=torch.float32)
    for name, wanted in decoded(path).items():
        tensor = loaded[name]
        dense = tensor.dequantize() if type(tensor) is not torch.Tensor else tensor
        np.testing.assert_array_equal(dense.float().numpy(), wanted, err_msg=name)


@pytest.mark.parametrize(
    ("level", "low", "high"),
    [
        ("Q8_0", 44.5, 46),
        ("Q6_K", 34.5, 36),
        ("Q5_K", 28, 31),
        ("Q4_K", 22, 24),
        ("Q4_0", 20, 22.5),
    ],
)
def test_gaussian_weights_reach_the_known_figures(tmp_path, source, level, low, high):
    report = quantize_checkpoint(source, level, tmp_path / "q.gguf")
    lossy = [t.sqnr_db for t in report.tensors if t.type == level]
    assert len(lossy) == 12
    assert low < min(lossy)
    assert max(lossy) < high


def test_types_and_counts_are_the_recipe(written):
    level, path, _ = written
    types = {t.name: t.tensor_type.name for t in gguf.GGUFReader(path).tensors}
    blocks = {f"{name}.weight" for name in model.linear_names()}
    stem = {f"{name}.weight" for name in model.STEM_LINEARS}
    assert {types[name] for name in blocks} == {level}
    assert {types[name] for name in stem} == {"BF16"}
    assert {types[name] for name in types.keys() - blocks - stem} == {"F32"}


def test_metadata_says_what_from_what_and_how(tmp_path, source):
    path = tmp_path / "q.gguf"
    options = QuantOptions(protect=("layers.0.*.o",), types=(TypeRule("*.w2", "Q8_0"),))
    quantize_checkpoint(source, "Q4_K", path, options=options)
    fields = {key: f.contents() for key, f in gguf.GGUFReader(path).fields.items()}
    assert fields["general.architecture"] == "ideogram4"
    assert fields["general.name"] == "Ideogram 4 conditional Q4_K"
    assert fields["general.quantization_version"] == 2
    assert fields["general.file_type"] == gguf.LlamaFileType.MOSTLY_Q4_K_S
    assert fields["general.license"] == "ideogram-non-commercial"
    assert fields["ideogram4.copy"] == "conditional"
    digest = hashlib.sha256(source.read_bytes()).hexdigest()
    assert fields["ideogram4.source_sha256"] == digest
    assert json.loads(fields["ideogram4.config"])["num_layers"] == 2
    recipe = json.loads(fields["ideogram4.quantization"])
    assert recipe["types"] == [["*.w2", "Q8_0"]]
    assert recipe["protected"] == ["layers.0.attention.o"]


@pytest.mark.parametrize("level", LEVELS)
def test_file_types_are_llama_cpps(level):
    from ideogram4_quant.quant import RECIPES

    names = {kind: f"MOSTLY_{kind}_S" for kind in ("Q3_K", "Q4_K", "Q5_K")}
    wanted = gguf.LlamaFileType[names.get(level, f"MOSTLY_{level}")]
    assert RECIPES[level].file_type == wanted


def test_all_linears_with_fallbacks_reads_back(tmp_path, source, weights):
    path = tmp_path / "q.gguf"
    quantize_checkpoint(source, "Q4_K", path, options=QuantOptions(linears="all"))
    types = {t.name: t.tensor_type.name for t in gguf.GGUFReader(path).tensors}
    assert types["input_proj.weight"] == "Q8_0"  # 128 inputs
    assert types["llm_cond_proj.weight"] == "Q8_0"  # 832
    assert types["t_embedding.mlp_in.weight"] == "Q4_K"
    found = decoded(path)
    assert sqnr(weights["input_proj.weight"].float().numpy(), found["input_proj.weight"]) > 44
    assert open_checkpoint(path).level == "Q4_K"


def test_fragile_layers_may_be_given_a_higher_type(tmp_path, source):
    options = QuantOptions(types=(TypeRule("layers.1.*", "Q6_K"), TypeRule("*", "Q5_K")))
    report = quantize_checkpoint(source, "Q4_K", tmp_path / "q.gguf", options=options)
    types = {t.name: t.type for t in report.tensors}
    assert types["layers.1.attention.o.weight"] == "Q6_K"
    assert types["layers.0.attention.o.weight"] == "Q5_K"


@pytest.mark.parametrize("level", ["Q8_0", "Q4_K"])
def test_same_input_same_bytes(tmp_path, source, level):
    files = [tmp_path / f"{i}.gguf" for i in range(2)]
    for file in files:
        quantize_checkpoint(source, level, file)
    assert files[0].read_bytes() == files[1].read_bytes()


def test_q8_0_is_gguf_pys_own_encoding(tmp_path, source, weights):
    path = tmp_path / "q.gguf"
    quantize_checkpoint(source, "Q8_0", path)
    stored = {t.name: t.data for t in gguf.GGUFReader(path).tensors}
    for name in model.linear_names():
        true = weights[f"{name}.weight"].float().numpy()
        wanted = gguf.quants.quantize(true, gguf.GGMLQuantizationType.Q8_0)
        np.testing.assert_array_equal(stored[f"{name}.weight"], wanted)
