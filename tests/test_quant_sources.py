"""Any readable source: FP8 per row, diffusers' names, folders with both copies, linears alone."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from ideogram4_quant.checkpoint import open_checkpoint
from ideogram4_quant.errors import MissingBaseError
from ideogram4_quant.quant import (
    AlreadyQuantizedError,
    QuantOptionError,
    QuantOptions,
    TypeRule,
    inspect_file,
    quantize_checkpoint,
    verify_file,
)
from ideogram4_quant.tests import quant_model as model


def fp8_per_row(weights):
    """ideogram-ai's FP8: e4m3 and one fp32 scale an output row; what it decodes to in fp32."""
    stored, true = {}, {}
    for name, tensor in weights.items():
        module = name.removesuffix(".weight")
        if module not in (*model.linear_names(), *model.STEM_LINEARS):
            stored[name] = tensor
            true[name] = tensor.float()
            continue
        scale = tensor.float().abs().amax(1) / 448
        stored[name] = (tensor.float() / scale[:, None]).to(torch.float8_e4m3fn)
        stored[f"{module}.weight_scale"] = scale
        true[name] = stored[name].float() * scale[:, None]
    return stored, true


def split_names(weights):
    """diffusers' names: q, k, v as row slices, o as ``to_out.0``."""
    made = {}
    for name, tensor in weights.items():
        if name.endswith("attention.qkv.weight"):
            stem = name.removesuffix("qkv.weight")
            for part, rows in zip("qkv", tensor.chunk(3), strict=True):
                made[f"{stem}to_{part}.weight"] = rows.contiguous()
        else:
            made[name.replace("attention.o.weight", "attention.to_out.0.weight")] = tensor
    return made


def test_fp8_is_quantized_from_its_exact_values(tmp_path):
    """Not from values rounded to bf16 on the way: the integers are those of the fp32 weight."""
    stored, true = fp8_per_row(model.weights())
    source = tmp_path / "fp8_conditional.safetensors"
    save_file(stored, source)
    report = quantize_checkpoint(source, "INT8 W8A8", tmp_path / "q.safetensors")
    written = load_file(tmp_path / "q.safetensors")
    for name in model.linear_names():
        rows = true[f"{name}.weight"].numpy()
        scale = np.abs(rows).max(axis=1) / np.float32(127)
        q = np.rint(rows / scale[:, None]).astype(np.int8)
        np.testing.assert_array_equal(written[f"{name}.weight"].numpy(), q)
    stem = written["llm_cond_proj.weight"]
    assert torch.equal(stem, true["llm_cond_proj.weight"].bfloat16())
    assert report.metadata["source_level"] == "FP8"


def test_the_origin_of_the_source_leaves_no_trace(tmp_path):
    weights = model.weights()
    fused = model.write(tmp_path / "fused.safetensors", weights)
    split = model.write(tmp_path / "split.safetensors", split_names(weights))
    prefixed = {f"model.diffusion_model.{name}": t for name, t in weights.items()}
    prefixed = model.write(tmp_path / "prefixed.safetensors", prefixed)
    found = []
    for i, source in enumerate((fused, split, prefixed)):
        out = tmp_path / f"{i}.safetensors"
        quantize_checkpoint(source, "INT8 W8A8 rotated", out)
        found.append(load_file(out))
    for other in found[1:]:
        assert other.keys() == found[0].keys()
        assert all(torch.equal(other[name], found[0][name]) for name in other)


@pytest.fixture
def folder(tmp_path):
    """ideogram-ai's release: a folder for each copy."""
    for name, copy, seed in (
        ("transformer", "conditional", 1),
        ("unconditional_transformer", "unconditional", 2),
    ):
        path = tmp_path / "release" / name
        path.mkdir(parents=True)
        model.write(path / "diffusion_pytorch_model.safetensors", model.weights(seed), copy)
    return tmp_path / "release"


@pytest.mark.parametrize(("copy", "seed"), [("conditional", 1), ("unconditional", 2)])
def test_a_folder_with_both_copies(tmp_path, folder, copy, seed):
    with pytest.raises(QuantOptionError, match="holds both copies"):
        quantize_checkpoint(folder, "Q8_0", tmp_path / "q.gguf")
    report = quantize_checkpoint(folder, "Q8_0", tmp_path / "q.gguf", copy=copy)
    assert report.copies == (copy,)
    assert report.metadata["ideogram4.copy"] == copy
    loaded = open_checkpoint(tmp_path / "q.gguf").load(copy, dtype=torch.float32)
    bias = model.weights(seed)["input_proj.bias"].float()
    assert torch.equal(loaded["input_proj.bias"], bias)


