"""Other programs' rows of the pocket table, and its tables of levels."""

import csv
import io
import json
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from torch import nn

from ideogram4_quant.errors import Ideogram4QuantError
from ideogram4_quant.ops.blocks import dequantize
from ideogram4_quant.pocket.table import __main__ as table
from ideogram4_quant.pocket.table import levels, report
from ideogram4_quant.pocket.table.models import VARIANTS, state_of
from ideogram4_quant.pocket.table.painting import PART, cases_of_part
from ideogram4_quant.pocket.table.peers import PEERS, Peer, parts
from ideogram4_quant.pocket.table.runs import Run, RunStore
from ideogram4_quant.pocket.table.systems import SCHEMES, Scheme, is_block_linear
from ideogram4_quant.tests.tensors import relative

NAME = "layers.1.feed_forward.w2"
WHOLE = ("weight", "bias")


class Halved(nn.Module):
    """A peer's linear that is easy to know again: half of the weight, in bf16."""

    def __init__(self, layer: nn.Linear):
        super().__init__()
        self.register_buffer("kept", layer.weight.detach().bfloat16() / 2)

    def forward(self, x):
        return x @ self.kept.float().t()


def halving(**options) -> Scheme:
    peer = Peer("torch", "half", lambda layer, _: Halved(layer), **options)
    return Scheme("halves", peer=peer, study=False)


def job_of(scheme: Scheme) -> table.Job:
    return table.Job(VARIANTS[0], scheme, 0)


def test_a_peers_linears_stand_in_the_model_in_place_of_ours(tmp_path):
    maker = table.Maker(RunStore(tmp_path))
    maker.studio = type("WithoutVae", (), {"vae": None})()
    made = maker._made(job_of(halving()))
    models = maker._models(job_of(halving()), made)
    for copy, model in (
        ("conditional", models.conditional),
        ("unconditional", models.unconditional),
    ):
        state = state_of(VARIANTS[0], copy)
        ours = [name for name, m in model.named_modules() if isinstance(m, Halved)]
        assert len(ours) == len(list(filter(is_block_linear, state))) == 24
        qkv = model.layers[1].attention.to_qkv.own.kept.float()
        assert torch.equal(2 * qkv, state["layers.1.attention.qkv.weight"].float())
        assert not isinstance(model.input_proj, Halved)
        x = torch.randn(2, 256, generator=torch.Generator().manual_seed(0))
        weight, bias = (state[f"layers.1.adaln_modulation.{part}"].float() for part in WHOLE)
        assert torch.allclose(model.layers[1].adaln_modulation(x), x @ weight.t() / 2 + bias)


def test_its_bytes_are_what_it_keeps_or_what_its_files_take(tmp_path):
    weights = sum(
        tensor.numel()
        for copy in ("conditional", "unconditional")
        for name, tensor in state_of(VARIANTS[0], copy).items()
        if is_block_linear(name)
    )
    whole = table.Maker(RunStore(tmp_path))._made(job_of(Scheme("BF16"))).bytes
    kept = table.Maker(RunStore(tmp_path))._made(job_of(halving())).bytes
    packed = table.Maker(RunStore(tmp_path))._made(job_of(halving(bits=4.5))).bytes
    assert kept == whole  # bf16, as it came
    assert packed == whole - 2 * weights + weights * 4.5 / 8
    assert levels.bits(whole) == 16.0
    assert levels.bits(packed) == 4.5


def test_a_peer_that_measures_gets_the_moments_of_its_own_linear(tmp_path, monkeypatch):
    asked = {}

    def make(layer, moments):
        asked[tuple(layer.weight.shape)] = moments
        return Halved(layer)

    known = {
        f"{copy}.{name.removesuffix('.weight')}": torch.eye(tensor.shape[1]) * 7
        for copy in ("conditional", "unconditional")
        for name, tensor in state_of(VARIANTS[0], copy).items()
        if is_block_linear(name)
    }
    monkeypatch.setattr(table, "moments_of", lambda variant, work: known)
    scheme = Scheme("measures", peer=Peer("torch", "none", make, moments=True), study=False)
    table.Maker(RunStore(tmp_path))._made(job_of(scheme))
    assert all(moments.shape == (shape[1], shape[1]) for shape, moments in asked.items())
    assert all(torch.equal(m.diagonal(), torch.full((len(m),), 7.0)) for m in asked.values())


def test_parts_are_every_tensor_it_keeps():
    layer = nn.Linear(8, 4)
    assert {k: v.shape for k, v in parts(layer).items()} == {"weight": (4, 8), "bias": (4,)}


def test_a_peer_that_is_not_installed_is_left_out_with_the_reason(tmp_path, monkeypatch, capsys):
    absent = Scheme("absent row", peer=Peer("no-such-package", "", lambda *_: None), study=False)
    monkeypatch.setattr(table, "SCHEMES", (absent,))
    monkeypatch.setattr("sys.argv", ["table", "--work", str(tmp_path), "--no-report"])
    table.main()
    assert "absent row: no-such-package is not installed" in capsys.readouterr().out


# OrbitQuant computes its tables of 256 levels for minutes where its cache has none.
@pytest.mark.parametrize(
    "name", [name for name in PEERS if "OrbitQuant" not in name or "A4" in name]
)
def test_installed_peers_multiply_by_about_the_weight(name):
    """Where a package is installed: a weight in another order or scale would be far off."""
    peer = PEERS[name]
    if peer.version is None:
        pytest.skip(f"{peer.package} is not installed")
    weight = state_of(VARIANTS[0], "conditional")[f"{NAME}.weight"]
    x = torch.randn(64, weight.shape[1], generator=torch.Generator().manual_seed(0))
    linear = peer.linear(weight, x.t() @ x / len(x))
    assert relative(linear(x[None])[0], x @ weight.float().t()) < (0.2 if "W4A4" in name else 0.12)


