"""Scores that need the user's weights: a small random CLIP, and what is said without weights."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

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


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_lpips_with_weights_in_torchvisions_layout(tmp_path, suffix):
    """Random weights of AlexNet's shapes; the linear heads are those of the lpips package."""
    try:
        import lpips
        import torchvision
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"LPIPS cannot run here: {error}")
    torch.manual_seed(0)
    state = torchvision.models.alexnet(weights=None).state_dict()
    file = tmp_path / f"alexnet{suffix}"
    (torch.save if suffix == ".pth" else save_file)(state, file)
    scorers, _ = load_scorers({"lpips": file})
    a, b, c = (Image.effect_noise((48, 64), sigma).convert("RGB") for sigma in (30, 30, 90))
    assert scorers["lpips"](a, a, CASE) == 0.0
    assert scorers["lpips"](a, b, CASE) > 0.0
    network = lpips.LPIPS(net="alex", pnet_rand=True, verbose=False).eval()
    features = torchvision.models.alexnet(weights=None)
    features.load_state_dict(state)
    for part in (network.net.slice1, network.net.slice2, network.net.slice3, network.net.slice4,
                 network.net.slice5):  # fmt: skip
        for name, layer in part.named_children():
            layer.load_state_dict(features.features[int(name)].state_dict())
    wanted = network(lpips.im2tensor(np.asarray(a)), lpips.im2tensor(np.asarray(c)))
    assert scorers["lpips"](a, c, CASE) == pytest.approx(float(wanted), rel=1e-4)
    assert scorers["lpips"](a.resize((30, 40)), b.resize((30, 40)), CASE) is None
    state["features.0.weight"] = state["features.0.weight"][:8].clone()
    (torch.save if suffix == ".pth" else save_file)(state, file)
    with pytest.raises(CompareError, match=r"features\.0\.weight.*found \[8, 3, 11, 11\]"):
        load_scorers({"lpips": file})
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(CompareError, match="not AlexNet's weights"):
        load_scorers({"lpips": file})


def test_lpips_says_which_package_or_file_it_lacks(tmp_path):
    try:
        import lpips  # noqa: F401
    except (ImportError, RuntimeError):
        expected = "pip install lpips"
    else:
        expected = "no such file of AlexNet weights"
    with pytest.raises(CompareError, match=expected):
        load_scorers({"lpips": tmp_path / "alexnet.pth"})
