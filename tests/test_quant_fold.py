"""Folding: the function stays, files tell what was folded, and our reader undoes it."""

from __future__ import annotations

import argparse
import json
import logging
import math
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ideogram4_quant.checkpoint import open_checkpoint
from ideogram4_quant.checkpoint.folding import Folding, sites
from ideogram4_quant.ops.errors import CorruptFileError
from ideogram4_quant.ops.rotation import rotate
from ideogram4_quant.quant import (
    Calibration,
    QuantOptions,
    cli,
    inspect_file,
    plan_quantization,
    quantize_checkpoint,
    verify_file,
)
from ideogram4_quant.quant.errors import CalibrationError, QuantOptionError
from ideogram4_quant.quant.fold import fold_tensor, remaining_factor
from ideogram4_quant.quant.treatments import smooth_factors
from ideogram4_quant.tests import fixtures_fold as fold
from ideogram4_quant.tests import quant_model as model

LEVELS = ("INT8 W8A8", "INT8 W8A8 rotated", "Q8_0", "Q4_K")
O0 = "layers.0.attention.o"


def db(found, wanted):
    noise = (found.double() - wanted.double()).square().sum().item()
    return math.inf if noise == 0 else 10 * math.log10(wanted.double().square().sum() / noise)


def relative(found, wanted):
    return 10 ** (-db(found, wanted) / 20)


@pytest.fixture(scope="module")
def weights():
    """Random weights with loud FFN channels, as the real model has, and loud inputs of qkv."""
    made = model.weights(3)
    for i in range(2):
        made[f"layers.{i}.feed_forward.w3.weight"][[5, 77, 300]] *= 64
        made[f"layers.{i}.feed_forward.w2.weight"][:, [5, 77, 300]] /= 64
        made[f"layers.{i}.attention_norm1.weight"][[3, 100]] *= 32
        made[f"layers.{i}.attention.qkv.weight"][:, [3, 100]] /= 32
    return made


@pytest.fixture(scope="module")
def source(tmp_path_factory, weights):
    return model.write(tmp_path_factory.mktemp("fold") / "bf16.safetensors", weights)


@pytest.fixture(scope="module")
def calibration(source):
    return fold.calibrate(source)


@pytest.fixture(scope="module")
def files(tmp_path_factory, source, calibration):
    """Level -> folded file; one w3 and one o are protected."""
    folder, found = tmp_path_factory.mktemp("files"), {}
    for level in LEVELS:
        path = folder / f"{level}.{'gguf' if level[0] == 'Q' else 'safetensors'}"
        options = QuantOptions(
            calibration=calibration,
            fold=("all",),
            protect=("layers.1.feed_forward.w3", "layers.1.attention.o"),
        )
        quantize_checkpoint(source, level, path, options=options)
        found[level] = path
    return found


# ---- the function


