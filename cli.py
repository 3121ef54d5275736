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

from .errors import Ideogram4QuantError
from .version import __version__

PROG = "ideogram4-quant"
GUIDED_PRESETS = ("quality", "default", "turbo")
PRESET_NAMES = (*GUIDED_PRESETS, "instant", "fast", "turbotime")
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
    "selftest": (
        ".diagnostics.selftest",
        "check every backend here against the formulas",
    ),
    "bench": (".diagnostics.bench", "time every backend of this device side by side"),
    "card": (".diagnostics.card.cli", "measure this card into a file; the table of such files"),
    "kernels": (".diagnostics.machine_code.cli", "compile the Triton kernels without a GPU"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns its exit code: 0, 1 for an error, 130 for Ctrl-C.

    Usage errors leave by SystemExit with 2, as argparse has it.
    """
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    arguments = sys.argv[1:] if argv is None else list(argv)
    try:
        args = _parser(arguments).parse_args(arguments)
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
        print("interrupted", file=sys.stderr)
        return 130


def _parser(arguments: Sequence[str]) -> argparse.ArgumentParser:
    """All commands with their one line of help; only the chosen one's module is imported."""
    parser = argparse.ArgumentParser(
        PROG, description="Ideogram 4.0 at 8 and 4 bits.", allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"{PROG} {__version__}")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_demo(subparsers)
    _add_generate(subparsers)
    chosen = next((a for a in arguments if not a.startswith("-")), None)
    module = DELEGATED[chosen][0] if chosen in DELEGATED else None
    if module is not None:
        importlib.import_module(module, __package__).add_parsers(subparsers)
    for name, (where, text) in DELEGATED.items():
        if where != module:
            subparsers.add_parser(name, help=text)
    return parser


def _handler(name: str) -> Callable[[argparse.Namespace], int]:
    """The function of `engine.commands`, imported when it is called."""

    def handle(args: argparse.Namespace) -> int:
        commands = importlib.import_module(".engine.commands", __package__)
        return getattr(commands, name)(args)

    return handle


def _add_demo(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser(
        "demo",
        help="the main job on the pocket model: files, pictures, words read",
        description="Quantize the pocket model to every level, paint held-out prompts with each, "
        "read the words, and write a contact sheet and a report.",
    )
    parser.add_argument("--out", type=Path, default=Path("demo-out"), metavar="DIR")
    parser.add_argument("--prompts", type=int, default=8, metavar="N", help="default: 8")
    parser.add_argument("--preset", choices=GUIDED_PRESETS, default="default")
    parser.add_argument(
        "--threads", type=int, default=1, metavar="N", help="default: 1, so runs repeat bit by bit"
    )
    parser.set_defaults(func=_handler("run_demo"))


def _add_generate(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser(
        "generate",
        help="paint one picture with files of your own",
        description="One picture with diffusers' Ideogram 4 transformer on files of any origin.",
    )
    files = parser.add_argument_group("files")
    files.add_argument(
        "--model", required=True, metavar="F", help="the conditional copy, or a file with both"
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
    files.add_argument("--encoder", required=True, metavar="DIR|F", help="Qwen3-VL text encoder")
    files.add_argument("--tokenizer", metavar="DIR", help="where the encoder brings none")
    files.add_argument(
        "--head", metavar="F", help="of --enhance, where the encoder's file has no lm_head"
    )
    files.add_argument("--vae", required=True, metavar="DIR|F", help="the FLUX.2 VAE")
    files.add_argument("--out", type=Path, required=True, metavar="PNG")
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
    picture.add_argument("--width", type=int, default=1024, help="multiple of 16 (default: 1024)")
    picture.add_argument("--height", type=int, default=1024, help="multiple of 16 (default: 1024)")
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
        default="default",
        help="instant (8 steps), fast (20), turbotime (4): for models without guidance",
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
        help="where the schedule ends: 0 (default), or 5.52e-4 as one patch of diffusers has it",
    )  # fmt: skip

    machine = parser.add_argument_group("machine")
    machine.add_argument("--device", metavar="D", help="default: cuda where there is one, else cpu")
    machine.add_argument("--backend", default="auto", help="of the int8 kernels (default: auto)")
    machine.add_argument(
        "--gguf-compute",
        choices=("auto", "w8a8", "dense"),
        default="auto",
        help="how GGUF weights are multiplied (default: auto)",
    )
    machine.add_argument(
        "--attention",
        choices=("sdpa", "int8", "auto"),
        default="sdpa",
        help="int8: faster and less exact, on NVIDIA with comfy-kitchen; auto: the faster one",
    )
    parser.set_defaults(func=_handler("run_generate"))
