"""The table of systems on the pocket model: what a row computes, and that it is made once."""

import pytest
import torch
from safetensors.torch import load_file

from ideogram4_quant.engine.compare.metrics import psnr
from ideogram4_quant.engine.generate import GenerateRequest, generate
from ideogram4_quant.engine.loading import load_pair, open_pair
from ideogram4_quant.ops.linear import LinearOptions, linear
from ideogram4_quant.pocket.data import HELD_OUT
from ideogram4_quant.pocket.paths import dit_path
from ideogram4_quant.pocket.table import systems
from ideogram4_quant.pocket.table.__main__ import Maker, jobs_of
from ideogram4_quant.pocket.table.models import VARIANTS
from ideogram4_quant.pocket.table.painting import Studio, case_of
from ideogram4_quant.pocket.table.runs import RunStore, run_key

NAME = "layers.1.feed_forward.w2.weight"


@pytest.fixture(scope="module")
def state():
    return load_file(dit_path("cond"))


@pytest.mark.parametrize("scheme", systems.SCHEMES, ids=lambda s: s.name)
def test_unpacked_weights_multiply_as_the_packed_ones(state, scheme):
    """What a row computes with is what `ops.linear` makes of the stored weight at each call."""
    packed = systems.weights(scheme, {NAME: state[NAME]})
    ready = systems.unpacked(packed, scheme.compute)[NAME]
    x = torch.randn(96, 768, generator=torch.Generator().manual_seed(0))
    options = LinearOptions(gguf_compute=scheme.compute)
    assert torch.equal(linear(x, ready, None, options), linear(x, packed[NAME], None, options))


def test_batches_paint_what_the_engine_paints_one_by_one(pocket):
    studio = Studio(HELD_OUT[:3])
    pair = open_pair(pocket.conditional_file, pocket.unconditional_file)
    models = load_pair(pair, None, studio.vae, device="cpu")
    painted = studio.paint(models, [case_of(p, 1) for p in HELD_OUT[:3]])
    case = case_of(HELD_OUT[2], 1)
    request = GenerateRequest(case.prompt, case.width, case.height, case.seed)
    alone = generate(request, models, features=studio.features[2])
    assert case.seed != HELD_OUT[2].seed
    assert psnr(alone.image, painted.pictures[2]) > 60
    assert torch.allclose(alone.latents, painted.trajectories[2, -1], atol=1e-3)


def test_a_run_is_made_once_and_again_for_other_weights(tmp_path):
    pytest.importorskip("rapidocr")
    store = RunStore(tmp_path)
    chosen = [s for s in systems.SCHEMES if s.name in ("BF16", "NF4")]
    jobs = list(jobs_of(VARIANTS[:1], chosen, 1))
    maker = Maker(store, 2)
    for job in jobs:
        maker.make(job)
    reference, nf4 = store.newest().values()
    assert (reference.scheme, nf4.scheme) == ("BF16", "NF4")
    assert reference.steps == []
    assert len(nf4.steps) == 2
    assert len(nf4.steps[0]) == 20
    assert nf4.bytes < 0.4 * reference.bytes
    assert 10 < nf4.scores["psnr"][0] < 60
    assert set(reference.scores) == {"ocr_exact", "ocr_distance"}

    again = Maker(RunStore(tmp_path), 2)
    for job in jobs:
        again.make(job)
    assert again.studio is None  # nothing was painted
    tensors = {"conditional": {"a": torch.ones(2)}}
    other = {"conditional": {"a": torch.tensor([1.0, 2.0])}}
    cases = again.cases(jobs[0])
    keys = {
        run_key(tensors, "dense", cases, None),
        run_key(tensors, "w8a8", cases, None),
        run_key(tensors, "dense", cases[:1], None),
        run_key(tensors, "dense", cases, "another reference"),
        run_key(other, "dense", cases, None),
    }
    assert len(keys) == 5


def test_stress_is_for_the_systems_that_ask_for_it():
    jobs = list(jobs_of(VARIANTS, systems.SCHEMES, 2))
    stressed = {job.scheme.name for job in jobs if job.variant.stress}
    assert stressed == {s.name for s in systems.SCHEMES if s.stress}
    assert [job.round for job in jobs] == sorted(job.round for job in jobs)
    assert all(job.scheme.name == systems.REFERENCE for job in jobs[: len(VARIANTS)])
