"""The nodes' logic that needs no host: captions, guidance, LoRA names, files and levels."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch

from ideogram4_quant.checkpoint import ModelConfig
from ideogram4_quant.checkpoint.levels import (
    AUTO,
    AUTO_ORDER,
    LEVELS,
    WORKING_MEMORY,
    Candidate,
    Catalogue,
    capability,
    find_pair,
    read_catalogue,
    resolve,
)
from ideogram4_quant.checkpoint.listing import list_files, new_name, stamp
from ideogram4_quant.nodes import costs, headers, report, residency
from ideogram4_quant.nodes.captions import check_caption
from ideogram4_quant.nodes.connections import leads_anywhere
from ideogram4_quant.nodes.fused_choice import decide
from ideogram4_quant.nodes.guidance import Guidance, format_guidance, parse_guidance
from ideogram4_quant.nodes.lora_files import parse_lora, stack
from ideogram4_quant.ops.choices import ATTENTION, GGUF, LINEAR, Key, Measurement, Table
from ideogram4_quant.ops.dispatch import BackendReport
from ideogram4_quant.ops.errors import (
    CheckpointError,
    CorruptFileError,
    NotIdeogram4Error,
    OpError,
    TruncatedFileError,
)
from ideogram4_quant.ops.linear import LinearOptions

PACK = Path(report.__file__).parents[1]

# ---- captions

GOOD = {
    "high_level_description": "A sign",
    "style_description": {
        "aesthetics": "plain",
        "lighting": "even",
        "photo": "35mm",
        "medium": "photograph",
        "color_palette": ["#102030"],
    },
    "compositional_deconstruction": {
        "background": "a wall",
        "elements": [
            {"type": "obj", "bbox": [0, 0, 500, 1000], "desc": "a door"},
            {"type": "text", "bbox": [1, 2, 3, 4], "text": "OPEN", "desc": "red"},
        ],
    },
}


def reversed_keys(value):
    if isinstance(value, dict):
        return {key: reversed_keys(value[key]) for key in reversed(value)}
    return [reversed_keys(v) for v in value] if isinstance(value, list) else value


def test_good_caption_passes_and_is_minified():
    verdict = check_caption(json.dumps(GOOD, indent=2))
    assert (verdict.errors, verdict.warnings) == ([], [])
    assert verdict.caption == json.dumps(GOOD, separators=(",", ":"))


def test_keys_are_put_into_the_trained_order():
    verdict = check_caption(json.dumps(reversed_keys(GOOD)))
    assert verdict.errors == []
    assert len(verdict.warnings) == 5  # top, style, composition, two elements
    assert verdict.caption == json.dumps(GOOD, separators=(",", ":"))


def test_drawings_have_their_medium_before_the_style():
    style = {"art_style": "ink", "medium": "drawing", "lighting": "flat", "aesthetics": "bold"}
    verdict = check_caption(json.dumps(GOOD | {"style_description": style}))
    order = list(json.loads(verdict.caption)["style_description"])
    assert order == ["aesthetics", "lighting", "medium", "art_style"]


def test_words_of_other_scripts_stay_readable():
    caption = json.dumps(GOOD | {"high_level_description": "Ein Schild: café, 開"})
    assert "café, 開" in check_caption(caption).caption


def test_plain_text_is_warned_about_and_kept():
    verdict = check_caption("a cat on a mat")
    assert verdict.errors == []
    assert "JSON" in verdict.warnings[0]
    assert verdict.caption == "a cat on a mat"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"compositional_deconstruction": None}, "must be an object"),
        ({"compositional_deconstruction": {"elements": []}}, "lacks background"),
        ({"compositional_deconstruction": {"background": "", "elements": {}}}, "must be a list"),
        ({"style_description": "bold"}, "must be an object"),
        ({"high_level_description": 3}, "must be text"),
    ],
)
def test_wrong_structure_is_an_error(change, message):
    found = check_caption(json.dumps({**GOOD, **change}))
    assert any(message in error for error in found.errors)


@pytest.mark.parametrize(
    ("element", "message"),
    [
        ({"type": "object", "desc": "x"}, 'not "object"'),
        ({"type": "text", "desc": "x"}, "lacks text"),
        ({"type": "text", "text": " ", "desc": "x"}, "empty"),
        ({"type": "obj", "desc": "x", "bbox": [0, 0, 5]}, "four numbers"),
        ({"type": "obj", "desc": "x", "bbox": [0, 0, 5, 1001]}, "within 0 and 1000"),
        ({"type": "obj", "desc": "x", "bbox": [9, 0, 5, 10]}, "bbox is empty"),
        ("x", "must be an object"),
    ],
)
def test_wrong_element_is_named_by_its_number(element, message):
    composition = {"background": "b", "elements": [GOOD_ELEMENT, element]}
    errors = check_caption(json.dumps({"compositional_deconstruction": composition})).errors
    assert any(error.startswith("element 2") and message in error for error in errors)


GOOD_ELEMENT = {"type": "obj", "desc": "a door"}


@pytest.mark.parametrize("text", ["", "{", '{"a": 1', "[]", "[" * 100_000])
def test_unreadable_captions_are_errors(text):
    verdict = check_caption(text)
    assert verdict.errors
    assert verdict.caption == text


# ---- guidance


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("7", (7.0,)),
        (" 7*2, 3.5 ", (7.0, 7.0, 3.5)),
        ("7x2;3", (7.0, 7.0, 3.0)),
        (".5*1", (0.5,)),
        ("0*3", (0.0,) * 3),
    ],
)
def test_guidance_is_read(text, values):
    assert parse_guidance(text) == values
    assert parse_guidance(format_guidance(values)) == values


@pytest.mark.parametrize(
    "text",
    ["", " , ", "seven", "7*0", "7*1001", "7*-1", "1e9", "101", "7**2", "nan", "7*600,7*600"],
)
def test_unreadable_guidance_is_refused(text):
    with pytest.raises(OpError):
        parse_guidance(text)


def factors(guidance: Guidance, sigmas: list[float]) -> tuple[float, ...]:
    return tuple(step.guidance for step in guidance.plan(sigmas))


def curve(steps: int, end: float = 0.0) -> list[float]:
    return torch.linspace(1.0, end, steps + 1).tolist()


def test_preset_polishes_the_last_steps_only():
    assert factors(Guidance("turbo"), curve(12)) == (7.0,) * 11 + (3.0,)
    assert factors(Guidance("default"), curve(5)) == (7.0,) * 3 + (3.0,) * 2


def test_first_part_of_a_split_schedule_has_no_polish_steps():
    assert factors(Guidance("quality"), curve(6, end=0.4)) == (7.0,) * 6


def test_image_to_image_takes_the_last_entries_of_a_list():
    guidance = Guidance(None, (9.0, 8.0, 7.0, 3.0))
    assert factors(guidance, curve(2)) == (7.0, 3.0)
    assert factors(guidance, curve(2, end=0.5)) == (9.0, 8.0)
    assert factors(Guidance(None, (4.0,)), curve(3)) == (4.0,) * 3


def test_list_that_is_too_short_is_refused():
    with pytest.raises(OpError, match="2 entries for 3 steps"):
        Guidance(None, (7.0, 3.0)).plan(curve(3))


# ---- LoRA names

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
    state = pair("input_proj", 2) | {"layers.0.attention.o.lokr_w1": torch.zeros(2, 2)}
    assert parse_lora(state, SHAPES, "f").unknown == ["layers.0.attention.o.lokr_w1"]


@pytest.mark.parametrize(
    ("state", "error"),
    [
        ({}, CheckpointError),
        ({"text_model.q.lora_A.weight": torch.zeros(2, 4)}, CheckpointError),
        ({"input_proj.lora_A.weight": torch.zeros(2, 6)}, CorruptFileError),
        (pair("input_proj", 2) | {"input_proj.lora_B.weight": torch.zeros(5, 2)}, CorruptFileError),
        (pair("input_proj", 2) | {"input_proj.dora_scale": torch.zeros(4)}, CheckpointError),
    ],
)
def test_unusable_loras_are_refused(state, error):
    with pytest.raises(error):
        parse_lora(state, SHAPES, "name-of-file")


# ---- files and levels


@dataclass(frozen=True)
class Header:
    """What levels ask of an opened file."""

    level: str
    copies: tuple[str, ...]
    size: int = 1000
    config: ModelConfig = field(default_factory=ModelConfig)
    copy_reason: str = "its name"
    linears_only: bool = False
    layout: str = "some layout"
    protected: tuple[str, ...] = ()
    paths: tuple[Path, ...] = (Path("f"),)

    def reads_text(self, copy: str) -> bool:
        return True


def catalogue(**files: Header) -> Catalogue:
    listing = list_files("diffusion models", ["/models"])
    return Catalogue(listing, [Candidate(name, Path(name), h) for name, h in files.items()])


COND, UNCOND, BOTH = ("conditional",), ("unconditional",), ("conditional", "unconditional")


def test_listing_finds_files_folders_and_links_once(tmp_path):
    for name in ("a.safetensors", "sub/b.GGUF", "c.txt", ".hidden/d.gguf", "sub/.e.gguf"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "pair" / "transformer").mkdir(parents=True)
    (tmp_path / "pair" / "transformer" / "x.safetensors").touch()
    (tmp_path / "shards").mkdir()
    for name in ("model.safetensors.index.json", "model-1.safetensors"):
        (tmp_path / "shards" / name).touch()
    (tmp_path / "sub" / "up").symlink_to(tmp_path, target_is_directory=True)
    listing = list_files("models", [str(tmp_path)])
    assert listing.names == ["a.safetensors", "pair", "shards", "sub/b.GGUF"]
    assert listing.path("sub\\b.GGUF") == tmp_path / "sub" / "b.GGUF"


@pytest.mark.parametrize("name", ["../a.safetensors", "/etc/passwd", "", "sub/../a.safetensors"])
def test_names_are_looked_up_never_joined(tmp_path, name):
    (tmp_path / "a.safetensors").touch()
    listing = list_files("models", [str(tmp_path)])
    assert str(tmp_path) in listing.problem(name)
    with pytest.raises(CheckpointError, match="no such file"):
        listing.path(name)


def test_folder_without_files_says_what_to_put_there(tmp_path):
    empty = list_files("vae", [str(tmp_path)])
    (shown,) = empty.choices
    assert "models/vae" in shown
    message = empty.problem(shown, "flux2-vae.safetensors")
    for words in (str(tmp_path), "press R", "flux2-vae.safetensors"):
        assert words in message
    (tmp_path / "a.safetensors").touch()
    assert list_files("vae", [str(tmp_path)]).choices == ["a.safetensors"]


def test_names_that_another_node_fills_in_are_no_problem_yet(tmp_path):
    (tmp_path / "a.safetensors").touch()
    listing = list_files("models", [str(tmp_path)])
    assert listing.problem(None) is True
    assert listing.problem("a.safetensors") is True


def test_stamp_and_fingerprint_change_with_the_file(tmp_path):
    path = tmp_path / "f.safetensors"
    path.write_bytes(bytes(3_000_000))
    before, mark = stamp(path), report.fingerprint(path)
    data = bytearray(3_000_000)
    data[0] = 1
    path.write_bytes(bytes(data))
    os.utime(path, ns=(0, before[2] + 1))
    assert stamp(path) != before
    assert report.fingerprint(path) != mark
    assert report.fingerprint(tmp_path) != report.fingerprint(path)


def test_headers_are_read_once_for_each_state_of_a_file(tmp_path, monkeypatch):
    read = []

    def open_file(path, *_, **__):
        read.append(path.name)
        if path.name == "broken.gguf":
            raise TruncatedFileError("ends early", file=path)
        return object()

    monkeypatch.setattr(headers, "open_checkpoint", open_file)
    good, broken = tmp_path / "good.gguf", tmp_path / "broken.gguf"
    for path in (good, broken):
        path.write_bytes(b"1")
    first = headers.open_header(good)
    assert headers.open_header(good) is first
    os.utime(good, ns=(0, 1))  # touched
    assert headers.open_header(good) is not first
    good.write_bytes(b"12")  # grown
    os.utime(good, ns=(0, 1))
    headers.open_header(good)
    assert read == ["good.gguf"] * 3
    for _ in range(2):  # an error is not kept: the download may be finished by now
        with pytest.raises(TruncatedFileError):
            headers.open_header(broken)
    assert read[3:] == ["broken.gguf"] * 2


def test_catalogue_passes_over_other_models_and_notes_broken_files(tmp_path):
    for name in ("good", "other", "broken"):
        (tmp_path / f"{name}.gguf").touch()

    def open_file(path: Path):
        if path.stem == "other":
            raise NotIdeogram4Error("other")
        if path.stem == "broken":
            raise TruncatedFileError("ends early", file=path)
        return Header("Q8_0", COND)

    found = read_catalogue(list_files("models", [str(tmp_path)]), open_file)
    assert [c.name for c in found.candidates] == ["good.gguf"]
    assert list(found.broken) == ["broken.gguf"]
    with pytest.raises(CheckpointError, match="ends early"):
        resolve("NF4", found, LEVELS, 0)


def test_copies_are_paired_by_the_names_that_differ_least():
    files = catalogue(
        **{
            "a/ideogram4-Q4_0.gguf": Header("Q4_0", COND),
            "a/ideogram4_uncond-Q4_0.gguf": Header("Q4_0", UNCOND),
            "b/tuned-unconditional-Q4_0.gguf": Header("Q4_0", UNCOND),
            "b/tuned-Q4_0.gguf": Header("Q4_0", COND),
        }
    )
    for name, partner in (
        ("a/ideogram4-Q4_0.gguf", "a/ideogram4_uncond-Q4_0.gguf"),
        ("b/tuned-Q4_0.gguf", "b/tuned-unconditional-Q4_0.gguf"),
    ):
        others = [c for c in files.candidates if c.name == name or c.header.copies == UNCOND]
        found = find_pair("Q4_0", others)
        assert (found.conditional.name, found.unconditional.name) == (name, partner)


def test_files_of_another_size_are_no_partners():
    small = ModelConfig(num_layers=4)
    files = catalogue(a=Header("Q4_0", COND), b=Header("Q4_0", UNCOND, config=small))
    assert find_pair("Q4_0", files.candidates).unconditional is None


def test_one_file_with_both_copies_comes_first_and_others_are_noted():
    files = catalogue(a=Header("Q8_0", COND), b=Header("Q8_0", UNCOND), z=Header("Q8_0", BOTH))
    found = find_pair("Q8_0", files.candidates)
    assert found.conditional.name == found.unconditional.name == "z"
    assert "a, b" in found.notes[0]
    assert found.weight_bytes() == (500, 500)


def test_auto_takes_the_first_level_that_fits_then_the_smallest():
    gigabyte = 10**9
    files = catalogue(
        big=Header("INT8 W8A8", BOTH, 20 * gigabyte),
        middle=Header("Q6_K", BOTH, 14 * gigabyte),
        small=Header("Q4_0", BOTH, 10 * gigabyte),
    )
    order = AUTO_ORDER["int8 and bfloat16"]

    def level(memory: int) -> str:
        return resolve(AUTO, files, order, memory).level

    assert level(20 * gigabyte + WORKING_MEMORY) == "INT8 W8A8"
    assert level(20 * gigabyte) == "Q6_K"
    assert level(12 * gigabyte) == "Q4_0"
    # one copy at a time fits: the fastest again
    assert resolve(AUTO, catalogue(a=files.candidates[0].header), order, 12 * gigabyte)
    assert level(gigabyte) == "Q4_0"


def test_auto_takes_linears_alone_only_with_a_base():
    files = catalogue(a=Header("INT8 W8A8", BOTH, linears_only=True), b=Header("BF16", BOTH))
    order = AUTO_ORDER["int8 and bfloat16"]
    assert resolve(AUTO, files, order, 10**12).level == "BF16"
    assert resolve(AUTO, files, order, 10**12, with_base=True).level == "INT8 W8A8"
    assert resolve("INT8 W8A8", files, order, 10**12).level == "INT8 W8A8"


def test_ampere_tries_the_levels_in_the_documented_order():
    listed = "INT8 W8A8 rotated, INT8 W8A8, Q8_0, Q6_K, Q5_K, Q4_K, Q4_0, NF4, FP8, BF16"
    found = AUTO_ORDER[capability(int8=True, bfloat16=True)]
    assert ", ".join(found[:10]) == listed
    turing = AUTO_ORDER[capability(int8=True, bfloat16=False)]
    assert turing.index("Q4_0") < turing.index("Q8_0")  # a 16-bit product is one in float32 there
    assert AUTO_ORDER[capability(int8=False, bfloat16=True)][0] == "BF16"


def test_help_page_lists_what_auto_tries():
    page = (PACK / "web/docs/Ideogram4QuantLoad.md").read_text("utf-8")
    for order in AUTO_ORDER.values():
        assert f"| {', '.join(order)} |" in page


def test_every_level_has_its_place_in_every_order():
    for order in AUTO_ORDER.values():
        assert sorted(order) == sorted(LEVELS)


def test_missing_level_says_what_there_is():
    with pytest.raises(CheckpointError, match="Pick one of: FP8, Q4_0"):
        resolve("NF4", catalogue(a=Header("Q4_0", COND), b=Header("FP8", COND)), LEVELS, 0)
    with pytest.raises(CheckpointError, match="no Ideogram 4 file"):
        resolve(AUTO, catalogue(), LEVELS, 0)


# ---- the report


@pytest.fixture
def model_file(tmp_path, monkeypatch) -> Path:
    """What the candidate named f stands for."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "f").write_bytes(bytes(100))
    return tmp_path / "f"


