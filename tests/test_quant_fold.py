"""Folded files: they tell what was folded, our reader undoes it, and LoRAs stay right."""

from __future__ import annotations

import json

import pytest
import torch

from ideogram4_quant.checkpoint import open_checkpoint
from ideogram4_quant.cli import main
from ideogram4_quant.quant import (
    inspect_file,
    quantize_checkpoint,
    verify_file,
)
from ideogram4_quant.tests import fixtures_fold as fold
from ideogram4_quant.tests import quant_model as model
from ideogram4_quant.tests.tensors import relative

LEVELS = fold.LEVELS
O0 = "layers.0.attention.o"


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    return fold.written(tmp_path_factory.mktemp("fold"))


@pytest.mark.parametrize("level", LEVELS)
def test_the_record_names_every_vector_and_rotation(case, level):
    files = open_checkpoint(case.files[level]).tensor_files[0]
    smoothed = {"layers.1.attention.o"}  # protected: nothing to gain
    smoothed = {f"layers.{i}.{n}" for i in range(2) for n in model.BLOCK_LINEARS} - smoothed
    smoothed -= {f"layers.{i}.adaln_modulation" for i in range(2)}
    names = {f"fold.{name}.smooth" for name in smoothed}
    names |= {f"fold.{O0}.rotation"} if level == "INT8 W8A8" else set()
    assert {key for key in files.tensors if key.startswith("fold.")} == names
    key = "ideogram4.lora_basis" if level[0] == "Q" else "lora_basis"
    assert files.metadata[key] == "folded"


@pytest.mark.parametrize("level", LEVELS)
def test_our_reader_gives_the_original_model(case, level):
    found = open_checkpoint(case.files[level]).load("conditional", dtype=torch.float32)
    assert found.keys() == case.weights.keys()
    bound = {"Q4_K": 17, "Q8_0": 38}.get(level, 34)
    for name, true in case.weights.items():
        got = found[name]
        if not name.startswith("layers.") or "norm" in name or name.endswith(".bias"):
            assert torch.equal(got.bfloat16(), true), name
            continue
        assert fold.db(got.dequantize() if hasattr(got, "dequantize") else got, true) > bound, name
    for name in ("layers.1.feed_forward.w3", "layers.1.attention.o"):
        assert type(found[f"{name}.weight"]) is torch.Tensor
        assert fold.db(found[f"{name}.weight"], case.weights[f"{name}.weight"]) > 50


@pytest.mark.parametrize("level", ["INT8 W8A8", "INT8 W8A8 rotated"])
def test_a_folded_file_gives_what_a_stock_host_computes_from_it(case, level, tmp_path):
    stock = fold.as_a_stock_host_sees_it(case.files[level], tmp_path / "stock.safetensors")
    assert open_checkpoint(stock).folding("conditional") is None
    passes = fold.inputs(seed=1)
    ours, theirs = (fold.run(fold.load(path), passes) for path in (case.files[level], stock))
    assert relative(ours, theirs) < 2e-3
    plain = fold.run(fold.load(case.source), passes)
    assert relative(ours, plain) > 5e-3  # not trivially the source


@pytest.mark.parametrize("level", LEVELS)
def test_folding_pays_where_channels_are_loud(case, level, tmp_path):
    plain = tmp_path / case.files[level].name
    quantize_checkpoint(case.source, level, plain)
    passes = fold.inputs(seed=1)
    wanted = fold.run(fold.load(case.source), passes)
    gain = fold.db(fold.run(fold.load(case.files[level]), passes), wanted)
    gain -= fold.db(fold.run(fold.load(plain), passes), wanted)
    assert gain > (1 if level == "Q4_K" else 3)


def test_a_folded_file_can_be_verified_and_quantized_again(case, tmp_path):
    verified = verify_file(case.files["INT8 W8A8"], case.source)
    assert verified.meter.sqnr_db > 35
    assert verified.folded
    again = tmp_path / "again.gguf"
    quantize_checkpoint(case.files["INT8 W8A8"], "Q8_0", again)
    assert open_checkpoint(again).folding("conditional") is None
    assert verify_file(again, case.source).meter.sqnr_db > 35


def test_the_command_line_says_that_a_file_is_folded_and_folds_none(case, capsys):
    command = ["verify", str(case.files["INT8 W8A8"]), "--against", str(case.source)]
    assert main(command) == 0
    assert "a folded file" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:
        main(["quantize", str(case.source), "--level", "int8", "--out", "x", "--fold"])
    assert stop.value.code == 2
    assert "--fold" in capsys.readouterr().err


def test_inspect_says_what_it_means_for_loras(case):
    found = inspect_file(case.files["INT8 W8A8"])
    assert O0 in found.folded
    assert "LoRAs are right in this pack" in found.table()
    assert json.loads(json.dumps(found.to_dict()))["folded"] == list(found.folded)
    assert inspect_file(case.source).folded == ()
    assert "folded" not in inspect_file(case.source).table()


# ---- LoRA


def test_a_lora_is_right_through_our_reader_and_wrong_where_the_fold_is_ignored(case, tmp_path):
    """Error of the output, over the effect of the LoRA; low-rank side path and patched weight."""
    generator = torch.Generator().manual_seed(9)
    pairs = {}
    for i in range(2):
        for name in ("attention.qkv", "attention.o", "feed_forward.w1", "feed_forward.w2"):
            n, k = model.shapes()[f"layers.{i}.{name}.weight"]
            down = torch.randn(4, k, generator=generator) / k**0.5
            up = 0.02 * torch.randn(n, 4, generator=generator)
            pairs[f"layers.{i}.{name}"] = (down, up)
    passes = fold.inputs(seed=1)

    def patched(path, change=lambda module, down, up: (down, up)):
        network = fold.load(path)
        for name, linear in fold.linears(network).items():
            if name in pairs:
                down, up = change(name, *pairs[name])
                weight = linear.weight.data
                dense = weight.dequantize() if hasattr(weight, "requantize_from_float") else weight
                dense = dense.float() + up @ down
                if hasattr(weight, "requantize_from_float"):
                    dense = weight.requantize_from_float(dense, scale="recalculate")
                linear.weight = torch.nn.Parameter(dense, requires_grad=False)
        return fold.run(network, passes)

    def side_path(path, change=lambda module, down, up: (down, up)):
        network = fold.load(path)
        for name, linear in fold.linears(network).items():
            if name in pairs:
                down, up = change(name, *pairs[name])
                linear.register_forward_hook(
                    lambda m, args, y, down=down, up=up: y + args[0] @ down.T @ up.T
                )
        return fold.run(network, passes)

    path = case.files["INT8 W8A8"]
    stock = fold.as_a_stock_host_sees_it(path, tmp_path / "stock.safetensors")
    folding = open_checkpoint(path).folding("conditional")
    without, wanted = fold.run(fold.load(case.source), passes), side_path(case.source)
    effect = (wanted - without).norm()
    assert effect / without.norm() > 0.05

    def error(output, base):
        return ((output - base - (wanted - without)).norm() / effect).item()

    ours, theirs = (fold.run(fold.load(p), passes) for p in (path, stock))
    assert error(side_path(path), ours) < 0.08
    assert error(patched(path), ours) < 0.12
    assert error(side_path(stock, folding.low_rank), theirs) < 0.08
    assert error(patched(stock, folding.low_rank), theirs) < 0.12
    assert error(side_path(stock), theirs) > 0.5
    assert error(patched(stock), theirs) > 0.5
