"""Scores that need the user's weights: a small random CLIP, and what is said without weights."""

import json

import pytest
import torch
from PIL import Image

from ideogram4_quant.engine.compare.cases import Case, CompareError
from ideogram4_quant.engine.compare.scorers import load_scorers

CASE = Case("a cat", 0, 40, 40)


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    """A CLIP folder as Hugging Face ships it, of a few thousand random weights."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("clip")
    letters = [letter + end for letter in "acdgot" for end in ("", "</w>")]
    words = ["<|startoftext|>", "<|endoftext|>", *letters]
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = transformers.CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"))
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
    text = {
        **shape,
        "num_hidden_layers": 1,
        "vocab_size": len(words),
        "max_position_embeddings": 16,
    }
    text |= {"bos_token_id": 0, "eos_token_id": 1}
    vision = {**shape, "num_hidden_layers": 1, "image_size": 32, "patch_size": 16}
    torch.manual_seed(0)
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)
    transformers.CLIPModel(config).save_pretrained(folder)
    images = transformers.CLIPImageProcessor(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
    )
    transformers.CLIPProcessor(images, tokenizer).save_pretrained(folder)
    return folder


def test_score_is_the_cosine_of_the_two_embeddings(clip_folder):
    from transformers import AutoProcessor, CLIPModel

    scorers, notes = load_scorers({"clip": clip_folder, "pickscore": clip_folder})
    assert sorted(scorers) == ["clip", "pickscore"]
    assert [note.partition(":")[0] for note in notes] == ["hpsv2", "lpips"]
    picture = Image.effect_mandelbrot((40, 40), (-2, -1, 1, 1), 20).convert("RGB")
    model = CLIPModel.from_pretrained(clip_folder).eval()
    inputs = AutoProcessor.from_pretrained(clip_folder)(
        text=["a cat"], images=[picture], return_tensors="pt"
    )
    with torch.no_grad():
        out = model(**inputs)
    wanted = torch.cosine_similarity(out.text_embeds, out.image_embeds)
    assert scorers["clip"](picture, picture, CASE) == pytest.approx(100 * wanted.item(), abs=1e-3)
    other = Case("a dog", 0, 40, 40)
    assert scorers["clip"](picture, picture, other) != scorers["clip"](picture, picture, CASE)


def test_without_weights_every_score_is_left_out_with_a_word():
    scorers, notes = load_scorers({})
    assert scorers == {}
    assert [note.partition(":")[0] for note in notes] == ["clip", "pickscore", "hpsv2", "lpips"]
    assert all("no weights given" in note for note in notes)


def test_a_folder_without_a_model_is_an_error(tmp_path):
    with pytest.raises(CompareError, match="no CLIP model"):
        load_scorers({"clip": tmp_path})


def test_lpips_says_which_package_or_file_it_lacks(tmp_path):
    try:
        import lpips  # noqa: F401
    except ImportError:
        expected = "pip install lpips"
    else:
        expected = "no such file of AlexNet weights"
    with pytest.raises(CompareError, match=expected):
        load_scorers({"lpips": tmp_path / "alexnet.pth"})