def machine(memory: int, dtype: str = "bfloat16") -> report.Machine:
    backends = (
        BackendReport("triton", False, "no compiler here"),
        BackendReport("int_mm", True, "torch._int_mm"),
    )
    return report.Machine("card", memory, dtype, backends)


@pytest.mark.parametrize(
    ("level", "compute", "expected"),
    [
        ("INT8 W8A8", "auto", "backend: int_mm (torch._int_mm)"),
        ("Q4_K", "auto", "backend: int_mm (torch._int_mm)"),
        ("Q4_K", "dense", "backend: dense bfloat16, weights decoded layer by layer"),
        ("Q8_0", "auto", "backend: dense bfloat16, weights decoded layer by layer"),
        ("FP8", "auto", "backend: dense bfloat16, weights decoded layer by layer"),
        ("BF16", "auto", "backend: dense bfloat16"),
    ],
)
def test_report_says_what_multiplies_and_why_not_the_others(model_file, level, compute, expected):
    chosen = find_pair(level, catalogue(f=Header(level, BOTH)).candidates)
    options = LinearOptions(gguf_compute=compute)
    lines = report.text(chosen, "auto", options, machine(10**12)).splitlines()
    assert expected in lines
    cost = [line for line in lines if "on the pocket model" in line]
    assert len(cost) == level.startswith("Q")
    if cost:
        figures = costs.figures()["choices"]
        for kind in ("w8a8", "dense"):
            assert f"{figures[f'{level} {kind}']['sqnr']} dB" in cost[0]
    assert ("  triton: no compiler here" in lines) == ("int_mm" in expected)


