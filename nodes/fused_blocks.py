"""The fused block in the host: put in the place of the forward of every block.

Linears and attention are called as the host's modules, so weights come through the host's own casts
and whatever it does with them (patches, partial loads, dynamic memory) stays in force; they are
handed an ``Activation`` in place of a tensor. What another node hooks or replaces is left alone: a
linear or an attention gets plain values, and where a norm or the feed-forward is concerned, which
the fused block does not call, the block runs as the host wrote it.
"""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable, Iterator
from functools import partial

import comfy.model_management
import comfy.model_patcher
import comfy.ops
import torch
from comfy.patcher_extension import CallbacksMP
from torch import Tensor
from torch.nn.modules import module as torch_module

from ..ops import fused, kitchen_rope
from ..ops.dispatch import AUTO
from . import injected

logger = logging.getLogger(__name__)
KEY = "ideogram4_quant_fused_blocks"

_NORMS = ("attention_norm1", "attention_norm2", "ffn_norm1", "ffn_norm2")
_NOT_CALLED = (*_NORMS, "feed_forward")
_CHILDREN = {*_NOT_CALLED, "attention", "adaln_modulation"}
_FORWARD = ("x", "attn_mask", "freqs_cis", "adaln_input", "transformer_options")


def add_fused_blocks(patcher: comfy.model_patcher.ModelPatcher, backend: str = AUTO) -> None:
    """Patch every block of a model of this pack's loader to run fused.

    ``backend`` runs norms and residuals; the linears use what they were made with. Where the host's
    block is not the one known here nothing is patched, and the log and the report say so.
    """
    layers = patcher.model.diffusion_model.layers
    unknown = next((why for layer in layers if (why := _unknown(layer))), None)
    if unknown is not None:
        text = f"not used: this ComfyUI's Ideogram 4 block is another one ({unknown})"
        _say(text)
        patcher.set_attachments(KEY, text)
        return
    injected.follow(patcher, KEY, partial(_fuse, backend), same_results=True)
    patcher.add_callback_with_key(CallbacksMP.ON_PRE_RUN, KEY, _look)


def status(patcher: comfy.model_patcher.ModelPatcher) -> str | None:
    """How the blocks ran in the last sampling, for a report; None where none is patched."""
    return patcher.get_attachment(KEY)


class FusedForward:
    """A block's forward on the fused kernels."""

    def __init__(self, block: torch.nn.Module, backend: str):
        self.block = block
        self.backend = backend
        self._types = {name: type(block.get_submodule(name)) for name in _CHILDREN}
        self._alike = _smoothed_alike(block.feed_forward.w1, block.feed_forward.w3)

    def __call__(
        self,
        x: Tensor,
        attn_mask: Tensor | None,
        freqs_cis: Tensor,
        adaln_input: Tensor,
        transformer_options: dict = {},  # noqa: B006  (the host's signature)
    ) -> Tensor:
        block = self.block
        if _trains(x) or _watches_all() or any(True for _ in self.aside()):
            own = type(block).forward
            return own(block, x, attn_mask, freqs_cis, adaln_input, transformer_options)
        ffn, attention = block.feed_forward, block.attention

        def attend(h: fused.Activation) -> Tensor:
            plain = self._changed("attention") or _watched_linear(attention.qkv)
            h = h.dense() if plain else h
            heads = attention.num_heads, attention.head_dim
            with kitchen_rope.on_our_kernel(freqs_cis, heads, x):
                return attention(h, attn_mask, freqs_cis, transformer_options=transformer_options)

        parts = fused.BlockParts(
            modulation=block.adaln_modulation,
            attention=attend,
            w1=partial(_run, ffn.w1),
            w2=partial(_run, ffn.w2),
            w3=partial(_run, ffn.w3),
            norm_weight=lambda name: _norm_weight(getattr(block, name), x),
            eps=block.attention_norm1.eps,
            alike=self._alike,
        )
        return fused.block(x, adaln_input, parts, self.backend)

    def aside(self) -> Iterator[tuple[str, str]]:
        """What makes the whole block step aside: (module, why)."""
        for name in _NOT_CALLED:
            if why := self._changed(name):
                yield name, why

    def plain(self) -> Iterator[tuple[str, str]]:
        """What makes single modules get plain values: (module, why)."""
        if why := self._changed("attention"):
            yield "attention", why
        for name in ("attention.qkv", "feed_forward.w1", "feed_forward.w2", "feed_forward.w3"):
            module = self.block.get_submodule(name)
            # Weights patched as they are used come dense, and their linear asks for values itself.
            patched = "a patch applied on the fly" if module.weight_function else None
            if why := _watched_linear(module) or patched:
                yield name, why

    def _changed(self, name: str) -> str | None:
        module = getattr(self.block, name)
        return "another module" if type(module) is not self._types[name] else _watched(module)


