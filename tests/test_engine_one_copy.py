"""The engine's guidance from one resident copy, against two models that are loaded apart."""

from __future__ import annotations

from itertools import chain

import pytest
import torch
from safetensors.torch import load_file, save_file

from ideogram4_quant.engine.compare.cases import Case, System
from ideogram4_quant.engine.compare.cli import _pair
from ideogram4_quant.engine.compare.render import Plan, Settings
from ideogram4_quant.engine.compare.store import Store
from ideogram4_quant.engine.generate import GenerateRequest, Models, generate
from ideogram4_quant.engine.loading import load_pair, open_pair
from ideogram4_quant.engine.vae import load_vae
from ideogram4_quant.errors import CheckpointError, CorruptFileError, PairMismatchError
from ideogram4_quant.tests.host.level_files import write_level

LEVELS = {"BF16": 1e-5, "INT8 W8A8 rotated": 1e-2, "Q4_K": 1e-2}
LINEARS = {"layers.0.attention.qkv": (768, 256), "layers.1.feed_forward.w2": (256, 768)}
LINEARS |= {"input_proj": (256, 128), "layers.2.attention.o": (256, 256)}
RANK = 4
REQUEST = GenerateRequest("", 64, 32, seed=7, preset="turbo", steps=4)


def updates() -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(5)
    return {
        name: (
            0.6 * torch.randn(RANK, k, generator=generator) / k**0.5,
            0.6 * torch.randn(n, RANK, generator=generator) / RANK**0.5,
        )
        for name, (n, k) in LINEARS.items()
    }


@pytest.fixture(scope="module")
def lora(tmp_path_factory):
    """ai-toolkit's names; one linear with an alpha of half its rank."""
    path = tmp_path_factory.mktemp("lora") / "uncond.safetensors"
    state = {}
    for name, (down, up) in updates().items():
        halved = name == "input_proj"
        state[f"diffusion_model.{name}.lora_A.weight"] = down
        state[f"diffusion_model.{name}.lora_B.weight"] = up * (2 if halved else 1)
        if halved:
            state[f"diffusion_model.{name}.alpha"] = torch.tensor(RANK / 2)
    save_file(state, path)
    return path


def latents(tiny, models: Models) -> torch.Tensor:
    features = torch.randn(9, 832, generator=torch.Generator().manual_seed(1))
    vae = load_vae(tiny.vae_dir, device="cpu")
    models = Models(models.conditional, models.unconditional, None, vae)
    return generate(REQUEST, models, features=features).latents


def load(path, **options) -> Models:
    pair = open_pair(path, copies="conditional")
    return load_pair(pair, None, None, device="cpu", **options)


def error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return ((found - wanted).norm() / wanted.norm()).item()


def apart(path) -> Models:
    """Two models of one file, the second with the dense formula in hooks of its linears."""
    first, second = load(path).conditional, load(path).conditional
    places = {"layers.0.attention.qkv": "layers.0.attention.to_qkv"}
    places["layers.2.attention.o"] = "layers.2.attention.to_out.0"
    for name, (down, up) in updates().items():
        delta = up @ down
        second.get_submodule(places.get(name, name)).register_forward_hook(
            lambda module, inputs, out, delta=delta: out + inputs[0] @ delta.t()
        )
    return Models(first, second, None, None)


@pytest.mark.parametrize("level", LEVELS)
def test_an_unconditional_lora_is_the_dense_formula_in_its_own_pass(tiny, lora, level, tmp_path):
    path = write_level(tiny.conditional_file, level, tmp_path, "conditional")
    models = load(path, stand_in=lora)
    wanted = latents(tiny, apart(path))
    assert error(latents(tiny, models), wanted) < LEVELS[level]
    assert error(latents(tiny, load(path)), wanted) > 0.01
    kept = {id(t) for t in chain(models.conditional.parameters(), models.conditional.buffers())}
    other = models.unconditional
    beside = [t for t in chain(other.parameters(), other.buffers()) if id(t) not in kept]
    assert sum(t.numel() for t in beside) == sum(RANK * (n + k) for n, k in LINEARS.values())


