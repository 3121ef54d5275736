"""One system on one model, painted and measured: made once, kept by the hash of what made it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from comfy_kitchen.tensor import QuantizedTensor
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from ...engine.compare.cases import Case
from ...engine.compare.metrics import latent_sqnr, ocr_scores, psnr, ssim
from ...engine.ocr import WordReader
from ...files.new_file import replaced
from .painting import PRESET, Painted

#: Part of every key; raised when the same weights would be painted or measured otherwise.
VERSION = 1
#: Smaller than the reader's default, and still without a misread word in the true renderings.
SHORT_SIDE = 128


@dataclass(frozen=True)
class Run:
    """What is known of one system on one model in one part; lists have an entry a case.

    ``seconds``: of a core, a picture. ``scores``: by metric. ``steps``: latent SQNR in dB after
    every step, empty for the reference. ``by``: a peer's package, version and settings.
    """

    variant: str
    scheme: str
    part: int
    bytes: int
    seconds: float
    read: list[str]
    scores: dict[str, list[float]]
    steps: list[list[float]]
    by: str = ""


class RunStore:
    """A folder of runs, their pictures, and the trajectories of those that serve as references."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def find(self, key: str) -> Run | None:
        """The run of this key, or None."""
        file = self.folder / f"{key}.json"
        return Run(**json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else None

    def keep(self, key: str, run: Run, painted: Painted) -> None:
        """Write pictures, trajectories of a reference, and last the record."""
        pixels = np.stack([np.asarray(picture) for picture in painted.pictures])
        tensors = {"pictures": torch.from_numpy(pixels)}
        if not run.steps:
            tensors["trajectories"] = painted.trajectories.contiguous()
        with replaced(self.folder / f"{key}.safetensors") as file:
            save_file(tensors, file)
        with replaced(self.folder / f"{key}.json") as file:
            file.write_text(json.dumps(asdict(run)), encoding="utf-8")

    def painted(self, key: str) -> Painted:
        """Pictures and trajectories of a run that is there; a reference has both."""
        tensors = load_file(self.folder / f"{key}.safetensors")
        pictures = [Image.fromarray(p) for p in tensors["pictures"].numpy()]
        return Painted(pictures, tensors.get("trajectories", torch.empty(0)), 0.0)

    def enter(self, key: str, run: Run) -> None:
        """Make this the newest run of its model, system and part: what a table is made from."""
        folder = self.folder / "newest"
        folder.mkdir(exist_ok=True)
        row = f"{run.variant} | {run.scheme} | {run.part}"
        name = hashlib.sha256(row.encode()).hexdigest()[:16]
        with replaced(folder / f"{name}.json") as file:
            file.write_text(json.dumps({"row": row, "key": key}), encoding="utf-8")

    def newest(self) -> dict[str, Run]:
        """Key -> run, for the newest run of every model, system and part."""
        entries = sorted((self.folder / "newest").glob("*.json"))
        keys = [json.loads(file.read_text(encoding="utf-8"))["key"] for file in entries]
        found = ((key, self.find(key)) for key in keys)
        return {key: run for key, run in found if run is not None}


def run_key(
    tensors: Mapping[str, Mapping[str, Tensor]],
    compute: str,
    cases: Sequence[Case],
    reference: str | None,
) -> str:
    """SHA-256 over every byte of both copies' weights, how they are multiplied, the cases, the
    preset and the key of the reference that the run is measured against."""
    digest = hashlib.sha256()
    for copy, named in sorted(tensors.items()):
        for name, tensor in sorted(named.items()):
            digest.update(f"{copy}.{name}".encode())
            add_to_digest(digest, tensor)
    what = [VERSION, PRESET, SHORT_SIDE, compute, reference, [asdict(case) for case in cases]]
    digest.update(json.dumps(what).encode())
    return digest.hexdigest()


def add_to_digest(digest, tensor: Tensor) -> None:
    """Every byte of a tensor, of a quantized one its parts and parameters, into a hash."""
    if isinstance(tensor, QuantizedTensor):
        plain = {k: v for k, v in vars(tensor._params).items() if not isinstance(v, Tensor)}
        digest.update(f"{tensor._layout_cls} {sorted(plain.items(), key=str)}".encode())
        for part in tensor.layout_cls.get_plain_tensors(tensor):
            add_to_digest(digest, part)
        return
    digest.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
    digest.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy())


class ReadOnce:
    """Words in pictures; of equal pictures only the first is read."""

    def __init__(self) -> None:
        self._known: dict[bytes, str] = {}
        self._reader = WordReader(short_side=SHORT_SIDE)

    def read(self, picture: Image.Image) -> str:
        """All text in the picture."""
        name = hashlib.sha256(picture.tobytes()).digest()
        if name not in self._known:
            self._known[name] = self._reader.read(picture)
        return self._known[name]

    def learn(self, pictures: Sequence[Image.Image], read: Sequence[str]) -> None:
        """Take over what was read in an earlier process."""
        for picture, text in zip(pictures, read, strict=True):
            self._known[hashlib.sha256(picture.tobytes()).digest()] = text


def scores_of(
    painted: Painted, reference: Painted | None, cases: Sequence[Case], read: Sequence[str]
) -> dict[str, list[float]]:
    """Metric -> a value a case; without a reference those of the text alone."""
    scores: dict[str, list[float]] = {}
    for i, case in enumerate(cases):
        found: dict[str, float] = ocr_scores(case.text, read[i])
        if reference is not None:
            pair = reference.pictures[i], painted.pictures[i]
            found |= {"psnr": psnr(*pair), "ssim": ssim(*pair)}
        for name, value in found.items():
            scores.setdefault(name, []).append(value)
    return scores


def steps_of(painted: Painted, reference: Painted | None) -> list[list[float]]:
    """Latent SQNR in dB after every step, a list a case; none without a reference."""
    if reference is None:
        return []
    pairs = zip(reference.trajectories, painted.trajectories, strict=True)
    return [latent_sqnr(a, b) for a, b in pairs]
