"""The inputs of the loader's node: what it offers, and what it says of each."""

from __future__ import annotations

from comfy_api.latest import io

from ..checkpoint.level_order import AUTO, LEVELS, SAME
from .attention import CHOICES as ATTENTIONS
from .file_choices import fitting_first, levels_here
from .fused_choice import CHOICES as FUSED_CHOICES
from .model_choice import BRANCHES, BY_LEVEL, FOLDERS, NONE
from .model_files import pocket_listing
from .schema import combo_input, details_input
from .unconditional_lora import FOLDERS as LORA_FOLDERS

BACKENDS = (AUTO, "triton", "comfy_kitchen", "int_mm", "reference")
GGUF_COMPUTE = {"auto": "auto", "W8A8": "w8a8", "16-bit": "dense"}
INT8_COMPUTE = {"auto": "auto", "W8A8": "w8a8", "16-bit": "dense"}


def loader_inputs() -> list:
    """The inputs of *Load Ideogram 4 (quantized)*, in the order of its widgets."""
    names = fitting_first(FOLDERS)
    picks = [*names, *pocket_listing(FOLDERS).names]
    return [
        io.Combo.Input(
            "level",
            options=[AUTO, *LEVELS],
            default=AUTO,
            tooltip="How the weights are quantized. auto picks the fastest level among your files "
            "that fits this device; the report says which. The same workflow then works on any "
            "machine that has any Ideogram 4 file. Levels without a file here are marked.",
            extra_dict={"here": [AUTO, *levels_here()]},
        ),
        combo_input(
            "conditional_file",
            [BY_LEVEL, *picks],
            "The file of the conditional copy, where you want a certain one. It goes "
            "before the level. With level auto one that is not here is passed over, and the report "
            "says so.",
        ),
        combo_input(
            "unconditional_file",
            [BY_LEVEL, *picks],
            "The file of the unconditional copy, where you want a certain one.",
        ),
        combo_input(
            "base_file",
            [NONE, *names],
            "For files that hold linears only (Transformer Lab's INT8): a complete file "
            "of the same model, which gives the norms and embeddings.",
        ),
        io.Boolean.Input(
            "trust_files",
            default=False,
            optional=True,
            advanced=True,
            tooltip="Load the files picked by name as the copies you picked them for, even if "
            "their names say otherwise. For renamed files; a file whose metadata says which copy "
            "it is stays that copy.",
        ),
        combo_input(
            "backend",
            BACKENDS,
            "What multiplies int8 matrices. auto measures what works here at the first "
            "load, 10 seconds at most, and takes the fastest; the report says which and why the "
            "others do not.",
        ),
        combo_input(
            "gguf_compute",
            GGUF_COMPUTE,
            "How GGUF weights are multiplied: W8A8 on int8 matrix units (faster, a little "
            "less exact), or 16-bit after decoding. auto: W8A8 for types of 2 to 5 bits where it "
            "is faster here, 16-bit for Q8_0 and Q6_K.",
        ),
        combo_input(
            "attention",
            ATTENTIONS,
            "host: what ComfyUI was started with. sdpa: torch's flash attention. int8: "
            "comfy-kitchen's, faster on NVIDIA and less exact. auto: the faster of the two, "
            "measured at the first load; the report says which and what it costs.",
        ),
        combo_input(
            "fused_blocks",
            FUSED_CHOICES,
            "Runs norms, SwiGLU and residuals inside the int8 kernels. auto: on where the "
            "Triton kernels run or comfy-kitchen makes norms, off elsewhere. What another node "
            "patches or hooks runs as before, and the log says so.",
        ),
        combo_input(
            "branches",
            BRANCHES,
            "Whether the model needs guidance. one: a distilled model such as fal's "
            "Instant or Fast, one file without guidance and without an unconditional copy. two: "
            "both copies. auto: one where the file's metadata or name says so.",
        ),
        combo_input(
            "unconditional_lora",
            [NONE, *fitting_first(LORA_FOLDERS)],
            "A LoRA in models/loras that makes the conditional copy stand for the "
            "unconditional one (ostris' ideogram_4_unconditional_lora, or one made by "
            "ideogram4-quant delta): guidance with one copy in memory. No unconditional file is "
            "read then.",
        ),
        combo_input(
            "unconditional_level",
            [SAME, *LEVELS],
            "A level of its own for the unconditional copy, to save memory: one step "
            "lower costs less there than in the conditional copy. With level auto, 'same' lets "
            "auto take a lower one where two equal copies do not fit; the report says so.",
            extra_dict={"here": [SAME, *levels_here()]},
        ),
        combo_input(
            "int8_compute",
            INT8_COMPUTE,
            "How INT8, W4A8, W6A8 and INT4 weights are multiplied: W8A8 on int8 matrix "
            "units (fast), or 16-bit after decoding: slower, nearer to BF16, above all where some "
            "channels are far louder than the others. auto: W8A8 but for the linears that the file "
            "wants in 16 bits.",
        ),
        details_input(),
    ]
