"""From files to levels: headers, pairs of copies, what auto takes, what is missing."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ideogram4_quant.cards.sizes import copy_bytes
from ideogram4_quant.checkpoint import ModelConfig, open_checkpoint
from ideogram4_quant.checkpoint.level_order import AUTO, AUTO_ORDER, LEVELS, MIXED, capability
from ideogram4_quant.checkpoint.levels import read_catalogue, resolve
from ideogram4_quant.checkpoint.listing import list_files
from ideogram4_quant.checkpoint.pairs import WORKING_MEMORY, find_pair
from ideogram4_quant.errors import (
    CheckpointError,
    NotIdeogram4Error,
    PairMismatchError,
    TruncatedFileError,
)
from ideogram4_quant.nodes import headers
from ideogram4_quant.quant.recipes import SOURCE_BITS
from ideogram4_quant.tests.fixtures_levels import BOTH, COND, UNCOND, Header, catalogue

PACK = Path(headers.__file__).parents[1]


def test_headers_are_read_once_for_each_state_of_a_file(tmp_path, monkeypatch):
    read = []

    def open_file(path, *_, **__):
        read.append(path.name)
        if path.name == "broken.gguf":
            raise TruncatedFileError("ends early", file=path)
        return object()

    monkeypatch.setattr(headers, "open_checkpoint", open_file)
    good, broken = tmp_path / "good.gguf", tmp_path / "broken.gguf"
    for path in (good, broken):
        path.write_bytes(b"1")
    first = headers.open_header(good)
    assert headers.open_header(good) is first
    os.utime(good, ns=(0, 1))  # touched
    assert headers.open_header(good) is not first
    good.write_bytes(b"12")  # grown
    os.utime(good, ns=(0, 1))
    headers.open_header(good)
    assert read == ["good.gguf"] * 3
    for _ in range(2):  # an error is not kept: the download may be finished by now
        with pytest.raises(TruncatedFileError):
            headers.open_header(broken)
    assert read[3:] == ["broken.gguf"] * 2


def test_other_models_are_read_once_for_each_state_of_a_file(tmp_path, monkeypatch):
    read = []

    def open_file(path, *_, **__):
        read.append(path)
        return open_checkpoint(path)

    monkeypatch.setattr(headers, "open_checkpoint", open_file)
    for number in range(200):
        save_file({"other.weight": torch.zeros(1)}, tmp_path / f"{number}.safetensors")
    listing = list_files("models", [str(tmp_path)])
    assert read_catalogue(listing, headers.open_header).candidates == []
    assert len(read) == 200
    seconds = []
    for _ in range(3):  # the least: other programs may be running here
        start = time.perf_counter()
        found = read_catalogue(listing, headers.open_header)
        seconds.append(time.perf_counter() - start)
    assert (len(read), found.candidates, found.broken) == (200, [], {})
    assert min(seconds) < 0.05
    os.utime(tmp_path / "7.safetensors", ns=(0, 1))
    read_catalogue(listing, headers.open_header)
    assert read[200:] == [tmp_path / "7.safetensors"]


def test_catalogue_passes_over_other_models_and_notes_broken_files(tmp_path):
    for name in ("good", "other", "broken"):
        (tmp_path / f"{name}.gguf").touch()

    def open_file(path: Path):
        if path.stem == "other":
            raise NotIdeogram4Error("other")
        if path.stem == "broken":
            raise TruncatedFileError("ends early", file=path)
        return Header("Q8_0", COND)

    found = read_catalogue(list_files("models", [str(tmp_path)]), open_file)
    assert [c.name for c in found.candidates] == ["good.gguf"]
    assert list(found.broken) == ["broken.gguf"]
    with pytest.raises(CheckpointError, match="ends early"):
        resolve("NF4", found, LEVELS, 0)


def test_copies_are_paired_by_the_names_that_differ_least():
    files = catalogue(
        **{
            "a/ideogram4-Q4_0.gguf": Header("Q4_0", COND),
            "a/ideogram4_uncond-Q4_0.gguf": Header("Q4_0", UNCOND),
            "b/tuned-unconditional-Q4_0.gguf": Header("Q4_0", UNCOND),
            "b/tuned-Q4_0.gguf": Header("Q4_0", COND),
        }
    )
    for name, partner in (
        ("a/ideogram4-Q4_0.gguf", "a/ideogram4_uncond-Q4_0.gguf"),
        ("b/tuned-Q4_0.gguf", "b/tuned-unconditional-Q4_0.gguf"),
    ):
        others = [c for c in files.candidates if c.name == name or c.header.copies == UNCOND]
        found = find_pair("Q4_0", others)
        assert (found.conditional.name, found.unconditional.name) == (name, partner)


def test_equal_names_in_sibling_folders_are_a_pair():
    files = catalogue(
        **{
            "my text copy/x.gguf": Header("Q4_0", COND),
            "b-uncond/x.gguf": Header("Q4_0", UNCOND),
            "my text copy/uncond-x.gguf": Header("Q4_0", UNCOND),
        }
    )
    assert find_pair("Q4_0", files.candidates).unconditional.name == "b-uncond/x.gguf"


@pytest.mark.parametrize("level", [AUTO, "Q4_0"])
def test_files_that_do_not_say_which_copy_they_are_are_asked_about(level):
    unsure = Header("Q4_0", COND, copy_assumed=True)
    files = catalogue(**{"a/x.gguf": unsure, "b/x.gguf": unsure})
    with pytest.raises(PairMismatchError, match=r"a/x\.gguf, b/x\.gguf.*trust_files"):
        resolve(level, files, LEVELS, 0)
    assert resolve(level, catalogue(x=unsure), LEVELS, 0).unconditional is None
    files = catalogue(**{"x.gguf": unsure, "x_uncond.gguf": Header("Q4_0", UNCOND)})
    assert resolve(level, files, LEVELS, 0).unconditional.name == "x_uncond.gguf"


@pytest.mark.parametrize("memory", [0, 10**9, 10**12])
def test_auto_takes_half_a_model_only_where_no_level_has_both(memory):
    half = Header("INT8 W8A8", COND, 100)
    files = catalogue(a=half, b=Header("Q8_0", COND), c=Header("Q8_0", UNCOND))
    order = AUTO_ORDER["int8 and bfloat16"]
    found = resolve(AUTO, files, order, memory)
    assert (found.level, found.unconditional.name) == ("Q8_0", "c")
    assert resolve("INT8 W8A8", files, order, memory).unconditional is None  # as asked
    assert resolve(AUTO, catalogue(a=half), order, memory).level == "INT8 W8A8"


def test_half_a_model_is_not_taken_before_asking_about_what_may_be_a_whole_one():
    unsure = Header("Q8_0", COND, copy_assumed=True)
    files = catalogue(a_cond=Header("INT8 W8A8", COND), b=unsure, c=unsure)
    with pytest.raises(PairMismatchError, match="several files of Q8_0"):
        resolve(AUTO, files, AUTO_ORDER["int8 and bfloat16"], 10**12)
    assert resolve("INT8 W8A8", files, LEVELS, 0).unconditional is None  # as asked


def test_files_of_another_size_are_no_partners():
    small = ModelConfig(num_layers=4)
    files = catalogue(a=Header("Q4_0", COND), b=Header("Q4_0", UNCOND, config=small))
    assert find_pair("Q4_0", files.candidates).unconditional is None


def test_one_file_with_both_copies_comes_first_and_others_are_noted():
    files = catalogue(a=Header("Q8_0", COND), b=Header("Q8_0", UNCOND), z=Header("Q8_0", BOTH))
    found = find_pair("Q8_0", files.candidates)
    assert found.conditional.name == found.unconditional.name == "z"
    assert "a, b" in found.notes[0]
    assert found.weight_bytes() == (500, 500)


def test_auto_takes_the_first_level_that_fits_then_the_smallest():
    gigabyte = 10**9
    files = catalogue(
        big=Header("INT8 W8A8", BOTH, 20 * gigabyte),
        middle=Header("Q6_K", BOTH, 14 * gigabyte),
        small=Header("Q4_0", BOTH, 10 * gigabyte),
    )
    order = AUTO_ORDER["int8 and bfloat16"]

    def level(memory: int) -> str:
        return resolve(AUTO, files, order, memory).level

    assert level(20 * gigabyte + WORKING_MEMORY) == "INT8 W8A8"
    assert level(20 * gigabyte) == "Q6_K"
    assert level(12 * gigabyte) == "Q4_0"
    # one copy at a time fits: the fastest again
    assert resolve(AUTO, catalogue(a=files.candidates[0].header), order, 12 * gigabyte)
    assert level(gigabyte) == "Q4_0"


def test_auto_takes_linears_alone_only_with_a_base():
    files = catalogue(a=Header("INT8 W8A8", BOTH, linears_only=True), b=Header("BF16", BOTH))
    order = AUTO_ORDER["int8 and bfloat16"]
    assert resolve(AUTO, files, order, 10**12).level == "BF16"
    assert resolve(AUTO, files, order, 10**12, with_base=True).level == "INT8 W8A8"
    assert resolve("INT8 W8A8", files, order, 10**12).level == "INT8 W8A8"


def test_ampere_tries_the_levels_in_the_documented_order():
    listed = (
        "INT8 W8A8 rotated, INT8 W8A8, mixed, mixed GGUF, Q8_0, SDNQ 8-bit, Q6_K, W6A8, MXFP8, "
        "Q5_K, W4A8, Q4_K, IQ4_XS, Q4_0, SDNQ 4-bit"
    )
    found = AUTO_ORDER[capability(int8=True, bfloat16=True)]
    assert ", ".join(found[:15]) == listed
    blackwell = AUTO_ORDER[capability(int8=True, bfloat16=True, fp4=True)]
    assert blackwell.index("NVFP4") < blackwell.index("W4A8")  # where the device multiplies it
    assert found.index("NVFP4") > found.index("Q4_0")
    turing = AUTO_ORDER[capability(int8=True, bfloat16=False)]
    assert turing.index("Q4_0") < turing.index("Q8_0")  # a 16-bit product is one in float32 there
    assert AUTO_ORDER[capability(int8=False, bfloat16=True)][0] == "BF16"


def test_help_page_lists_what_auto_tries():
    page = (PACK / "web/docs/Ideogram4QuantLoad.md").read_text("utf-8")
    for order in AUTO_ORDER.values():
        assert f"| {', '.join(order)} |" in page


def test_every_level_has_its_place_in_every_order():
    for order in AUTO_ORDER.values():
        assert sorted(order) == sorted(LEVELS)
    single = sorted(set(LEVELS) - set(MIXED))
    assert sorted(SOURCE_BITS) == single  # what files are made from
    assert all(copy_bytes(level) > 0 for level in single)  # what the doctor says of their size


def test_missing_level_says_what_there_is_and_what_to_put_where():
    there = catalogue(a=Header("Q4_0", COND), b=Header("FP8", COND))
    with pytest.raises(CheckpointError, match=r"Pick one of: FP8, Q4_0\. Or put files of NF4 into"):
        resolve("NF4", there, LEVELS, 0)
    for level in ("Q5_1", "IQ4_XS"):
        with pytest.raises(CheckpointError, match="Quantize Ideogram 4 makes them"):
            resolve(level, there, LEVELS, 0)
    with pytest.raises(CheckpointError) as caught:
        resolve("MXFP4", there, LEVELS, 0)
    assert "makes them" not in str(caught.value)
    with pytest.raises(CheckpointError, match=r"both copies \(from huggingface.co/leejet/"):
        resolve("Q4_0", catalogue(), LEVELS, 0)
    with pytest.raises(CheckpointError) as caught:
        resolve("INT8 W8A8 rotated", catalogue(), LEVELS, 0)
    assert str(caught.value).endswith(
        "Put ideogram4_int8_convrot.safetensors and "
        "ideogram4_unconditional_int8_convrot.safetensors (from huggingface.co/Comfy-Org/"
        "Ideogram-4) into /Models/diffusion_models and press R in ComfyUI."
    )


def test_auto_without_any_file_says_what_most_people_want():
    with pytest.raises(CheckpointError, match="no Ideogram 4 file") as caught:
        resolve(AUTO, catalogue(), LEVELS, 0)
    for words in ("ideogram4_int8_convrot", "for a 24 GB card, or ideogram4-q4_k.gguf"):
        assert words in str(caught.value)


@pytest.mark.parametrize("level", [AUTO, "Q4_K"])
def test_where_one_branch_is_wanted_no_file_of_two_is_advised(level):
    with pytest.raises(CheckpointError) as caught:
        resolve(level, catalogue(), LEVELS, 0, one_copy=True, one_branch=True)
    assert "huggingface.co/fal/ideogram-v4-instant" in str(caught.value)
    assert not any(name in str(caught.value) for name in ("int8_convrot", "q4_k.gguf"))


def test_one_copy_is_chosen_by_what_one_copy_takes():
    size = 10 * 10**9
    files = {
        "c8": Header("INT8 W8A8", COND, size=size),
        "u8": Header("INT8 W8A8", UNCOND, size=size),
        "c4": Header("Q4_K", COND, size=size // 2),
        "u4": Header("Q4_K", UNCOND, size=size // 2),
    }
    memory = size + WORKING_MEMORY
    order = ("INT8 W8A8", "Q4_K")
    found = resolve(AUTO, catalogue(**files), order, memory, one_copy=True)
    assert (found.conditional.name, found.unconditional) == ("c8", None)
    two = resolve(AUTO, catalogue(**files), order, memory)
    assert (two.conditional.name, two.unconditional.name) != ("c8", None)
    alone = {"c4": files["c4"]}
    assert resolve("Q4_K", catalogue(**alone), order, memory, one_copy=True).unconditional is None
