"""``compare`` and ``compare-merge``: the instrument from the command line."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from ...version import __version__
from ..arguments import check_there
from ..sampling_arguments import PRESET_NAMES
from .errors import CompareError

_EXAMPLES = """examples:
  ideogram4-quant compare --system INT8=int8-cond.safetensors,int8-uncond.safetensors \\
      --system Q4_K=q4_k.gguf --prompts captions.jsonl --seeds 0 1 --out compared
  ideogram4-quant compare --pictures BF16=pictures/bf16 --pictures Q4_K=pictures/q4_k --out compared
The encoder and the VAE in ComfyUI's folders are used unless others are named."""
_INTERRUPTED = "what is in the cache is kept; the same command goes on with the pictures left"
# in the place of the second file of --system
_FIELDS = {
    "conditional": "diffusion_models",
    "unconditional": "diffusion_models",
    "stand_in": "loras",
}
_NONE, _SELF, _LORA = "none", "self", "lora:"


def add_parsers(subparsers: argparse._SubParsersAction) -> None:
    """Register both commands; nothing heavy is imported until one runs."""
    _add_compare(subparsers)
    merge = subparsers.add_parser(
        "compare-merge",
        help="collect the pictures that shards made into one cache",
        description="Collect the pictures that compare --shard made on several machines.",
        epilog="example: ideogram4-quant compare-merge all/cache shard-0/cache shard-1/cache",
    )
    merge.add_argument("into", type=Path, metavar="CACHE", help="the cache that gets them")
    merge.add_argument(
        "shards", type=Path, nargs="+", metavar="SHARD_CACHE", help="those that have them"
    )
    merge.set_defaults(func=run_merge, interrupted=_INTERRUPTED)


def _add_compare(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser(
        "compare",
        help="fidelity and text of several levels at the same seeds, with intervals",
        description="Render the same prompts and seeds with several files, or take pictures that "
        "are already rendered, and compare all with a reference.",
        epilog=_EXAMPLES,
    )
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="for report and sheets"
    )
    parser.add_argument("--reference", metavar="NAME", help="default: the first system")
    files = parser.add_argument_group("rendering files")
    files.add_argument(
        "--system", action="append", default=[], metavar="NAME=COND[,UNCOND]",
        help="a row of the table; repeat. UNCOND: a file; self: the conditional copy without text; "
        "lora:F: the conditional copy with an unconditional LoRA; none: no guidance",
    )  # fmt: skip
    files.add_argument("--base", type=Path, help="rest of the weights for files of linears only")
    files.add_argument(
        "--encoder", type=Path, metavar="DIR|F", help="Qwen3-VL text encoder (default: ComfyUI's)"
    )
    files.add_argument(
        "--tokenizer", type=Path, metavar="DIR", help="where the encoder brings none"
    )
    files.add_argument(
        "--vae", type=Path, metavar="DIR|F", help="the FLUX.2 VAE (default: ComfyUI's)"
    )
    files.add_argument("--prompts", type=Path, metavar="F", help=".txt or .jsonl")
    files.add_argument("--limit", type=int, help="only the first prompts of the file")
    files.add_argument(
        "--seeds", type=int, nargs="+", default=[0], help="of each prompt (default: 0)"
    )
    files.add_argument("--width", type=int, default=1024, help="multiple of 16 (default: 1024)")
    files.add_argument("--height", type=int, default=1024, help="multiple of 16 (default: 1024)")
    files.add_argument(
        "--preset",
        choices=PRESET_NAMES,
        default="default",
        help="steps and guidance (default: default)",
    )
    files.add_argument("--steps", type=int, help="instead of the preset's")
    files.add_argument("--guidance", type=float, help="one factor for every step")
    files.add_argument("--device", help="default: cuda where there is one, else cpu")
    files.add_argument("--cache", type=Path, help="default: OUT/cache")
    files.add_argument(
        "--trajectories", action=argparse.BooleanOptionalAction, default=True,
        help="keep latents of every step (2 MB a step at 1024 px)",
    )  # fmt: skip
    files.add_argument("--jobs", type=int, default=1, help="processes on this machine")
    files.add_argument("--shard", default="0/1", metavar="I/N", help="make only this share")
    files.add_argument("--ray", action="store_true", help="make the pictures on a Ray cluster")
    folders = parser.add_argument_group("pictures already rendered")
    folders.add_argument(
        "--pictures", action="append", default=[], metavar="NAME=DIR",
        help="one picture a prompt and seed, the same file names in every folder; repeat",
    )  # fmt: skip
    folders.add_argument(
        "--captions", type=Path, metavar="F", help='JSON: {"file name": "prompt"}, for text metrics'
    )
    extra = parser.add_argument_group("more")
    extra.add_argument("--differences", action="store_true", help="difference maps as well")
    for name in ("clip", "pickscore", "hpsv2"):
        extra.add_argument(
            f"--{name}", type=Path, metavar="DIR", help=f"weights for the score of {name}"
        )
    extra.add_argument("--lpips", type=Path, metavar="F", help="AlexNet's weights for LPIPS")
    parser.set_defaults(func=run_compare, interrupted=_INTERRUPTED)


