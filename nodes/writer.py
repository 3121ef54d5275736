"""What makes the encoder write: final norm, head and vision tower, beside the conditioning model.

They are read when something is written for the first time, have a patcher of their own, and are on
the device only while something is written: conditioning neither waits for them nor sees them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import comfy.model_management as management
import comfy.model_patcher
import torch
from comfy.text_encoders.llama import RMSNorm
from comfy.text_encoders.qwen3vl import Qwen3VLVisionModel
from torch import Tensor

from ..captions.tokens import Constraint, constraints
from ..checkpoint import EncoderCheckpoint
from ..checkpoint.encoder_writing import HEAD, Part, find_head, find_vision, head_beside
from ..errors import CheckpointError, OpError
from ..quant.tables import gigabytes
from .host_ops import make_ops
from .model_files import host_listing

logger = logging.getLogger(__name__)
NORM = "norm.weight"
WITH_HEAD = (
    "Load one that has it, such as qwen3vl_8b_fp8_scaled.safetensors (from Comfy-Org/Qwen3-VL), or "
    "put the head alone, the file of diffusers/qwen3-vl-8b-instruct-lm-head, into "
    "models/text_encoders: it is found there by itself."
)
WITH_VISION = (
    "Load an encoder with vision, such as qwen3vl_8b_fp8_scaled.safetensors (from "
    "Comfy-Org/Qwen3-VL), or disconnect the picture."
)
# what the host's picture preparation has fixed
_PATCHES = {"patch_size": 16, "temporal_patch_size": 2, "spatial_merge_size": 2, "in_channels": 3}
_END = "<|im_end|>"  # of a turn


class _Head(torch.nn.Module):
    """Hidden states after the last layer -> logits."""

    def __init__(self, config: dict, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        hidden, words = config["hidden_size"], config["vocab_size"]
        self.norm = RMSNorm(hidden, config["rms_norm_eps"], device=device, dtype=dtype)
        self.lm_head = make_ops(dtype).Linear(hidden, words, bias=False, device=device, dtype=dtype)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.lm_head(self.norm(hidden))


class Writer:
    """The parts for writing of one encoder, each read from its file when it is needed first."""

    def __init__(self, encoder: EncoderCheckpoint, dtype: torch.dtype) -> None:
        self._encoder, self._dtype = encoder, dtype
        self._patchers: dict[str, comfy.model_patcher.ModelPatcher] = {}
        self._head_part: Part | None = None
        self._constraints: tuple[Callable[[], Constraint] | None] | None = None

    @property
    def head(self) -> torch.nn.Module:
        """The final norm and the head; CheckpointError where no file has one."""
        return self._patcher("head", self._read_head).model

    @property
    def vision(self) -> torch.nn.Module:
        """The vision tower; CheckpointError where the encoder's file has none."""
        return self._patcher("vision", self._read_vision).model

    def check(self, *, picture: bool) -> None:
        """CheckpointError, before anything is read, where a part for writing is missing."""
        if self._find_head() is None:
            raise CheckpointError(
                "this encoder cannot write: it has no head",
                file=self._encoder.paths[0].name,
                found=f"no {HEAD}, in it or in models/text_encoders",
                hint=WITH_HEAD,
            )
        if NORM not in self._encoder.entries:
            raise CheckpointError(
                "this encoder cannot write: its file lacks the final norm",
                file=self._encoder.paths[0].name,
                found=f"no {NORM}",
                hint=WITH_HEAD,
            )
        if picture and find_vision(self._encoder) is None:
            raise CheckpointError(
                "this encoder cannot look at pictures: its file has no vision tower",
                file=self._encoder.paths[0].name,
                found="no tensor under visual.",
                hint=WITH_VISION,
            )

    def to_device(self, model: torch.nn.Module, tokens: int, *, picture: bool) -> None:
        """Loads the parts beside the encoder ``model``, with room for the keys and values."""
        self.check(picture=picture)
        _ = self.head, self.vision if picture else None
        wanted = list(self._patchers.values()) if picture else [self._patchers["head"]]
        # the encoder too, or the host would move it out to make room
        loaded = [p for p in management.loaded_models() if p is not None and p.model is model]
        management.load_models_gpu([*loaded, *wanted], memory_required=self._cache_bytes(tokens))

    def constraint(self, tokenizer: object) -> Constraint | None:
        """What keeps one caption to the schema, where outlines is installed."""
        if self._constraints is None:
            self._constraints = (constraints(tokenizer),)
        make = self._constraints[0]
        return None if make is None else make()

    def said(self) -> str:
        """Which files were read for writing, and how much memory they take."""
        parts = [f"{name} {gigabytes(p.model_size())}" for name, p in self._patchers.items()]
        file = "" if self._head_part is None else f" ({self._head_part.path.name})"
        return f"{', '.join(parts)}{file}, on the device only while a caption is written"

    def _cache_bytes(self, tokens: int) -> int:
        config = self._encoder.config
        size = config["num_hidden_layers"] * config["num_key_value_heads"] * config["head_dim"]
        return 2 * size * tokens * self._dtype.itemsize

    def _find_head(self) -> Part | None:
        if self._head_part is None:
            own = find_head(self._encoder)
            self._head_part = own or head_beside(host_listing("text_encoders"), self._encoder)
        return self._head_part

    def _patcher(
        self, name: str, read: Callable[[torch.device], torch.nn.Module]
    ) -> comfy.model_patcher.ModelPatcher:
        if name not in self._patchers:
            offload = management.text_encoder_offload_device()
            patcher = comfy.model_patcher.CoreModelPatcher(
                read(offload).eval().requires_grad_(False),
                load_device=management.text_encoder_device(),
                offload_device=offload,
            )
            patcher.set_model_compute_dtype(torch.float32)  # as the host does for its encoders
            self._patchers[name] = patcher
            logger.info("for writing captions: %s", self.said())
        return self._patchers[name]

    def _read_head(self, device: torch.device) -> torch.nn.Module:
        self.check(picture=False)
        module = _Head(self._encoder.config, self._dtype, device)
        norm = self._encoder.entries[NORM].read(self._dtype)
        module.load_state_dict({NORM: norm, **self._head_part.load(self._dtype)}, assign=True)
        return module

    def _read_vision(self, device: torch.device) -> torch.nn.Module:
        self.check(picture=True)
        part = find_vision(self._encoder)
        for key, needed in _PATCHES.items():
            if part.config[key] != needed:
                raise OpError(
                    f"ComfyUI prepares pictures for another {key}",
                    found=part.config[key],
                    needed=needed,
                    hint="Disconnect the picture.",
                )
        ops = make_ops(self._dtype)
        module = Qwen3VLVisionModel(dict(part.config), device=device, dtype=self._dtype, ops=ops)
        try:
            module.load_state_dict(part.load(self._dtype), assign=True)
        except RuntimeError as error:  # torch's word for keys and shapes that do not fit
            raise CheckpointError(
                "the vision tower in this file is not that of Qwen3-VL",
                file=part.path,
                found=str(error).splitlines()[-1].strip(),
                hint="Disconnect the picture.",
            ) from error
        return module


def stop_tokens(tokenizer: object) -> list[int]:
    """The tokens at which an answer ends, by the tokenizer's own vocabulary, as in diffusers."""
    return [tokenizer.get_vocab().get(_END, tokenizer.eos_token_id)]
