"""LoRA files of every kind: the dense formula's weights, and words for what does not fit."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from ideogram4_quant.checkpoint.loras import (
    LoraFile,
    LowRank,
    changed,
    describe,
    parse_lora,
    read_lora,
    read_strength,
    stack,
)
from ideogram4_quant.checkpoint.loras.updates import LARGEST_SIDE_PATH
from ideogram4_quant.errors import CheckpointError, CorruptFileError
from ideogram4_quant.tests.lora_kind_cases import ADALN, CASES, OTHERS, OUT, QKV, SHAPES
from ideogram4_quant.tests.lora_kind_cases import peft as peft_name

NAME = f"diffusion_model.{OUT}"


@pytest.fixture(scope="module")
def weights():
    generator = torch.Generator().manual_seed(1)
    shapes = {f"{name}.weight": shape for name, shape in SHAPES.items()} | OTHERS
    return {n: torch.randn(s, generator=generator) / s[-1] ** 0.5 for n, s in shapes.items()}


def parsed(state, **options):
    return parse_lora(state, SHAPES, "f.safetensors", others=OTHERS, **options)


def applied(weights, *files):
    """The weights with (file, strength), side paths and changes."""
    after = {}
    for name, weight in weights.items():
        changes = [(c, s) for f, s in files for c in f.changes.get(None, {}).get(name, ())]
        after[name] = changed(weight, changes)
        linear = name.removesuffix(".weight")
        low = [(f.updates[None][linear], s) for f, s in files if linear in f.updates.get(None, {})]
        if low:
            update = stack(low)
            after[name] = after[name] + update.up @ update.down
    return after


@pytest.mark.parametrize("strength", [0.0, 1.0, -0.5])
@pytest.mark.parametrize("name", CASES)
def test_every_kind_is_its_dense_formula(weights, tmp_path, name, strength):
    case = CASES[name]
    save_file(dict(case.state), tmp_path / "f.safetensors")
    found = parsed(read_lora(tmp_path / "f.safetensors"))
    assert found.unknown == []
    after = applied(weights, (found, strength))
    for key, wanted in (dict(weights) | case.merged(weights, strength)).items():
        torch.testing.assert_close(after[key], wanted, rtol=1e-4, atol=2e-6)
    changes = found.changes.get(None, {})
    assert sum(key.removesuffix(".weight") in SHAPES for key in changes) == case.baked
    if case.baked:
        assert f"baked into the weights, {case.baked} linears" in describe(found)


@pytest.mark.parametrize(
    ("one", "other"), [("DoRA, fused", "OFT, split"), ("LoKr, whole", "LoHa, rank 4, split")]
)
def test_two_files_are_added_in_either_order(weights, one, other):
    files = (parsed(CASES[one].state), 0.7), (parsed(CASES[other].state), -0.5)
    first, second = (CASES[n].merged(weights, s) for n, s in ((one, 0.7), (other, -0.5)))
    for order in (files, files[::-1]):
        after = applied(weights, *order)
        for key, weight in weights.items():
            if key in first:
                wanted = first[key] + second[key] - weight
                torch.testing.assert_close(after[key], wanted, rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("prefix", ["unconditional_transformer.", "conditional_transformer."])
def test_a_file_that_names_its_copy_changes_that_copy(prefix):
    found = parsed({f"{prefix}{OUT}.diff": torch.ones(256, 256)})
    named = prefix.removesuffix("_transformer.")
    other = "conditional" if named == "unconditional" else "unconditional"
    assert list(found.changes_for_copy(named, "as in the file")) == [f"{OUT}.weight"]
    assert found.changes_for_copy(other, "both") == {}


def test_a_large_update_is_no_side_path():
    for name, case in CASES.items():
        for update in parsed(case.state).updates.get(None, {}).values():
            assert update.rank <= LARGEST_SIDE_PATH * (3 if "split" in name else 1)


def test_dora_scales_that_are_promised_have_to_be_there(tmp_path):
    state = {
        f"{NAME}.lora_A.weight": torch.ones(2, 256),
        f"{NAME}.lora_B.weight": torch.ones(256, 2),
    }
    config = {"transformer.r": 2, "transformer.lora_alpha": 2, "transformer.use_dora": True}
    save_file(state, tmp_path / "f.safetensors", {"lora_adapter_metadata": json.dumps(config)})
    strength = read_strength(tmp_path / "f.safetensors")
    with pytest.raises(CorruptFileError, match="a DoRA, but it has no magnitudes"):
        parsed(state, strength=strength)
    state[f"{NAME}.lora_magnitude_vector"] = torch.ones(256)
    assert parsed(state, strength=strength).changes


@pytest.mark.parametrize(
    ("config", "tensors", "scale"),
    [
        ({"peft_type": "LORA", "r": 2, "lora_alpha": 8}, ("lora_A.weight", "lora_B.weight"), 4.0),
        ({"peft_type": "LOKR", "r": 8, "alpha": 4}, ("lokr_w1", "lokr_w2"), 0.5),
        ({"peft_type": "LOKR", "r": None}, ("lokr_w1", "lokr_w2"), 1.0),
        (
            {"peft_type": "LOKR", "r": 8, "alpha": 4, "rank_pattern": {"attention.o": 2}},
            ("lokr_w1", "lokr_w2"),
            2.0,
        ),
        (
            {
                "peft_type": "LOKR",
                "r": 8,
                "alpha": 4,
                "rank_pattern": {"ntion.o": 2, "attention.o": 32},
                "alpha_pattern": {"layers.2.attention.o": 8},
            },
            ("lokr_w1", "lokr_w2"),
            0.25,
        ),
        (
            {"peft_type": "LOKR", "r": 8, "alpha": 4, "rank_pattern": {"o": 0}},
            ("lokr_w1", "lokr_w2"),
            1.0,
        ),
    ],
)
def test_the_config_beside_pefts_file_states_its_strength(tmp_path, config, tensors, scale):
    """PEFT divides a LoKr's alpha by its r or the module's, though matrices are whole."""
    shapes = {"lora_A.weight": (2, 256), "lora_B.weight": (256, 2)}
    shapes |= {"lokr_w1": (2, 2), "lokr_w2": (128, 128)}
    state = {f"{peft_name(OUT)}.{tail}": torch.ones(shapes[tail]) for tail in tensors}
    file = tmp_path / "adapter_model.safetensors"
    save_file(state, file)
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    found = parsed(read_lora(file), strength=read_strength(file))
    weight = torch.zeros(256, 256)
    after = applied({f"{OUT}.weight": weight}, (found, 1.0))[f"{OUT}.weight"]
    per_entry = 2.0 if "lora_A.weight" in tensors else 1.0
    torch.testing.assert_close(after, torch.full((256, 256), scale * per_entry))


@pytest.mark.parametrize("blocks", [1, 16])
def test_rotations_that_pefts_config_bounds(tmp_path, blocks):
    """COFT: a block's Q is no longer than eps over the root of the number of blocks."""
    random = torch.Generator().manual_seed(2)
    upper = 0.05 * torch.randn(blocks, 120, generator=random)
    file = tmp_path / "adapter_model.safetensors"
    save_file({f"{peft_name(OUT)}.oft_R.weight": upper}, file)
    config = {"peft_type": "OFT", "coft": True, "eps": 0.5}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    weight = torch.randn(256, 256, generator=random)
    found = parsed(read_lora(file), strength=read_strength(file))
    after = applied({f"{OUT}.weight": weight}, (found, 1.0))[f"{OUT}.weight"]
    rotations = []
    for entries in upper.double():
        q = torch.zeros(16, 16, dtype=torch.double)
        q[tuple(torch.triu_indices(16, 16, 1))] = entries
        q = q - q.T
        q = q * min(1, 0.5 / blocks**0.5 / q.norm())
        one, two, three, four = (torch.matrix_power(q, i) for i in range(1, 5))
        rotations.append(torch.eye(16, dtype=torch.double) + 2 * (one + two + three) + four)
    assert max(r.sub(torch.eye(16)).norm() for r in rotations) < 1.1  # the bound bites
    wanted = weight.double() @ torch.block_diag(*(rotations * (16 // blocks))).T
    torch.testing.assert_close(after.double(), wanted, rtol=0, atol=2e-6)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ('{"peft_type": "OFT", "use_cayley_neumann": false}', "another map of its rotations"),
        ('{"peft_type": "OFT", "num_cayley_neumann_terms": 3}', "another map of its rotations"),
        ("{", "no JSON object"),
        (" " * (1 << 20) + "{}", "too large"),
    ],
)
def test_a_config_that_says_something_else_is_refused(tmp_path, config, words):
    file = tmp_path / "adapter_model.safetensors"
    save_file({f"{peft_name(OUT)}.oft_R.weight": torch.zeros(16, 120)}, file)
    (tmp_path / "adapter_config.json").write_text(config)
    with pytest.raises(CheckpointError, match=words):
        read_strength(file)


def lora(**more) -> dict[str, torch.Tensor]:
    state = {"lora_A.weight": torch.ones(2, 256), "lora_B.weight": torch.ones(256, 2)}
    return {**state, **{name.replace("__", "."): value for name, value in more.items()}}


def loha(**more) -> dict[str, torch.Tensor]:
    state = {f"hada_w{i}_a": torch.ones(256, 2) for i in (1, 2)}
    return state | {f"hada_w{i}_b": torch.ones(2, 256) for i in (1, 2)} | more


def without(state: dict, name: str) -> dict:
    return {key: value for key, value in state.items() if key != name}


NAN = float("nan")


@pytest.mark.parametrize(
    ("state", "named"),
    [
        (without(loha(), "hada_w1_a"), "hada_w1_a"),
        (without(loha(), "hada_w2_b"), "hada_w2_b"),
        (loha(hada_w1_a=torch.ones(256, 3)), "hada_w1_a"),
        (loha(hada_w2_b=torch.ones(2, 255)), "hada_w2_b"),
        (loha(hada_w2_b=torch.ones(())), "hada_w2_b"),
        (loha(hada_w2_b=torch.ones(0, 256), hada_w2_a=torch.ones(256, 0)), "hada_w2_b"),
        (loha(hada_w2_b=torch.full((2, 256), NAN)), "hada_w2_b"),
        (loha(hada_w2_b=torch.ones(2, 256, dtype=torch.int32)), "hada_w2_b"),
        (loha(alpha=torch.ones(2)), "alpha"),
        ({"lokr_w1": torch.ones(4, 4)}, "lokr_w2"),
        ({"lokr_w1": torch.ones(4, 4), "lokr_w2_a": torch.ones(64, 2)}, "lokr_w2_b"),
        ({"lokr_w1": torch.ones(4, 4), "lokr_w2": torch.ones(64, 63)}, "lokr_w2"),
        ({"lokr_w1": torch.ones(4), "lokr_w2": torch.ones(64, 64)}, "lokr_w1"),
        ({"oft_blocks": torch.ones(31, 8, 8)}, "oft_blocks"),
        ({"oft_blocks": torch.ones(32, 8, 7)}, "oft_blocks"),
        ({"oft_blocks": torch.full((32, 8, 8), NAN)}, "oft_blocks"),
        ({"oft_blocks": torch.ones(9, 32, 8, 8)}, "oft_blocks"),
        ({"oft_blocks": torch.ones(0, 32, 8, 8)}, "oft_blocks"),
        ({"oft_blocks": torch.ones(32, 8, 8), "rescale": torch.ones(255, 1)}, "rescale"),
        ({"oft_R.weight": torch.ones(16, 119)}, "oft_R.weight"),
        ({"oft_R.weight": torch.ones(15, 120)}, "oft_R.weight"),
        ({"boft_R": torch.ones(2, 32, 8, 8)}, "boft_R"),
        ({"boft_R": torch.ones(1, 31, 8, 8)}, "boft_R"),
        ({"boft_R": torch.ones(1, 32, 8, 8), "boft_s": torch.ones(3, 1)}, "boft_s"),
        ({"boft_s": torch.ones(256, 1)}, "down"),
        ({"diff": torch.ones(256, 255)}, "diff"),
        ({"diff": torch.full((256, 256), NAN)}, "diff"),
        ({"diff_b": torch.ones(256)}, "diff_b"),
        (lora(lora_B__bias=torch.ones(256)), "lora_B.bias"),
        (lora(dora_scale=torch.ones(255, 1)), "dora_scale"),
        (lora(dora_scale=torch.full((256, 1), NAN)), "dora_scale"),
        ({"dora_scale": torch.ones(256, 1)}, "down"),
        (lora(lokr_w1=torch.ones(4, 4)), None),
        (lora(diff=torch.ones(256, 256)), None),
        ({"oft_blocks": torch.ones(32, 8, 8), "dora_scale": torch.ones(256, 1)}, None),
        (lora(lora_mid__weight=torch.ones(2, 2, 1, 1)), "lora_mid.weight"),
        (loha(hada_t1=torch.ones(2, 2, 1, 1)), "hada_t1"),
        ({"oft_diag": torch.ones(32, 8, 8)}, "oft_diag"),
        ({"a1.weight": torch.ones(2, 2)}, "a1.weight"),
    ],
)
def test_what_does_not_fit_is_told_with_the_tensor(state, named):
    with pytest.raises(CheckpointError) as caught:
        parsed({f"{NAME}.{tail}": tensor for tail, tensor in state.items()})
    assert caught.value.tensor == (OUT if named is None else f"{NAME}.{named}")
    assert caught.value.file == "f.safetensors"


def test_a_bias_of_a_shape_that_does_not_fit():
    with pytest.raises(CorruptFileError, match=f"{ADALN}.diff_b"):
        parsed({f"diffusion_model.{ADALN}.diff_b": torch.ones(3)})


def test_a_kind_of_a_linear_fused_and_split_is_refused():
    both = {f"{QKV}.diff": torch.ones(768, 256)}
    both |= {f"{QKV.replace('qkv', 'to_q')}.diff": torch.ones(256, 256)}
    with pytest.raises(CheckpointError, match="fused and split at once"):
        parsed(both)


@pytest.mark.parametrize(
    ("name", "model"),
    [
        ("lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight", "FLUX"),
        ("transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight", "FLUX"),
        ("diffusion_model.blocks.3.self_attn.q.lora_A.weight", "Wan"),
        ("transformer_blocks.0.attn.add_q_proj.lora_A.default.weight", "Qwen-Image"),
        ("lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight", "Stable Diffusion"),
        ("lora_te1_text_model_encoder_layers_0_mlp_fc1.hada_w1_a", "a text encoder"),
        ("diffusion_model.context_refiner.0.attention.qkv.lokr_w1", "Z-Image"),
    ],
)
def test_a_file_of_another_model_is_named(name, model):
    with pytest.raises(CheckpointError, match=f"holds no LoRA for Ideogram 4.*{model}"):
        parsed({name: torch.ones(2, 2)})


@pytest.mark.parametrize(
    ("copy", "apply_to", "where"),
    [
        (None, "as in the file", "the conditional copy"),
        (None, "unconditional", "the unconditional copy"),
        (None, "both", "both copies"),
        ("unconditional", "both", "the unconditional copy"),
    ],
)
def test_reports_say_how_many_of_how_many_linears_of_which_copy(copy, apply_to, where):
    update = LowRank(torch.zeros(8, 4), torch.zeros(4, 8))
    updates = {f"layers.{i}.attention.qkv": update for i in range(20)}
    found = LoraFile({copy: updates}, kinds={copy: {"LoKr"}}, linears=24)
    assert describe(found, apply_to) == f"LoKr: 20 of 24 linears of {where}, rank 8"
