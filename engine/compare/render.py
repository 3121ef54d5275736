"""What is still to be rendered, and one unit of it in the process that is told to."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from ...checkpoint import Checkpoint, open_checkpoint
from ...ops.linear import LinearOptions
from ...sampling import preset
from ..encoder import load_encoder
from ..generate import GenerateRequest, Models, check_branches, generate
from ..linear import default_device
from ..loading import load_pair, open_pair, pair_label
from ..vae import load_vae
from .cases import Case, CompareError, System
from .results import SystemScores
from .score import Rendered, word_reader
from .store import Fingerprints, Record, Store, picture_key
from .versions import versions_used

Progress = Callable[[int], None]

#: Pictures in one forward, for every system alike: libraries multiply few rows by another kernel
#: than many, so that a row's last bits depend on its batch. No level should be charged with that.
BATCH = 1

#: Of one unit, at most: the features of its prompts wait in RAM, up to 60 MB each at full size.
MOST_PICTURES = 64


@dataclass(frozen=True)
class Settings:
    """What all systems share: encoder, VAE, schedule, and whether to keep trajectories.

    ``threads`` is the number of torch threads of one process; ``read`` asks for OCR, which is left
    to the scoring where it is not installed. ``tokenizer`` is for an encoder without one.
    """

    encoder: Path
    vae: Path
    preset: str = "default"
    steps: int | None = None
    guidance: float | None = None
    trajectories: bool = True
    read: bool = True
    device: str | None = None
    dtype: str | None = None
    threads: int | None = None
    tokenizer: Path | None = None

    def painting(self) -> dict[str, object]:
        """The settings that change a picture, for its key; every picture is a batch of its own."""
        names = ("preset", "steps", "guidance", "dtype", "device_kind")
        return {name: getattr(self, name) for name in names}

    @property
    def device_kind(self) -> str:
        """``cpu`` or ``cuda``, whichever one of several it is; without a device this machine's."""
        return default_device().type if self.device is None else self.device.partition(":")[0]

    def request(self, case: Case) -> GenerateRequest:
        """What the engine is asked for one case."""
        return GenerateRequest(
            case.prompt, case.width, case.height, case.seed, self.preset, self.steps,
            self.guidance, keep_latents=self.trajectories,
        )  # fmt: skip


@dataclass(frozen=True)
class Unit:
    """Work for one process: a system and some of its cases, with their keys."""

    system: System
    work: tuple[tuple[str, Case], ...] = field(repr=False)


