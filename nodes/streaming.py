"""Weights that do not fit on the device come a transformer block ahead of their use.

Under the host's dynamic memory its own prefetch queue does it, which the host's Ideogram 4 does not
drive: here it is driven, block by block. Under the host's older patcher, which fetches each weight
when its linear comes, `ops.weight_stream` does it. Both hang on hooks of the blocks, so a fused
block and the host's own are served alike, and both leave what the host does with a weight (patches,
casts) to the host.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from functools import partial

import comfy.model_management as management
import comfy.model_patcher
import psutil
import torch
from comfy.patcher_extension import CallbacksMP, WrapperExecutor, WrappersMP
from torch import Tensor, nn

from ..checkpoint.mapped import origin
from ..ops.lanes import DeviceLane, Lane
from ..ops.weight_stream import SLOTS, WeightStream
from . import injected

try:
    import comfy.model_prefetch as prefetch
except ImportError:  # a host of before its queue
    prefetch = None

logger = logging.getLogger(__name__)
KEY = "ideogram4_quant_streaming"
WITH_STREAMS = ("cuda", "xpu")


def add_streaming(patcher: comfy.model_patcher.ModelPatcher) -> None:
    """Have the weights of this patcher's blocks fetched ahead wherever they do not stay."""
    injected.follow(patcher, KEY, _hook, same_results=True)
    patcher.add_wrapper_with_key(WrappersMP.APPLY_MODEL, KEY, _let_go_after_an_error)
    patcher.add_callback_with_key(CallbacksMP.ON_CLEANUP, KEY, _end)


def lane_for(device: torch.device) -> Lane | None:
    """How copies run beside the work there; None where they cannot."""
    if device.type not in WITH_STREAMS or management.NUM_STREAMS == 0:
        return None
    return DeviceLane(device, pins=management.MAX_PINNED_MEMORY > 0)


def is_away(device: torch.device, module: nn.Module, stored: nn.Parameter) -> bool:
    """Whether the host left a weight behind, to be cast each time it is used."""
    return stored.device != device and bool(getattr(module, "comfy_cast_weights", False))


def pinned_budget() -> int:
    """Bytes of pinned memory for one copy of the model: half of what the host may still pin, and no
    more than a quarter of the memory that is free."""
    allowed = management.MAX_PINNED_MEMORY - management.TOTAL_PINNED_MEMORY
    return max(0, int(min(allowed / 2, psutil.virtual_memory().available / 4)))


