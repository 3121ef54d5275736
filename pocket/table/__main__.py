"""Makes the table of the systems: paints what is missing, measures, writes the document and plots.

    python -m ideogram4_quant.pocket.table --work pocket-table

About twelve core-seconds a row, model and part. A run that is broken off goes on where it stopped;
several may share a folder, each with ``--systems`` of its own. Other programs' quantizers have rows
where they are installed (`peers.py`).
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ...engine.generate import Models
from ...engine.linear import QuantLinear
from ...engine.loading import COPIES
from ...engine.transformer import canonical_name, load_transformer
from .calibrating import calibration_of, written
from .models import VARIANTS, Variant, in_memory, state_of, stored_bytes
from .painting import Studio, cases_of_part
from .peer_inputs import moments_of
from .peers import Biased, parts
from .report import write_levels, write_report
from .runs import ReadOnce, Run, RunStore, run_key, scores_of, steps_of
from .systems import REFERENCE, SCHEMES, Scheme, is_block_linear, unpacked, weights

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "pocket-table.md"


@dataclass(frozen=True)
class Job:
    """A row of the table, as far as one part of the pictures goes."""

    variant: Variant
    scheme: Scheme
    part: int


@dataclass(frozen=True)
class Made:
    """One model by one system: copy -> tensors as they are stored, and what multiplies them.

    ``modules``: copy -> canonical name -> a peer's linear, empty for ours; ``bytes``: both copies.
    """

    tensors: dict[str, dict[str, Tensor]]
    compute: str
    bytes: int
    modules: dict[str, dict[str, nn.Module]] = field(default_factory=dict)


def jobs_of(
    variants: Sequence[Variant], schemes: Sequence[Scheme], parts: Sequence[int]
) -> Iterator[Job]:
    """References first; parts innermost, as they share what was quantized."""
    for scheme in schemes:
        for variant in variants:
            if scheme.stress or not variant.stress:
                for part in parts:
                    yield Job(variant, scheme, part)


class Maker:
    """Makes runs one after the other; keeps what they share."""

    def __init__(self, store: RunStore) -> None:
        self.store = store
        self.studio: Studio | None = None
        self.reader: ReadOnce | None = None
        self.references: dict[tuple[Variant, int], str] = {}
        self._last: tuple[tuple[Variant, Scheme], Made] | None = None

    def make(self, job: Job) -> None:
        """Make the job's run unless the store has it."""
        made = self._made(job)
        reference = self.references.get((job.variant, job.part))
        key = run_key(made.tensors, made.compute, cases_of_part(job.part), reference)
        if job.scheme.name == REFERENCE:
            self.references[job.variant, job.part] = key
        if self.store.find(key) is None:
            self._paint(job, key, made, reference)
        self.store.enter(key, self.store.find(key))

    def _made(self, job: Job) -> Made:
        what = (job.variant, job.scheme)
        if self._last is None or self._last[0] != what:
            self._last = what, self._by_peer(job) if job.scheme.peer else self._ours(job)
        return self._last[1]

    def _ours(self, job: Job) -> Made:
        tensors = self._tensors(job)
        return Made(tensors, job.scheme.compute, sum(map(stored_bytes, tensors.values())))

    def _by_peer(self, job: Job) -> Made:
        peer = job.scheme.peer
        moments = moments_of(job.variant, self.store.folder) if peer.moments else {}
        tensors, modules, size = {}, {}, 0
        for copy in COPIES:
            state = dict(state_of(job.variant, copy))
            weights = {name: state.pop(name) for name in filter(is_block_linear, list(state))}
            size += stored_bytes(state)
            tensors[copy], modules[copy] = state, {}
            for name, weight in weights.items():
                module = name.removesuffix(".weight")
                made = peer.linear(weight, moments.get(f"{copy}.{module}"))
                kept = {f"{module}.{part}": value for part, value in parts(made).items()}
                size += stored_bytes(kept) if peer.bits is None else weight.numel() * peer.bits / 8
                state.update(kept)
                modules[copy][module] = made
        return Made(tensors, peer.stamp, int(size), modules)

    def _tensors(self, job: Job) -> dict[str, dict[str, Tensor]]:
        calibration = None
        if job.scheme.calibrated:
            calibration = calibration_of(job.variant, self.store.folder)
        if job.scheme.level is not None:
            how = (job.scheme.level, job.scheme.treatment)
            return written(job.variant, *how, calibration, self.store.folder)
        return {
            copy: weights(job.scheme, state_of(job.variant, copy), copy, calibration)
            for copy in COPIES
        }

    def _paint(self, job: Job, key: str, made: Made, reference: str | None) -> None:
        self.studio = self.studio or Studio()
        self.reader = self.reader or ReadOnce()
        cases = cases_of_part(job.part)
        models = self._models(job, made)
        painted = self.studio.paint(models, cases)
        truth = None
        if reference is not None:
            truth = self.store.painted(reference)
            self.reader.learn(truth.pictures, self.store.find(reference).read)
        read = [self.reader.read(picture) for picture in painted.pictures]
        run = Run(
            job.variant.name,
            job.scheme.name,
            job.part,
            made.bytes,
            painted.seconds,
            read,
            scores_of(painted, truth, cases, read),
            steps_of(painted, truth),
            job.scheme.peer.stamp if job.scheme.peer else "",
        )
        self.store.keep(key, run, painted)

    def _models(self, job: Job, made: Made) -> Models:
        loaded = []
        for copy in COPIES:
            own = made.modules.get(copy, {})
            state = (
                state_of(job.variant, copy) if own else unpacked(made.tensors[copy], made.compute)
            )
            model = load_transformer(in_memory(job.variant, state), copy, device="cpu")
            for path, module in list(model.named_modules()):
                name = canonical_name(f"{path}.weight").removesuffix(".weight")
                if isinstance(module, QuantLinear) and name in own:
                    model.set_submodule(path, Biased(own[name], module.bias))
            loaded.append(model)
        return Models(*loaded, None, self.studio.vae)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("pocket-table"), metavar="DIR")
    parser.add_argument(
        "--parts", type=int, nargs="+", default=range(4), metavar="N",
        help="0 and 1: both halves of the prompts, 2 and 3: again with other seeds (default: all)",
    )  # fmt: skip
    parser.add_argument("--models", nargs="+", metavar="NAME", help="default: all")
    parser.add_argument("--systems", nargs="+", metavar="NAME", help="default: all")
    parser.add_argument(
        "--tables", nargs="+", choices=("levels", "study"), default=["levels", "study"],
        help="which of the document's tables to write (default: both)",
    )  # fmt: skip
    parser.add_argument(
        "--report", action=argparse.BooleanOptionalAction, default=None,
        help="write the document from what the folder holds (default: when all rows are made)",
    )  # fmt: skip
    parser.add_argument("--paint", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--document", type=Path, default=DOCUMENT, metavar="MD")
    args = parser.parse_args()
    torch.set_num_threads(1)
    variants = [v for v in VARIANTS if not args.models or v.name in args.models]
    schemes = [s for s in SCHEMES if not args.systems or s.name in [REFERENCE, *args.systems]]
    for scheme in [s for s in schemes if s.peer and s.peer.version is None]:
        print(f"left out: {scheme.name}: {scheme.peer.package} is not installed")
        schemes.remove(scheme)
    store = RunStore(args.work)
    if args.paint:
        maker = Maker(store)
        with tqdm(list(jobs_of(variants, schemes, args.parts)), unit="run") as bar:
            for job in bar:
                bar.set_description(f"{job.variant.name}, {job.scheme.name}, part {job.part}")
                maker.make(job)
    whole = args.models is None and args.systems is None
    if args.report or (args.report is None and whole):
        writers = {"levels": write_levels, "study": write_report}
        files = [file for name in args.tables for file in writers[name](store, args.document)]
        print("\n".join(map(str, dict.fromkeys(files))))


if __name__ == "__main__":
    main()
