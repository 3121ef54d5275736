"""Makes the table of the systems: paints what is missing, measures, writes the document and plots.

    python -m ideogram4_quant.pocket.table --work pocket-table

About twelve core-seconds a row and part. A run that is broken off goes on where it stopped.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from ...engine.generate import Models
from ...engine.loading import COPIES
from ...engine.transformer import load_transformer
from .calibrating import calibration_of, written
from .models import VARIANTS, Variant, in_memory, state_of, stored_bytes
from .painting import Studio, cases_of_part
from .report import write_report
from .runs import ReadOnce, Run, RunStore, run_key, scores_of, steps_of
from .systems import REFERENCE, SCHEMES, Scheme, unpacked, weights

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "pocket-table.md"


@dataclass(frozen=True)
class Job:
    """A row of the table, as far as one part of the pictures goes."""

    variant: Variant
    scheme: Scheme
    part: int


def jobs_of(
    variants: Sequence[Variant], schemes: Sequence[Scheme], parts: Sequence[int]
) -> Iterator[Job]:
    """References first, parts outermost: a run broken off has all rows with fewer pictures."""
    for part in parts:
        for scheme in schemes:
            for variant in variants:
                if scheme.stress or not variant.stress:
                    yield Job(variant, scheme, part)


class Maker:
    """Makes runs one after the other; keeps what they share."""

    def __init__(self, store: RunStore) -> None:
        self.store = store
        self.studio: Studio | None = None
        self.reader: ReadOnce | None = None
        self.references: dict[tuple[Variant, int], str] = {}

    def make(self, job: Job) -> None:
        """Make the job's run unless the store has it."""
        tensors = self._tensors(job)
        reference = self.references.get((job.variant, job.part))
        key = run_key(tensors, job.scheme.compute, cases_of_part(job.part), reference)
        if job.scheme.name == REFERENCE:
            self.references[job.variant, job.part] = key
        if self.store.find(key) is None:
            self._paint(job, key, tensors, reference)
        self.store.enter(key, self.store.find(key))

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

    def _paint(
        self, job: Job, key: str, tensors: dict[str, dict[str, Tensor]], reference: str | None
    ) -> None:
        self.studio = self.studio or Studio()
        self.reader = self.reader or ReadOnce()
        cases = cases_of_part(job.part)
        models = self._models(job, tensors)
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
            sum(map(stored_bytes, tensors.values())),
            painted.seconds,
            read,
            scores_of(painted, truth, cases, read),
            steps_of(painted, truth),
        )
        self.store.keep(key, run, painted)

    def _models(self, job: Job, tensors: dict[str, dict[str, Tensor]]) -> Models:
        loaded = [
            load_transformer(
                in_memory(job.variant, unpacked(tensors[copy], job.scheme.compute)),
                copy,
                device="cpu",
            )
            for copy in COPIES
        ]
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
        "--report", action=argparse.BooleanOptionalAction, default=None,
        help="write the document from what the folder holds (default: when all rows are made)",
    )  # fmt: skip
    parser.add_argument("--paint", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--document", type=Path, default=DOCUMENT, metavar="MD")
    args = parser.parse_args()
    torch.set_num_threads(1)
    variants = [v for v in VARIANTS if not args.models or v.name in args.models]
    schemes = [s for s in SCHEMES if not args.systems or s.name in [REFERENCE, *args.systems]]
    store = RunStore(args.work)
    if args.paint:
        maker = Maker(store)
        with tqdm(list(jobs_of(variants, schemes, args.parts)), unit="run") as bar:
            for job in bar:
                bar.set_description(f"{job.variant.name}, {job.scheme.name}, part {job.part}")
                maker.make(job)
    whole = args.models is None and args.systems is None
    if args.report or (args.report is None and whole):
        print("\n".join(str(file) for file in write_report(store, args.document)))


if __name__ == "__main__":
    main()
