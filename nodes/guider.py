"""Classifier-free guidance with a separate-weight unconditional copy, as the reference does it.

``v = g * v_cond + (1 - g) * v_uncond`` in float32. The unconditional copy sees image tokens only;
g follows the step, in sampling order. Denoised pictures are ``x - sigma * v``, so the host's
combination of denoised pictures is the same thing.
"""

from __future__ import annotations

import logging
import math
from contextlib import AbstractContextManager, nullcontext

import comfy.model_management as management
import comfy.model_patcher
import comfy.patcher_extension as extension
import comfy.sampler_helpers
import comfy.samplers
import torch
from torch import Tensor

from ..checkpoint.copies import CONDITIONAL, COPIES, UNCONDITIONAL
from ..ops.finite import check_latents
from ..sampling import StepPlan, step_at
from . import one_copy, residency
from .guidance import Guidance
from .hook_loras import take_hooks
from .one_branch import one_branch_of, settle
from .pairing import check_conditioning, check_pair
from .passes import Passes
from .predictions import predict

logger = logging.getLogger(__name__)
_ADDITIONAL = "ideogram4_quant_unconditional"
_STREAM = "ideogram4_quant_streamed"
_ALL = 1e20  # bytes, more than any device has: what the host asks for where weights stay in RAM
IMAGE_ONLY = [[None, {}]]  # a conditioning without text: the model then runs image tokens alone


