"""The pocket model by name, from inside the pack; which VAE files can be loaded; lists of files."""

from __future__ import annotations

import shutil
import sys
import types

import pytest
import torch
from safetensors.torch import load_file, save_file

from ideogram4_quant.checkpoint.vae_files import check_vae, is_pocket_vae
from ideogram4_quant.diagnostics.doctor.comfyui import Host
from ideogram4_quant.diagnostics.doctor.known_files import known_files
from ideogram4_quant.errors import CheckpointError, NotIdeogram4Error
from ideogram4_quant.nodes.file_choices import choices
from ideogram4_quant.nodes.model_files import host_listing, known_listing, listing_around
from ideogram4_quant.pocket.comfy_vae import comfy_vae_state_dict
from ideogram4_quant.pocket.paths import dit_path, vae_dir

KIND = "diffusion_models"
POCKET = f"pocket/{dit_path('cond').name}"
VAE_FILE = vae_dir() / "diffusion_pytorch_model.safetensors"


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """The host's model folders, empty."""
    for kind in (KIND, "text_encoders", "vae"):
        (tmp_path / kind).mkdir()
    stub = types.ModuleType("folder_paths")
    stub.get_folder_paths = lambda kind: [str(tmp_path / kind)]
    monkeypatch.setitem(sys.modules, "folder_paths", stub)
    return tmp_path


def shapes_of(state: dict) -> dict:
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def test_a_name_finds_the_pocket_model_and_no_level_does(folders):
    assert known_listing(KIND).path(POCKET) == dit_path("cond")
    assert known_listing(KIND).path(POCKET.replace("/", "\\")) == dit_path("cond")
    assert host_listing(KIND).names == []
    assert listing_around(KIND, "by level").names == []
    assert POCKET in listing_around(KIND, POCKET).names
    assert known_listing(KIND).folder == str(folders / KIND)


def test_a_file_of_the_user_with_the_same_name_is_the_user_s(folders):
    own = folders / KIND / POCKET
    own.parent.mkdir()
    own.touch()
    assert known_listing(KIND).path(POCKET) == own


@pytest.mark.parametrize("kind", ["text_encoders", "vae"])
def test_the_pocket_model_stands_last_and_is_never_what_a_new_node_has(folders, kind):
    first, *others = choices(kind)
    assert first == f"(no file in models/{kind} yet)"
    assert others
    assert all(name.startswith("pocket/") for name in others)


def test_heads_stand_behind_all_other_files_of_the_encoder_s_list(folders):
    here = folders / "text_encoders"
    save_file({"lm_head.weight": torch.zeros(8, 4)}, here / "a_head.safetensors")
    save_file({"something": torch.zeros(1)}, here / "z_other.safetensors")
    listed = [name for name in choices("text_encoders") if not name.startswith("pocket/")]
    assert listed == ["z_other.safetensors", "a_head.safetensors"]


def test_the_pocket_vae_is_told_in_both_layouts():
    as_shipped, for_the_host = load_file(VAE_FILE), comfy_vae_state_dict()
    check_vae(shapes_of(as_shipped), VAE_FILE)
    check_vae(shapes_of(for_the_host), VAE_FILE)
    assert is_pocket_vae(shapes_of(as_shipped))
    assert not is_pocket_vae(shapes_of(for_the_host))


def wide() -> dict:
    """Shapes of a VAE in diffusers' layout at FLUX.2's width."""
    first = "encoder.down_blocks.0.resnets.0.conv1.weight"
    return {"bn.running_mean": (128,), first: (128, 128, 3, 3)}


def test_another_vae_in_diffusers_layout_is_refused_and_another_model_is_none():
    with pytest.raises(CheckpointError, match="diffusers' layout") as refused:
        check_vae(wide(), VAE_FILE)
    assert not isinstance(refused.value, NotIdeogram4Error)
    for other in ({}, {"bn.running_mean": (64,)}):
        with pytest.raises(NotIdeogram4Error, match=r"not a FLUX\.2 VAE"):
            check_vae(other, VAE_FILE)


def test_doctor_takes_the_pocket_vae_and_says_why_another_is_refused(tmp_path):
    folder = tmp_path / "models" / "vae"
    folder.mkdir(parents=True)
    shutil.copy(VAE_FILE, folder / "pocket.safetensors")
    refused = {name: torch.zeros(shape) for name, shape in wide().items()}
    save_file(refused, folder / "wide.safetensors")
    found = known_files(Host(tmp_path, tmp_path / "python"))
    assert [name for name, *_ in found.vaes] == ["pocket.safetensors"]
    assert "diffusers' layout" in found.broken["wide.safetensors"]
