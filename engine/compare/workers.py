"""Render what is missing: in this process, in several, or on a Ray cluster."""

from __future__ import annotations

from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context

import torch

from .cases import CompareError
from .render import Plan, Progress, render_unit

_LOOK_EVERY = 2.0  # seconds between two looks for what other processes have made


def render(
    plan: Plan,
    *,
    jobs: int = 1,
    shard: tuple[int, int] = (0, 1),
    ray: bool = False,
    progress: Progress | None = None,
) -> int:
    """Make every missing picture of the shard; returns how many were made.

    ``jobs`` processes on this machine, which take its CUDA devices in turn, or with ``ray`` tasks
    on the cluster that ``ray.init()`` finds, at least one for each of its GPUs, each task with a
    GPU of its own (its workers must see the same folders).
    """
    folder = str(plan.store.folder)
    watch = _Watch(plan, shard, progress)
    if ray:
        return _render_on_ray(plan, shard, jobs, folder, watch)
    units = plan.units(shard, jobs)
    if jobs == 1:
        return sum(render_unit(unit, plan.settings, folder, progress) for unit in units)
    context = get_context("spawn")
    turn = context.Value("i", 0)
    pool = ProcessPoolExecutor(jobs, context, initializer=_take_a_gpu, initargs=(turn,))
    with pool:
        waiting = {pool.submit(render_unit, unit, plan.settings, folder) for unit in units}
        try:
            while waiting:
                done, waiting = wait(waiting, timeout=_LOOK_EVERY, return_when=FIRST_COMPLETED)
                for future in done:
                    future.result()
                watch.look()
        except BaseException as error:
            pool.shutdown(wait=False, cancel_futures=True)
            if isinstance(error, BrokenProcessPool):
                raise CompareError(
                    "a process died, most often for want of memory",
                    hint="Run it again with fewer --jobs: it goes on with what is left.",
                ) from error
            raise
    return watch.made


class _Watch:
    """Reports the pictures of other processes as they appear in the store."""

    def __init__(self, plan: Plan, shard: tuple[int, int], progress: Progress | None) -> None:
        self._store, self._progress = plan.store, progress
        self._wanted = plan.settings.trajectories
        self._missing = {key for _, key, _ in plan.missing(shard)}
        self.made = 0

    def look(self) -> None:
        """Count what has come since the last look."""
        come = {key for key in self._missing if self._store.has(key, trajectory=self._wanted)}
        self._missing -= come
        self.made += len(come)
        if come and self._progress is not None:
            self._progress(len(come))


def _render_on_ray(
    plan: Plan, shard: tuple[int, int], jobs: int, folder: str, watch: _Watch
) -> int:
    try:
        import ray
    except ImportError as error:
        raise CompareError("Ray is not installed", hint="pip install ray, or use --jobs") from error
    if not ray.is_initialized():
        try:
            ray.init(address="auto", log_to_driver=False)
        except ConnectionError as error:
            raise CompareError(
                "no Ray cluster is running", hint="Start one (ray start --head), or use --jobs."
            ) from error
    gpus = int(ray.cluster_resources().get("GPU", 0))
    kind = plan.settings.device_kind
    if plan.settings.device is None and (kind == "cuda") != (gpus > 0):
        raise CompareError(
            "this machine and the cluster have different devices",
            found=f"{kind} here, {gpus} GPUs there",
            hint="Name the one to use: --device cuda or --device cpu.",
        )
    # Ray hides the GPUs of a node from tasks that ask for none.
    task = ray.remote(num_cpus=1, num_gpus=1 if kind == "cuda" else 0)(render_unit)
    units = plan.units(shard, max(jobs, gpus if kind == "cuda" else 1))
    waiting = [task.remote(unit, plan.settings, folder) for unit in units]
    while waiting:
        done, waiting = ray.wait(waiting, timeout=_LOOK_EVERY)
        ray.get(done)
        watch.look()
    return watch.made


def _take_a_gpu(turn) -> None:
    """One CUDA device after the other for the processes of one machine; ``turn`` counts them."""
    with turn.get_lock():
        number = turn.value
        turn.value += 1
    if torch.cuda.device_count() > 1:
        torch.cuda.set_device(number % torch.cuda.device_count())
