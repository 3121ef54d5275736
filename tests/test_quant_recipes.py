"""The tables and the planner: what is stored how, from names and shapes alone."""

from collections import Counter

import pytest
import torch

from ideogram4_quant.quant.encodings import Blocks, NativeInt8, SmoothInt8, Unquantized
from ideogram4_quant.quant.errors import QuantOptionError
from ideogram4_quant.quant.plan import container_of, plan_tensors, rotation_notes
from ideogram4_quant.quant.recipes import RECIPES, QuantOptions, TypeRule, recipe_of
from ideogram4_quant.tests import quant_model as model


def plans(level: str, options: QuantOptions | None = None, **copies):
    shapes = copies or {"conditional": model.shapes()}
    return plan_tensors(recipe_of(level), options or QuantOptions(), shapes)


def by_name(found):
    return {plan.name: plan.encoding for plan in found}


@pytest.mark.parametrize(
    ("text", "level"),
    [
        ("INT8 W8A8", "INT8 W8A8"),
        ("int8-w8a8-rotated", "INT8 W8A8 rotated"),
        ("int8", "INT8 W8A8 rotated"),
        ("INT8", "INT8 W8A8 rotated"),
        ("w8a8", "INT8 W8A8 rotated"),
        ("convrot", "INT8 W8A8 rotated"),
        ("Q4_K_M", "Q4_K"),
        ("q6_k_xl", "Q6_K"),
        ("q5", "Q5_K"),
        ("int8_rotated", "INT8 W8A8 rotated"),
        ("q4_k", "Q4_K"),
        ("Q8_0", "Q8_0"),
        ("q80", "Q8_0"),
    ],
)
def test_levels_are_found_by_any_spelling(text, level):
    assert recipe_of(text).level == level


@pytest.mark.parametrize("text", ["INT8", "int8", "W8A8", "Q4_K_M"])
def test_a_name_that_leaves_something_open_says_what_is_taken(text, caplog):
    level = recipe_of(text).level
    assert level in caplog.text
    assert text in caplog.text


@pytest.mark.parametrize("text", ["INT8 W8A8", "int8-rotated", "q4_k", "Q4K"])
def test_a_name_that_leaves_nothing_open_says_nothing(text, caplog):
    recipe_of(text)
    assert caplog.text == ""


@pytest.mark.parametrize(
    ("text", "near"), [("Q4_KX", "Q4_K"), ("IQ4_XL", "IQ4_XS"), ("int4", "W4A8"), ("Q8_1", "Q8_0")]
)
def test_unknown_levels_suggest_the_nearest(text, near):
    with pytest.raises(QuantOptionError, match=f"Did you mean {near}"):
        recipe_of(text)


@pytest.mark.parametrize("text", ["bf16", "nf4", "NVFP4"])
def test_levels_that_are_only_read_are_said_to_be(text):
    with pytest.raises(QuantOptionError, match="read, and not written"):
        recipe_of(text)


@pytest.mark.parametrize("text", ["", "Q3_X", "int4"])
def test_unknown_levels_list_the_known_ones(text):
    with pytest.raises(QuantOptionError, match=r"unknown level.*INT8 W8A8, .*Q4_0"):
        recipe_of(text)


def test_native_quantizes_the_204_block_linears_of_the_full_model_and_no_stem():
    shapes = model.shapes(layers=34)
    found = plans("INT8 W8A8 rotated", conditional=shapes)
    quantized = [p.module for p in found if isinstance(p.encoding, NativeInt8)]
    assert quantized == model.linear_names(layers=34)
    assert len(quantized) == 204
    assert sum(p.linear for p in found) == 211
    assert {p.name for p in found} == set(shapes)


def test_all_linears_means_all_but_the_embedding():
    found = by_name(plans("INT8 W8A8", QuantOptions(linears="all")))
    quantized = {name for name, encoding in found.items() if isinstance(encoding, NativeInt8)}
    assert quantized == {f"{n}.weight" for n in (*model.linear_names(), *model.STEM_LINEARS)}
    assert found["embed_image_indicator.weight"] == Unquantized(torch.bfloat16)


def test_rotation_falls_to_a_group_that_divides_or_to_none():
    shapes = {
        "layers.0.a.weight": (8, 512),
        "layers.0.b.weight": (8, 320),
        "layers.0.c.weight": (8, 48),
        "layers.0.d.weight": (8, 40),
    }
    found = plans("INT8 W8A8 rotated", conditional=shapes)
    assert [p.encoding.rotation for p in found] == [256, 64, 16, None]
    notes = rotation_notes(recipe_of("INT8 W8A8 rotated"), found)
    assert ["groups of 64" in notes[0], "groups of 16" in notes[1]] == [True, True]
    assert "40 inputs are not rotated" in notes[2]
    assert rotation_notes(recipe_of("INT8 W8A8"), plans("INT8 W8A8", conditional=shapes)) == []


def test_protected_linears_stay_in_bf16():
    options = QuantOptions(protect=("layers.*.feed_forward.w2", "layers.1.attention.o"))
    found = plans("INT8 W8A8", options)
    protected = [p.module for p in found if p.protected]
    assert protected == [
        "layers.0.feed_forward.w2",
        "layers.1.attention.o",
        "layers.1.feed_forward.w2",
    ]
    assert all(p.encoding == Unquantized(torch.bfloat16) for p in found if p.protected)
    assert Counter(isinstance(p.encoding, NativeInt8) for p in found)[True] == 12 - 3


