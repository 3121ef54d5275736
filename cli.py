"""``ideogram4-quant``: demo, generate, and the commands of the other folders.

Importing this module and showing ``--help`` imports neither torch nor any other heavy package; a
command's own code is imported when it is chosen.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from .command_help import HelpFormatter
from .engine.sampling_arguments import GUIDED_PRESETS, PRESET_NAMES
from .errors import Ideogram4QuantError
from .version import __version__

PROG = "ideogram4-quant"
# Commands that other modules define by ``add_parsers(subparsers)``: name -> module, help.
DELEGATED = {
    "quantize": (".quant.cli", "write a model at another level"),
    "inspect": (".quant.cli", "say what a model file is"),
    "verify": (".quant.cli", "compare the weights of two files"),
    "delta": (".quant.delta_cli", "make an unconditional LoRA of two copies"),
    "calibrate": (".engine.calibration_cli", "watch every linear while captions are sampled"),
    "sensitivity": (
        ".engine.sensitivity_cli",
        "measure how much of each linear's error arrives in the picture",
    ),
    "fragility": (".engine.calibration_cli", "rank the linears of a calibration"),
    "compare": (".engine.compare.cli", "compare levels at the same seeds: fidelity and text"),
    "compare-merge": (".engine.compare.cli", "collect the pictures that shards made"),
    "doctor": (".diagnostics.doctor.cli", "say what this machine has, lacks and can run"),
    "selftest": (".diagnostics.cli", "check every backend here against the formulas"),
    "bench": (".diagnostics.cli", "time every backend of this device side by side"),
    "card": (".diagnostics.card.cli", "measure this card into a file; the table of such files"),
    "kernels": (".diagnostics.machine_code.cli", "compile the Triton kernels without a GPU"),
}


EXAMPLES = """examples:
  ideogram4-quant doctor                     what is missing, and which level fits this card
  ideogram4-quant generate --prompt-file caption.json --out picture.png
  ideogram4-quant quantize my-tune-v2.safetensors --level Q4_K

ideogram4-quant COMMAND --help says more of each."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns its exit code: 0, 1 for an error, 130 for Ctrl-C.

    Without a command it prints the help. Usage errors leave by SystemExit with 2, as argparse has
    it.
    """
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    arguments = sys.argv[1:] if argv is None else list(argv)
    args = argparse.Namespace(words=arguments)
    try:
        parser = _parser(arguments)
        parser.parse_args(arguments, args)
        if args.command is None:
            parser.print_help()
            return 0
        code = args.func(args)
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # as of `inspect F | head`: the reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at exit
        return 1
    except (Ideogram4QuantError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except ModuleNotFoundError as error:
        print(
            f"error: {error.name} is not installed. In the pack's folder, with an environment of "
            'its own (not ComfyUI\'s): pip install -e ".[demo]"',
            file=sys.stderr,
        )
        return 1
    except KeyboardInterrupt:
        said = getattr(args, "interrupted", None)  # of commands that know what was written
        said = said(args) if callable(said) else said
        print(f"interrupted: {said}" if said else "interrupted", file=sys.stderr)
        return 130


_GENERATE = """examples:
  ideogram4-quant generate --prompt-file caption.json --out picture.png
  ideogram4-quant generate --level Q4_K --prompt "A red fox" --enhance --preset turbo --out fox.png
  ideogram4-quant generate --model cond.gguf --uncond uncond.gguf --encoder qwen3vl.gguf \\
      --vae flux2-vae.safetensors --prompt-file caption.json --out picture.png"""


def _parser(arguments: Sequence[str]) -> argparse.ArgumentParser:
    """All commands with their one line of help; only the chosen one's module is imported."""
    parser = argparse.ArgumentParser(
        PROG,
        description="Ideogram 4.0 at 8 and 4 bits.",
        epilog=EXAMPLES,
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"{PROG} {__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND")
    _add_demo(subparsers)
    _add_generate(subparsers)
    chosen = next((a for a in arguments if not a.startswith("-")), None)
    module = DELEGATED[chosen][0] if chosen in DELEGATED else None
    if module is not None:
        importlib.import_module(module, __package__).add_parsers(subparsers)
    for name, (where, text) in DELEGATED.items():
        if where != module:
            subparsers.add_parser(name, help=text)
    for command in subparsers.choices.values():
        command.formatter_class = HelpFormatter
    return parser


def _handler(name: str) -> Callable[[argparse.Namespace], int]:
    """The function of `engine.commands`, imported once the arguments are checked."""

    def handle(args: argparse.Namespace) -> int:
        arguments = importlib.import_module(".engine.arguments", __package__)
        getattr(arguments, f"check_{name.removeprefix('run_')}")(args)
        commands = importlib.import_module(".engine.commands", __package__)
        return getattr(commands, name)(args)

    return handle