class Plan:
    """Keys of every (system, case), and what is still to be made in a store.

    Every model file is hashed once. Raises OpError for sizes, steps or a preset that do not fit.
    """

    def __init__(
        self, systems: Sequence[System], cases: Sequence[Case], settings: Settings, store: Store
    ) -> None:
        self.systems, self.cases, self.settings, self.store = systems, cases, settings, store
        for case in {(case.width, case.height): case for case in cases}.values():
            settings.request(case).plan()
        prints = Fingerprints(store.folder / "fingerprints.json")
        shared = settings.painting() | {
            "versions": versions_used(settings.device_kind),
            "encoder": prints.of(settings.encoder),
            "vae": prints.of(settings.vae),
        }
        if settings.tokenizer is not None:
            shared["tokenizer"] = prints.of(settings.tokenizer)
        self._keys = {}
        for system in systems:
            identity = {
                "files": [None if f is None else prints.of(f) for f in
                          (system.conditional, system.unconditional, system.base)],
                "guided": system.guided,
                "options": asdict(LinearOptions(**system.options)),
            }  # fmt: skip
            if system.stand_in is not None:  # only then, so that older pictures keep their keys
                lora = system.lora
                identity["stand_in"] = system.stand_in if lora is None else prints.of(lora)
            for case in cases:
                self._keys[system.name, case.key] = picture_key(identity, shared, case)
        prints.keep()

    def check_files(self) -> None:
        """What a system's files will be refused for, said of all before the first is rendered.

        Reads headers. Raises CheckpointError and OpError as loading and painting do.
        """
        for system in self.systems:
            first, second = _open(system, self.settings)
            one_branch = first.one_branch is not None
            self.settings.request(self.cases[0]).plan(one_branch=one_branch)
            if second is not None or system.stand_in is not None:
                check_branches(self.settings.request(self.cases[0]), one_branch, True)

    def key(self, system: System, case: Case) -> str:
        """The store's key of one picture."""
        return self._keys[system.name, case.key]

    def missing(self, shard: tuple[int, int] = (0, 1)) -> list[tuple[System, str, Case]]:
        """What shard ``i`` of ``n`` has to make: every n-th picture in the order of keys.

        So shards differ by at most one picture, and know their share without knowing each other.
        """
        index, count = shard
        if not 0 <= index < count:
            raise CompareError("no such shard", found=f"{index}/{count}", needed="0 <= i < n")
        wanted = self.settings.trajectories
        share = set(sorted(set(self._keys.values()))[index::count])
        todo: dict[str, tuple[System, str, Case]] = {}  # two systems may have the same files
        for system in self.systems:
            for case in self.cases:
                key = self.key(system, case)
                if key in share and key not in todo and not self.store.has(key, trajectory=wanted):
                    todo[key] = (system, key, case)
        return list(todo.values())

    def units(self, shard: tuple[int, int] = (0, 1), jobs: int = 1) -> list[Unit]:
        """The missing work cut so that ``jobs`` processes load few models and end together."""
        by_system: dict[str, list[tuple[str, Case]]] = {}
        for system, key, case in self.missing(shard):
            by_system.setdefault(system.name, []).append((key, case))
        units = []
        for system in self.systems:
            work = by_system.get(system.name, [])
            parts = 1 if len(by_system) >= 2 * jobs else jobs
            size = max(1, min(MOST_PICTURES, -(-len(work) // parts)))
            units += [Unit(system, tuple(work[i : i + size])) for i in range(0, len(work), size)]
        return units

    def rendered(self, system: System) -> Rendered:
        """The pictures of a system as the store has them, with level, size and mean seconds."""
        files = (system.conditional, system.unconditional)
        opened = [open_checkpoint(f, system.base) for f in files if f is not None]
        level = pair_label((opened[0], opened[-1]))
        size = sum(path_size(f) for f in dict.fromkeys(system.files) if f != system.base)
        scores = SystemScores(system.name, level, size)
        records = {c.key: self.store.record(self.key(system, c)) for c in self.cases}
        times = [r.seconds for r in records.values() if r is not None]
        scores.seconds = sum(times) / len(times) if times else None
        return Rendered(
            scores,
            picture=lambda case: self.store.picture(self.key(system, case)),
            latents=lambda case: self.store.latents(self.key(system, case)),
            read={k: r.read for k, r in records.items() if r is not None and r.read is not None},
        )


def path_size(path: Path) -> int:
    """Bytes of a file, or of the safetensors files in a folder."""
    if path.is_file():
        return path.stat().st_size
    return sum(f.stat().st_size for f in path.rglob("*.safetensors"))


def _encoded(cases: Sequence[Case], settings: Settings, place: dict) -> dict[str, Tensor]:
    """Prompt -> features, kept in RAM. The encoder is gone afterwards: with both copies of the
    transformer it does not fit 24 GB."""
    encoder = load_encoder(settings.encoder, tokenizer=settings.tokenizer, **place)
    prompts = dict.fromkeys(case.prompt for case in cases)
    return {prompt: encoder.encode([prompt])[0].cpu() for prompt in prompts}


def _open(system: System, settings: Settings) -> tuple[Checkpoint, Checkpoint | None]:
    """Both copies of a system; one, where its passes take no more."""
    guided = settings.guidance is not None or preset(settings.preset).guided
    both = system.guided and guided and system.stand_in is None
    copies = "both" if both else "conditional"
    return open_pair(system.conditional, system.unconditional, base=system.base, copies=copies)


def _load(system: System, settings: Settings, place: dict) -> Models:
    """The copies of a system and the VAE."""
    pair = _open(system, settings)
    vae = load_vae(settings.vae, **place)
    options = LinearOptions(**system.options)
    return load_pair(pair, None, vae, options=options, stand_in=system.stand_in, **place)


def render_unit(
    unit: Unit, settings: Settings, folder: str, progress: Progress | None = None
) -> int:
    """Make and keep the pictures of one unit; returns how many. Runs in any process."""
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    store = Store(Path(folder))
    dtype = None if settings.dtype is None else getattr(torch, settings.dtype)
    place = {"device": settings.device, "dtype": dtype}
    cases = [case for _, case in unit.work]
    features = _encoded(cases, settings, place)
    models = _load(unit.system, settings, place)
    reader = word_reader(cases) if settings.read else None
    for key, case in unit.work:
        started = time.perf_counter()
        result = generate(settings.request(case), models, features=features[case.prompt])
        seconds = time.perf_counter() - started
        read = reader(result.image) if reader is not None and case.text else None
        latents = torch.stack(result.trajectory) if settings.trajectories else None
        store.save(key, result.image, Record(seconds, read), latents)
        if progress is not None:
            progress(1)
    return len(unit.work)