def measurement(op: str, tokens: int, detail: str, **seconds: float) -> Measurement:
    size = (18, 256) if op == ATTENTION else (4608, 12288)
    return Measurement(Key(op, *size, tokens, "bfloat16", detail), seconds)


def test_report_says_what_was_measured(model_file):
    table = Table(
        [
            measurement(LINEAR, 4608, "0", int_mm=3e-3, triton=2e-3),
            measurement(LINEAR, 512, "0", int_mm=1e-3, triton=2e-3),
        ]
    )
    here = replace(machine(10**12), measured=table)
    chosen = find_pair("INT8 W8A8", catalogue(f=Header("INT8 W8A8", BOTH)).candidates)
    lines = report.text(chosen, "auto", LinearOptions(), here).splitlines()
    assert "backend: triton, the fastest measured here for each shape" in lines
    figures = "  int8 linear 12288 -> 4608, 4608 tokens, bfloat16: triton 2 ms, int_mm 3 ms"
    assert figures in lines
    assert not any("512 tokens" in line for line in lines)
    assert "attention: the host's own setting" in lines
    asked = report.text(chosen, "auto", LinearOptions(backend="int_mm"), here)
    assert "backend: int_mm, as asked" in asked


def test_report_says_where_decoding_is_faster(model_file):
    chosen = find_pair("Q4_K", catalogue(f=Header("Q4_K", BOTH)).candidates)
    for dense, expected in ((1e-3, "faster here than int8"), (3e-3, "backend: int_mm")):
        table = Table([measurement(GGUF, 2048, "Q4_K", w8a8=2e-3, dense=dense)])
        here = replace(machine(10**12), measured=table)
        assert expected in report.text(chosen, "auto", LinearOptions(), here)


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ("host", "attention: the host's own setting"),
        ("sdpa", "attention: sdpa, as asked"),
        ("int8", "relative error of 0.010 against 0.002"),
        ("auto", "int8, the fastest measured here"),
    ],
)
def test_report_says_which_attention_and_what_it_costs(model_file, asked, expected):
    chosen = find_pair("FP8", catalogue(f=Header("FP8", BOTH)).candidates)
    found = measurement(ATTENTION, 4608, "", sdpa=9e-3, int8=3e-3)
    table = Table([replace(found, errors={"sdpa": 2e-3, "int8": 1e-2})])
    here = replace(machine(10**12), attention=asked, measured=table)
    shown = report.text(chosen, "auto", LinearOptions(), here)
    assert expected in shown
    assert ("relative error: int8 1.0e-02, sdpa 2.0e-03" in shown) == (asked != "host")
    assert report.summary(chosen, "auto", LinearOptions(), here)["attention"] in shown


