"""Render what is missing: in this process, in several, or on a Ray cluster."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from multiprocessing import get_context
from pathlib import Path

import torch

from ...checkpoint import open_checkpoint
from ...ops.linear import LinearOptions
from ..encoder import load_encoder
from ..generate import GenerateRequest, Models, generate
from ..loading import load_pair, open_pair
from ..vae import load_vae
from .cases import Case, CompareError, System
from .results import SystemScores
from .score import Rendered
from .store import Fingerprints, Record, Store, picture_key

Progress = Callable[[int], None]


@dataclass(frozen=True)
class Settings:
    """What all systems share: encoder, VAE, schedule, and whether to keep trajectories.

    ``threads`` is the number of torch threads of one process; ``read`` asks for OCR.
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

    def painting(self) -> dict[str, object]:
        """The settings that change a picture, for its key."""
        names = ("preset", "steps", "guidance", "device", "dtype")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class Unit:
    """Work for one process: a system and some of its cases, with their keys."""

    system: System
    work: tuple[tuple[str, Case], ...] = field(repr=False)


class Plan:
    """Keys of every (system, case), and what is still to be made in a store."""

    def __init__(
        self, systems: Sequence[System], cases: Sequence[Case], settings: Settings, store: Store
    ) -> None:
        self.systems, self.cases, self.settings, self.store = systems, cases, settings, store
        prints = Fingerprints(store.folder / "fingerprints.json")
        shared = settings.painting() | {
            "encoder": prints.of(settings.encoder),
            "vae": prints.of(settings.vae),
        }
        self._keys = {}
        for system in systems:
            identity = {
                "files": [None if f is None else prints.of(f) for f in
                          (system.conditional, system.unconditional, system.base)],
                "guided": system.guided,
                "options": asdict(LinearOptions(**system.options)),
            }  # fmt: skip
            for case in cases:
                self._keys[system.name, case.key] = picture_key(identity, shared, case)
        prints.keep()

    def key(self, system: System, case: Case) -> str:
        """The store's key of one picture."""
        return self._keys[system.name, case.key]

    def missing(self, shard: tuple[int, int] = (0, 1)) -> list[tuple[System, str, Case]]:
        """What shard ``i`` of ``n`` has to make; the shards split the keys evenly by their hash."""
        index, count = shard
        if not 0 <= index < count:
            raise CompareError("no such shard", found=f"{index}/{count}", needed="0 <= i < n")
        wanted = self.settings.trajectories
        todo = []
        for system in self.systems:
            for case in self.cases:
                key = self.key(system, case)
                if int(key[:12], 16) % count == index and not self.store.has(
                    key, trajectory=wanted
                ):
                    todo.append((system, key, case))
        return todo

    def units(self, shard: tuple[int, int] = (0, 1), jobs: int = 1) -> list[Unit]:
        """The missing work cut so that ``jobs`` processes load few models and end together."""
        by_system: dict[str, list[tuple[str, Case]]] = {}
        for system, key, case in self.missing(shard):
            by_system.setdefault(system.name, []).append((key, case))
        units = []
        for system in self.systems:
            work = by_system.get(system.name, [])
            parts = 1 if len(by_system) >= 2 * jobs else jobs
            size = max(1, -(-len(work) // parts))
            units += [Unit(system, tuple(work[i : i + size])) for i in range(0, len(work), size)]
        return units

    def rendered(self, system: System) -> Rendered:
        """The pictures of a system as the store has them, with level, size and mean seconds."""
        checkpoint = open_checkpoint(system.conditional, system.base)
        size = sum(path_size(f) for f in dict.fromkeys(system.files) if f != system.base)
        scores = SystemScores(system.name, checkpoint.level, size)
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


def load_models(system: System, settings: Settings) -> Models:
    """Both copies of a system (one, where one file holds only the conditional), encoder and VAE."""
    dtype = None if settings.dtype is None else getattr(torch, settings.dtype)
    place = {"device": settings.device, "dtype": dtype}
    copies = "both" if system.guided else "conditional"
    pair = open_pair(system.conditional, system.unconditional, base=system.base, copies=copies)
    return load_pair(
        pair,
        load_encoder(settings.encoder, **place),
        load_vae(settings.vae, **place),
        options=LinearOptions(**system.options),
        **place,
    )


def render_unit(
    unit: Unit, settings: Settings, folder: str, progress: Progress | None = None
) -> int:
    """Make and keep the pictures of one unit; returns how many. Runs in any process."""
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    store = Store(Path(folder))
    models = load_models(unit.system, settings)
    reader = _reader() if settings.read and any(case.text for _, case in unit.work) else None
    for key, case in unit.work:
        request = GenerateRequest(
            case.prompt, case.width, case.height, case.seed, settings.preset, settings.steps,
            settings.guidance, keep_latents=settings.trajectories,
        )  # fmt: skip
        started = time.perf_counter()
        result = generate(request, models)
        seconds = time.perf_counter() - started
        read = reader(result.image) if reader is not None and case.text else None
        latents = torch.stack(result.trajectory) if settings.trajectories else None
        store.save(key, result.image, Record(seconds, read), latents)
        if progress is not None:
            progress(1)
    return len(unit.work)


def _reader():
    from ..ocr import WordReader

    return WordReader().read


def render(
    plan: Plan,
    *,
    jobs: int = 1,
    shard: tuple[int, int] = (0, 1),
    ray: bool = False,
    progress: Progress | None = None,
) -> int:
    """Make every missing picture of the shard; returns how many were made.

    ``jobs`` processes on this machine, or with ``ray`` one task a unit on the cluster that
    ``ray.init()`` finds (its workers must see the same folders).
    """
    units = plan.units(shard, jobs)
    folder = str(plan.store.folder)
    if ray:
        return _render_on_ray(units, plan.settings, folder, progress)
    if jobs == 1:
        return sum(render_unit(unit, plan.settings, folder, progress) for unit in units)
    made = 0
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        futures = [pool.submit(render_unit, unit, plan.settings, folder) for unit in units]
        try:
            for future in as_completed(futures):
                made += future.result()
                if progress is not None:
                    progress(future.result())
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return made


def _render_on_ray(
    units: Sequence[Unit], settings: Settings, folder: str, progress: Progress | None
) -> int:
    try:
        import ray
    except ImportError as error:
        raise CompareError("Ray is not installed", hint="pip install ray, or use --jobs") from error
    if not ray.is_initialized():
        ray.init(address="auto", log_to_driver=False)
    task = ray.remote(num_cpus=1)(render_unit)
    waiting = [task.remote(unit, settings, folder) for unit in units]
    made = 0
    while waiting:
        done, waiting = ray.wait(waiting)
        for count in ray.get(done):
            made += count
            if progress is not None:
                progress(count)
    return made