def random_folding(rotation=64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    smooth = {}
    for site in sites(2):
        width = model.shapes()[f"{site.consumers[0]}.weight"][1]
        factors = 2 ** torch.randn(width, generator=generator, dtype=torch.float64)
        smooth |= dict.fromkeys(site.consumers, factors)
    return Folding(smooth, {f"layers.{i}.attention.o": rotation for i in range(2)})


def block_inputs():
    generator = torch.Generator().manual_seed(1)
    shapes = ((40, 256), (11, 832), (4, 256))
    return [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]


def folded(state, folding):
    return {name: fold_tensor(name, tensor, folding) for name, tensor in state.items()}


def test_folding_leaves_the_function_as_it_is():
    state = {name: tensor.double() for name, tensor in model.weights(4).items()}
    wanted = fold.block(state, *block_inputs())
    changed = folded(state, random_folding())
    assert db(fold.block(changed, *block_inputs()), wanted) > 200
    moved = [name for name in state if not torch.equal(changed[name], state[name])]
    assert (
        len(moved) == 1 + 1 + 2 * 7
    )  # llm_cond_norm and _proj; two norms and five linears a layer


def test_what_rounding_to_bf16_leaves():
    """The rounding of the norms costs nothing where the linears take what remains of the factor."""
    state = {name: tensor.double() for name, tensor in model.weights(4).items()}
    wanted = fold.block(state, *block_inputs())
    planned = random_folding()
    remaining = {
        consumer: remaining_factor(
            state[f"{site.producer}.weight"], planned.smooth[consumer]
        ).double()
        if "norm" in site.producer
        else planned.smooth[consumer]
        for site in sites(2)
        for consumer in site.consumers
    }

    def error(folding, rounded):
        changed = {
            name: tensor.bfloat16().double() if rounded(name) else tensor
            for name, tensor in folded(state, folding).items()
        }
        return db(fold.block(changed, *block_inputs()), wanted)

    exact = Folding(remaining, planned.rotation)
    assert error(exact, lambda name: "norm" in name) > 130  # fp32 factors
    assert error(planned, lambda name: "norm" in name) < 60
    assert error(exact, lambda name: True) > 45


@pytest.mark.parametrize(
    ("what", "least"),
    [("w2 into w1", 0.05), ("rotation of w2", 0.3), ("rotation of qkv", 0.3), ("wide o", 0.3)],
)
def test_what_is_refused_would_change_the_function(what, least):
    state = {name: tensor.double() for name, tensor in model.weights(4).items()}
    wanted = fold.block(state, *block_inputs())
    changed = dict(state)

    def layer(name):
        return f"layers.0.{name}.weight"

    w1, w2, w3 = (layer(f"feed_forward.w{i}") for i in (1, 2, 3))
    if what == "w2 into w1":
        factors = random_folding().smooth["layers.0.feed_forward.w2"]
        changed[w1] = state[w1] / factors[:, None]
        changed[w2] = state[w2] * factors
    elif what == "rotation of w2":
        changed[w3] = rotate(state[w3].T.contiguous(), 256).T
        changed[w2] = rotate(state[w2], 256)
    elif what == "rotation of qkv":
        norm = layer("attention_norm1")
        changed[norm] = rotate(state[norm], 256)
        changed[layer("attention.qkv")] = rotate(state[layer("attention.qkv")], 256)
    else:  # heads are 128 wide
        changed |= folded(state, Folding({}, {O0: 256}))
    assert relative(fold.block(changed, *block_inputs()), wanted) > least


def test_factors_balance_activations_and_weights():
    x, w = torch.tensor([4.0, 1.0, 16.0, 0.0]), torch.tensor([1.0, 1.0, 4.0, 2.0])
    factors = smooth_factors(x, w, 0.5)
    assert torch.allclose(factors[:3].log().mean(), torch.zeros((), dtype=torch.float64))
    assert torch.allclose(factors[:3] / factors[1], torch.tensor([2.0, 1.0, 2.0]).double())
    assert factors[3] == 1
    assert torch.equal(smooth_factors(torch.zeros(3), w[:3]), torch.ones(3).double())
    assert torch.allclose(smooth_factors(x, w, 1.0)[:3] * 4, x[:3].double())


def test_the_remaining_factor_is_what_a_rounded_norm_takes():
    generator = torch.Generator().manual_seed(2)
    norm = torch.randn(500, generator=generator).bfloat16()
    norm[7] = 0
    factors = 4 ** torch.randn(500, generator=generator).double()
    remaining = remaining_factor(norm, factors)
    stored = (norm.float() / remaining).bfloat16()
    assert torch.equal(stored, (norm.double() / factors).bfloat16())
    assert torch.equal((stored.float() * remaining).bfloat16(), norm)
    assert remaining[7] == 1
    assert (remaining > 0).all()
    assert 1e-5 < (remaining.double() / factors - 1).abs()[norm != 0].max() < 2**-8


# ---- files


@pytest.mark.parametrize("level", LEVELS)
def test_the_record_names_every_vector_and_rotation(files, level, weights):
    container = open_checkpoint(files[level]).containers[0]
    smoothed = {"layers.1.attention.o"}  # protected: nothing to gain
    smoothed = {f"layers.{i}.{n}" for i in range(2) for n in model.BLOCK_LINEARS} - smoothed
    smoothed -= {f"layers.{i}.adaln_modulation" for i in range(2)}
    names = {f"fold.{name}.smooth" for name in smoothed}
    names |= {f"fold.{O0}.rotation"} if level == "INT8 W8A8" else set()
    assert {key for key in container.tensors if key.startswith("fold.")} == names
    key = "ideogram4.lora_basis" if level[0] == "Q" else "lora_basis"
    assert container.metadata[key] == "folded"
    recipe = json.loads(
        container.metadata.get("quantization") or container.metadata["ideogram4.quantization"]
    )
    assert set(recipe["folded"]) == smoothed
    assert set(recipe["folded"].values()) == {0.5}
    assert recipe["folded_rotation"] == ({O0: 64} if level == "INT8 W8A8" else {})


@pytest.mark.parametrize("level", LEVELS)
def test_our_reader_gives_the_original_model(files, level, weights):
    found = open_checkpoint(files[level]).load("conditional", dtype=torch.float32)
    assert found.keys() == weights.keys()
    bound = {"Q4_K": 17, "Q8_0": 38}.get(level, 34)
    for name, true in weights.items():
        got = found[name]
        if not name.startswith("layers.") or "norm" in name or name.endswith(".bias"):
            assert torch.equal(got.bfloat16(), true), name
            continue
        assert db(got.dequantize() if hasattr(got, "dequantize") else got, true) > bound, name
    for name in ("layers.1.feed_forward.w3", "layers.1.attention.o"):
        assert type(found[f"{name}.weight"]) is torch.Tensor
        assert db(found[f"{name}.weight"], weights[f"{name}.weight"]) > 50


@pytest.mark.parametrize("level", ["INT8 W8A8", "INT8 W8A8 rotated"])
def test_a_folded_file_gives_what_a_stock_host_computes_from_it(files, level, source, tmp_path):
    stock = fold.as_a_stock_host_sees_it(files[level], tmp_path / "stock.safetensors")
    assert open_checkpoint(stock).folding("conditional") is None
    passes = fold.inputs(seed=1)
    ours, theirs = (fold.run(fold.load(path), passes) for path in (files[level], stock))
    assert relative(ours, theirs) < 2e-3
    assert relative(ours, fold.run(fold.load(source), passes)) > 5e-3  # not trivially the source


@pytest.mark.parametrize("level", LEVELS)
def test_folding_pays_where_channels_are_loud(files, level, source, tmp_path):
    plain = tmp_path / files[level].name
    quantize_checkpoint(source, level, plain)
    passes = fold.inputs(seed=1)
    wanted = fold.run(fold.load(source), passes)
    gain = db(fold.run(fold.load(files[level]), passes), wanted)
    gain -= db(fold.run(fold.load(plain), passes), wanted)
    assert gain > (1 if level == "Q4_K" else 3)


@pytest.mark.parametrize("level", ["INT8 W8A8", "Q4_K"])
def test_the_same_input_gives_the_same_bytes(files, level, source, calibration, tmp_path):
    options = QuantOptions(
        calibration=calibration,
        fold=("all",),
        protect=("layers.1.feed_forward.w3", "layers.1.attention.o"),
    )
    again = tmp_path / files[level].name
    quantize_checkpoint(source, level, again, options=options)
    assert again.read_bytes() == files[level].read_bytes()


def test_a_part_of_the_model_can_be_folded(source, calibration, tmp_path):
    path = tmp_path / "part.safetensors"
    options = QuantOptions(calibration=calibration, fold=("layers.*.feed_forward.w1",), alpha=0.7)
    quantize_checkpoint(source, "INT8 W8A8 rotated", path, options=options)
    found = [key for key in load_file(path) if key.startswith("fold.")]
    wanted = [f"fold.layers.{i}.feed_forward.{w}.smooth" for i in range(2) for w in ("w1", "w3")]
    assert sorted(found) == wanted


def test_each_input_is_folded_as_was_measured_best(source, calibration, tmp_path):
    """o: a rotation alone; qkv: nothing; w1 and w3: the best of both together; w2: as usual."""
    measured = {
        "attention.o": {"int8": 0.03, "int8 rotated": 0.01, "int8 smooth 0.65": 0.02},
        "attention.qkv": {"int8": 0.01, "int8 smooth 0.5": 0.02, "int8 rotated": 0.001},
        "feed_forward.w1": {"int8": 0.04, "int8 smooth 0.5": 0.03, "int8 smooth 0.8": 0.02},
        "feed_forward.w3": {"int8": 0.04, "int8 smooth 0.5": 0.01, "int8 smooth 0.8": 0.03},
    }
    one = torch.ones(1, dtype=torch.float64)
    layers = {
        key: replace(
            stats,
            signal=one,
            noise={c: e * e * one for c, e in measured.get(key.split(".", 3)[-1], {}).items()},
        )
        for key, stats in calibration.layers.items()
    }
    path = tmp_path / "measured.safetensors"
    options = QuantOptions(calibration=Calibration(layers, (0.0,)), fold=("all",))
    report = quantize_checkpoint(source, "INT8 W8A8", path, options=options)
    folding = open_checkpoint(path).folding("conditional")
    names = ("feed_forward.w1", "feed_forward.w2", "feed_forward.w3")
    assert set(folding.smooth) == {f"layers.{i}.{name}" for i in range(2) for name in names}
    assert folding.rotation == {f"layers.{i}.attention.o": 64 for i in range(2)}
    recipe = json.loads(report.metadata["quantization"])
    assert recipe["folded"]["layers.0.feed_forward.w3"] == 0.5
    passes = fold.inputs(seed=1)
    wanted = fold.run(fold.load(source), passes)
    assert db(fold.run(fold.load(path), passes), wanted) > 25


def test_blocks_are_led_by_the_folded_inputs(source, calibration, tmp_path):
    options = QuantOptions(calibration=calibration)
    out = tmp_path / "x.gguf"

    def importance(options):
        plan = plan_quantization(source, "Q4_K", out, options=options)
        return plan, {t.module: t.encoding.importance for t in plan.tensors if t.quantized}

    _, usual = importance(options)
    plan, changed = importance(replace(options, fold=("all",)))
    for module, led in changed.items():
        vector = plan.fold.vectors.get(module, torch.ones(()))
        wanted = (usual[module] / vector.square()).float()
        group = plan.fold.rotation.get(module)
        if group is not None:  # a rotation spreads each input over its group
            wanted = wanted.view(-1, group).mean(1, keepdim=True).expand(-1, group).flatten()
        torch.testing.assert_close(led, wanted)
    assert set(plan.fold.vectors) < set(changed)


def test_a_folded_file_can_be_verified_and_quantized_again(files, source, tmp_path):
    verified = verify_file(files["INT8 W8A8"], source)
    assert verified.meter.sqnr_db > 35
    assert verified.folded
    again = tmp_path / "again.gguf"
    quantize_checkpoint(files["INT8 W8A8"], "Q8_0", again)
    assert open_checkpoint(again).folding("conditional") is None
    assert verify_file(again, source).meter.sqnr_db > 35


def test_the_command_line_folds(source, calibration, tmp_path, capsys):
    saved, out = tmp_path / "calibration.safetensors", tmp_path / "folded.safetensors"
    calibration.save(saved)
    parser = argparse.ArgumentParser()
    cli.add_parsers(parser.add_subparsers(required=True))

    def run(*words):
        args = parser.parse_args([str(word) for word in words])
        return args.func(args), capsys.readouterr()

    order = ("quantize", source, "--level", "int8", "--calibration", saved, "--out", out)
    code, said = run(*order, "--fold", "layers.0.adaln_modulation")
    assert code == 1
    assert "its input cannot be folded: an activation lies before it" in said.err
    assert run(*order, "--fold", "--alpha", "0.6")[0] == 0
    assert set(open_checkpoint(out).folding("conditional").rotation) == {O0, O0.replace("0", "1")}
    code, said = run("verify", out, "--against", source)
    assert code == 0
    assert "a folded file" in said.out


def test_inspect_says_what_it_means_for_loras(files, source):
    found = inspect_file(files["INT8 W8A8"])
    assert O0 in found.folded
    assert "LoRAs are right in this pack" in found.table()
    assert json.loads(json.dumps(found.to_dict()))["folded"] == list(found.folded)
    assert inspect_file(source).folded == ()
    assert "folded" not in inspect_file(source).table()


def test_the_report_says_what_it_means_for_loras(source, calibration, tmp_path, caplog):
    options = QuantOptions(calibration=calibration, fold=("all",))
    with caplog.at_level(logging.WARNING):
        report = quantize_checkpoint(
            source, "INT8 W8A8", tmp_path / "x.safetensors", options=options
        )
    assert any("LoRAs are right on this file in this pack alone" in note for note in report.notes)
    assert "in other hosts they come out wrong" in caplog.text
    gguf = quantize_checkpoint(source, "Q8_0", tmp_path / "x.gguf", options=options)
    assert any("fold a GGUF file only if" in note for note in gguf.notes)


# ---- LoRA


def test_a_lora_is_right_through_our_reader_and_wrong_where_the_fold_is_ignored(
    files, source, tmp_path
):
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

    path = files["INT8 W8A8"]
    stock = fold.as_a_stock_host_sees_it(path, tmp_path / "stock.safetensors")
    folding = open_checkpoint(path).folding("conditional")
    without, wanted = fold.run(fold.load(source), passes), side_path(source)
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


# ---- what is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"calibration": None}, "needs the sizes of the activations.*calibrate"),
        ({"alpha": 1.5}, "alpha out of range"),
        ({"fold": ("layers.0.adaln_modulation",)}, "an activation lies before it"),
        ({"fold": ("final_layer.linear",)}, "the norm before it has no weight"),
        ({"fold": ("input_proj",)}, "the latent picture itself"),
        ({"fold": ("layers.*.w4",)}, "no linear has this name"),
        ({"smooth": {O0: torch.ones(256)}}, "smoothing vectors are given already"),
        ({"layout": "transformer-lab"}, "the norms, which take the factors"),
    ],
)
def test_what_cannot_be_folded_is_refused_with_the_reason(
    source, calibration, tmp_path, options, message
):
    options = {"calibration": calibration, "fold": ("all",), **options}
    out = tmp_path / "out.safetensors"
    with pytest.raises(QuantOptionError, match=message):
        quantize_checkpoint(source, "INT8 W8A8", out, options=QuantOptions(**options))
    assert not out.exists()