def test_transformer_lab_takes_both_copies_of_a_folder_and_verifies(tmp_path, folder):
    out = tmp_path / "both.safetensors"
    lab = QuantOptions("transformer-lab")
    report = quantize_checkpoint(folder, "INT8 W8A8", out, options=lab)
    assert report.copies == ("conditional", "unconditional")
    with pytest.raises(MissingBaseError):
        verify_file(out, folder)
    found = verify_file(out, folder, base=folder)
    assert found.copies == report.copies
    assert found.meter.sqnr_db == pytest.approx(report.meter.sqnr_db, abs=0.01)
    assert len(found.tensors) == 2 * len(model.shapes())
    only = verify_file(out, folder, base=folder, copy="unconditional")
    assert len(only.tensors) == len(model.shapes())
    inspected = inspect_file(out)  # needs no base
    assert inspected.copies == report.copies
    assert inspected.level == "INT8 W8A8"
    assert {row.type for row in inspected.types} == {"I8", "F32", "BF16"}


def test_linears_alone_with_a_base_are_a_source(tmp_path, folder):
    both = tmp_path / "both.safetensors"
    lab = QuantOptions("transformer-lab", protect=("*.w2",))
    quantize_checkpoint(folder, "INT8 W8A8", both, options=lab)
    out = tmp_path / "q.gguf"
    with pytest.raises(MissingBaseError):
        quantize_checkpoint(both, "Q4_K", out, copy="conditional")
    report = quantize_checkpoint(both, "Q4_K", out, copy="conditional", base=folder)
    named = [file["name"] for file in json.loads(report.metadata["ideogram4.source"])]
    assert named[0] == "both.safetensors"
    assert set(named[1:]) == {"diffusion_pytorch_model.safetensors"}
    norm = open_checkpoint(out).load("conditional")["layers.0.ffn_norm1.weight"]
    assert torch.equal(norm, model.weights(1)["layers.0.ffn_norm1.weight"])


def test_an_unconditional_copy_without_its_text_part(tmp_path):
    weights = model.weights()
    for name in ("llm_cond_norm.weight", "llm_cond_proj.weight", "llm_cond_proj.bias"):
        del weights[name]
    source = model.write(tmp_path / "u.safetensors", weights, "unconditional")
    quantize_checkpoint(source, "INT8 W8A8", tmp_path / "q.safetensors")
    loaded = open_checkpoint(tmp_path / "q.safetensors").load("unconditional")
    assert loaded.keys() == weights.keys()


def test_the_copy_of_a_file_that_does_not_say_may_be_said(tmp_path):
    source = tmp_path / "mine.safetensors"
    save_file(model.weights(), source)
    report = quantize_checkpoint(
        source, "INT8 W8A8", tmp_path / "q.safetensors", copy="unconditional"
    )
    assert report.metadata["model_type"] == "ideogram4_uncond"
    assert open_checkpoint(tmp_path / "q.safetensors").copies == ("unconditional",)


def test_a_mixed_source_is_judged_weight_by_weight(tmp_path):
    """Mostly bf16, but one linear is Q4_K already: Q8_0 would hide its loss."""
    source = model.write(tmp_path / "s.safetensors", model.weights())
    mixed = tmp_path / "mixed.gguf"
    options = QuantOptions(types=(TypeRule("layers.0.attention.o", "Q4_K"), TypeRule("*", "BF16")))
    quantize_checkpoint(source, "Q4_K", mixed, options=options)
    assert open_checkpoint(mixed).level == "BF16"
    with pytest.raises(AlreadyQuantizedError, match=r"layers\.0\.attention\.o\.weight.*Q4_K"):
        quantize_checkpoint(mixed, "Q8_0", tmp_path / "q.gguf")
    quantize_checkpoint(
        mixed,
        "Q8_0",
        tmp_path / "q.gguf",
        options=QuantOptions(protect=("layers.0.attention.o",)),
    )
