"""The encoder as a writer in a real ComfyUI, against diffusers and transformers."""

from __future__ import annotations

import copy
import importlib.util
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ideogram4_quant.captions import instruction
from ideogram4_quant.engine.encoder import load_encoder
from ideogram4_quant.engine.enhance import read_head, writer
from ideogram4_quant.engine.pipeline import TURNS
from ideogram4_quant.tests.tiny_model import AsVisionLanguageModel
from ideogram4_quant.tests.tiny_writer import TinyWriter, write_tiny_writer

pytestmark = pytest.mark.host
# brief: the tiny tokenizer makes 1,800 tokens of the real instruction
SYSTEM, USER = "write a caption", "as {aspect_ratio}: {original_prompt}"
CAPTION = '{"high_level_description":"a red word"}'
SENTENCE = 'a fox beside a sign "OPEN"'
ASKED = instruction.TURNS.format(
    system=SYSTEM, user=USER.format(aspect_ratio="3:2", original_prompt=SENTENCE)
)
LOOKING = instruction.TURNS.format(system=SYSTEM, user=f"{instruction.PICTURE}what is this?")


@pytest.fixture(scope="module")
def tiny_writer(tmp_path_factory: pytest.TempPathFactory) -> TinyWriter:
    return write_tiny_writer(tmp_path_factory.mktemp("writer") / "files")


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with the library that constrains, and nothing else of this Python's."""
    found = importlib.util.find_spec("outlines_core")
    if found is None:
        return ""
    folder = tmp_path_factory.mktemp("library")
    (folder / "outlines_core").symlink_to(Path(found.origin).parent, target_is_directory=True)
    return str(folder)


@pytest.fixture(scope="module")
def run(tiny_writer: TinyWriter, library: str, in_host, tmp_path_factory) -> tuple[dict, dict]:
    out = tmp_path_factory.mktemp("written") / "out.safetensors"
    files = tiny_writer.whole, tiny_writer.headless, tiny_writer.head
    report = in_host("writing.py", *files, out, library, ASKED, LOOKING, CAPTION)
    return load_file(out), report


@torch.no_grad()
def reference_taps(tiny_writer: TinyWriter, *, normed: bool) -> torch.Tensor:
    """What diffusers' pipeline reads; ``normed``: with the final norm on the last tap."""
    from diffusers import Ideogram4Pipeline
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_writer.whole)
    tokenizer.chat_template = TURNS
    text_model = copy.deepcopy(tiny_writer.model.model.language_model)
    pipeline = Ideogram4Pipeline(
        None, None, AsVisionLanguageModel(text_model), tokenizer, None, None
    )
    message = [{"role": "user", "content": [{"type": "text", "text": CAPTION}]}]
    length = len(tokenizer.apply_chat_template(message, add_generation_prompt=True)["input_ids"])
    found = pipeline.encode_prompt([CAPTION], 1, 1, length, torch.device("cpu"))[0]
    found = found[0, :length].unflatten(1, (-1, 13)).clone()
    if normed:
        found[..., -1] = text_model.norm(found[..., -1])
    return found.flatten(1)


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("taps", ["taps whole", "taps headless", "taps after"])
def test_conditioning_keeps_the_raw_last_tap(tiny_writer, run, taps: str):
    """With a head, without one, and after the encoder wrote."""
    found = run[0][taps]
    assert relative(found, reference_taps(tiny_writer, normed=False)) < 1e-5
    last = found.unflatten(1, (-1, 13))[..., -1]
    normed = reference_taps(tiny_writer, normed=True).unflatten(1, (-1, 13))[..., -1]
    assert relative(last, normed) > 0.3  # the two differ, so the test can tell
    assert torch.equal(found, run[0]["taps whole"])


