"""Which files are of one branch, told by metadata, index or name, and how levels are found then."""

from __future__ import annotations

import json
import shutil

import pytest
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ideogram4_quant.checkpoint import check_pair, open_checkpoint
from ideogram4_quant.checkpoint.branches import named_one_branch
from ideogram4_quant.checkpoint.level_order import AUTO, AUTO_ORDER
from ideogram4_quant.checkpoint.levels import read_catalogue, resolve
from ideogram4_quant.checkpoint.listing import list_files
from ideogram4_quant.errors import PairMismatchError
from ideogram4_quant.pocket.export import from_canonical
from ideogram4_quant.pocket.paths import dit_path
from ideogram4_quant.pocket.transformer import CONFIG

ORDER = AUTO_ORDER["neither"]
PLENTY = 1 << 40


@pytest.mark.parametrize(
    "name",
    [
        "Ideogram4-instant_int8-convrot-simple.safetensors",
        "ideogram-v4-instant",
        "ideogram-v4-fast",
        "ideogram_4_fast_q8_0.gguf",
        "Ideogram4Fast_bf16.safetensors",
        "ideogram4_cfg-fold_6step_fp8.safetensors",
        "ideogram-4.0-fal-fast.safetensors",
        "ideogram4_no-cfg.safetensors",
        "ideogram4_turbotime_merged.safetensors",
    ],
)
def test_names_of_one_branch(name):
    assert named_one_branch(name)


@pytest.mark.parametrize(
    "name",
    [
        "ideogram4_fp8_scaled.safetensors",
        "ideogram4_int8_fast_kernels.safetensors",
        "ideogram4_breakfast.safetensors",
        "ideogram4_instantid_like.safetensors",
        "ideogram4_conditional_Q4_K.gguf",
        "turbo",
    ],
)
def test_names_of_two_copies(name):
    assert not named_one_branch(name)


def renamed(tmp_path, name: str, metadata: dict | None = None, copy: str = "cond"):
    """The pocket's copy without a word of which copy it is, under another name."""
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    with safe_open(dit_path(copy), "pt") as file:
        config = file.metadata()["config"]
    save_file(load_file(dit_path(copy)), path, {"config": config, **(metadata or {})})
    return path


def test_name_tells_one_branch(tmp_path):
    found = open_checkpoint(renamed(tmp_path, "Ideogram4-instant_bf16.safetensors"))
    assert found.one_branch.reason == "the name Ideogram4-instant_bf16.safetensors says so"
    assert found.copies == ("conditional",)
    assert not found.copy_assumed
    assert open_checkpoint(dit_path("cond")).one_branch is None


def test_metadata_goes_before_the_name(tmp_path):
    marked = renamed(tmp_path, "plain.safetensors", {"ideogram4.guidance": "none"})
    assert open_checkpoint(marked).one_branch.certain
    pair = renamed(tmp_path, "ideogram4-instant.safetensors", {"ideogram4.guidance": "pair"})
    assert open_checkpoint(pair).one_branch is None
    titled = renamed(tmp_path, "x.safetensors", {"modelspec.title": "Ideogram 4 Instant"})
    assert "modelspec.title" in open_checkpoint(titled).one_branch.reason


def test_users_word_goes_before_everything(tmp_path):
    marked = renamed(tmp_path, "plain.safetensors", {"ideogram4.guidance": "none"})
    assert open_checkpoint(marked, one_branch=False).one_branch is None
    assert open_checkpoint(dit_path("cond"), one_branch=True).one_branch is not None
    other = open_checkpoint(dit_path("uncond"), one_branch=True)
    assert other.one_branch is None
    assert other.copies == ("unconditional",)


def test_unconditional_copy_in_a_folder_of_that_name_stays_one(tmp_path):
    path = renamed(tmp_path / "instant", "uncond.safetensors", copy="uncond")
    assert open_checkpoint(path).one_branch is None


def test_folder_of_a_pipeline_without_the_other_part(tmp_path):
    folder = tmp_path / "distilled"
    renamed(folder, "transformer/diffusion_pytorch_model.safetensors")
    index = {"_class_name": "Ideogram4Pipeline", "transformer": ["diffusers", "X"]}
    (folder / "model_index.json").write_text(json.dumps(index))
    assert "model_index.json" in open_checkpoint(folder).one_branch.reason
    assert open_checkpoint(folder / "transformer").one_branch is not None
    index["unconditional_transformer"] = ["diffusers", "X"]
    (folder / "model_index.json").write_text(json.dumps(index))
    assert open_checkpoint(folder).one_branch is None
    (folder / "model_index.json").write_text("{")
    assert open_checkpoint(folder).one_branch is None