def test_a_linear_that_was_not_watched_is_named(source, calibration, tmp_path):
    layers = {
        k: v for k, v in calibration.layers.items() if not k.endswith("layers.1.feed_forward.w2")
    }
    options = QuantOptions(calibration=Calibration(layers, (0.0,)), fold=("all",))
    with pytest.raises(CalibrationError, match=r"layers\.1\.feed_forward\.w2: no statistics"):
        quantize_checkpoint(source, "INT8 W8A8", tmp_path / "out.safetensors", options=options)


def rewritten(path, out, change):
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, out, metadata)
    return out


W1 = "fold.layers.0.feed_forward.w1.smooth"


def _set(key, value):
    return lambda tensors: tensors.__setitem__(key, value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_set(W1, torch.zeros(256)), "cannot be divided by"),
        (_set(W1, torch.full((256,), math.nan)), "cannot be divided by"),
        (_set(W1, torch.ones(256)), "differs from what shares its input"),
        (lambda tensors: tensors.pop(W1), "differs from what shares its input"),
        (_set(W1, torch.ones(2, 128)), "no vector of factors"),
        (_set(f"fold.{O0}.rotation", torch.tensor([77], dtype=torch.int32)), "unknown rotation"),
        (_set(f"fold.{O0}.rotation", torch.ones(2, dtype=torch.int32)), "no rotation group"),
        (_set(f"fold.{O0}.smooth", torch.ones(128)), "do not fit the weight"),
        (_set("fold.input_proj.smooth", torch.ones(128)), "nothing can be folded there"),
        (
            _set("fold.layers.0.feed_forward.w2.rotation", torch.tensor([64], dtype=torch.int32)),
            "no weight can absorb a rotation",
        ),
    ],
)
def test_a_damaged_record_is_an_error(files, tmp_path, change, message):
    path = rewritten(files["INT8 W8A8"], tmp_path / "damaged.safetensors", change)
    with pytest.raises(CorruptFileError, match=message):
        open_checkpoint(path).load("conditional")


def test_a_removed_record_is_an_error(files, tmp_path):
    def remove(tensors):
        for key in [key for key in tensors if key.startswith("fold.")]:
            del tensors[key]

    path = rewritten(files["INT8 W8A8"], tmp_path / "removed.safetensors", remove)
    with pytest.raises(CorruptFileError, match="the record of it was removed"):
        open_checkpoint(path)


def test_a_folded_file_in_a_format_that_is_not_written_so_is_an_error(files, tmp_path):
    name = "layers.0.feed_forward.w1.weight"

    def as_fp8(tensors):
        tensors[name] = tensors[name].float().to(torch.float8_e4m3fn)
        conf = json.dumps({"format": "float8_e4m3fn"}).encode()
        tensors[name.replace("weight", "comfy_quant")] = torch.tensor(list(conf), dtype=torch.uint8)

    path = rewritten(files["INT8 W8A8"], tmp_path / "fp8.safetensors", as_fp8)
    with pytest.raises(CorruptFileError, match="cannot be folded"):
        open_checkpoint(path).load("conditional")
