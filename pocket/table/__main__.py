"""Makes the table of the systems: paints what is missing, measures, writes the document and plots.

    python -m ideogram4_quant.pocket.table --work pocket-table

About a core-minute a row and round. A run that is broken off goes on where it stopped.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from ...engine.compare.cases import Case
from ...engine.generate import Models
from ...engine.loading import COPIES
from ...engine.transformer import load_transformer
from ..data import HELD_OUT
from .models import VARIANTS, Variant, in_memory, state_of, stored_bytes
from .painting import Studio, case_of
from .runs import ReadOnce, Run, RunStore, run_key, scores_of, steps_of
from .systems import REFERENCE, SCHEMES, Scheme, unpacked, weights


@dataclass(frozen=True)
class Job:
    """A row of the table in one round (a seed of every prompt)."""

    variant: Variant
    scheme: Scheme
    round: int


def jobs_of(variants: Sequence[Variant], schemes: Sequence[Scheme], rounds: int) -> Iterator[Job]:
    """References first, rounds outermost: a run broken off has all rows with fewer seeds."""
    for round_ in range(rounds):
        for scheme in schemes:
            for variant in variants:
                if scheme.stress or not variant.stress:
                    yield Job(variant, scheme, round_)


class Maker:
    """Makes runs one after the other; keeps what they share."""

    def __init__(self, store: RunStore, prompts: int) -> None:
        self.store = store
        self.prompts = HELD_OUT[:prompts]
        self.studio: Studio | None = None
        self.reader: ReadOnce | None = None
        self.references: dict[tuple[Variant, int], str] = {}

    def cases(self, job: Job) -> list[Case]:
        """The pictures of one job."""
        return [case_of(prompt, job.round) for prompt in self.prompts]

    def make(self, job: Job) -> None:
        """Make the job's run unless the store has it."""
        tensors = {copy: weights(job.scheme, state_of(job.variant, copy)) for copy in COPIES}
        reference = self.references.get((job.variant, job.round))
        key = run_key(tensors, job.scheme.compute, self.cases(job), reference)
        if job.scheme.name == REFERENCE:
            self.references[job.variant, job.round] = key
        if self.store.find(key) is None:
            self._paint(job, key, tensors, reference)
        self.store.enter(key, self.store.find(key))

    def _paint(
        self, job: Job, key: str, tensors: dict[str, dict[str, Tensor]], reference: str | None
    ) -> None:
        self.studio = self.studio or Studio(self.prompts)
        self.reader = self.reader or ReadOnce()
        cases = self.cases(job)
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
            job.round,
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
    parser.add_argument("--prompts", type=int, default=len(HELD_OUT), metavar="N")
    parser.add_argument("--rounds", type=int, default=2, metavar="N", help="seeds a prompt")
    parser.add_argument("--models", nargs="+", metavar="NAME", help="default: all")
    parser.add_argument("--systems", nargs="+", metavar="NAME", help="default: all")
    args = parser.parse_args()
    torch.set_num_threads(1)
    variants = [v for v in VARIANTS if not args.models or v.name in args.models]
    schemes = [s for s in SCHEMES if not args.systems or s.name in [REFERENCE, *args.systems]]
    maker = Maker(RunStore(args.work), args.prompts)
    jobs = list(jobs_of(variants, schemes, args.rounds))
    with tqdm(jobs, unit="run", dynamic_ncols=True) as bar:
        for job in bar:
            bar.set_description(f"{job.variant.name}, {job.scheme.name}, seed {job.round}")
            maker.make(job)


if __name__ == "__main__":
    main()
