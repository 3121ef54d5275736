"""``generate --enhance``: diffusers' own method on this pack's encoder, heads found and refused."""

from __future__ import annotations

import json
from argparse import Namespace

import pytest
import torch

from ideogram4_quant import cli
from ideogram4_quant.captions.check import check_caption
from ideogram4_quant.engine import commands
from ideogram4_quant.engine.encoder import load_encoder
from ideogram4_quant.engine.enhance import read_head, writer
from ideogram4_quant.engine.generate import GenerateRequest
from ideogram4_quant.errors import CheckpointError, OpError
from ideogram4_quant.tests.tiny_writer import TinyWriter, write_tiny_writer


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> TinyWriter:
    return write_tiny_writer(tmp_path_factory.mktemp("writer") / "files")


@pytest.fixture
def brief(monkeypatch: pytest.MonkeyPatch) -> None:
    """A short instruction: the tiny tokenizer makes thousands of tokens of the real one. And free:
    what constrains is the same in the tests of the host."""
    from diffusers.pipelines.ideogram4 import pipeline_ideogram4, prompt_enhancer

    monkeypatch.setattr(pipeline_ideogram4, "is_outlines_available", lambda: False)
    monkeypatch.setattr(prompt_enhancer, "CAPTION_SYSTEM_MESSAGE", "write JSON")


def test_taps_are_the_same_with_and_without_the_final_norm(files: TinyWriter):
    """The norm is loaded for writing and read by nothing else."""
    encoder = load_encoder(files.whole, device="cpu")
    (with_norm,) = encoder.encode(["a fox"])
    encoder.model.norm = torch.nn.Identity()
    assert torch.equal(encoder.encode(["a fox"])[0], with_norm)


def test_writer_is_diffusers_own(files: TinyWriter, brief):
    """Against the pipeline around transformers' own model."""
    from diffusers import Ideogram4Pipeline, Ideogram4PromptEnhancerHead
    from transformers import AutoTokenizer

    from ideogram4_quant.engine.pipeline import TURNS

    encoder = load_encoder(files.whole, device="cpu")
    write = writer(encoder, read_head(files.whole), 3, 24)
    head = Ideogram4PromptEnhancerHead(64, 512)
    head.lm_head.weight = files.model.lm_head.weight
    tokenizer = AutoTokenizer.from_pretrained(files.whole)
    tokenizer.chat_template = TURNS
    pipeline = Ideogram4Pipeline(None, None, files.model.model, tokenizer, None, None, head)
    wanted = pipeline.upsample_prompt(
        "a fox", 512, 768, max_new_tokens=24, generator=torch.Generator().manual_seed(3)
    )
    assert write("a fox", (3, 2)) == wanted[0]
    assert write("a fox", (3, 2)) == wanted[0]  # again the same


def test_head_of_its_own_writes_as_that_in_the_file(files: TinyWriter, brief):
    encoder = load_encoder(files.headless, device="cpu")
    other = load_encoder(files.whole, device="cpu")
    own = writer(encoder, read_head(files.headless, files.head), 3, 12)("a fox", (1, 1))
    assert own == writer(other, read_head(files.whole), 3, 12)("a fox", (1, 1))


def test_encoder_without_a_head_says_which_file_has_one(files: TinyWriter):
    with pytest.raises(CheckpointError, match="qwen3-vl-8b-instruct-lm-head"):
        read_head(files.headless)


def test_generate_encodes_the_caption_that_was_written(files, brief, capsys, monkeypatch):
    monkeypatch.setattr(commands, "MAX_TOKENS", 24)
    args = Namespace(encoder=files.whole, tokenizer=None, enhance=True, head=None)
    request, features = commands._encode(args, GenerateRequest('a fox "HI"'), {"device": "cpu"})
    assert check_caption(request.prompt).errors == []
    assert "HI" in [e.get("text") for e in _elements(request.prompt)]
    assert capsys.readouterr().out.strip() == request.prompt
    encoder = load_encoder(files.whole, device="cpu")
    assert torch.equal(features, encoder.encode([request.prompt])[0])


def _elements(caption: str) -> list:
    return json.loads(caption)["compositional_deconstruction"]["elements"]


def test_a_head_is_for_enhance(files: TinyWriter):
    args = Namespace(encoder=files.whole, tokenizer=None, enhance=False, head="x")
    with pytest.raises(OpError, match="--enhance"):
        commands._encode(args, GenerateRequest("a fox"), {"device": "cpu"})


def test_options_are_there():
    line = ["generate", "--model", "m", "--encoder", "e", "--vae", "v", "--out", "o.png"]
    args = cli._parser(line).parse_args([*line, "--prompt", "x", "--enhance", "--head", "h"])
    assert args.enhance
    assert args.head == "h"
