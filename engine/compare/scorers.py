"""Scores that need weights of the user's own: CLIP, PickScore, HPSv2 and LPIPS.

Nothing is downloaded: each scorer takes a local folder or file, and is left out with a word where
none is given.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from PIL import Image

from .cases import Case, CompareError
from .metrics import to_tensor
from .score import Scorer

_ALEXNET_SIDE = 31

_CLIP_LIKE = {
    "clip": "a CLIP folder as Hugging Face ships it (openai/clip-vit-large-patch14)",
    "pickscore": "the PickScore folder (yuvalkirstain/PickScore_v1)",
    "hpsv2": "an HPSv2 folder in the transformers layout",
}


def load_scorers(weights: Mapping[str, Path | None]) -> tuple[dict[str, Scorer], list[str]]:
    """Scorers for the weights that are given, and a note for each that is not.

    ``weights`` maps ``clip``, ``pickscore``, ``hpsv2`` to folders and ``lpips`` to the file of
    AlexNet's weights. Raises CompareError for a path that is not there or not loadable.
    """
    scorers: dict[str, Scorer] = {}
    notes: list[str] = []
    for name, what in _CLIP_LIKE.items():
        folder = weights.get(name)
        if folder is None:
            notes.append(f"{name}: no weights given (--{name} DIR: {what})")
        else:
            scorers[name] = clip_scorer(folder)
    backbone = weights.get("lpips")
    if backbone is None:
        notes.append("lpips: no weights given (--lpips FILE: torchvision's AlexNet state dict)")
    else:
        scorers["lpips"] = lpips_scorer(backbone)
    return scorers, notes


def clip_scorer(folder: Path) -> Scorer:
    """``100 * cos(text, image)`` of a CLIP model in the transformers layout.

    The text is the prompt, cut to the model's length. Raises CompareError if the folder holds none.
    """
    from transformers import AutoProcessor, CLIPModel

    try:
        model = CLIPModel.from_pretrained(folder, local_files_only=True, use_safetensors=True)
        model = model.eval()
        processor = AutoProcessor.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError) as error:
        raise CompareError(f"no CLIP model in the folder: {error}", file=folder) from error

    def score(_reference: Image.Image, picture: Image.Image, case: Case) -> float:
        inputs = processor(
            text=[case.prompt], images=[picture], return_tensors="pt", padding=True, truncation=True
        )
        with torch.inference_mode():
            out = model(**inputs)
        text = torch.nn.functional.normalize(out.text_embeds, dim=-1)
        image = torch.nn.functional.normalize(out.image_embeds, dim=-1)
        return 100.0 * float((text * image).sum())

    return score


def lpips_scorer(backbone: Path) -> Scorer:
    """Learned perceptual distance (Zhang et al. 2018) by the ``lpips`` package, AlexNet variant.

    ``backbone`` is AlexNet's state dict as torchvision ships it (.safetensors, or .pth read without
    unpickling code); the package brings the linear heads. Pictures with a side below 31 px, too
    small for AlexNet, have no score. Raises CompareError.
    """
    try:
        import lpips
    except (ImportError, RuntimeError) as error:  # RuntimeError: a torchvision of another torch
        raise CompareError(
            f"LPIPS needs the lpips package: {error}",
            hint="pip install lpips, and the torchvision that belongs to your torch.",
        ) from error
    if not backbone.is_file():
        raise CompareError("no such file of AlexNet weights", file=backbone)
    network = lpips.LPIPS(net="alex", pnet_rand=True, verbose=False).eval()
    _load_alexnet(network.net, backbone)

    def score(reference: Image.Image, picture: Image.Image, _case: Case) -> float | None:
        if min(picture.size) < _ALEXNET_SIDE or reference.size != picture.size:
            return None
        with torch.inference_mode():
            return float(network(to_tensor(picture), to_tensor(reference), normalize=True))

    return score


def _load_alexnet(network: torch.nn.Module, file: Path) -> None:
    """Torchvision's ``features.N.*`` onto the slices of the lpips network, whose layers keep N."""
    read: Callable[[Path], dict] = _read_safetensors if file.suffix == ".safetensors" else _read_pth
    try:
        stored = read(file)
    except Exception as error:  # damaged files make both readers raise almost anything
        raise CompareError(f"not AlexNet's weights: {error}", file=file) from error
    state = {k.removeprefix("features."): v for k, v in stored.items() if "features." in k}
    wanted = {name: name.split(".", 1)[1] for name in network.state_dict()}
    for name, source in wanted.items():
        found, needed = getattr(state.get(source), "shape", None), network.state_dict()[name].shape
        if found != needed:
            raise CompareError(
                "not AlexNet's weights",
                file=file,
                tensor=f"features.{source}",
                found="missing" if found is None else list(found),
                needed=list(needed),
            )
    network.load_state_dict({name: state[source] for name, source in wanted.items()})


def _read_safetensors(file: Path) -> dict:
    from safetensors.torch import load_file

    return load_file(file)


def _read_pth(file: Path) -> dict:
    return torch.load(file, map_location="cpu", weights_only=True)