def _run(module: torch.nn.Module, h: fused.Activation) -> Tensor:
    return module(h.dense() if _watched_linear(module) else h)


def _watched_linear(module: torch.nn.Module) -> str | None:
    takes = getattr(type(module), "takes_activations", False)
    return _watched(module) if takes else "another module"


def _watched(module: torch.nn.Module) -> str | None:
    """What of another node wants to see tensors here."""
    if module._forward_hooks or module._forward_pre_hooks:
        return "a forward hook"
    return "a replaced forward" if _replaced(module) else None


def _replaced(module: torch.nn.Module) -> bool:
    return getattr(module.forward, "__func__", None) is not type(module).forward


def _watches_all() -> bool:
    return bool(torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks)


def _trains(x: Tensor) -> bool:
    return comfy.model_management.in_training or (x.requires_grad and torch.is_grad_enabled())


def _norm_weight(norm: torch.nn.Module, x: Tensor) -> Tensor:
    weight, bias, stream = comfy.ops.cast_bias_weight(norm, x, offloadable=True)
    # It is used after the next weight is cast, perhaps into the same buffer.
    kept = weight if weight is norm.weight else weight.clone()
    comfy.ops.uncast_bias_weight(norm, weight, bias, stream)
    return kept


def _smoothed_alike(first: torch.nn.Module, second: torch.nn.Module) -> bool:
    """Whether two linears divide their input by the same smoothing vector."""
    params = (getattr(module.weight, "_params", None) for module in (first, second))
    a, b = (getattr(found, "smooth", None) for found in params)
    return a is not None and b is not None and a.shape == b.shape and bool(torch.equal(a, b))


def _unknown(block: torch.nn.Module) -> str | None:
    """How a block differs from the one that is written down in ``ops.fused``."""
    children = {name for name, _ in block.named_children()}
    if children != _CHILDREN:
        return f"it has {sorted(children ^ _CHILDREN)}"
    takes = tuple(inspect.signature(type(block).forward).parameters)[1:]
    return None if takes == _FORWARD else f"it takes {', '.join(takes)}"


def _fuse(
    backend: str, patcher: comfy.model_patcher.ModelPatcher, modules: injected.Modules
) -> Iterator[Callable[[], None]]:
    for index in range(len(modules["layers"])):
        name = f"layers.{index}"
        layer = modules[name]
        if _replaced(layer):
            continue  # another node's forward stays in force
        layer.forward = modules.made(
            f"{KEY}.{backend}", name, partial(FusedForward, backend=backend)
        )
        yield partial(_restore, layer)


def _restore(layer: torch.nn.Module) -> None:
    if isinstance(vars(layer).get("forward"), FusedForward):
        del layer.forward


def _look(patcher: comfy.model_patcher.ModelPatcher) -> None:
    """Before sampling: say, once, what steps aside."""
    layers = patcher.model.diffusion_model.layers
    notes: dict[str, list[int]] = {}
    for index, patch in enumerate(layer.forward for layer in layers):
        if not isinstance(patch, FusedForward):
            notes.setdefault("the block has another patch of its forward", []).append(index)
            continue
        for module, why in patch.aside():
            notes.setdefault(f"{module} has {why}: the block runs unfused", []).append(index)
        for module, why in patch.plain():
            notes.setdefault(f"{module} has {why}: it gets plain input", []).append(index)
    if _watches_all():
        notes["every module has a hook: the blocks run unfused"] = list(range(len(layers)))
    lines = [f"{note} (blocks {', '.join(map(str, found))})" for note, found in notes.items()]
    for line in lines:
        _say(line)
    patcher.set_attachments(KEY, "; ".join(["on", *lines]))


@functools.cache
def _say(line: str) -> None:
    logger.warning("fused blocks: %s", line)
