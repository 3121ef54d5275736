"""Weights that stay in main memory, fetched onto a device a transformer block ahead of their use.

Two slots on the device each hold one block's weights. While block i runs out of one, the next block
that has to be fetched comes into the other; when i is done, its slot takes the one after. A fetch
reads mapped files (or memory) into pinned memory and copies that to the slot on a stream of its
own: what the budget allows keeps its pinned copy for later passes, the rest goes through two
staging buffers. Streams and events are a `lanes.Lane`'s.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch
from comfy_kitchen.tensor.base import QuantizedTensor
from torch import Tensor, nn

from .lanes import Lane

logger = logging.getLogger(__name__)

SLOTS = 2
_ALIGNED = 1024  # bytes: what copy engines and kernels like, and no more than 1 % of a block

Read = Callable[[Tensor, Tensor], None]
"""``read(source, out)``: the bytes of a plain tensor into ``out`` (uint8, flat, on the CPU)."""

Away = Callable[[nn.Module, nn.Parameter], bool]
"""``away(module, parameter)``: whether a weight has to be fetched."""

_SLOW = 1.5e9  # bytes a second: memory gives more, most disks do not
_TELLING = 1 << 20  # bytes: of less a rate says nothing


@dataclass(frozen=True)
class _Part:
    """One plain tensor of a parameter, and where in a slot it goes."""

    source: Tensor
    start: int

    def view(self, slot: Tensor) -> Tensor:
        data = slot[self.start : self.start + self.source.nbytes]
        return data.view(self.source.dtype).view(self.source.shape)


@dataclass(frozen=True)
class _Weight:
    module: nn.Module
    name: str
    stored: nn.Parameter
    parts: Mapping[str, _Part]
    context: object  # what a quantized tensor is put together with; None for a plain one

    def on(self, slot: Tensor) -> nn.Parameter:
        views = {name: part.view(slot) for name, part in self.parts.items()}
        if self.context is None:
            return nn.Parameter(views[""], requires_grad=False)
        kind = type(self.stored)
        whole = kind.__tensor_unflatten__(views, self.context, self.stored.shape, None)
        return nn.Parameter(whole, requires_grad=False)


@dataclass(frozen=True)
class _Block:
    weights: tuple[_Weight, ...]
    nbytes: int

    @classmethod
    def of(cls, block: nn.Module, away: Away) -> _Block:
        weights, nbytes = [], 0
        for module in block.modules():
            for name, stored in module.named_parameters(recurse=False):
                if not stored.numel() or not away(module, stored):
                    continue
                plain, context = {"": stored}, None
                if isinstance(stored, QuantizedTensor):
                    names, context = stored.__tensor_flatten__()
                    plain = {inner: getattr(stored, inner) for inner in names}
                parts = {}
                for inner, tensor in plain.items():
                    parts[inner] = _Part(tensor.detach(), nbytes)
                    nbytes += -(-tensor.nbytes // _ALIGNED) * _ALIGNED
                weights.append(_Weight(module, name, stored, parts, context))
        return cls(tuple(weights), nbytes)


@dataclass
class _Slot:
    memory: Tensor
    free: object  # the mark after which it may be written


@dataclass
class _Coming:
    slot: _Slot
    mark: Future


class WeightStream:
    """Blocks whose weights are elsewhere than ``device``, lent to it one after the other.

    Call ``enter(i)`` before block i runs and ``leave(i)`` after it, also after an error; ``close``
    when the pass is over. In between the block's modules have their weights on the device: a low
    rank patch that is applied as a weight is used sees nothing new. Raises what ``read`` raises, in
    ``enter``, and torch's error for a device without room for the slots, when it is made.

    budget: bytes of pinned memory that may be taken beside the two staging buffers. away: which
    weights are fetched; without it those on another device.
    """

    def __init__(
        self,
        blocks: Sequence[nn.Module],
        device: torch.device,
        lane: Lane,
        *,
        budget: int,
        read: Read,
        away: Away | None = None,
        executor: Executor | None = None,
    ):
        self._blocks: dict[int, _Block] = {}
        for index, block in enumerate(blocks):
            found = _Block.of(block, away or (lambda _, stored: stored.device != device))
            if found.weights:
                self._blocks[index] = found
        self._order = list(self._blocks)
        self._lane, self._read, self._budget = lane, read, budget
        largest = max((block.nbytes for block in self._blocks.values()), default=0)
        self._largest = largest
        memory = [torch.empty(largest, dtype=torch.uint8, device=device) for _ in range(SLOTS)]
        # what the work has freed before, it may still be using
        self._free = [_Slot(slot, lane.done(None)) for slot in memory]
        self._coming: dict[int, _Coming] = {}
        self._lent: dict[int, _Slot] = {}
        self._kept: dict[int, Tensor] = {}
        self._read_once: set[int] = set()
        self._said_slow = False
        self._staging: list[tuple[Tensor, object]] | None = None
        self._executor = executor or ThreadPoolExecutor(1, thread_name_prefix="weights")

    @property
    def indices(self) -> tuple[int, ...]:
        """Blocks that have weights to fetch."""
        return tuple(self._order)

    @property
    def nbytes(self) -> int:
        """Bytes that one pass fetches."""
        return sum(block.nbytes for block in self._blocks.values())

    @property
    def kept(self) -> int:
        """Bytes of pinned memory that keep copies of blocks."""
        return sum(tensor.nbytes for tensor in self._kept.values())

    def enter(self, index: int) -> None:
        """Block ``index`` has its weights on the device; the next block's are on their way."""
        if index not in self._blocks:
            return
        if index not in self._coming:
            self._drop()  # another order than the last pass had
            self._fetch(index)
        self._ahead(index)
        coming = self._coming.pop(index)
        try:
            mark = coming.mark.result()
        except BaseException:
            self._free.append(coming.slot)
            raise
        self._lane.wait(index, mark)
        self._lent[index] = coming.slot
        for weight in self._blocks[index].weights:
            weight.module._parameters[weight.name] = weight.on(coming.slot.memory)

    def leave(self, index: int) -> None:
        """The block has its stored weights again, and its slot takes the next one."""
        slot = self._lent.pop(index, None)
        if slot is None:
            return
        for weight in self._blocks[index].weights:
            weight.module._parameters[weight.name] = weight.stored
        slot.free = self._lane.done(index)
        self._free.append(slot)
        self._ahead(index)

    def close(self) -> None:
        """Every block has its stored weights; nothing is fetched any more."""
        for index in list(self._lent):
            self.leave(index)
        self._drop()
        self._executor.shutdown(wait=True)

    def _ahead(self, index: int) -> None:
        """Fetch what comes after ``index`` into the slots that are free."""
        for following in self._order[self._order.index(index) + 1 :]:
            if not self._free:
                return
            if following not in self._coming and following not in self._lent:
                self._fetch(following)

    def _fetch(self, index: int) -> None:
        if not self._free:
            return
        slot = self._free.pop(0)
        work = torch.inference_mode()(self._bring)  # as the caller's; modes are a thread's own
        self._coming[index] = _Coming(slot, self._executor.submit(work, index, slot))

    def _bring(self, index: int, slot: _Slot) -> object:
        block = self._blocks[index]
        pinned, staged = self._pinned(index, block.nbytes)
        if pinned is None:  # from where it lies; the copy then holds up its thread, no one else
            return self._lane.fetch(index, slot.free, lambda: self._copy_plain(block, slot))
        size, mark = block.nbytes, None

        def copy() -> None:
            slot.memory[:size].copy_(pinned[:size], non_blocking=True)

        try:
            if staged or index not in self._kept:
                self._fill(index, block, pinned)
            if not staged:
                self._kept[index] = pinned
            mark = self._lane.fetch(index, slot.free, copy)
        finally:
            if staged:  # also after a read that failed: the next one needs it
                self._staging.append((pinned, mark))
        return mark

    def _fill(self, index: int, block: _Block, pinned: Tensor) -> None:
        start = time.perf_counter()
        for weight in block.weights:
            for part in weight.parts.values():
                self._read(part.source, pinned[part.start : part.start + part.source.nbytes])
        rate = block.nbytes / max(time.perf_counter() - start, 1e-9)
        if index not in self._read_once:
            self._read_once.add(index)  # the first time from the disk, of course
        elif rate < _SLOW and block.nbytes > _TELLING and not self._said_slow:
            self._said_slow = True
            logger.warning(
                "weights come from the disk in every pass, at %.2f GB/s: main memory is too small "
                "to keep them, and steps wait for it; a smaller level or fewer other programs help",
                rate / 1e9,
            )

    def _copy_plain(self, block: _Block, slot: _Slot) -> None:
        for weight in block.weights:
            for part in weight.parts.values():
                part.view(slot.memory).copy_(part.source)

    def _pinned(self, index: int, nbytes: int) -> tuple[Tensor | None, bool]:
        """(pinned memory for a block, whether it is a staging buffer)."""
        if index in self._kept:
            return self._kept[index], False
        if self._staging is None:
            made = [self._lane.pinned(self._largest) for _ in range(SLOTS)]
            self._staging = [(buffer, None) for buffer in made if buffer is not None]
            if not self._staging:
                logger.warning(
                    "no pinned memory for weights that stay in main memory: they are copied "
                    "without it, more slowly"
                )
        if nbytes <= self._budget - self.kept:
            own = self._lane.pinned(nbytes)
            if own is not None:
                return own, False
            self._budget = self.kept
        if not self._staging:
            return None, False
        buffer, mark = self._staging.pop(0)
        if mark is not None:
            self._lane.finish(mark)
        return buffer, True

    def _drop(self) -> None:
        for coming in self._coming.values():
            error = coming.mark.exception()
            if error is None:
                self._lane.finish(coming.mark.result())
            self._free.append(coming.slot)
        self._coming.clear()