def _add_demo(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser(
        "demo",
        help="the main job on the pocket model: files, pictures, words read",
        description="Quantize the pocket model to every level, paint held-out prompts with each, "
        "read the words, and write a contact sheet and a report.",
        epilog="example: ideogram4-quant demo --out demo-out --prompts 4",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("demo-out"),
        metavar="DIR",
        help="for files, sheet and report (default: demo-out)",
    )
    parser.add_argument(
        "--prompts", type=int, default=8, metavar="N", help="how many to paint (default: 8)"
    )
    parser.add_argument(
        "--preset",
        choices=GUIDED_PRESETS,
        default="default",
        help="steps and guidance (default: default, 20 steps)",
    )
    parser.add_argument(
        "--threads", type=int, default=1, metavar="N", help="default: 1, so runs repeat bit by bit"
    )
    parser.set_defaults(
        func=_handler("run_demo"),
        interrupted=lambda args: f"what was made is in {args.out}; the same command makes it anew",
    )


def _add_generate(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser(
        "generate",
        help="paint one picture with files of your own",
        description="One picture with diffusers' Ideogram 4 transformer on files of any origin. "
        "Files that are not named are those that doctor finds in ComfyUI's folders.",
        epilog=_GENERATE,
    )
    files = parser.add_argument_group("files")
    files.add_argument(
        "--model",
        metavar="F",
        help="the conditional copy, or a file with both (default: the level that fits)",
    )
    files.add_argument(
        "--level",
        default="auto",
        metavar="L",
        help="of the files in ComfyUI's folders, where --model is left out: Q4_K, ... (default: "
        "auto, the fastest that fits)",
    )
    files.add_argument(
        "--uncond",
        metavar="F|self|none",
        help="the unconditional copy; self: the conditional copy without text in its place; none: "
        "no guidance",
    )
    files.add_argument(
        "--uncond-lora",
        type=Path,
        metavar="F",
        help="a LoRA with which the conditional copy stands for the unconditional one",
    )
    files.add_argument(
        "--base", nargs="+", metavar="F", help="gives a linears-only file its other tensors"
    )
    files.add_argument(
        "--encoder", metavar="DIR|F", help="Qwen3-VL text encoder (default: ComfyUI's)"
    )
    files.add_argument("--tokenizer", metavar="DIR", help="where the encoder brings none")
    files.add_argument(
        "--head", metavar="F", help="of --enhance, where the encoder's file has no lm_head"
    )
    files.add_argument("--vae", metavar="DIR|F", help="the FLUX.2 VAE (default: ComfyUI's)")
    files.add_argument(
        "--comfyui", type=Path, metavar="DIR", help="ComfyUI's folder, if it is not found by itself"
    )
    files.add_argument("--out", type=Path, required=True, metavar="PNG", help="the picture")
    files.add_argument("--overwrite", action="store_true", help="replace PNG if it exists")

    picture = parser.add_argument_group("picture")
    prompt = picture.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt", metavar="P", help="best a JSON caption, as in training")
    prompt.add_argument("--prompt-file", type=Path, metavar="F", help="the prompt in a text file")
    picture.add_argument(
        "--enhance",
        action="store_true",
        help="the encoder writes the caption of the prompt, a sentence, by diffusers' own method",
    )
    picture.add_argument("--width", type=int, default=1024, help="in pixels (default: 1024)")
    picture.add_argument("--height", type=int, default=1024, help="in pixels (default: 1024)")
    picture.add_argument(
        "--seed", type=int, default=0, help="its low 32 bits make the noise (default: 0)"
    )
    picture.add_argument("--init-image", type=Path, metavar="F", help="a picture to start from")
    picture.add_argument(
        "--denoise", type=float, default=1.0, help="how much of it to repaint, above 0, at most 1"
    )

    sampling = parser.add_argument_group("sampling")
    sampling.add_argument(
        "--preset",
        choices=PRESET_NAMES,
        help="instant (8 steps), fast (20), turbotime (4): for models without guidance (default: "
        "that of such a model's name, else default)",
    )
    sampling.add_argument("--steps", type=int, metavar="N", help="instead of the preset's")
    sampling.add_argument("--guidance", type=float, metavar="G", help="one factor for every step")
    sampling.add_argument(
        "--copies",
        choices=("both", "conditional"),
        default="both",
        help="conditional: one copy, half the time, no guidance",
    )
    sampling.add_argument(
        "--branches",
        choices=("auto", "one", "two"),
        default="auto",
        help="one: a distilled model that needs no guidance (auto: by its metadata or name)",
    )
    sampling.add_argument(
        "--mu", type=float, metavar="M",
        help="of the schedule, instead of the preset's; one tool takes 0.5 for Instant, others 0",
    )  # fmt: skip
    sampling.add_argument(
        "--last-sigma", type=float, default=0.0, metavar="S",
        help="where the schedule ends: 0 (default), or 5.53e-4 as one patch of diffusers has it",
    )  # fmt: skip

    machine = parser.add_argument_group("machine")
    machine.add_argument(
        "--device",
        metavar="D",
        help="where to compute (default: cuda where there is one, else cpu)",
    )
    machine.add_argument(
        "--backend",
        choices=("auto", "triton", "comfy_kitchen", "int_mm", "reference"),
        default="auto",
        help="of the int8 kernels (default: auto)",
    )
    machine.add_argument(
        "--gguf-compute",
        choices=("auto", "w8a8", "dense"),
        default="auto",
        help="how GGUF weights are multiplied (default: auto)",
    )
    machine.add_argument(
        "--int8-compute",
        choices=("auto", "w8a8", "dense"),
        default="auto",
        help="how INT8, W4A8, W6A8 and INT4 weights are multiplied; dense: in 16 bits, slower and "
        "nearer to BF16; auto: w8a8 but where the file wants the other (default)",
    )
    machine.add_argument(
        "--attention",
        choices=("sdpa", "int8", "auto"),
        default="sdpa",
        help="int8: faster and less exact, on NVIDIA with comfy-kitchen; auto: the faster one",
    )
    parser.set_defaults(func=_handler("run_generate"), interrupted="nothing was written")