def run_compare(args: argparse.Namespace) -> int:
    """Handler of ``compare``: the exit code."""
    if bool(args.system) == bool(args.pictures):
        raise CompareError("give either --system (files) or --pictures (folders), once a level")
    scorers, notes = _scorers(args)
    if args.pictures:
        return _compare_folders(args, scorers, notes)
    return _compare_files(args, scorers, notes)


def run_merge(args: argparse.Namespace) -> int:
    """Handler of ``compare-merge``: the exit code."""
    from .store import Store

    store = Store(args.into)
    for shard in args.shards:
        print(f"{shard}: {store.merge(shard)} pictures")
    print(f"compare --cache {args.into} with the same systems and prompts scores all of them")
    return 0


def _compare_files(args: argparse.Namespace, scorers: dict, notes: Sequence[str]) -> int:
    if args.prompts is None:
        raise CompareError("rendering needs --prompts")
    if args.jobs < 1:
        raise CompareError("too few processes", found=args.jobs, needed="--jobs 1 at least")
    check_there((args.prompts, args.tokenizer))
    shard = _shard(args.shard)
    named = [(name, _pair(value)) for name, value in map(_named, args.system)]

    from tqdm import tqdm

    from ...sampling import preset
    from ..files_here import fill_in
    from .cases import System, check_reference, check_systems, read_cases
    from .render import BATCH, Plan, Settings
    from .store import Store
    from .workers import render

    here = fill_in(args)
    for field, kind in _FIELDS.items():
        for _, pair in named:
            if isinstance(pair.get(field), Path):
                pair[field] = here.path(pair[field], kind)
    systems = [System(name, base=args.base, **pair) for name, pair in named]
    check_systems(systems)
    if args.guidance is None and not preset(args.preset).guided:
        pairs = [system.name for system in systems if system.unconditional is not None]
        if pairs:
            raise CompareError(
                f"the preset {args.preset} runs without guidance, so no system takes a second file",
                found=", ".join(pairs),
                needed="NAME=COND",
            )
    check_reference(args.reference, [system.name for system in systems])
    cases = read_cases(
        args.prompts, seeds=args.seeds, width=args.width, height=args.height, limit=args.limit
    )
    settings = Settings(
        args.encoder, args.vae, args.preset, args.steps, args.guidance, args.trajectories,
        device=args.device, threads=1 if args.jobs > 1 else None, tokenizer=args.tokenizer,
    )  # fmt: skip
    store = Store(args.cache or args.out / "cache")
    plan = Plan(systems, cases, settings, store)
    plan.check_files()
    with tqdm(total=len(plan.missing(shard)), unit="picture", desc="rendering") as bar:
        made = render(plan, jobs=args.jobs, shard=shard, ray=args.ray, progress=bar.update)
    left = len(plan.missing())
    if shard != (0, 1) and left:
        print(f"shard {args.shard}: {made} pictures made; {left} are left to other shards")
        return 0
    rendered = [plan.rendered(system) for system in systems]
    files = {system.name: [file.name for file in system.files] for system in systems}
    shared = {"encoder": args.encoder.name, "vae": args.vae.name}
    painting = {"pictures_at_once": BATCH} | settings.painting()
    made_of = painting | shared | {"files": files, "version": __version__}
    return _finish(args, rendered, cases, scorers, notes, made_of)