class Ahead:
    """What is asked for before and after each block of one model."""

    def __init__(self, blocks: Sequence[nn.Module]):
        self.blocks = list(blocks)
        self._index = {id(block): index for index, block in enumerate(self.blocks)}
        self._queue: list | None = None
        self._stream: WeightStream | None = None
        self._fetched: tuple[int, ...] = ()  # what the stream was made for
        self._refused: tuple[int, ...] = ()  # what there was no room to make one for
        self.off = False  # for the rest of a run

    def before(self, block: nn.Module, args: tuple, kwargs: dict) -> None:
        """A forward pre-hook."""
        if torch.compiler.is_compiling():
            return
        x, index = args[0], self._index[id(block)]
        if index == 0:
            self._begin(x, kwargs.get("transformer_options") or {})
        if self._queue is not None:
            prefetch.prefetch_queue_pop(self._queue, x.device, block)
        elif self._stream is not None:
            self._stream.enter(index)

    def after(self, block: nn.Module, args: tuple, kwargs: dict, output: object) -> None:
        """A forward hook."""
        if torch.compiler.is_compiling():
            return
        index = self._index[id(block)]
        if self._stream is not None:
            self._stream.leave(index)
        if self._queue is not None and index == len(self.blocks) - 1:
            queue, self._queue = self._queue, None
            prefetch.prefetch_queue_pop(queue, args[0].device, None)

    def failed(self, error: BaseException) -> None:
        """A pass raised: what was fetched for the next block goes, before anyone tries again."""
        if self._queue is not None:
            prefetch.cleanup_prefetch_queues()
        held = self._stream is not None
        self.close()
        if held and management.is_oom(error):
            self.off = True
            logger.warning(
                "out of device memory: in the rest of this run weights that do not fit come one by "
                "one as they are used, more slowly, which needs less"
            )

    def close(self) -> None:
        """Nothing of a pass is left on the device."""
        self._queue = None
        if self._stream is not None:
            self._stream.close()
        self._stream, self._fetched, self._refused = None, (), ()

    def _begin(self, x: Tensor, options: dict) -> None:
        self._queue = None
        if prefetch is not None:
            self._queue = prefetch.make_prefetch_queue(list(self.blocks), x.device, options)
        if (
            self._queue is None
            and not self.off
            and not options.get("prefetch_dynamic_vbars", False)
        ):
            self._settle(x)

    def _settle(self, x: Tensor) -> None:
        """A stream for the weights that are elsewhere now; the last one, if these are the same."""
        away = partial(is_away, x.device)
        fetched = tuple(
            id(stored)
            for block in self.blocks
            for module in block.modules()
            for stored in module._parameters.values()
            if stored is not None and away(module, stored)
        )
        if fetched == self._fetched and torch.is_inference_mode_enabled():
            return
        refused = self._refused
        self.close()
        if not fetched or fetched == refused or not torch.is_inference_mode_enabled():
            self._refused = refused
            return
        lane = lane_for(x.device)
        if lane is None:
            return
        try:
            self._stream = WeightStream(
                self.blocks, x.device, lane, budget=pinned_budget(), read=read, away=away
            )
        except torch.OutOfMemoryError:
            self._refused = fetched
            logger.warning(
                "no room on the device for %d transformer blocks: weights that do not fit come one "
                "by one as they are used, more slowly",
                SLOTS,
            )
            return
        self._fetched = fetched
        logger.info(
            "%d of %d blocks are fetched a block ahead, %.2f GB a pass",
            len(self._stream.indices),
            len(self.blocks),
            self._stream.nbytes / 1e9,
        )


def read(source: Tensor, out: Tensor) -> None:
    """The bytes of a weight: from its file, where it is mapped, so that a file that was cut is an
    error; else from memory. Raises what `MappedFile.read_into` raises."""
    place = origin(source)
    if place is None:
        out.copy_(source.contiguous().view(-1).view(torch.uint8))
    else:
        place.file.read_into(place.offset, out)


def _let_go_after_an_error(executor: WrapperExecutor, *args: object, **kwargs: object) -> object:
    """Around each pass and not hooks that are called after errors: torch.compile watches numbers
    of those, and a model whose hooks are put in again would be compiled again."""
    try:
        return executor(*args, **kwargs)
    except BaseException as error:
        ahead = vars(executor.class_obj).get(KEY)
        if ahead is not None:
            ahead.failed(error)
        raise


def _end(patcher: comfy.model_patcher.ModelPatcher) -> None:
    """After a run: the slots and the pinned copies are others' again."""
    ahead = vars(patcher.model).get(KEY)
    if ahead is not None:
        ahead.close()
        ahead.off = False


def _hook(
    patcher: comfy.model_patcher.ModelPatcher, modules: injected.Modules
) -> Iterator[injected.TakeOut]:
    blocks = [modules[f"layers.{index}"] for index in range(len(modules["layers"]))]
    ahead = vars(patcher.model).get(KEY)
    if ahead is None or ahead.blocks != blocks:
        ahead = Ahead(blocks)
        setattr(patcher.model, KEY, ahead)
    yield ahead.close
    for block in blocks:
        yield block.register_forward_pre_hook(ahead.before, with_kwargs=True).remove
        yield block.register_forward_hook(ahead.after, with_kwargs=True).remove