@pytest.mark.parametrize(
    ("memory", "expected"),
    [(12, "everything stays there"), (10, "one copy at a time"), (6, "streamed from RAM")],
)
def test_report_says_what_fits(model_file, memory, expected):
    chosen = find_pair("Q4_0", catalogue(f=Header("Q4_0", BOTH, 10**10)).candidates)
    shown = report.text(chosen, "Q4_0", LinearOptions(), machine(memory * 10**9, "float32"))
    assert expected in shown
    assert "no bfloat16" in shown
    assert f"fingerprint {report.fingerprint(model_file)[:16]}" in shown


def test_figures_of_every_gguf_level_are_there():
    found = costs.figures()
    levels = [level for level in LEVELS if level.startswith("Q")]
    assert list(found["linear"]) == levels
    for level in levels:
        for kind in ("w8a8", "dense"):
            assert 0 < found["choices"][f"{level} {kind}"]["sqnr"] < 100
    alone = found["choices"]["conditional alone"]["time"]
    assert f"{alone} x the time" in costs.without_guidance()
    page = (PACK / "web/docs/Ideogram4QuantGuider.md").read_text("utf-8")
    assert f"| the conditional copy alone | {alone:.2f} |" in page
    for row, name in {
        "reuse_unconditional 2": "reuse 2",
        "guidance_end 0.5": "guidance until half",
    }.items():
        measured = found["choices"][name]
        start = f"| {row} | {measured['time']:.2f} | {measured['sqnr']} dB"
        line = next(line for line in page.splitlines() if line.startswith(start))
        assert line.endswith(f"| {measured['words']} of {found['prompts']} |")


