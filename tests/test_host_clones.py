"""LoRAs and fused blocks on the clones that a real ComfyUI makes of a patched model."""

from __future__ import annotations

import json

import pytest
from safetensors.torch import save_file

from ideogram4_quant.tests.host.level_files import write_level
from ideogram4_quant.tests.test_host_lora import fused, update

pytestmark = pytest.mark.host
LEVELS = ("BF16", "INT8 W8A8 rotated", "Q4_K")
KINDS = [
    f"{level}, {copy}, {how}"
    for level in LEVELS
    for copy in ("conditional", "unconditional")
    for how in ("unfused", "fused")
]
SHARED = ("clone",)
OWN = ("disable_dynamic", "force_deepcopy", "both", "delegate", "multigpu", "clone of a clone")
# int8 roundings may fall the other way after another order of sums
WITHIN = {"BF16": 1e-5, "INT8 W8A8 rotated": 1e-2, "Q4_K": 1e-2}
LINEARS = 4  # that the LoRA is for


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clones")
    save_file(fused(update(1)), folder / "fused.safetensors")
    save_file(fused(update(2)), folder / "second.safetensors")
    return folder


@pytest.fixture(scope="module")
def files(tiny, tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("levels")
    sources = {"conditional": tiny.conditional_file, "unconditional": tiny.unconditional_file}
    return json.dumps(
        {
            level: {c: str(write_level(path, level, folder, c)) for c, path in sources.items()}
            for level in LEVELS
        }
    )


@pytest.fixture(scope="module")
def clones(files, folder, in_host) -> dict:
    return in_host("clones.py", files, folder, "clones", seconds=1500)


@pytest.fixture(scope="module")
def rest(files, folder, in_host) -> dict:
    return in_host("clones.py", files, folder, "rest")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("loras", ["one", "two"])
@pytest.mark.parametrize("clone", [*SHARED, *OWN])
def test_a_clone_has_the_lora_and_the_original_keeps_its_own(clones, kind, loras, clone):
    found = clones[kind][f"{clone}, {loras}"]
    assert clones[kind]["effect"] > 0.05  # the LoRA does something
    assert max(found["errors"].values()) < WITHIN[kind.split(",")[0]], found["errors"]
    assert len(set(found["errors"].values())) == 1  # between themselves they are alike to the bit
    assert found["own model"] == (clone in OWN)
    assert found["hooks"] == [LINEARS, LINEARS]


@pytest.mark.parametrize("kind", KINDS)
def test_the_model_without_a_lora_never_gets_it(clones, kind):
    for name, found in clones[kind].items():
        if name != "effect":
            assert found["untouched"], name
            assert found["left"] == [0, 0, 0], name


def test_models_of_one_lora_in_memory_at_once_do_not_take_it_from_each_other(rest):
    assert max(rest["life"]["at once"]) < 1e-5
    assert rest["life"]["one taken out"] < 1e-5


def test_a_clone_that_ends_takes_nothing_with_it(rest):
    assert rest["life"]["after a clone ended"] < 1e-5
    assert rest["life"]["without"]


def test_clones_for_other_gpus_get_loras_that_come_later(rest):
    assert max(rest["several"]) < 1e-5


def test_the_hosts_bypass_goes_over_it_and_leaves_nothing(rest):
    assert rest["life"]["under a bypass"] < 1e-5
    assert rest["life"]["left under it"] == 0


def test_what_cannot_go_in_is_said_and_leaves_nothing_behind(rest):
    assert (
        "lacks one of its modules (found no layers.3.adaln_modulation)" in rest["failure"]["said"]
    )
    assert rest["failure"]["left"] == 0
