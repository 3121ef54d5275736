"""What this pack puts onto a model's modules, for as long as the host has the model injected.

The host copies a patcher's injections to its clones, and a clone may share the patcher's model or
own another one (torch.compile, conditionings with hooks, several GPUs). So nothing is bound to
modules beforehand: each time the host injects a patcher, names are looked up in the model that this
patcher has, and what was put in is written down on that model.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from types import MethodType
from typing import TypeVar

from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import CallbacksMP, PatcherInjection
from torch import nn

from ..errors import OpError

_RECORD = "ideogram4_quant_injected"  # on every model: key -> what is in now
_COVERED = "ideogram4_quant_covered"  # on every model: marks under forwards of other nodes
_MADE = "ideogram4_quant_made"  # on every model: (key, name) -> (module, what was made for it)
HOOKS = "ideogram4_quant_side_paths"  # on every module that had a hook: the tags of those there
_TAG = "ideogram4_quant_tag"  # on whatever hooks belong to
_TAGS = map(str, itertools.count())  # never used again, as an id would be

T = TypeVar("T")
TakeOut = Callable[[], None]
Put = Callable[[ModelPatcher, "Modules"], Iterator[TakeOut]]


def follow(patcher: ModelPatcher, key: str, put: Put, *, same_results: bool = False) -> None:
    """Have ``put`` run on whatever model this patcher, or a clone of it, is injected into.

    ``put(patcher, modules)`` changes modules, which it finds by canonical name, and yields how each
    change is taken out again. It replaces what the patcher had under ``key``, and what another
    patcher of the same model has in under it. same_results: by itself the model gives what it gives
    without it, so it is none of the changes that `changing` tells.
    """

    def inject(patcher: ModelPatcher) -> None:
        placed = _placed(patcher.model)
        _take_out(placed.pop(key, None))
        now = placed[key] = _Placed(weakref.ref(patcher))
        try:
            for take_out in put(patcher, Modules(patcher)):
                now.ways_out.append(take_out)
        except BaseException:
            _take_out(placed.pop(key))
            raise

    def eject(patcher: ModelPatcher) -> None:
        placed = _placed(patcher.model)
        now = placed.get(key)
        owner = None if now is None else now.owner()
        # a patcher that the garbage collector is ending is no longer seen by its reference
        if owner is None or owner is patcher:
            _take_out(placed.pop(key, None))

    kind_of = _SameResults if same_results else PatcherInjection
    patcher.set_injections(key, [kind_of(inject=inject, eject=eject)])
    for kind, callback in (
        (CallbacksMP.ON_CLONE, _starts_without),
        (CallbacksMP.ON_EJECT_MODEL, _unmark_the_rest),
    ):
        patcher.remove_callbacks_with_key(kind, key)
        patcher.add_callback_with_key(kind, key, callback)


def changing(patcher: ModelPatcher) -> list[str]:
    """The keys of what is injected into a model and may change what its linears give."""
    return [
        key
        for key, injections in patcher.injections.items()
        if not all(isinstance(each, _SameResults) for each in injections)
    ]


class _SameResults(PatcherInjection):
    """What runs the same model in another way."""


class Modules(Mapping[str, nn.Module]):
    """The modules of a patcher's transformer by canonical name; OpError for one that is missing."""

    def __init__(self, patcher: ModelPatcher):
        self._found = dict(patcher.model.diffusion_model.named_modules())
        # kept by the whole model, so that no module refers to itself through it
        self._made = vars(patcher.model).setdefault(_MADE, {})
        self._covered = vars(patcher.model).setdefault(_COVERED, [])

    def made(self, key: str, name: str, make: Callable[[nn.Module], T]) -> T:
        """``make(module)`` of the first time: to one object nothing is compiled twice."""
        module = self[name]
        if (key, name) not in self._made or self._made[key, name][0] is not module:
            self._made[key, name] = module, make(module)
        return self._made[key, name][1]

    def __getitem__(self, name: str) -> nn.Module:
        if name not in self._found:
            raise OpError(
                "a change was made for another model: this one lacks one of its modules",
                found=f"no {name}",
                hint="Connect the node to the model that it was made for, and run again.",
            )
        return self._found[name]

    def hook(self, name: str, function: Callable) -> TakeOut:
        """A forward hook on a module, so that a compiled model sees it come, go and be another.

        ``function``, a method, has to look for the `tag` of its object in
        ``module.ideogram4_quant_side_paths``. torch.compile does not watch a module's hooks, and
        would go on with what it compiled without them, or with others; it does watch attributes,
        such as these tags, and whether ``forward`` is one.
        """
        module = self[name]
        handle = module.register_forward_hook(function)
        here = tag(function.__self__)
        setattr(module, HOOKS, (*getattr(module, HOOKS, ()), here))
        mark = None
        if "forward" not in vars(module):
            mark = module.forward = MethodType(type(module).forward, module)

        def take_out() -> None:
            handle.remove()
            left = list(getattr(module, HOOKS))
            left.remove(here)
            setattr(module, HOOKS, tuple(left))
            if mark is not None and not _unmark(module, mark):
                self._covered.append((module, mark))

        return take_out

    def __iter__(self) -> Iterator[str]:
        return iter(self._found)

    def __len__(self) -> int:
        return len(self._found)


def tag(owner: object) -> str:
    """What tells an object whose methods are hooks from any other, as long as the process runs."""
    if _TAG not in vars(owner):
        setattr(owner, _TAG, next(_TAGS))
    return getattr(owner, _TAG)


@dataclass
class _Placed:
    owner: weakref.ref[ModelPatcher]
    ways_out: list[TakeOut] = field(default_factory=list)


def _placed(model: nn.Module) -> dict[str, _Placed]:
    """The record of one model; it goes with the model, so no two models share one."""
    return vars(model).setdefault(_RECORD, {})


def _take_out(placed: _Placed | None) -> None:
    while placed is not None and placed.ways_out:
        placed.ways_out.pop()()


def _unmark(module: nn.Module, mark: MethodType) -> bool:
    """False where another node has put its forward over the mark, and will put the mark back."""
    if vars(module).get("forward") is not mark:
        return False
    del module.forward
    return True


def _unmark_the_rest(patcher: ModelPatcher) -> None:
    """When everything is out, that of other nodes too."""
    covered = vars(patcher.model).get(_COVERED, [])
    while covered:
        _unmark(*covered.pop())


def _starts_without(patcher: ModelPatcher, clone: ModelPatcher) -> None:
    """The host copies the mark too, but nothing is in for the clone until it is injected itself."""
    clone.is_injected = False
