"""Load Ideogram 4 (quantized)."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace

from comfy_api.latest import io, ui

from ..checkpoint.copies import CONDITIONAL, COPIES
from ..checkpoint.level_order import AUTO, LEVELS, SAME
from ..checkpoint.listing import stamp
from ..errors import Ideogram4QuantError
from ..ops.linear import LinearOptions
from . import report
from .attention_choice import followed
from .connections import leads_anywhere, running_graph
from .fused_choice import decide
from .missing_copy import check_complete
from .model_choice import BRANCHES, BY_LEVEL, FOLDERS, NONE, choose_files, machine, missing_picks
from .model_files import host_listing, host_stamp, known_listing
from .model_inputs import GGUF_COMPUTE, INT8_COMPUTE, loader_inputs
from .model_loading import ModelSource, load_model, measured
from .picture_notes import note_when_sampling
from .schema import CATEGORY
from .unconditional_lora import FOLDERS as LORA_FOLDERS
from .unconditional_lora import unconditional_of

logger = logging.getLogger(__name__)
_NO_FILE = (BY_LEVEL, NONE)
_FILE_INPUTS = (
    "conditional_file",
    "unconditional_file",
    "base_file",
    "trust_files",
    "branches",
    "unconditional_level",
)


class LoadIdeogram4(io.ComfyNode):
    """A quantization level, or files by name -> both copies as MODELs, and a report."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="Ideogram4QuantLoad",
            display_name="Load Ideogram 4 (quantized)",
            category=CATEGORY,
            description=(
                "Loads Ideogram 4 from the files in models/diffusion_models, at the quantization "
                "level you pick: INT8, GGUF, FP8, NF4 or BF16. Both copies are found by level; "
                "the report says which files and why."
            ),
            search_aliases=[
                "ideogram",
                "gguf",
                "unet loader gguf",
                "load diffusion model",
                "int8",
                "w8a8",
                "q4_k",
                "q8_0",
                "nf4",
                "fp8",
                "instant",
                "distilled",
            ],
            inputs=loader_inputs(),
            outputs=[
                io.Model.Output(
                    id="conditional",
                    display_name="conditional",
                    tooltip="The copy that reads the caption.",
                ),
                io.Model.Output(
                    id="unconditional",
                    display_name="unconditional",
                    tooltip="The copy that guidance moves away from. Read from disk only if this "
                    "output is connected; nothing where the model is of one branch.",
                ),
                io.String.Output(
                    id="report",
                    display_name="report",
                    tooltip="Level, files, sizes, protected layers, backend and why, memory.",
                ),
            ],
            hidden=[io.Hidden.unique_id, io.Hidden.prompt],
            has_intermediate_output=True,
        )

    @classmethod
    def validate_inputs(
        cls,
        level=None,
        conditional_file=BY_LEVEL,
        unconditional_file=BY_LEVEL,
        base_file=NONE,
        unconditional_lora=NONE,
    ) -> bool | str:
        # Named here, these inputs skip the host's own check, whose message lists every file.
        if level not in (None, AUTO, *LEVELS):
            return f"There is no level {level!r}. Pick one of the list."
        listing = known_listing(FOLDERS)
        picked = [n for n in (conditional_file, unconditional_file) if n not in _NO_FILE]
        absent = missing_picks(level, listing, *picked)
        names = [n for n in picked if n not in absent]
        problems = [listing.problem(name) for name in names]
        if base_file not in _NO_FILE:
            problems.append(host_listing(FOLDERS).problem(base_file))
        if unconditional_lora != NONE:
            problems.append(host_listing(LORA_FOLDERS).problem(unconditional_lora))
        return next((problem for problem in problems if problem is not True), True)

    @classmethod
    def fingerprint_inputs(cls, **inputs) -> str:
        connected = _connected(running_graph(cls.hidden.unique_id), cls.hidden.unique_id)
        chosen = {k: inputs[k] for k in ("level", *_FILE_INPUTS) if k in inputs}
        lora = inputs.get("unconditional_lora", NONE)
        try:
            alone = not connected[1]
            pair, bases = choose_files(**chosen, one_copy=lora != NONE, alone=alone)
            files = [c.path for c in (pair.conditional, pair.unconditional) if c]
            beside = None if lora == NONE else host_stamp(LORA_FOLDERS, lora)
            return repr((connected, [stamp(path) for path in (*files, *bases)], beside))
        except (Ideogram4QuantError, OSError) as error:
            return repr(error)  # execute raises it again, where the host shows it

    @classmethod
    def execute(
        cls,
        level: str,
        conditional_file: str = BY_LEVEL,
        unconditional_file: str = BY_LEVEL,
        base_file: str = NONE,
        trust_files: bool = False,
        backend: str = AUTO,
        gguf_compute: str = "auto",
        attention: str = report.HOST_ATTENTION,
        fused_blocks: str = AUTO,
        branches: str = AUTO,
        unconditional_lora: str = NONE,
        unconditional_level: str = SAME,
        int8_compute: str = "auto",
        details: bool = False,
    ) -> io.NodeOutput:
        one_copy = unconditional_lora != NONE
        wanted = _connected(cls.hidden.prompt, cls.hidden.unique_id)
        alone = not wanted[1] and not one_copy
        pair, bases = choose_files(
            level,
            conditional_file,
            unconditional_file,
            base_file,
            trust_files,
            branches,
            unconditional_level,
            one_copy,
            alone,
        )
        options = LinearOptions(
            backend,
            GGUF_COMPUTE[gguf_compute],
            INT8_COMPUTE[int8_compute],
        )
        if not one_copy:
            check_complete(pair, wanted[1], host_listing(FOLDERS).folder)
        here = machine()  # before loading, so that it tells what is free now
        fused = decide(fused_blocks, backend, here.backends)
        wish = pair.conditional.header.attention_wish
        attention, by_file = followed(attention, wish, here.attention_backends)
        expected, too_much = report.expected_memory(pair, here)
        logger.log(logging.WARNING if too_much else logging.INFO, "%s", expected)
        models = []
        for copy, connected in zip(COPIES, wanted, strict=True):
            candidate = getattr(pair, copy)
            needed = connected or (one_copy and copy == CONDITIONAL and any(wanted))
            if candidate is None or not needed:
                models.append(None)
                continue
            source = ModelSource(
                candidate.path, copy, bases, options, trust_files, attention, BRANCHES[branches],
                fused.on,
            )  # fmt: skip
            models.append(load_model(source))
        found = measured(m for m in models if m is not None)
        here = replace(here, attention=attention, attention_by_file=by_file, measured=found)
        stands_in = f"the conditional copy with {unconditional_lora}" if one_copy else None
        if one_copy and models[0] is not None:
            models[1], stands_in = unconditional_of(models[0], unconditional_lora)
        about = (pair, level, options, here, fused.why, stands_in)
        note = report.summary(*about)
        for model in models:
            if model is not None:
                note_when_sampling(model, note)
        told = report.text(*about, details=details, alone=alone)
        return io.NodeOutput(*models, told, ui=ui.PreviewText(told))


def _connected(graph: Mapping | None, node_id: str | None) -> tuple[bool, ...]:
    return tuple(leads_anywhere(graph, node_id, index) for index in range(len(COPIES)))