def test_a_copy_prefix_protects_that_copy_alone():
    both = {"conditional": model.shapes(), "unconditional": model.shapes()}
    options = QuantOptions("transformer-lab", protect=("unconditional.layers.0.attention.o",))
    found = plans("INT8 W8A8", options, **both)
    assert [(p.copy, p.module) for p in found if p.protected] == [
        ("unconditional", "layers.0.attention.o")
    ]


@pytest.mark.parametrize("field", ["protect", "types", "smooth"])
def test_a_name_that_means_no_linear_is_an_error(field):
    name = "layers.0.feed_forward.w4"
    options = {
        "protect": QuantOptions(protect=(name,)),
        "types": QuantOptions(types=(TypeRule(name, "Q8_0"),)),
        "smooth": QuantOptions("transformer-lab", smooth={name: torch.ones(256)}),
    }[field]
    level = "Q4_K" if field == "types" else "INT8 W8A8"
    with pytest.raises(QuantOptionError, match=r"w4: no linear has this name.*feed_forward\.w"):
        plans(level, options)


def test_gguf_types_fall_back_where_blocks_do_not_fit():
    options = QuantOptions(linears="all", types=(TypeRule("layers.*.w2", "Q6_K"),))
    shapes = {**model.shapes(), "layers.0.odd.weight": (4, 40)}
    found = by_name(plans("Q4_K", options, conditional=shapes))
    assert found["layers.1.feed_forward.w2.weight"] == Blocks("Q6_K", (256, 768))
    assert found["layers.1.feed_forward.w1.weight"] == Blocks("Q4_K", (768, 256))
    assert found["input_proj.weight"] == Blocks("Q8_0", (256, 128))  # 128 inputs: no super-block
    assert found["llm_cond_proj.weight"] == Blocks("Q8_0", (256, 832))
    assert found["layers.0.odd.weight"] == Blocks("BF16", (4, 40))
    assert found["embed_image_indicator.weight"] == Blocks("F32", (2, 256))
    assert found["input_proj.bias"] == Blocks("F32", (256,), "bias")


def test_gguf_keeps_the_stem_in_bf16_by_default():
    found = by_name(plans("Q8_0"))
    stem = [found[f"{name}.weight"].qtype for name in model.STEM_LINEARS]
    assert stem == ["BF16"] * 7
    assert {found[f"{name}.weight"].qtype for name in model.linear_names()} == {"Q8_0"}


def test_transformer_lab_holds_linears_and_their_biases_alone():
    smooth = torch.linspace(0.5, 2, 768)
    options = QuantOptions("transformer-lab", smooth={"layers.0.feed_forward.w2": smooth})
    found = plans("INT8 W8A8", options)
    linears = [*model.linear_names(), *model.STEM_LINEARS]
    assert {p.module for p in found} == set(linears)
    encodings = by_name(found)
    assert torch.equal(encodings["layers.0.feed_forward.w2.weight"].smooth, smooth)
    assert encodings["layers.1.feed_forward.w2.weight"].smooth is None
    assert isinstance(encodings["input_proj.weight"], SmoothInt8)
    assert encodings["input_proj.bias"] == Unquantized(torch.bfloat16, "bias")


@pytest.mark.parametrize(
    ("level", "options", "message"),
    [
        ("INT8 W8A8", QuantOptions("gptq"), "unknown container"),
        ("INT8 W8A8", QuantOptions(linears="some"), "unknown linears"),
        ("Q8_0", QuantOptions("transformer-lab"), "Q8_0 is a GGUF type"),
        ("INT8 W8A8 rotated", QuantOptions("transformer-lab"), "cannot say that a weight is rot"),
        ("Q4_K", QuantOptions(smooth={}), "gguf container cannot carry smoothing"),
        ("INT8 W8A8", QuantOptions(types=(TypeRule("*", "Q8_0"),)), "are for GGUF levels"),
        ("Q4_K", QuantOptions(types=(TypeRule("*", "Q9"),)), "unknown GGUF type.*Q9"),
        ("Q4_K", QuantOptions(types=(TypeRule("*", "MXFP4"),)), "read only.*MXFP4.*IQ4_XS"),
    ],
)
def test_options_that_contradict_each_other(level, options, message):
    with pytest.raises(QuantOptionError, match=message):
        container_of(recipe_of(level), options)


@pytest.mark.parametrize(
    ("vector", "message"),
    [
        (torch.ones(255), r"another size.*\[255\].*\[768\]"),
        (torch.zeros(768), "positive and finite"),
        (torch.full((768,), float("nan")), "positive and finite"),
    ],
)
def test_smoothing_vectors_are_checked(vector, message):
    options = QuantOptions("transformer-lab", smooth={"layers.0.feed_forward.w2": vector})
    with pytest.raises(QuantOptionError, match=message):
        plans("INT8 W8A8", options)


def test_every_recipe_has_a_place_to_go():
    for recipe in RECIPES.values():
        assert recipe.file_format in ("safetensors", "gguf")
        assert (recipe.file_type is not None) == (recipe.file_format == "gguf")
        assert container_of(recipe, QuantOptions()) in ("native", "gguf")