@pytest.mark.parametrize(("ram", "short"), [(21, False), (9, True)])
def test_expected_memory_is_compared_with_what_is_free(model_file, ram, short):
    chosen = find_pair("Q4_0", catalogue(f=Header("Q4_0", BOTH, 10**10)).candidates)
    here = replace(machine(24 * 10**9), free=3 * 10**9, ram_free=ram * 10**9)
    line, too_much = report.expected_memory(chosen, here)
    assert "card has 24.00 GB, 3.00 GB of them free: everything stays there" in line
    assert f"loading takes 10.00 GB of RAM, {ram}.00 GB are free" in line
    assert too_much == short
    assert ("pick a smaller level" in line) == short


# ---- fused blocks

RUNS = (BackendReport("triton", True, "Triton 3.7, sm_86"),)
LACKS = (BackendReport("triton", False, "no Triton"),)


@pytest.mark.parametrize(
    ("asked", "backend", "found", "on", "why"),
    [
        ("auto", "auto", RUNS, True, "on: the Triton kernels run here (Triton 3.7, sm_86)"),
        ("auto", "triton", RUNS, True, "on: "),
        ("auto", "auto", LACKS, False, "off: the Triton kernels do not run here (no Triton)"),
        ("auto", "auto", (), False, "off: the Triton kernels do not run here"),
        ("auto", "int_mm", RUNS, False, "off: they gain on the Triton kernels, not with int_mm"),
        ("auto", "comfy_kitchen", RUNS, False, "off: "),
        ("on", "auto", LACKS, True, "on, as asked"),
        ("off", "auto", RUNS, False, "off, as asked"),
        ("off", "comfy_kitchen", RUNS, False, "off, as asked"),
    ],
)
def test_blocks_are_fused_where_the_kernels_run_or_where_asked(asked, backend, found, on, why):
    decision = decide(asked, backend, found)
    assert decision.on is on
    assert decision.why.startswith(why)


