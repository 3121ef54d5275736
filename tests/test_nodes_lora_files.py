"""LoRA files of every trainer: names, copies, split rows, and those that are refused."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from ideogram4_quant.checkpoint.loras import (
    parse_lora,
    read_lora,
    read_strength,
    stack,
    strength_of,
)
from ideogram4_quant.errors import CheckpointError, CorruptFileError

SHAPES = {"layers.0.attention.qkv": (12, 4), "layers.0.attention.o": (4, 4), "input_proj": (4, 6)}


def pair(module: str, rank: int, names=("lora_A.weight", "lora_B.weight"), rows=None, prefix=""):
    fused = module.replace("to_q", "qkv").replace("to_k", "qkv").replace("to_v", "qkv")
    n, k = SHAPES[fused.replace("to_out.0", "o")]
    generator = torch.Generator().manual_seed(len(module) + rank)
    return {
        f"{prefix}{module}.{names[0]}": torch.randn(rank, k, generator=generator),
        f"{prefix}{module}.{names[1]}": torch.randn(rows or n, rank, generator=generator),
    }


def delta(update) -> torch.Tensor:
    return update.up @ update.down


def test_a_picture_in_the_header(tmp_path):
    """Six megabytes of base64: the header was called no safetensors file, the download broken."""
    path = tmp_path / "f.safetensors"
    picture = "data:image/png;base64," + "iVBORw0K" * 750_000
    state = pair("layers.0.attention.qkv", 2, prefix="diffusion_model.")
    save_file(state, path, {"modelspec.thumbnail": picture, "format": "pt"})
    found = read_lora(path)
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], state[name]) for name in state)


@pytest.mark.parametrize(
    ("prefix", "copy"),
    [
        ("", None),
        ("diffusion_model.", None),
        ("model.diffusion_model.", None),
        ("transformer.", None),
        ("base_model.model.", None),
        ("base_model.model.transformer.", None),
        ("conditional_transformer.", "conditional"),
        ("unconditional_transformer.", "unconditional"),
    ],
)
def test_prefixes_say_the_copy_or_nothing(prefix, copy):
    found = parse_lora(pair("layers.0.attention.o", 2, prefix=prefix), SHAPES, "f")
    assert list(found.updates) == [copy]
    assert list(found.updates[copy]) == ["layers.0.attention.o"]
    assert found.unknown == []


@pytest.mark.parametrize("prefix", ["lora_unet_", "lora_transformer_"])
def test_underscored_names_are_resolved_by_the_model(prefix):
    state = pair("layers.0.attention.o", 2, ("lora_down.weight", "lora_up.weight"))
    state = {
        prefix + k.replace("layers.0.attention.o", "layers_0_attention_o"): v
        for k, v in state.items()
    }
    state[f"{prefix}layers_0_attention_o.alpha"] = torch.tensor(1.0)
    found = parse_lora(state, SHAPES, "f").updates[None]["layers.0.attention.o"]
    down, up, _ = state.values()
    torch.testing.assert_close(delta(found), up @ down / 2)


def test_split_rows_land_on_their_third():
    state = pair("layers.0.attention.to_v", 2, rows=4) | pair("layers.0.attention.to_q", 3, rows=4)
    update = parse_lora(state, SHAPES, "f").updates[None]["layers.0.attention.qkv"]
    v_down, v_up, q_down, q_up = state.values()
    expected = torch.cat([q_up @ q_down, torch.zeros(4, 4), v_up @ v_down])
    torch.testing.assert_close(delta(update), expected)
    assert update.rank == 5


def test_stacked_updates_add_up_with_their_strengths():
    first = parse_lora(pair("input_proj", 2), SHAPES, "f").updates[None]["input_proj"]
    second = parse_lora(pair("input_proj", 3), SHAPES, "f").updates[None]["input_proj"]
    both = stack([(first, 0.5), (second, -2.0)])
    torch.testing.assert_close(delta(both), 0.5 * delta(first) - 2.0 * delta(second))


def test_unnamed_updates_go_to_the_conditional_copy_unless_told():
    state = pair("input_proj", 2) | pair(
        "layers.0.attention.o", 2, prefix="unconditional_transformer."
    )
    found = parse_lora(state, SHAPES, "f")
    assert list(found.for_copy("conditional", "as in the file")) == ["input_proj"]
    assert list(found.for_copy("unconditional", "as in the file")) == ["layers.0.attention.o"]
    assert len(found.for_copy("unconditional", "both")) == 2
    assert found.for_copy("conditional", "unconditional") == {}


def test_other_tensors_are_counted_not_dropped_silently():
    state = pair("input_proj", 2) | {"text_model.layers.0.q.lora_A.weight": torch.zeros(2, 2)}
    assert parse_lora(state, SHAPES, "f").unknown == ["text_model.layers.0.q.lora_A.weight"]


@pytest.mark.parametrize(
    ("tail", "kind"),
    [
        ("lora_mid.weight", "a LoCon"),
        ("hada_t1", "a LoCon"),
        ("lokr_t2", "a LoCon"),
        ("oft_diag", "an OFT of another form"),
        ("a1.weight", "a GLoRA"),
        ("lora_embedding_A", "a LoRA of an embedding"),
        ("lora_E", "an AdaLoRA"),
        ("vera_lambda_b", "a VeRA"),
        ("randlora_A", "a RandLoRA"),
        ("ia3_l", "an IA3"),
        ("hra_u", "an HRA"),
        ("miss_block", "a MiSS"),
        ("shira_weight", "a SHiRA"),
        ("fourierft_spectrum", "a FourierFT"),
        ("c3a_kernel", "a C3A"),
        ("road_theta", "a RoAd"),
        ("p_layer.weight", "a T-LoRA"),
    ],
)
def test_kinds_that_are_not_supported_are_named(tmp_path, tail, kind):
    name = f"diffusion_model.layers.0.attention.o.{tail}"
    for state in ({name: torch.ones(4)}, pair("input_proj", 2) | {name: torch.ones(4)}):
        save_file(state, tmp_path / "f.safetensors")
        for refused in (
            lambda: read_lora(tmp_path / "f.safetensors"),
            lambda state=state: parse_lora(state, SHAPES, "f"),
        ):
            with pytest.raises(CheckpointError, match=kind) as caught:
                refused()
            assert caught.value.tensor == name


def adapter(**config) -> dict[str, str]:
    return {"lora_adapter_metadata": json.dumps({f"transformer.{k}": v for k, v in config.items()})}


@pytest.mark.parametrize(
    ("metadata", "scale"),
    [
        ({}, 1.0),
        (adapter(r=4, lora_alpha=1), 0.25),
        (adapter(r=4, lora_alpha=8), 2.0),
        (adapter(r=4, lora_alpha=1, use_rslora=True), 0.5),
        (adapter(r=16, lora_alpha=2, rank_pattern={"input_proj": 4}), 0.5),
        (adapter(r=4, lora_alpha=4, alpha_pattern={"input_proj": 2}), 0.5),
        (adapter(r=4, lora_alpha=4, alpha_pattern={"put_proj": 2, "other": 1}), 1.0),
        ({"ss_network_alpha": "2.0", "ss_network_dim": "4"}, 0.5),
    ],
)
def test_metadata_gives_the_strength_where_no_alpha_tensor_does(tmp_path, metadata, scale):
    state = pair("input_proj", 4, prefix="transformer.")
    path = tmp_path / "f.safetensors"
    save_file(state, path, metadata)
    strength = read_strength(path)
    down, up = state.values()
    found = parse_lora(read_lora(path), SHAPES, "f", strength).updates[None]["input_proj"]
    torch.testing.assert_close(delta(found), up @ down * scale)
    state["transformer.input_proj.alpha"] = torch.tensor(12.0)  # goes before the metadata
    found = parse_lora(state, SHAPES, "f", strength).updates[None]["input_proj"]
    torch.testing.assert_close(delta(found), up @ down * 3.0)


@pytest.mark.parametrize(
    ("metadata", "words"),
    [
        ({"lora_adapter_metadata": "["}, "no JSON object"),
        (adapter(lora_alpha="much"), "lora_alpha is no number"),
        (adapter(lora_alpha=1, alpha_pattern={"(a+)+b": 2}), "not supported"),
        ({"ss_network_alpha": "nan"}, "ss_network_alpha is no number"),
    ],
)
def test_strengths_that_cannot_be_understood_are_refused(metadata, words):
    with pytest.raises(CheckpointError, match=words):
        strength_of(metadata, "f")


@pytest.mark.parametrize(
    "tail",
    [
        "lora_latent_mapping.default.weight",  # LoRA-XS
        "lora_A.comfy_quant",
        "lora_A.weight_scale",
        "lora_gate.weight",
        "bias",  # PEFT's bias="lora_only"
        "modules_to_save.weight",
    ],
)
@pytest.mark.parametrize("prefix", ["transformer.", "lora_unet_", "other."])
def test_a_tensor_of_a_linear_that_is_not_understood(prefix, tail):
    """One line said that it was not loaded, and the LoRA acted otherwise than trained."""
    name = f"{prefix}input_proj.{tail}"
    state = pair("input_proj", 4) | {name: torch.rand(4, 4)}
    with pytest.raises(CheckpointError, match="not understood") as caught:
        parse_lora(state, SHAPES, "f")
    assert caught.value.tensor == name


def test_codes_are_no_values():
    state = {name: half.to(torch.int8) for name, half in pair("input_proj", 4).items()}
    with pytest.raises(CheckpointError, match=r"quantized LoRA is not supported.*int8"):
        parse_lora(state, SHAPES, "f")
    whole = pair("input_proj", 4)
    whole["input_proj.alpha"] = torch.tensor(2)  # kohya's may be a whole number
    assert parse_lora(whole, SHAPES, "f").updates


@pytest.mark.parametrize(
    "config",
    [
        {"init_lora_weights": "pissa"},
        {"init_lora_weights": "pissa_niter_16"},
        {"init_lora_weights": "olora"},
        {"peft_type": "ADALORA"},
        {"alora_invocation_tokens": [1, 2]},
    ],
)
def test_an_adapter_of_other_weights_is_refused(config):
    with pytest.raises(CheckpointError, match=next(iter(config))):
        strength_of(adapter(r=4, lora_alpha=4, **config), "f")
    strength_of(adapter(r=4, lora_alpha=4, init_lora_weights="gaussian", peft_type="LORA"), "f")


def test_pefts_config_beside_its_file(tmp_path):
    """``save_pretrained`` of PEFT writes alpha there and no metadata."""
    state, path = pair("input_proj", 4, prefix="base_model.model."), "adapter_model.safetensors"
    save_file(state, tmp_path / path, {"format": "pt"})
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 1, "use_rslora": True}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    strength = read_strength(tmp_path / path)
    down, up = state.values()
    found = parse_lora(read_lora(tmp_path / path), SHAPES, "f", strength).updates[None]
    torch.testing.assert_close(delta(found["input_proj"]), up @ down * 0.5)
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "use_dora": True}))
    with pytest.raises(CheckpointError, match="DoRA"):
        parse_lora(read_lora(tmp_path / path), SHAPES, "f", read_strength(tmp_path / path))


def test_pefts_file_without_its_config_is_warned_about(tmp_path, caplog):
    """Renamed, as into a folder of LoRAs: the strength that was trained is nowhere."""
    state = pair("input_proj", 4, prefix="base_model.model.")
    save_file(state, tmp_path / "other.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"lora_alpha": 1}))
    assert read_strength(tmp_path / "other.safetensors").alpha is None
    assert "other.safetensors" in caplog.text
    assert "alpha" in caplog.text
    caplog.clear()
    stated = {"lora_adapter_metadata": json.dumps({"r": 4, "lora_alpha": 1})}
    save_file(state, tmp_path / "stated.safetensors", stated)
    alphas = {"base_model.model.input_proj.alpha": torch.tensor(1.0)}
    save_file({**state, **alphas}, tmp_path / "alphas.safetensors")
    save_file(pair("input_proj", 4), tmp_path / "ours.safetensors")
    for name in ("stated", "alphas", "ours"):
        read_strength(tmp_path / f"{name}.safetensors")
    assert caplog.text == ""


def test_rank_0_and_fused_with_split_rows_are_told_in_words():
    with pytest.raises(CorruptFileError, match="rank 0"):
        parse_lora(pair("input_proj", 0), SHAPES, "f")
    both = pair("layers.0.attention.qkv", 2) | pair("layers.0.attention.to_q", 2, rows=4)
    with pytest.raises(CheckpointError, match="fused and split at once"):
        parse_lora(both, SHAPES, "f")


@pytest.mark.parametrize(
    ("state", "error"),
    [
        ({}, CheckpointError),
        ({"text_model.q.lora_A.weight": torch.zeros(2, 4)}, CheckpointError),
        ({"input_proj.lora_A.weight": torch.zeros(2, 6)}, CorruptFileError),
        (pair("input_proj", 2) | {"input_proj.lora_B.weight": torch.zeros(5, 2)}, CorruptFileError),
        (pair("input_proj", 2) | {"input_proj.dora_scale": torch.zeros(9)}, CheckpointError),
    ],
)
def test_unusable_loras_are_refused(state, error):
    with pytest.raises(error):
        parse_lora(state, SHAPES, "name-of-file")
