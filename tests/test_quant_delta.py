"""The difference of two copies as a LoRA: the best of its rank, in names that other tools read."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import Ideogram4Pipeline
from safetensors import safe_open
from safetensors.torch import load_file

from ideogram4_quant.cli import main
from ideogram4_quant.errors import CorruptFileError, PairMismatchError
from ideogram4_quant.files.new_file import OutputExistsError, WriteError
from ideogram4_quant.pocket.paths import encoder_dir
from ideogram4_quant.quant.calibration import Calibration
from ideogram4_quant.quant.delta import STEM_RANK, DeltaOptions, make_delta
from ideogram4_quant.quant.errors import (
    CalibrationError,
    NonFiniteWeightError,
    QuantOptionError,
)
from ideogram4_quant.quant.input_moments import InputMoments
from ideogram4_quant.quant.layer_stats import LayerStats
from ideogram4_quant.quant.low_rank import truncate
from ideogram4_quant.tests import quant_model as model

RANK = 6


def inputs(k: int, columns: int = 3) -> tuple[InputMoments, np.ndarray]:
    """Moments of loud and quiet inputs, and E[x x^T] itself in double precision."""
    generator = torch.Generator().manual_seed(k)
    rest = torch.rand(k, generator=generator) ** 4 + 1e-3
    directions = torch.randn(k, columns, generator=generator)
    moments = InputMoments(rest + directions.square().sum(1), directions)
    wide = directions.double().numpy()
    return moments, np.diag(moments.rest.double().numpy()) + wide @ wide.T


def best(matrix: torch.Tensor, second: np.ndarray) -> np.ndarray:
    """Squared singular values of D E[x x^T]^(1/2), by numpy: what each rank can take away."""
    values, axes = np.linalg.eigh(second)
    root = axes * np.sqrt(values.clip(0)) @ axes.T
    return np.linalg.svd(matrix.double().numpy() @ root, compute_uv=False) ** 2


def left(matrix: torch.Tensor, found, second: np.ndarray) -> float:
    """The mean square of ``(D - up down) x``, by its formula."""
    error = (matrix.double() - found.up.double() @ found.down.double()).numpy()
    return float(np.trace(error @ second @ error.T))


@pytest.mark.parametrize("shape", [(40, 70), (70, 40), (1, 9), (9, 1)])
@pytest.mark.parametrize("weighed", [False, True])
def test_what_is_left_is_the_least_of_that_rank(shape, weighed):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    moments, second = inputs(shape[1])
    if not weighed:
        moments, second = None, np.eye(shape[1])
    wanted = best(matrix, second)
    found = truncate(matrix, RANK, moments)
    rank = min(RANK, *shape)
    assert found.down.shape == (rank, shape[1])
    assert found.up.shape == (shape[0], rank)
    assert found.total == pytest.approx(wanted.sum(), rel=1e-5)
    assert left(matrix, found, second) == pytest.approx(
        wanted[rank:].sum(), rel=1e-4, abs=1e-5 * wanted.sum()
    )
    np.testing.assert_allclose(found.energies.numpy(), wanted[:rank], rtol=1e-4)


def test_weighing_by_inputs_leaves_less_of_the_outputs_error():
    matrix = torch.randn(60, 50, generator=torch.Generator().manual_seed(2))
    moments, second = inputs(50)
    plain, weighed = truncate(matrix, RANK), truncate(matrix, RANK, moments)
    assert left(matrix, weighed, second) < 0.7 * left(matrix, plain, second)


@pytest.mark.parametrize("weighed", [False, True])
def test_a_large_matrix_of_slowly_falling_values_is_within_a_percent_of_the_best(weighed):
    n, k = 1300, 1100
    generator = torch.Generator().manual_seed(3)
    u = torch.linalg.qr(torch.randn(n, k, generator=generator)).Q
    v = torch.linalg.qr(torch.randn(k, k, generator=generator)).Q
    matrix = (u * torch.arange(1, k + 1).float() ** -0.4) @ v
    moments, second = inputs(k) if weighed else (None, np.eye(k))
    wanted = best(matrix, second)
    found, again = (truncate(matrix, 16, moments) for _ in range(2))
    assert left(matrix, found, second) < 1.01 * wanted[16:].sum()
    assert found.left(16) == pytest.approx(left(matrix, found, second), rel=1e-3)
    assert torch.equal(found.down, again.down)
    assert torch.equal(found.up, again.up)


@pytest.mark.parametrize("matrix", [torch.zeros(5, 7), torch.zeros(1200, 1100)])
def test_nothing_is_nothing(matrix):
    found = truncate(matrix, 2)
    assert found.total == 0.0
    assert bool((found.up @ found.down == 0).all())


@pytest.fixture(scope="module")
def copies(tmp_path_factory):
    """Two copies whose linears differ by rank 4, and by nothing in one of them."""
    folder = tmp_path_factory.mktemp("copies")
    first = model.weights(0)
    second, generator = {}, torch.Generator().manual_seed(9)
    for name, tensor in first.items():
        second[name] = tensor.clone()
        if tensor.ndim == 2 and name != "layers.1.attention.o.weight":
            n, k = tensor.shape
            update = torch.randn(n, 4, generator=generator) @ torch.randn(4, k, generator=generator)
            second[name] = tensor + 0.01 * update.bfloat16()
        elif name.endswith(".bias"):
            second[name] = tensor * 1.5
    return (
        model.write(folder / "cond.safetensors", first),
        model.write(folder / "uncond.safetensors", second, "unconditional"),
        first,
        second,
    )


def test_the_file_holds_the_difference_in_ai_toolkits_names(copies, tmp_path):
    cond, uncond, first, second = copies
    out = tmp_path / "lora.safetensors"
    seen = []
    report = make_delta(
        cond,
        uncond,
        out,
        DeltaOptions(rank=4, dtype="fp32"),
        progress=lambda *done: seen.append(done),
    )
    state = load_file(out)
    linears = [
        n.removesuffix(".weight")
        for n, t in first.items()
        if t.ndim == 2 and not n.startswith(("llm_cond", "embed"))
    ]
    keys = {f"diffusion_model.{n}.lora_{half}.weight" for n in linears for half in "AB"}
    assert state.keys() == keys
    for name in linears:
        down, up = (state[f"diffusion_model.{name}.lora_{half}.weight"] for half in "AB")
        true = second[f"{name}.weight"].float() - first[f"{name}.weight"].float()
        # what bf16 rounded of the sum is beyond rank 4
        assert (up @ down - true).norm() <= 0.1 * true.norm() + 1e-7, name
    assert seen[-1][0] == seen[-1][1] == sum(first[f"{n}.weight"].numel() for n in linears)
    assert sorted(linear.module for linear in report.linears) == sorted(linears)
    assert report.mean_error(4) < 0.1 * report.mean_error(0)
    vectors = dict(report.vectors)
    assert vectors["input_proj.bias"] == pytest.approx(1 / 3, rel=0.01)
    assert vectors["layers.0.attention_norm1.weight"] == 0
    biases = [
        n for n in first if n.endswith(".bias") and not n.startswith("llm_cond")
    ]  # and the embedding
    assert f"{len(biases) + 1} norms, biases and embeddings differ too" in report.table()
    with safe_open(out, "pt") as file:
        assert "unconditional LoRA" in file.metadata()["ideogram4_quant"]


def test_the_same_files_give_the_same_bytes_and_blocks_alone_on_request(copies, tmp_path):
    cond, uncond, *_ = copies
    paths = [tmp_path / f"{i}.safetensors" for i in range(3)]
    for path, which in zip(paths, ("all", "all", "blocks"), strict=True):
        make_delta(cond, uncond, path, DeltaOptions(rank=3, linears=which))
    assert paths[0].read_bytes() == paths[1].read_bytes()
    ranks = {key: len(t) for key, t in load_file(paths[0]).items() if "lora_A" in key}
    for key, rank in ranks.items():  # the first and last linears are 128 wide: they are whole
        assert rank == (3 if ".layers." in key else STEM_RANK), key
    some = load_file(paths[2])
    assert all(key.startswith("diffusion_model.layers.") for key in some)
    assert {tensor.dtype for tensor in some.values()} == {torch.bfloat16}


def calibrated(weights, copy: str = "unconditional") -> Calibration:
    generator = torch.Generator().manual_seed(4)
    layers = {}
    for name, tensor in weights.items():
        if tensor.ndim == 2 and name.startswith("layers."):
            loud = torch.rand(tensor.shape[1], generator=generator) ** 6
            x = torch.randn(80, tensor.shape[1], generator=generator) * loud
            layers[f"{copy}.{name.removesuffix('.weight')}"] = LayerStats.of(x, tensor)
    return Calibration(layers, (0.5,))


def test_a_calibration_weighs_the_outputs(copies, tmp_path):
    cond, uncond, first, second = copies
    found = calibrated(second)
    reports = [
        make_delta(cond, uncond, tmp_path / f"{i}.safetensors", DeltaOptions(2, calibration=each))
        for i, each in enumerate((None, found))
    ]
    assert [report.weighted for report in reports] == [False, True]
    key = "diffusion_model.layers.0.feed_forward.w1"
    true = (
        second["layers.0.feed_forward.w1.weight"].float()
        - first["layers.0.feed_forward.w1.weight"].float()
    )
    moments = found.layer("unconditional", "layers.0.feed_forward.w1").moments
    errors = []
    for i in range(2):
        state = load_file(tmp_path / f"{i}.safetensors")
        update = state[f"{key}.lora_B.weight"].float() @ state[f"{key}.lora_A.weight"].float()
        errors.append(moments.output_energy(true - update))
    assert errors[1] < 0.95 * errors[0]
    row = next(r for r in reports[1].linears if r.module == "layers.0.feed_forward.w1")
    assert row.written == pytest.approx(errors[1], rel=1e-3)


def test_what_cannot_be_made_is_refused_and_leaves_nothing(copies, tmp_path):
    cond, uncond, _, second = copies
    out = tmp_path / "lora.safetensors"

    def refused(kind, first, other, words, **options):
        with pytest.raises(kind, match=words):
            make_delta(first, other, out, DeltaOptions(2, **options))
        assert list(tmp_path.glob("lora*")) == []

    refused(PairMismatchError, uncond, cond, "conditional")
    same = model.write(tmp_path / "same.safetensors", model.weights(0), "unconditional")
    refused(PairMismatchError, cond, same, "the two copies are equal")
    bad = {k: v.clone() for k, v in second.items()}
    bad["layers.1.attention.o.weight"][3, 4] = float("nan")
    nan = model.write(tmp_path / "nan.safetensors", bad, "unconditional")
    refused(NonFiniteWeightError, cond, nan, "layers.1.attention.o.weight")
    strange = calibrated(model.weights(5))
    refused(CalibrationError, cond, uncond, "another model", calibration=strange)
    wrong = calibrated(second, "conditional")
    refused(CalibrationError, cond, uncond, "no statistics of the unconditional", calibration=wrong)
    for options in ({"rank": 0}, {"rank": 1, "dtype": "int8"}, {"rank": 1, "linears": "some"}):
        with pytest.raises(QuantOptionError):
            DeltaOptions(**options)
    out.write_bytes(b"mine")
    with pytest.raises(OutputExistsError):
        make_delta(cond, uncond, out, DeltaOptions(2))
    assert out.read_bytes() == b"mine"


@pytest.mark.parametrize("through", ["its name", "a link", "a hard link"])
def test_a_copy_is_never_overwritten_by_the_lora_made_of_it(copies, tmp_path, through):
    """With --overwrite the model's file was replaced by the LoRA, and then it failed."""
    paths = [tmp_path / "cond.safetensors", tmp_path / "uncond.safetensors"]
    for path, source in zip(paths, copies[:2], strict=True):
        path.write_bytes(source.read_bytes())
    for path in paths:
        out, before = path, path.read_bytes()
        if through != "its name":
            out = tmp_path / f"to-{path.name}"
            out.symlink_to(path) if through == "a link" else out.hardlink_to(path)
        with pytest.raises(WriteError, match="one of the files that it is made of"):
            make_delta(*paths, out, DeltaOptions(2), overwrite=True)
        assert path.read_bytes() == before