def _compare_folders(args: argparse.Namespace, scorers: dict, notes: Sequence[str]) -> int:
    from .score import read_captions_file, rendered_folders

    folders = {name: Path(value) for name, value in map(_named, args.pictures)}
    if len(folders) < len(args.pictures):
        raise CompareError("two folders share a name", found=", ".join(folders))
    prompts = {} if args.captions is None else read_captions_file(args.captions)
    reference = args.reference or next(iter(folders))
    rendered, cases, more = rendered_folders(folders, reference, prompts)
    settings = {"folders": {name: str(f) for name, f in folders.items()}, "version": __version__}
    return _finish(args, rendered, cases, scorers, [*notes, *more], settings)


def _finish(args, rendered, cases, scorers, notes, settings) -> int:
    from tqdm import tqdm

    from .output import write_output
    from .score import score, word_reader
    from .tables import markdown

    with tqdm(total=len(rendered) * len(cases), unit="picture", desc="scoring") as bar:
        comparison = score(
            args.reference or rendered[0].scores.name, rendered, cases,
            reader=word_reader(cases, notes), scorers=scorers, progress=bar.update,
        )  # fmt: skip
    comparison.gaps.extend(notes)
    comparison.settings.update(settings)
    by_name = {item.scores.name: item for item in rendered}
    files = write_output(
        comparison, args.out, lambda name, case: by_name[name].picture(case),
        differences=args.differences,
    )  # fmt: skip
    print(markdown(comparison))
    print("\n".join(str(file) for file in files))
    return 0


def _scorers(args: argparse.Namespace) -> tuple[dict, list[str]]:
    names = ("clip", "pickscore", "hpsv2", "lpips")
    if not any(getattr(args, name) for name in names):
        return {}, [f"{', '.join(names)}: no weights given"]
    from .scorers import load_scorers

    return load_scorers({name: getattr(args, name) for name in names})


def _named(text: str) -> tuple[str, str]:
    name, separator, value = text.partition("=")
    if not (name and separator and value):
        raise CompareError("not of the form NAME=PATH", found=text)
    return name, value


def _pair(text: str) -> dict[str, object]:
    """The fields of a System that ``COND``, ``COND,UNCOND`` and the words for one copy mean."""
    parts = text.split(",")
    if len(parts) > 2:
        raise CompareError("more than two files", found=text, needed="COND or COND,UNCOND")
    found: dict[str, object] = {"conditional": Path(parts[0])}
    second = parts[1] if len(parts) == 2 else None
    if second == _NONE:
        return found | {"guided": False}
    if second == _SELF:
        return found | {"stand_in": _SELF}
    if second is not None and second.startswith(_LORA):
        return found | {"stand_in": Path(second.removeprefix(_LORA))}
    return found | ({} if second is None else {"unconditional": Path(second)})


def _shard(text: str) -> tuple[int, int]:
    try:
        index, count = (int(part) for part in text.split("/"))
    except ValueError as error:
        raise CompareError("not of the form I/N", found=text) from error
    if not 0 <= index < count:
        raise CompareError("no such shard", found=text, needed="0/N to (N - 1)/N")
    return index, count