def test_a_whole_difference_is_the_merged_unconditional_copy(tiny, lora, tmp_path):
    """The same as a file whose weights hold the update."""
    state = load_file(tiny.conditional_file)
    for name, (down, up) in updates().items():
        state[f"{name}.weight"] = state[f"{name}.weight"].float() + up @ down
    merged = tmp_path / "unconditional.safetensors"
    save_file(state, merged, metadata=_metadata(tiny.unconditional_file))
    two = load_pair(open_pair(tiny.conditional_file, merged), None, None, device="cpu")
    one = load(tiny.conditional_file, stand_in=lora)
    assert error(latents(tiny, one), latents(tiny, two)) < 1e-5


def _metadata(path) -> dict[str, str]:
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        return file.metadata()


def test_self_is_the_conditional_copy_without_text(tiny):
    one = load(tiny.conditional_file, stand_in="self")
    assert one.unconditional is one.conditional
    two = Models(one.conditional, load(tiny.conditional_file).conditional, None, None)
    assert torch.equal(latents(tiny, one), latents(tiny, two))


def test_what_is_no_lora_of_this_model_is_refused(tiny, lora, tmp_path):
    good = load_file(lora)
    key = "diffusion_model.layers.0.attention.qkv.lora_A.weight"

    def refused(kind, words, change):
        state = dict(good)
        change(state)
        path = tmp_path / "bad.safetensors"
        save_file(state, path)
        with pytest.raises(kind, match=words):
            load(tiny.conditional_file, stand_in=path)

    refused(CorruptFileError, "one half", lambda state: state.pop(key))
    refused(CorruptFileError, "does not fit", lambda s: s.update({key: torch.zeros(4, 9)}))
    refused(CorruptFileError, "does not fit", lambda s: s.update({key: torch.zeros(3)}))
    strange = {"transformer.layers.0.attention.to_q.lora_A.weight": torch.zeros(4, 256)}
    refused(CorruptFileError, "one half", lambda s: s.update(strange))
    named = {k.replace("diffusion_model.", "conditional_transformer."): v for k, v in good.items()}
    refused(CheckpointError, "changes none", lambda s: (s.clear(), s.update(named)))
    with pytest.raises(CheckpointError, match="LoRA"):
        load(tiny.conditional_file, stand_in=tiny.conditional_file)
    pair = open_pair(tiny.conditional_file, tiny.unconditional_file)
    with pytest.raises(PairMismatchError, match="a stand-in for it are given"):
        load_pair(pair, None, None, device="cpu", stand_in="self")


def test_compare_knows_the_words_and_keeps_the_pictures_apart(tiny, lora, tmp_path):
    cond = str(tiny.conditional_file)
    words = {"two": f",{tiny.unconditional_file}", "self": ",self", "none": ",none"}
    words["lora"] = f",lora:{lora}"
    systems = [System(name, **_pair(cond + word)) for name, word in words.items()]
    assert [system.guided for system in systems] == [True, True, False, True]
    assert systems[3].files == (tiny.conditional_file, lora)
    settings = Settings(tiny.encoder_dir, tiny.vae_dir, steps=2, device="cpu")
    case = Case("a word", 0, 64, 32)
    plan = Plan(systems, [case], settings, Store(tmp_path / "cache"))
    assert len({plan.key(system, case) for system in systems}) == 4


@pytest.mark.parametrize("naming", ["unconditional_transformer.", "split", "alpha"])
def test_a_lora_of_any_naming_is_the_same(tiny, lora, tmp_path, naming):
    wanted = latents(tiny, load(tiny.conditional_file, stand_in=lora))
    state = {}
    for key, half in load_file(lora).items():
        name = key.removeprefix("diffusion_model.")
        if naming == "split" and "attention.qkv." in name:
            for i, part in enumerate("qkv"):
                own = half.chunk(3)[i].contiguous() if "lora_B" in name else half.clone()
                state[f"diffusion_model.{name.replace('qkv', f'to_{part}')}"] = own
        elif naming == "alpha" and "input_proj" not in key:  # which has one
            state[key] = half if "lora_A" in key else half / 2
            module = key.rpartition(".lora_")[0]
            rank = half.shape[0] if "lora_A" in key else half.shape[1]
            state[f"{module}.alpha"] = torch.tensor(2.0 * rank)
        else:
            state[(naming if naming[-1] == "." else "diffusion_model.") + name] = half
    path = tmp_path / "other.safetensors"
    save_file(state, path)
    found = latents(tiny, load(tiny.conditional_file, stand_in=path))
    assert torch.allclose(found, wanted, rtol=1e-4, atol=1e-4)