@pytest.mark.parametrize("command", ["delta", "quantize", "quantize, base", "calibrate"])
def test_no_command_overwrites_what_it_reads(copies, tmp_path, capsys, command):
    cond, uncond = (tmp_path / name for name in ("conditional.safetensors", "other.safetensors"))
    cond.write_bytes(copies[0].read_bytes())
    uncond.write_bytes(copies[1].read_bytes())
    calibration = tmp_path / "cal.safetensors"
    calibrated(copies[3]).save(calibration)
    level = ["--level", "INT8 W8A8"]
    words, out = {
        "delta": (["delta", cond, uncond, "--rank", "2"], calibration),
        "quantize": (["quantize", cond, *level], calibration),
        "quantize, base": (["quantize", cond, "--base", uncond, *level], uncond),
        "calibrate": (["calibrate", cond, "--uncond", uncond, "--encoder", encoder_dir()], cond),
    }[command]
    before = out.read_bytes()
    with_calibration = ["--calibration", calibration] if out == calibration else []
    words = [*words, *with_calibration, "--out", out, "--overwrite"]
    assert main([str(word) for word in words]) == 1
    assert "one of the files that it is made of" in capsys.readouterr().err
    assert out.read_bytes() == before


def test_the_command_prints_a_table_of_ranks(copies, tmp_path, capsys):
    cond, uncond, *_ = copies
    out = tmp_path / "lora.safetensors"
    words = ["delta", str(cond), str(uncond), "--rank", "4", "--out", str(out)]
    assert main(words) == 0
    captured = capsys.readouterr()
    ranks = [line.split()[0] for line in captured.out.splitlines()[1:6] if line.strip()]
    assert ranks[:4] == ["0", "1", "2", "4"]
    assert "error of weights" in captured.out
    assert "100%" in captured.err
    assert main(words) == 1
    assert "--overwrite" in capsys.readouterr().err
    assert main([*words, "--overwrite"]) == 0
    truncated = tmp_path / "short.safetensors"
    truncated.write_bytes(uncond.read_bytes()[:-100])
    with pytest.raises(CorruptFileError):
        make_delta(cond, truncated, tmp_path / "x.safetensors", DeltaOptions(2))