def test_one_branch_is_no_half_of_a_pair(tmp_path):
    path = renamed(tmp_path, "ideogram4-instant.safetensors")
    with pytest.raises(PairMismatchError, match="one-branch model is no unconditional copy"):
        open_checkpoint(path, copy="unconditional")
    with pytest.raises(PairMismatchError, match="no other copy: it needs no guidance"):
        check_pair(open_checkpoint(path), open_checkpoint(dit_path("uncond")))


def found(tmp_path, level: str):
    return resolve(level, read_catalogue(list_files("m", [str(tmp_path)]), open_checkpoint), ORDER,
                   PLENTY)  # fmt: skip


def test_auto_and_level_take_one_branch_alone(tmp_path):
    renamed(tmp_path, "ideogram4-instant.safetensors")
    renamed(tmp_path, "ideogram4-instant-other.safetensors")  # two of them are no riddle
    for level in (AUTO, "BF16"):
        pair = found(tmp_path, level)
        assert pair.complete
        assert pair.unconditional is None
        assert "instant" in pair.conditional.name


def test_both_copies_go_before_one_branch_and_that_before_half_a_pair(tmp_path):
    renamed(tmp_path, "ideogram4-instant.safetensors")
    shutil.copy(dit_path("cond"), tmp_path / "ideogram4_bf16.safetensors")
    assert found(tmp_path, AUTO).conditional.name == "ideogram4-instant.safetensors"
    shutil.copy(dit_path("uncond"), tmp_path / "ideogram4_unconditional_bf16.safetensors")
    pair = found(tmp_path, AUTO)
    assert (pair.conditional.name, pair.unconditional.name) == (
        "ideogram4_bf16.safetensors",
        "ideogram4_unconditional_bf16.safetensors",
    )
    assert "ideogram4-instant.safetensors" in pair.notes[0]


def test_diffusers_names_in_a_folder_of_that_name(tmp_path):
    """As fal publishes it: q, k and v apart, the transformer alone."""
    folder = tmp_path / "ideogram-v4-fast" / "transformer"
    folder.mkdir(parents=True)
    path = folder / "diffusion_pytorch_model.safetensors"
    save_file(from_canonical(load_file(dit_path("cond"))), path)
    config = {"_class_name": "Ideogram4Transformer2DModel", **CONFIG}
    (folder / "config.json").write_text(json.dumps(config))
    for opened in (path, folder, folder.parent):
        header = open_checkpoint(opened)
        assert header.origin == "diffusers"
        assert header.one_branch.reason == "the name ideogram-v4-fast says so"
        assert header.copies == ("conditional",)


@pytest.mark.parametrize(
    ("name", "preset"),
    [
        ("Ideogram4-instant_int8-convrot-simple.safetensors", "instant"),
        ("ideogram_4_fast_bf16.safetensors", "fast"),
        ("ideogram4_turbotime_merged.safetensors", "turbotime"),
        ("ideogram4_cfg-fold_6step_fp8.safetensors", None),
        ("ideogram4_no-cfg.safetensors", None),
    ],
)
def test_a_name_tells_the_preset(tmp_path, name, preset):
    assert open_checkpoint(renamed(tmp_path, name)).one_branch.preset == preset


def test_metadata_tell_the_preset_before_the_name(tmp_path):
    none = {"ideogram4.guidance": "none"}
    for told, preset in (("instant", "instant"), ("quality", "fast"), ("\x00", "fast")):
        metadata = none | {"ideogram4.preset": told}
        path = renamed(tmp_path, "ideogram4-fast.safetensors", metadata)
        assert open_checkpoint(path).one_branch.preset == preset
        path.unlink()
    plain = renamed(tmp_path, "plain.safetensors", none | {"title": "Ideogram 4 Instant"})
    assert open_checkpoint(plain).one_branch.preset == "instant"
    said = renamed(tmp_path, "fast.safetensors")
    assert open_checkpoint(said, one_branch=True).one_branch.preset is None
