"""Hook LoRAs, which a real ComfyUI applies to one conditioning, on models of every layout."""

from __future__ import annotations

import io

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from ideogram4_quant.tests.host import graphs
from ideogram4_quant.tests.test_host_clones import (  # noqa: F401  (fixtures)
    WITHIN,
    files,
    folder,
)
from ideogram4_quant.tests.test_host_lora import loras, split, update  # noqa: F401  (a fixture)

pytestmark = pytest.mark.host
CASES = ("both", "alternating", "streamed", "other names", "by step", "not dynamic")
CASES += ("beside our node's", "two hooks", "one of two")


@pytest.fixture(scope="module")
def found(files, folder, tiny, in_host) -> dict:  # noqa: F811
    save_file(split(update(1)), folder / "split.safetensors")
    return in_host("hooks.py", files, folder, tiny.encoder_dir)


@pytest.mark.parametrize("level", WITHIN)
@pytest.mark.parametrize("case", CASES)
def test_a_hook_is_the_dense_formula_on_its_conditioning(found, level, case):
    assert found[level]["effect"] > 0.05
    assert found[level][case] < WITHIN[level]


@pytest.mark.parametrize("level", WITHIN)
def test_a_hook_ends_with_its_run(found, level):
    assert found[level]["without"]
    assert found[level]["left"] == found[level]["kept"] == 0


def test_the_hosts_own_guider_has_hooks_too(found):
    assert found["others"]["stock guider"] < WITHIN["INT8 W8A8 rotated"]


def test_what_the_hosts_own_loader_quantized_has_hooks_in_our_sampler(found):
    assert found["others"]["stock loader"] < WITHIN["INT8 W8A8 rotated"]


def test_a_compiled_model_follows_hooks_and_loras_that_come_and_go(found):
    compiled = found["others"]["compiled"]
    assert max(compiled["errors"]) < WITHIN["INT8 W8A8 rotated"]
    # each of four cases is compiled once; the two hooks that are made anew are other ones
    assert compiled["frames"] == [4, 6]
    assert not compiled["breaks"]


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("whole", "(found a model as a LoRA, needed a LoRA of two halves"),
        ("lokr", "the LoRA of a hook: tensor diffusion_model.layers.0.attention.qkv.lokr_w2:"),
        (
            "diff",
            "changes the weights themselves, which a hook cannot do (found baked",
        ),
        ("foreign", "the LoRA of a hook: this file holds no LoRA for Ideogram 4"),
        ("encoder", "Set the strength_clip of Create Hook LoRA to 0."),
    ],
)
def test_what_cannot_act_beside_the_weights_is_refused_in_words(found, kind, words):
    assert words in found["others"][kind]


@pytest.mark.parametrize("level", ["BF16", "Q8_0"])
def test_the_hosts_hook_nodes_give_the_picture_of_our_node(server, loras, level):  # noqa: F811
    def graph(hook: float, ours: float) -> dict:
        lora = "fused.safetensors"
        copies = (("ours", 0), ("ours", 1))
        found = graphs.with_sampler("hooks", level=level, models=copies)
        found["ours"] = graphs.node(
            "Ideogram4QuantLoadLora",
            conditional=("model", 0),
            unconditional=("model", 1),
            lora=lora,
            strength=ours,
        )
        found["hook"] = graphs.node(
            "CreateHookLora", lora_name=lora, strength_model=hook, strength_clip=hook
        )
        found["clip"] = graphs.node(
            "SetClipHooks",
            clip=("encoder", 0),
            apply_to_conds=True,
            schedule_clip=False,
            hooks=("hook", 0),
        )
        found["positive"]["inputs"]["clip"] = ["clip", 0]
        return found

    def picture(hook: float, ours: float) -> torch.Tensor:
        run = server.run(graph(hook, ours))
        assert run.status == "success", run.error
        saved = Image.open(io.BytesIO(server.fetch(run.outputs["saved"]["images"][0])))
        return torch.frombuffer(bytearray(saved.tobytes()), dtype=torch.uint8).float()

    hooked, wanted, plain = picture(3, 0), picture(0, 3), picture(0, 0)
    effect = (wanted - plain).abs().mean()
    assert effect > 1
    assert (hooked - wanted).abs().mean() < 0.05 * effect