def test_diffusers_own_loader_takes_the_blocks(copies, tmp_path):
    """Under its names every product of halves is what the file holds; a file that holds
    ``input_proj`` as well it refuses (0.42.1), which is what ``--linears blocks`` is for."""
    cond, uncond = copies[:2]
    out = tmp_path / "blocks.safetensors"
    make_delta(cond, uncond, out, DeltaOptions(rank=4, dtype="fp32", linears="blocks"))
    state = load_file(out)
    found = Ideogram4Pipeline.lora_state_dict(str(out))
    converted: dict[str, torch.Tensor] = {}
    for key in (k for k in found if "lora_A" in k):
        name = key.removeprefix("transformer.").removesuffix(".lora_A.weight")
        converted[name] = found[key.replace("lora_A", "lora_B")] @ found[key]
    assert 2 * len(converted) == len(found)
    own = {n: m.shape for n, m in fuse_names(converted).items()}
    modules = {key.rpartition(".lora_")[0] for key in state}
    assert {f"diffusion_model.{name}" for name in own} == modules
    for name, product in fuse_names(converted).items():
        down, up = (state[f"diffusion_model.{name}.lora_{half}.weight"] for half in "AB")
        torch.testing.assert_close(product, up @ down, rtol=1e-5, atol=1e-7)
    make_delta(cond, uncond, tmp_path / "all.safetensors", DeltaOptions(rank=4))
    with pytest.raises(ValueError, match="LoRA"):
        Ideogram4Pipeline.lora_state_dict(str(tmp_path / "all.safetensors"))


def fuse_names(split: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """By the canonical modules: q, k and v as rows of one, ``to_out.0`` as ``o``."""
    fused = {}
    for name, tensor in split.items():
        if name.endswith("to_q"):
            rows = [split[name.replace("to_q", f"to_{part}")] for part in "qkv"]
            fused[name.replace("to_q", "qkv")] = torch.cat(rows)
        elif not name.endswith(("to_k", "to_v")):
            fused[name.replace("to_out.0", "o")] = tensor
    return fused
