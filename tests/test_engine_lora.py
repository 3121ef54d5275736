"""LoRAs on diffusers' pipeline of ours: each linear with them is that of the summed weights."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from ideogram4_quant import api
from ideogram4_quant.tests.test_api import BF16, gguf, loaded, picture  # noqa: F401

QKV, OUT = "layers.0.attention.qkv", "layers.1.attention.o"


def halves(rows: int, k: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    down = torch.randn(4, k, generator=generator) / k**0.5
    return down, torch.randn(rows, 4, generator=generator)


@pytest.fixture(scope="module")
def pipe():
    return loaded(BF16)


@pytest.fixture
def lora(pipe, tmp_path):
    """A file of split names with alpha, and what it adds to each linear."""
    linears = {QKV: pipe.transformer.layers[0].attention.to_qkv}
    linears[OUT] = pipe.transformer.layers[1].attention.to_out[0]
    state, added = {}, {}
    for seed, (name, linear) in enumerate(linears.items()):
        n, k = linear.weight.shape
        parts = [name]
        if name == QKV:
            parts = [name.replace("qkv", part) for part in ("to_q", "to_k", "to_v")]
        for number, part in enumerate(parts):
            down, up = halves(n // len(parts), k, 3 * seed + number)
            written = part if name == QKV else part.replace(".o", ".to_out.0")
            state[f"transformer.{written}.lora_A.weight"] = down
            state[f"transformer.{written}.lora_B.weight"] = up
            state[f"transformer.{written}.alpha"] = torch.tensor(2)
            added.setdefault(name, []).append(up @ down / 2)
    save_file(state, tmp_path / "lora.safetensors")
    return tmp_path / "lora.safetensors", {n: torch.cat(rows) for n, rows in added.items()}


@pytest.mark.parametrize("strength", [0.0, 1.0, -0.5])
def test_a_linear_is_that_of_the_summed_weights(pipe, lora, strength):
    file, added = lora
    there = {QKV: pipe.transformer.layers[0].attention.to_qkv}
    there[OUT] = pipe.transformer.layers[1].attention.to_out[0]
    x = {n: torch.randn(3, m.weight.shape[1]) for n, m in there.items()}
    before = {name: module(x[name]) for name, module in there.items()}
    linears = 6 * len(pipe.transformer.layers)  # qkv, o, w1, w2, w3 and the modulation
    assert pipe.load_lora_weights(file, strength=strength) == [
        f"LoRA: 2 of {linears} linears of the conditional copy, rank 4 to 12"
    ]
    for name, module in there.items():
        weight = module.weight.float() + strength * added[name]
        torch.testing.assert_close(module(x[name]), x[name] @ weight.T, rtol=1e-4, atol=1e-4)
    pipe.unload_lora_weights()
    for name, module in there.items():
        assert torch.equal(module(x[name]), before[name])
        assert not module._forward_hooks


def test_either_copy_and_two_files_of_a_quantized_model(gguf, lora):  # noqa: F811
    file, added = lora
    pipe = loaded(gguf)
    without = np.asarray(picture(pipe))
    other, one = (
        m.layers[1].attention.to_out[0] for m in (pipe.unconditional_transformer, pipe.transformer)
    )
    x = torch.randn(3, one.weight.shape[1])
    before, same = other(x), one(x)
    pipe.load_lora_weights(file, apply_to="unconditional")
    pipe.load_lora_weights(file, strength=-0.5, apply_to="unconditional")
    assert torch.equal(one(x), same)
    torch.testing.assert_close(other(x), before + 0.5 * x @ added[OUT].T, rtol=1e-4, atol=1e-4)
    assert not np.array_equal(np.asarray(picture(pipe)), without)
    with pytest.raises(api.OpError, match="a LoRA is beside them"):
        pipe.enable_sequential_cpu_offload(device="cpu")
    pipe.unload_lora_weights()
    assert np.array_equal(np.asarray(picture(pipe)), without)


def test_small_loha_acts_and_a_kind_that_changes_weights_is_refused(pipe, tmp_path):
    linear = pipe.transformer.layers[1].attention.to_out[0]
    n, k = linear.weight.shape
    name = f"diffusion_model.{OUT}"
    state = {f"{name}.hada_w{i}_a": torch.randn(n, 2) for i in (1, 2)}
    state |= {f"{name}.hada_w{i}_b": torch.randn(2, k) for i in (1, 2)}
    save_file(state, tmp_path / "loha.safetensors")
    x = torch.randn(3, k)
    first, second = (state[f"{name}.hada_w{i}_a"] @ state[f"{name}.hada_w{i}_b"] for i in (1, 2))
    wanted = linear(x) + x @ (first * second).T
    pipe.load_lora_weights(tmp_path / "loha.safetensors")
    torch.testing.assert_close(linear(x), wanted, rtol=1e-4, atol=1e-3)
    pipe.unload_lora_weights()
    save_file({f"{name}.diff": torch.ones(n, k)}, tmp_path / "diff.safetensors")
    with pytest.raises(api.CheckpointError, match=r"baked into the weights, 1 linears \(diff\)"):
        pipe.load_lora_weights(tmp_path / "diff.safetensors")


@pytest.mark.parametrize(
    ("name", "apply_to", "error"),
    [
        ("unconditional_transformer.", "conditional", "changes none of the copies"),
        ("", "all", "apply_to is none of its values"),
        ("blocks.", "both", "tensor of a linear is not understood"),
    ],
)
def test_what_does_not_fit_is_told(pipe, tmp_path, name, apply_to, error):
    n, k = pipe.transformer.layers[1].attention.to_out[0].weight.shape
    state = {f"{name}{OUT}.lora_A.weight": torch.ones(2, k)}
    state[f"{name}{OUT}.lora_B.weight"] = torch.ones(n, 2)
    save_file(state, tmp_path / "f.safetensors")
    with pytest.raises(api.Ideogram4QuantError, match=error):
        pipe.load_lora_weights(tmp_path / "f.safetensors", apply_to=apply_to)


def test_a_file_of_another_size_is_told(pipe, tmp_path):
    state = {f"{OUT}.lora_A.weight": torch.ones(2, 5), f"{OUT}.lora_B.weight": torch.ones(5, 2)}
    save_file(state, tmp_path / "f.safetensors")
    with pytest.raises(api.CheckpointError, match="trained for a model of another size"):
        pipe.load_lora_weights(tmp_path / "f.safetensors")