def test_fusing_over_a_backend_of_whole_layers_is_refused():
    with pytest.raises(OpError, match=r"multiplies whole layers.*Set fused_blocks to auto or off"):
        decide("on", "comfy_kitchen", RUNS)


# ---- residency


@pytest.mark.parametrize(
    ("memory", "chosen"),
    [(30, "both"), (22, "both"), (21, "alternating"), (12, "alternating"), (11, "streamed")],
)
def test_copies_take_turns_where_one_fits_and_are_streamed_where_none_does(memory, chosen):
    assert residency.choose("auto", (10, 10), 2, memory) == chosen


def test_residency_can_be_overridden():
    assert residency.choose("alternating", (1, 1), 0, 100) == "alternating"
    assert residency.choose("both", (10, 10), 2, 12) == "both"


# ---- connections


def test_connected_outputs_are_seen():
    graph = {"1": {"inputs": {}}, "2": {"inputs": {"a": ["1", 1], "b": [1, 2, 3], "c": 5}}}
    assert leads_anywhere(graph, "1", 1)
    assert not leads_anywhere(graph, "1", 0)
    assert leads_anywhere(graph, "7", 0)
    assert leads_anywhere(None, "1", 0)


# ---- names of new files


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("mine", "mine.gguf"),
        (" mine.gguf ", "mine.gguf"),
        ("v1.5 tuned", "v1.5 tuned.gguf"),
        ("MINE.GGUF", "MINE.GGUF"),
        ("größer", "größer.gguf"),
    ],
)
def test_a_new_file_gets_a_plain_name_with_its_ending(name, wanted):
    assert new_name(name, ".gguf") == wanted


@pytest.mark.parametrize(
    "name",
    [
        *("", " ", ".", "..", "../x", "a/b", "a\\b", "C:x", ".x", "x.", "x\0y", "x\ny", "a*"),
        *("con", "LPT1.gguf", "x.safetensors", "x" * 300),
    ],
)
def test_a_new_file_gets_no_other_name(name):
    with pytest.raises(CheckpointError, match=r"needed a plain name such as my-model\.gguf"):
        new_name(name, ".gguf")
