"""The source's tensors as the file's, one at a time, and what each of them lost."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from ..errors import CorruptFileError
from ..files.partial import Partial
from .calibration import blamed
from .encode import encode_tensor
from .measure import ErrorMeter, channel_absmax
from .plan import TensorPlan
from .quant_plan import QuantPlan, tensor_result
from .report import TensorResult


class TensorStream:
    """Turns the source's stream into stored tensors and keeps the figures of each.

    ``uncertain``: copy -> hash of its file, for copies whose calibration is of another file, so
    that their weights are compared with it. With ``partial``, tensors that an earlier run has
    written are neither read nor written; their figures come from its notes. ``advance`` is told how
    many bytes of the tensor at hand are encoded.
    """

    def __init__(
        self,
        plan: QuantPlan,
        uncertain: Mapping[str, str],
        *,
        device: torch.device | None = None,
        partial: Partial | None = None,
        advance: Callable[[float], None] = lambda nbytes: None,
    ) -> None:
        self._plan = plan
        self._uncertain = uncertain
        self._device = device
        self._partial = partial
        self._advance = advance
        self._meters: dict[tuple[str, str], ErrorMeter] = {}

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        """(name in the file, tensor); raises CorruptFileError if the source changed its shape."""
        plans = {(plan.copy, plan.name): plan for plan in self._plan.tensors}
        left = {key: plan for key, plan in plans.items() if not self._skip(plan)}
        for file, copy, name, tensor in self._plan.source.stream(only=left):
            plan = left[copy, name]
            if tuple(tensor.shape) != plan.shape:
                raise CorruptFileError(
                    "is not of the shape that the header gave",
                    file=file,
                    tensor=name,
                    found=list(tensor.shape),
                    needed=list(plan.shape),
                )
            if plan.quantized and copy in self._uncertain:
                absmax = channel_absmax(tensor)
                calibration = self._plan.options.calibration
                model = f"sha256 {self._uncertain[copy]}"
                calibration.check_weight(copy, plan.module, absmax, model)
            with blamed(self._plan.options.calibration, copy, plan.module):
                stored, meter = encode_tensor(
                    plan,
                    tensor,
                    file=file,
                    device=self._device,
                    advance=lambda share, nbytes=plan.nbytes: self._advance(nbytes * share),
                )
            self._meters[copy, name] = meter
            del tensor
            while stored:
                suffix = next(iter(stored))
                yield self._plan.stored_name(plan, suffix), stored.pop(suffix)
            if self._partial is not None:
                self._partial.note(_key(plan), meter.to_list())

    @property
    def results(self) -> tuple[TensorResult, ...]:
        """One a stored source tensor, in the file's order."""
        return tuple(
            tensor_result(self._plan, plan, self._meters[plan.copy, plan.name])
            for plan in self._plan.tensors
        )

    @property
    def meter(self) -> ErrorMeter:
        """The sums over all linears."""
        total = ErrorMeter()
        for plan in self._plan.tensors:
            if plan.linear:
                total.merge(self._meters[plan.copy, plan.name])
        return total

    def _skip(self, plan: TensorPlan) -> bool:
        """Whether an earlier run has written all of this tensor; then it stays."""
        if self._partial is None:
            return False
        meter = ErrorMeter.of(self._partial.notes.get(_key(plan)))
        if meter is None:
            return False
        stored = {**plan.encoding.parts(plan.shape), **plan.encoding.constants()}
        names = {self._plan.stored_name(plan, suffix) for suffix in stored}
        if not names <= self._partial.finished:
            return False
        for name in names:
            self._partial.skip(name)
        self._meters[plan.copy, plan.name] = meter
        return True


def fingerprint(
    plan: QuantPlan, metadata: Mapping[str, object], device: torch.device | None
) -> str:
    """SHA-256 of everything that decides the file's bytes; the source by its hash in ``metadata``.

    The device counts: sums of a rotation may differ between two of them in the last bit.
    """
    digest = hashlib.sha256()
    digest.update(json.dumps([dict(metadata), str(device)], sort_keys=True).encode())
    for tensor in plan.tensors:
        digest.update(json.dumps([tensor.copy, tensor.name, tensor.encoding.label]).encode())
        vectors = [*tensor.encoding.constants().values()]
        if (inputs := tensor.inputs) is not None:
            vectors += [inputs.square, inputs.directions, inputs.blocks]
        for vector in vectors:
            if vector is not None:
                digest.update(vector.contiguous().numpy().tobytes())
    return digest.hexdigest()


def _key(plan: TensorPlan) -> str:
    return f"{plan.copy}.{plan.name}"