class DualCopyGuider(comfy.samplers.CFGGuider):
    """A host guider over a conditional and an optional unconditional model.

    Each runs with its own model options, so that a patch on one never acts on the other. Without an
    unconditional model there is nothing to guide away from: the conditional prediction is the
    result. keep: which copies stay on the device, one of `residency.CHOICES`. A pass that runs out
    of memory is made again, once in a run, with the next smaller residency: the step's inputs are
    as they were, so the picture is the same. unconditional_from: one of `one_copy.CHOICES`; two
    patchers of one model are one resident copy for both passes.
    """

    def __init__(
        self,
        conditional: comfy.model_patcher.ModelPatcher,
        unconditional: comfy.model_patcher.ModelPatcher | None,
        positive: list,
        guidance: Guidance,
        keep: str = residency.AUTO,
        unconditional_from: str = one_copy.INPUT,
    ):
        unconditional = one_copy.chosen(conditional, unconditional, unconditional_from)
        check_pair(conditional, unconditional)
        guidance, self.said = settle(conditional, unconditional, guidance)
        self.one_branch = one_branch_of(conditional)
        for line in self.said:
            logger.log(logging.WARNING if self.one_branch is None else logging.INFO, "%s", line)
        check_conditioning(conditional, positive)
        self.one_copy = unconditional is not None and unconditional.is_clone(conditional)
        if self.one_copy:
            one_copy.check_shared(conditional, unconditional)
            unconditional = unconditional.clone()
            unconditional.is_injected = False  # the host copies the mark, but it is not loaded
        conditional = conditional.clone()
        take_hooks(conditional)
        super().__init__(conditional)
        self.unconditional = unconditional
        self.guidance = guidance
        self.keep = keep
        self.kept = keep  # what the last run made of it
        self.inner_set_conds({"positive": positive})
        self.passes = Passes()  # of the last run
        self._steps: tuple[StepPlan, ...] = ()
        self._negative: list = []
        self._unconditional_options: dict = {}
        self._last_velocity: Tensor | None = None
        self._turn: comfy.model_patcher.ModelPatcher | None = None  # on the device, if in turns
        self._working_memory = 0
        self._shrunk = False  # out of memory once in this run

    def outer_sample(self, noise, latent_image, sampler, sigmas, *args, **kwargs):
        self._steps = self.guidance.plan(sigmas.tolist())
        self._last_velocity = self._turn = None
        self._shrunk = False
        self.passes = Passes()
        if self.unconditional is None:
            self.kept = residency.BOTH  # all that there is; the host streams what does not fit
            found = super().outer_sample(noise, latent_image, sampler, sigmas, *args, **kwargs)
            return self._checked(found)
        self._negative = comfy.sampler_helpers.convert_cond(IMAGE_ONLY)
        self._unconditional_options = self._own_options(sigmas)
        self._settle_residency(noise)
        try:
            found = super().outer_sample(noise, latent_image, sampler, sigmas, *args, **kwargs)
            return self._checked(found)
        finally:
            # the host cleans additional models up after a good run only, and this clone never
            if self.one_copy or self.unconditional.model.current_patcher is not None:
                self.unconditional.cleanup()
            self._last_velocity = self._turn = None

    def _checked(self, latents: Tensor) -> Tensor:
        """The latents, which are numbers: OpError names the weight that made them none."""
        copies = dict(zip(COPIES, (self.model_patcher, self.unconditional), strict=True))
        models = {c: p and p.model.diffusion_model for c, p in copies.items()}
        check_latents(latents, models)
        return latents

    def inner_sample(
        self, noise, latent_image, device, sampler, sigmas, denoise_mask, *args, **kwargs
    ):
        if self.unconditional is not None:
            with self._as_unconditional():
                self.unconditional.pre_run()
                model = self.unconditional.model
                model.latent_shapes = kwargs.get("latent_shapes")
                self._negative = comfy.samplers.process_conds(
                    model,
                    noise,
                    {"negative": self._negative},
                    device,
                    latent_image,
                    denoise_mask,
                    latent_shapes=kwargs.get("latent_shapes"),
                )["negative"]
        return super().inner_sample(
            noise, latent_image, device, sampler, sigmas, denoise_mask, *args, **kwargs
        )

    def outer_predict_noise(self, x, timestep, model_options=None, seed=None):
        # set before the host's wrappers run, so that one that overrides the cfg has its way
        step = step_at(self._steps, float(timestep.flatten()[0]))
        self.cfg = step.guidance
        self.passes.asked(step, self.unconditional is not None)
        return super().outer_predict_noise(x, timestep, model_options or {}, seed)

    def predict_noise(self, x, timestep, model_options=None, seed=None):
        velocity = self._last_velocity
        while True:
            try:
                return self._predict(x, timestep, model_options or {})
            except Exception as error:
                if not management.is_oom(error):
                    raise
                reason = error.with_traceback(None)  # its frames hold what the pass had allocated
            self._make_room(reason)
            self._last_velocity = velocity

    def _predict(self, x: Tensor, timestep: Tensor, model_options: dict) -> Tensor:
        """Both copies' predictions, combined: denoised latents [B, C, H, W]."""
        skippable = not model_options.get("disable_cfg1_optimization", False)
        if self.unconditional is None or (math.isclose(self.cfg, 1.0) and skippable):
            conditional = self._predict_conditional(x, timestep, model_options)
            return self._combine(x, timestep, model_options, conditional)
        if self._turn is self.unconditional:  # it is there, so it goes first
            unconditional = self._predict_unconditional(x, timestep)
            conditional = self._predict_conditional(x, timestep, model_options)
        else:
            conditional = self._predict_conditional(x, timestep, model_options)
            unconditional = self._predict_unconditional(x, timestep)
        return self._combine(x, timestep, model_options, conditional, unconditional)

    def _combine(
        self,
        x: Tensor,
        timestep: Tensor,
        model_options: dict,
        conditional: Tensor,
        unconditional: Tensor | None = None,
    ) -> Tensor:
        """Guidance as the host's own: other nodes' functions before and after it run too.

        Without an unconditional prediction they see zeros and a scale of 1, as in the host, and the
        result is the conditional one.
        """
        guided = unconditional is not None
        scale = self.cfg if guided else 1.0
        negative = self._negative if guided else None
        predictions = [conditional, unconditional if guided else torch.zeros_like(conditional)]
        for function in model_options.get("sampler_pre_cfg_function", ()):
            predictions = function(
                {
                    "conds": [self.conds["positive"], negative],
                    "conds_out": predictions,
                    "cond_scale": scale,
                    "timestep": timestep,
                    "input": x,
                    "sigma": timestep,
                    "model": self.inner_model,
                    "model_options": model_options,
                }
            )
        return comfy.samplers.cfg_function(
            self.inner_model,
            *predictions[:2],
            scale,
            x,
            timestep,
            model_options=model_options,
            cond=self.conds["positive"],
            uncond=negative,
        )

    def _predict_conditional(self, x: Tensor, timestep: Tensor, model_options: dict) -> Tensor:
        """The conditional copy's denoised latents [B, C, H, W]."""
        self._take_turn(self.model_patcher)
        conds = [self.conds["positive"], None]
        options = self.passes.watched(model_options)
        return self.passes.counted(
            CONDITIONAL, lambda: predict(self.inner_model, conds, x, timestep, options)[0]
        )

    def _predict_unconditional(self, x: Tensor, timestep: Tensor) -> Tensor:
        """The unconditional copy's denoised latents [B, C, H, W]; a velocity is kept for reuse."""
        sigma = timestep.reshape(-1, *[1] * (x.ndim - 1))
        step = step_at(self._steps, float(timestep.flatten()[0]))
        if step.unconditional == "reuse" and self._last_velocity is not None:
            return x - sigma * self._last_velocity
        self._take_turn(self.unconditional)
        # second in the list, so that patches that ask see it marked as the unconditional one
        model, conds = self.unconditional.model, [None, self._negative]
        options = self.passes.watched(self._unconditional_options)
        with self._as_unconditional():
            denoised = self.passes.counted(
                UNCONDITIONAL, lambda: predict(model, conds, x, timestep, options)[1]
            )
        if self.guidance.reuse > 1:
            self._last_velocity = (x - denoised) / sigma
        return denoised

    def _as_unconditional(self) -> AbstractContextManager:
        """What an unconditional pass runs within."""
        if not self.one_copy:
            return nullcontext()
        return one_copy.turn(self.model_patcher, self.unconditional)

    def _settle_residency(self, noise: Tensor) -> None:
        """Asks for both copies by one request, has them take turns, or keeps them in RAM."""
        patcher = self.model_patcher
        need, least = comfy.sampler_helpers.estimate_memory(patcher, noise.shape, self.conds)
        self._working_memory = need
        if self.one_copy:  # nothing to take turns with; the host streams what does not fit
            streamed = self.keep == residency.STREAMED
            self.kept = residency.STREAMED if streamed else residency.BOTH
        else:
            sizes = tuple(residency.size(p, _ADDITIONAL) for p in (patcher, self.unconditional))
            memory = management.get_total_memory(patcher.load_device)
            self.kept = residency.choose(self.keep, sizes, int(least), memory)
        if self.kept == residency.ALTERNATING:
            patcher.remove_additional_models(_ADDITIONAL)
            self._turn = patcher
        else:
            patcher.set_additional_models(_ADDITIONAL, self._loaded_with(patcher))
        if self.kept == residency.STREAMED:
            extension.add_wrapper_with_key(
                extension.WrappersMP.PREPARE_SAMPLING,
                _STREAM,
                _keep_in_ram,
                self.model_options,  # the run's own, which the host takes back after it
                is_model_options=True,
            )

    def _loaded_with(self, patcher: comfy.model_patcher.ModelPatcher) -> list:
        """What the unconditional pass needs on the device beside the conditional copy."""
        if self.one_copy:
            return one_copy.beside(patcher, self.unconditional)
        return [self.unconditional]

    def _take_turn(self, patcher: comfy.model_patcher.ModelPatcher) -> None:
        if self.kept != residency.ALTERNATING or self._turn is patcher:
            return
        management.load_models_gpu(
            residency.whole(patcher, _ADDITIONAL), memory_required=self._working_memory
        )
        self._turn = patcher

    def _make_room(self, reason: Exception) -> None:
        """Go on with the next smaller residency; OutOfDeviceMemoryError if this helped already."""
        device = self.model_patcher.load_device
        alone = self.unconditional is None or self.one_copy
        smaller = residency.smaller(self.kept, copies=1 if alone else 2)
        if self._shrunk or smaller is None:
            free = management.get_free_memory(device)
            raise residency.out_of_memory(self.kept, free) from reason
        logger.warning(
            "out of device memory with %s copies on the device; this step is made again, and the "
            "next ones, with residency %s: slower, the same picture",
            self.kept,
            smaller,
        )
        self._shrunk, self.kept, self._turn = True, smaller, None
        management.free_memory(_ALL, device)
        management.soft_empty_cache()
        if smaller == residency.STREAMED:
            models = residency.whole(self.model_patcher, _ADDITIONAL)
            if self.unconditional is not None:
                others = self._loaded_with(self.model_patcher)
                models += [
                    model for other in others for model in residency.whole(other, _ADDITIONAL)
                ]
            management.load_models_gpu(models, memory_required=_ALL)

    def _own_options(self, sigmas: Tensor) -> dict:
        """The unconditional copy's model options, prepared as the host prepares the other's."""
        options = comfy.model_patcher.create_model_options_clone(self.unconditional.model_options)
        comfy.sampler_helpers.prepare_model_patcher(
            self.unconditional, {"negative": self._negative}, options
        )
        options["transformer_options"]["sample_sigmas"] = sigmas
        return options


def _keep_in_ram(prepare, *args, **kwargs):
    """The host's preparation of a run, asking for so much room that weights stay in RAM."""
    return prepare(*args, **kwargs | {"force_offload": True})
