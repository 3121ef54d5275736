"""Comparing files: rendering, resuming, shards, processes, and what makes a new picture."""

import json
import weakref
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch
from PIL import Image

from ideogram4_quant.engine.compare import render as module
from ideogram4_quant.engine.compare import versions, workers
from ideogram4_quant.engine.compare.cases import Case, CompareError, System, read_cases
from ideogram4_quant.engine.compare.render import BATCH, Plan, Settings
from ideogram4_quant.engine.compare.score import score
from ideogram4_quant.engine.compare.store import Fingerprints, Record, Store, picture_key
from ideogram4_quant.engine.compare.workers import render
from ideogram4_quant.ops.dispatch import BackendReport
from ideogram4_quant.quant import quantize_checkpoint

CASES = [Case(f"word {i}", seed, 64, 32, text="A") for i in range(3) for seed in (0, 1)]


@pytest.fixture(scope="module")
def files(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("levels")
    made = []
    for source in (tiny.conditional_file, tiny.unconditional_file):
        path = folder / f"q4-{source.name}.gguf"
        quantize_checkpoint(source, "Q4_K", path)
        made.append(path)
    return {
        "BF16": System("BF16", tiny.conditional_file, tiny.unconditional_file),
        "Q4_K": System("Q4_K", *made),
    }


@pytest.fixture
def settings(tiny) -> Settings:
    return Settings(
        tiny.encoder_dir, tiny.vae_dir, preset="turbo", steps=3, read=False, device="cpu"
    )


@pytest.fixture
def one_thread(settings):
    """As ``compare --jobs``: sums of several threads end in other last digits."""
    threads = torch.get_num_threads()
    yield replace(settings, threads=1)
    torch.set_num_threads(threads)


def plan(files, settings, folder) -> Plan:
    return Plan(list(files.values()), CASES, settings, Store(folder))


def test_renders_scores_and_answers_the_second_run_from_the_store(files, settings, tmp_path):
    todo = plan(files, settings, tmp_path)
    assert render(todo) == 2 * len(CASES)
    again = plan(files, settings, tmp_path)
    assert again.missing() == []
    assert render(again) == 0
    rendered = [again.rendered(system) for system in files.values()]
    result = score("BF16", rendered, CASES)
    q4 = result.system("Q4_K")
    assert q4.level == "Q4_K"
    assert q4.bytes < result.system("BF16").bytes
    assert len(q4.steps) == 3
    assert len(q4.values["psnr"]) == len(CASES)
    last = sum(q4.values["latent_sqnr"].values()) / len(CASES)
    assert last == pytest.approx(q4.steps[-1])
    assert result.system("BF16").values.get("psnr") is None


def test_every_system_makes_one_picture_at_a_time(files, settings, tmp_path, monkeypatch):
    """The rows of a batch need not be those of single pictures, to the last bit."""
    from ideogram4_quant.engine import generate as engine

    sizes, velocity = set(), engine.velocity

    def watched(model, latents, *rest):
        sizes.add(len(latents))
        return velocity(model, latents, *rest)

    monkeypatch.setattr(engine, "velocity", watched)
    render(plan(files, settings, tmp_path))
    assert sizes == {BATCH}


def test_a_lost_picture_is_made_again_bit_for_bit(files, settings, tmp_path):
    todo = plan({"BF16": files["BF16"]}, settings, tmp_path)
    render(todo)
    key = todo.key(files["BF16"], CASES[2])
    before = todo.store.latents(key)
    for file in tmp_path.glob(f"{key[:2]}/{key}.*"):
        file.unlink()
    assert [case for _, _, case in todo.missing()] == [CASES[2]]
    render(todo)
    assert torch.equal(todo.store.latents(key), before)


def test_shards_split_the_work_and_merge(files, settings, tmp_path):
    bf16 = {"BF16": files["BF16"]}
    parts = [tmp_path / "a", tmp_path / "b"]
    made = [render(plan(bf16, settings, part), shard=(i, 2)) for i, part in enumerate(parts)]
    assert sum(made) == len(CASES)
    whole = Store(tmp_path / "whole")
    assert [whole.merge(part) for part in parts] == made
    assert whole.merge(parts[0]) == 0
    assert plan(bf16, settings, tmp_path / "whole").missing() == []
    with pytest.raises(CompareError, match="no such shard"):
        render(plan(bf16, settings, parts[0]), shard=(2, 2))


@pytest.mark.slow
def test_two_processes_make_the_same_pictures_as_one(files, one_thread, tmp_path):
    one, two = (plan(files, one_thread, tmp_path / name) for name in ("one", "two"))
    render(one)
    assert render(two, jobs=2) == 2 * len(CASES)
    for system in files.values():
        for case in CASES:
            key = one.key(system, case)
            assert torch.equal(one.store.latents(key), two.store.latents(key))


@pytest.mark.slow
def test_a_local_ray_cluster_makes_the_same_pictures(files, one_thread, tmp_path):
    ray = pytest.importorskip("ray", reason="Ray is an optional extra")
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        one, two = (plan(files, one_thread, tmp_path / name) for name in ("one", "two"))
        render(one)
        assert render(two, ray=True, jobs=2) == 2 * len(CASES)
    finally:
        ray.shutdown()
    for system in files.values():
        for case in CASES:
            key = one.key(system, case)
            assert torch.equal(one.store.latents(key), two.store.latents(key))


def test_units_share_the_work_between_processes(files, settings, tmp_path):
    units = plan(files, settings, tmp_path).units(jobs=2)
    assert sorted(unit.system.name for unit in units) == ["BF16", "BF16", "Q4_K", "Q4_K"]
    assert sum(len(unit.work) for unit in units) == 2 * len(CASES)


def test_units_are_small_enough_for_the_features_of_their_prompts(
    files, settings, tmp_path, monkeypatch
):
    monkeypatch.setattr(module, "MOST_PICTURES", 4)
    units = plan(files, settings, tmp_path).units()
    assert [len(unit.work) for unit in units] == [4, 2, 4, 2]


def test_the_encoder_is_gone_before_the_transformers_come(files, settings, tmp_path, monkeypatch):
    alive = []
    load = module.load_encoder

    def loading(*arguments, **options):
        encoder = load(*arguments, **options)
        alive.append(weakref.ref(encoder.model))
        return encoder

    def sampling(*arguments, **options):
        assert alive
        assert not any(reference() for reference in alive)
        raise InterruptedError

    monkeypatch.setattr(module, "load_encoder", loading)
    monkeypatch.setattr(module, "load_pair", sampling)
    with pytest.raises(InterruptedError):
        render(plan({"BF16": files["BF16"]}, settings, tmp_path))


def test_an_encoder_without_a_tokenizer_takes_a_folder_with_one(files, settings, tiny, tmp_path):
    bare = tmp_path / "encoder.safetensors"
    bare.write_bytes((tiny.encoder_dir / "model.safetensors").read_bytes())
    base = plan(files, settings, tmp_path / "a")
    named = replace(settings, encoder=bare, tokenizer=tiny.encoder_dir)
    other = plan(files, named, tmp_path / "b")
    assert other.key(files["BF16"], CASES[0]) != base.key(files["BF16"], CASES[0])
    assert render(Plan([files["BF16"]], CASES[:1], named, other.store)) == 1


def test_what_changes_a_picture_changes_its_key(files, settings, tmp_path):
    def keys(system=files["BF16"], settings=settings):
        return Plan([system], CASES[:1], settings, Store(tmp_path)).key(system, CASES[0])

    base = keys()
    assert keys() == base
    others = [
        keys(settings=replace(settings, steps=4)),
        keys(settings=replace(settings, guidance=2.0)),
        keys(replace(files["BF16"], guided=False)),
        keys(replace(files["BF16"], options={"gguf_compute": "dense"})),
        keys(replace(files["Q4_K"], name="BF16")),
    ]
    assert len({base, *others}) == 6
    assert keys(replace(files["BF16"], name="another label")) == base
    assert keys(settings=replace(settings, threads=1)) == base
    assert picture_key({}, {}, CASES[0]) != picture_key({}, {}, CASES[1])


@pytest.mark.parametrize("package", ["ideogram4-quant", "torch", "triton", "comfy-kitchen"])
def test_an_upgrade_changes_the_keys_of_pictures_that_go_through_it(
    files, settings, tmp_path, monkeypatch, package
):
    def key():
        return plan(files, settings, tmp_path).key(files["BF16"], CASES[0])

    working = [BackendReport(name, True, "") for name in ("triton", "comfy_kitchen")]
    monkeypatch.setattr(versions, "reports", lambda device: working)
    installed = {"triton": "3.1.0", "comfy-kitchen": "0.2.0"}
    monkeypatch.setattr(versions, "_installed", installed.get)
    before = key()
    assert key() == before
    if package in installed:
        installed[package] += ".post1"
    elif package == "torch":
        monkeypatch.setattr(torch, "__version__", "9.9.9")
    else:
        monkeypatch.setattr(versions, "__version__", "9.9.9")
    assert key() != before


def test_a_backend_that_does_not_run_on_the_device_is_not_in_the_key(monkeypatch):
    absent = [BackendReport(name, False, "no GPU") for name in ("triton", "comfy_kitchen")]
    monkeypatch.setattr(versions, "reports", lambda device: absent)
    monkeypatch.setattr(versions, "_installed", lambda package: "1.0")
    assert not {"triton", "triton-windows", "comfy-kitchen"} & versions.versions_used("cpu").keys()


def test_a_changed_file_is_hashed_again(tmp_path):
    file = tmp_path / "m.safetensors"
    file.write_bytes(b"one")
    memory = tmp_path / "prints.json"
    first = Fingerprints(memory)
    old = first.of(file)
    first.keep()
    file.write_bytes(b"other")
    assert Fingerprints(memory).of(file) != old
    memory.write_text("{ damaged")
    assert Fingerprints(memory).of(file) != old


def test_a_picture_whose_record_is_missing_does_not_count(tmp_path):
    store = Store(tmp_path)
    store.save("ab" * 32, Image.new("RGB", (8, 8)), Record(1.0, None), None)
    assert store.has("ab" * 32, trajectory=False)
    assert not store.has("ab" * 32, trajectory=True)
    next(tmp_path.glob("*/*.json")).unlink()
    assert not store.has("ab" * 32, trajectory=False)
    assert store.picture("ab" * 32) is None


def test_merging_brings_latents_to_pictures_that_lack_them(tmp_path):
    key = "ab" * 32
    ours, theirs = Store(tmp_path / "ours"), Store(tmp_path / "theirs")
    ours.save(key, Image.new("RGB", (8, 8)), Record(1.0, None), None)
    theirs.save(key, Image.new("RGB", (8, 8)), Record(1.0, None), torch.ones(2, 3))
    assert ours.merge(theirs.folder) == 1
    assert torch.equal(ours.latents(key), torch.ones(2, 3))
    assert theirs.merge(ours.folder) == 0


def test_a_changed_chat_template_changes_the_hash_of_a_folder(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    (tmp_path / "chat_template.jinja").write_text("one")
    before = Fingerprints(tmp_path / "prints").of(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("another")
    assert Fingerprints(tmp_path / "prints").of(tmp_path) != before


def test_the_processes_of_a_machine_take_its_gpus_in_turn(monkeypatch):
    taken = []
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    turn = get_context("spawn").Value("i", 0)
    for count in (2, 2, 2, 1):
        monkeypatch.setattr(torch.cuda, "device_count", lambda count=count: count)
        workers._take_a_gpu(turn)
    assert taken == [0, 1, 0]


def test_reading_cases(tmp_path):
    lines = tmp_path / "prompts.txt"
    lines.write_text('a sign "SALE"\n\na cat\n')
    cases = read_cases(lines, seeds=(1, 2), width=64, height=32)
    assert [(c.prompt, c.seed, c.text) for c in cases] == [
        ('a sign "SALE"', 1, "SALE"),
        ('a sign "SALE"', 2, "SALE"),
        ("a cat", 1, None),
        ("a cat", 2, None),
    ]
    lines.write_text("a\u2028b\r\nc\r\n", encoding="utf-8-sig", newline="")
    prompts = [c.prompt for c in read_cases(lines, seeds=(1,), width=64, height=32)]
    assert prompts == ["a\u2028b", "c"]
    with pytest.raises(CompareError, match=r"same noise.*1 and 4294967297.*low 32 bits"):
        read_cases(lines, seeds=(1, 1 + (1 << 32)), width=64, height=32)
    rows = tmp_path / "prompts.jsonl"
    rows.write_text(json.dumps({"prompt": "x", "seed": 9, "width": 128, "text": "HI"}) + "\n")
    assert read_cases(rows, seeds=(1, 2), width=64, height=32) == [Case("x", 9, 128, 32, "HI")]
    rows.write_text('{"prompt": 3}\n')
    with pytest.raises(CompareError, match="line 1"):
        read_cases(rows, seeds=(1,), width=64, height=32)
    with pytest.raises(CompareError, match="no such prompt file"):
        read_cases(Path("nowhere.txt"), seeds=(1,), width=64, height=32)


def test_ray_missing_is_an_error_with_a_way_out(files, settings, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    with pytest.raises(CompareError, match="--jobs"):
        workers.render(plan(files, settings, tmp_path), ray=True)