@pytest.mark.parametrize("qtype", ["Q6_K", "Q4_K", "IQ4_XS"])
def test_ggmls_importance_matrix_is_heeded(qtype):
    pytest.importorskip("ggml")
    weight = state_of(VARIANTS[0], "conditional")[f"{NAME}.weight"]
    loudness = torch.randn(weight.shape[1], generator=torch.Generator().manual_seed(0)).exp()
    moments = torch.diag(loudness.square())
    peer = PEERS[f"ggml {qtype}, imatrix"]
    flat = peer.linear(weight, torch.eye(weight.shape[1]))
    led = peer.linear(weight, moments)
    assert led.blocks.shape == flat.blocks.shape
    found = dequantize(led.blocks, qtype, tuple(weight.shape), torch.float32)
    assert torch.equal(led.dense, found)
    weighted = [
        ((p.dense - weight.float()).square() @ moments.diagonal()).sum() for p in (led, flat)
    ]
    assert weighted[0] < weighted[1]


def made_up(scheme: str, variant: str, part: int, db: float, by: str = "") -> Run:
    spread = np.random.default_rng(part).normal(0, 1, PART)
    steps = [[60.0, db + float(x)] for x in spread]
    return Run(variant, scheme, part, 10_000_000, 0.2, ["X"] * PART, {}, steps, by)


@pytest.fixture
def runs() -> list[Run]:
    """Ours on all pictures; ggml's on half of the prompts, and a second half of one model only."""
    found = []
    for model in levels.MODELS:
        for part in range(4):
            found.append(made_up("ours: Q4_K, calibrated", model.name, part, 28.0))
        found.append(made_up("ggml Q4_K, imatrix", model.name, 0, 25.0, "ggml-python 1: imatrix"))
        found.append(replace(made_up("BF16", model.name, 0, 0.0), steps=[]))
    return [*found, made_up("ggml Q4_K, imatrix", "clean", 1, 99.0)]


def test_rows_say_how_many_pictures_they_have_and_pairs_take_those_of_both(runs, tmp_path):
    store = RunStore(tmp_path / "work")
    for i, run in enumerate(runs):
        (store.folder / f"{i}.json").write_text(json.dumps(asdict(run)))
        store.enter(str(i), run)
    document = tmp_path / "table.md"
    marks = ("levels conditions", "levels", "pairs", "peers", "short")
    document.write_text("".join(f"<!-- begin {m} -->\n<!-- end {m} -->\n" for m in marks))
    report.write_levels(store, document)
    text = document.read_text(encoding="utf-8")
    (ours,) = [
        line for line in text.splitlines() if line.startswith("| **ours: Q4_K, calibrated**")
    ]
    (peer,) = [
        line for line in text.splitlines() if line.startswith("| ggml Q4_K") and " x " in line
    ]
    assert "| 64 x 2 |" in ours
    assert "| 32 x 1 | 24.8 [" in peer  # the half that one model alone has is not in it
    (pair,) = [line for line in text.splitlines() if line.startswith("| Q4_K, calibrated | ggml")]
    assert pair.count("nearer: +3.0 [+3.0, +3.0]") == 3  # the same pictures: their spread cancels
    assert "| ggml Q4_K, imatrix | ggml-python 1: imatrix |" in text
    assert "| hqq 4 bits | not run" in text
    db = np.mean([28 + np.random.default_rng(part).normal(0, 1, PART) for part in range(4)])
    share = f"{100 * 10 ** (-db / 20):.1f} %"
    assert f"| {share} | {share} |" in text
    rows = list(csv.DictReader(io.StringIO((tmp_path / "pocket-levels.csv").read_text())))
    assert {(r["level"], r["prompts x seeds"]) for r in rows} == {
        ("ours: Q4_K, calibrated", "64 x 2"),
        ("ggml Q4_K, imatrix", "32 x 1"),
    }


def test_a_second_seed_of_half_of_the_prompts_is_left_out():
    runs = [made_up("Q8_0", m.name, part, 45.0) for m in levels.MODELS[:2] for part in range(3)]
    assert levels.shared_parts("Q8_0", runs) == [0, 1]
    assert levels.shared_parts("Q8_0", [run for run in runs if run.part == 0]) == [0]
    assert levels.shared_parts("Q4_K", runs) == []


def test_a_folder_without_levels_is_an_error(tmp_path):
    with pytest.raises(Ideogram4QuantError, match="no level is measured"):
        report.write_levels(RunStore(tmp_path / "work"), tmp_path / "table.md")


@pytest.mark.parametrize(
    ("parts", "words"),
    [([0], "32 x 1"), ([0, 1], "64 x 1"), ([0, 1, 2, 3], "64 x 2"), ([0, 2], "32 x 2")],
)
def test_pictures_are_prompts_times_seeds(parts, words):
    cases = [case for part in parts for case in cases_of_part(part)]
    prompts = len({case.prompt for case in cases})
    assert levels.pictures(parts) == words == f"{prompts} x {len(cases) // prompts}"


def test_every_pair_and_row_is_a_system():
    names = {scheme.name for scheme in SCHEMES}
    assert {level.name for level in (*levels.OURS, *levels.FIELD)} <= names
    assert {name for pair in levels.PAIRS for name in pair} <= names