@pytest.mark.parametrize("kind", ["free whole", "free headless", "constrained"])
def test_tokens_are_those_of_diffusers(tiny_writer, run, monkeypatch, kind: str):
    """`Ideogram4Pipeline.upsample_prompt` as `generate --enhance` calls it, told the same."""
    from diffusers.pipelines.ideogram4 import pipeline_ideogram4, prompt_enhancer

    if kind == "constrained" and "constrained" not in run[1]["texts"]:
        pytest.skip("outlines is not installed")
    monkeypatch.setattr(prompt_enhancer, "CAPTION_SYSTEM_MESSAGE", SYSTEM)
    monkeypatch.setattr(prompt_enhancer, "CAPTION_USER_TEMPLATE", USER)
    if kind != "constrained":
        monkeypatch.setattr(pipeline_ideogram4, "is_outlines_available", lambda: False)
    folder = tiny_writer.headless if kind == "free headless" else tiny_writer.whole
    head = read_head(folder, tiny_writer.head if kind == "free headless" else None)
    encoder = load_encoder(folder, device="cpu", dtype=torch.float32)
    write = writer(encoder, head, run[1]["seed"], run[1]["tokens"])
    assert write(SENTENCE, (3, 2)) == run[1]["texts"][kind].strip()


@torch.no_grad()
def test_picture_is_seen_as_transformers_sees_it(tiny_writer, run):
    """Tower, its place in the text and deepstack: the tokens of transformers' own model."""
    from transformers import AutoTokenizer

    tensors, report = run
    tokenizer = AutoTokenizer.from_pretrained(tiny_writer.whole)
    places = int(tensors["grid"].prod()) // 4
    text = LOOKING.replace("<|image_pad|>", "<|image_pad|>" * places)
    ids = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])
    kinds = (ids == tiny_writer.model.config.image_token_id).int()
    drawn = torch.randint(
        0, 2**63 - 1, (1,), generator=torch.Generator().manual_seed(run[1]["seed"])
    )
    with torch.random.fork_rng():
        torch.manual_seed(int(drawn))
        out = tiny_writer.model.generate(
            ids,
            pixel_values=tensors["pixels"],
            image_grid_thw=tensors["grid"],
            mm_token_type_ids=kinds,
            do_sample=True,
            max_new_tokens=run[1]["tokens"],
        )
    wanted = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
    assert report["texts"]["picture"] == wanted
    assert wanted != report["texts"]["free whole"]


def test_generate_text_works_with_a_head(tiny_writer, run):
    """The host's own node, greedily, behind this pack's encoder."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_writer.whole)
    text = "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
    ids = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])
    out = tiny_writer.model.generate(ids, do_sample=False, max_new_tokens=12)
    wanted = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
    assert run[1]["texts"]["greedy"] == wanted


@pytest.mark.parametrize(
    ("case", "said"),
    [
        ("no head", "qwen3-vl-8b-instruct-lm-head"),
        ("no vision", "disconnect the picture"),
        ("stock", "expand off"),
    ],
)
def test_missing_parts_are_errors_that_say_which_file_has_them(run, case: str, said: str):
    message = run[1]["refused"][case]
    assert "Error: " in message
    assert said in message


def test_cancelling_ends_the_writing(run):
    assert run[1]["refused"]["cancelled"].startswith("InterruptProcessingException")
    assert run[1]["cancelled at"] == 5


def test_parts_for_writing_are_no_part_of_the_conditioning_model(tiny_writer, run):
    """Their memory is counted by the host in patchers of their own, and said."""
    text = sum(p.numel() for p in tiny_writer.model.model.language_model.parameters())
    norm = tiny_writer.model.model.language_model.norm.weight.numel()
    assert run[1]["parameters"] == text - norm + 1  # and the host's logit_scale
    head = tiny_writer.model.lm_head.weight.numel() + norm
    vision = sum(p.numel() for p in tiny_writer.model.model.visual.parameters())
    assert run[1]["bytes"] == {"head": 2 * head, "vision": 2 * vision}
    assert "kB" in run[1]["memory"]
