"""``ideogram4-quant quantize``, once its arguments are read.

What they say is checked before torch is imported, which takes seconds.
"""

from __future__ import annotations

import argparse
import re
import shlex
from pathlib import Path

from ..checkpoint.copy_names import COPIES
from ..files.new_file import check_output
from ..files.partial import partial_path
from .command_parts import calibration_of, check_files, progress_bar
from .errors import QuantOptionError
from .output_names import named_after, output_name
from .recipes import CONTAINERS, QuantOptions, TypeRule, recipe_of
from .target_cli import quantize_to_size, target_of
from .target_goal import Target

BOTH = "both"
_TRANSFORMER_LAB = CONTAINERS[1]


def quantize(args: argparse.Namespace) -> int:
    """Everything that can be wrong with the arguments is said before torch is imported."""
    read = (args.source, args.pair, args.calibration, args.sensitivity, *(args.base or ()))
    check_files(*read)
    target = target_of(args)
    if target is None:
        args.level = recipe_of(args.level).level  # what it was taken for is said here, once
    runs = _runs(args, target)
    types, budget = tuple(map(_type_rule, args.types)), _budget(args.protect_budget)
    if not args.dry_run:
        for _, _, out in runs:
            several = target is not None or len(runs) > 1  # checks itself what is finished
            replace = args.overwrite or (several and args.resume)
            check_output(out, overwrite=replace, made_of=read)

    from .block_types import check_policy
    from .quantize import plan_quantization, quantize_checkpoint

    check_policy(args.policy)
    options = QuantOptions(
        container=args.container,
        protect=tuple(args.protect),
        types=types,
        native=args.native,
        linears=args.linears,
        licence=args.licence,
        calibration=calibration_of(args),
        treatment=args.treatment,
        alpha=args.alpha,
        rounding=args.rounding,
        protect_below=args.protect_below,
        **budget,
    )
    if args.device == "cpu" and (target is not None or not args.dry_run):  # a choice encodes too
        from .compiled import prepare

        prepare()
    from .several import check_several
    from .target_files import Part

    parts = [Part(source, out, copy) for source, copy, out in runs]
    if target is not None:
        return quantize_to_size(args, target, parts, options)
    level, finished = args.level, set()
    if len(parts) > 1:
        again = args.resume and not args.overwrite
        finished = check_several(parts, level, options, args.base, resume=again)
    pair = args.pair if args.container == _TRANSFORMER_LAB else None
    for source, copy, out in runs:
        if Path(out) in finished:
            print(f"{out}: finished before, and kept")
            continue
        choice = {
            "copy": copy,
            "base": args.base,
            "pair": pair,
            "options": options,
            "overwrite": args.overwrite,
        }
        if args.dry_run:
            print(plan_quantization(source, level, out, **choice).table())
            continue
        resume = args.resume and (len(runs) == 1 or partial_path(Path(out)).exists())
        with progress_bar(level, "B") as progress:
            report = quantize_checkpoint(
                source,
                level,
                out,
                **choice,
                progress=progress,
                device=args.device,
                resume=resume,
                keep_partial=True,
            )
        print(report.table())
    return 0


def _runs(args: argparse.Namespace, target: Target | None) -> list[tuple[str, str | None, str]]:
    """(source, copy, output) of each file that will be written."""
    together = args.container == _TRANSFORMER_LAB
    if args.copy == BOTH and args.pair is not None:
        raise QuantOptionError(
            "--pair names the file of the other copy, and --copy both says that SRC holds it",
            needed="one of the two",
        )
    if args.copy == BOTH and not together:
        parts = [(args.source, copy) for copy in COPIES]
    else:
        parts = [(args.source, None if args.copy == BOTH else args.copy)]
    if args.pair is not None and not together:
        other = {None: None, COPIES[0]: COPIES[1], COPIES[1]: COPIES[0]}[args.copy]
        parts.append((args.pair, other))
    both = args.copy == BOTH and not together
    return [
        (source, copy, _output(args, target, source, copy if both else None, place))
        for place, (source, copy) in enumerate(parts)
    ]


def _output(
    args: argparse.Namespace, target: Target | None, source: str, copy: str | None, place: int
) -> str:
    """Where a file goes: --out for the first one, unless it is a folder; else named after its
    source, in the folder of --out or beside the source. A size is written as --out's format."""
    out = None if args.out is None else Path(args.out)
    file = out is not None and not out.is_dir()
    if target is None:
        name = output_name(source, recipe_of(args.level), copy)
    else:
        name = named_after(source, target.name, out.suffix if file else ".safetensors", copy)
    if out is None:
        return str(Path(source).parent / name)
    if not file:
        return str(out / name)
    return str(out if place == 0 else out.parent / name)


def how_to_go_on(args: argparse.Namespace) -> str:
    """After Ctrl-C: how to go on."""
    outs = [Path(out) for _, _, out in _runs(args, target_of(args))]
    left = [str(path) for path in map(partial_path, outs) if path.exists()]
    whole = [str(out) for out in outs if len(outs) > 1 and out.exists()]
    if not left and (not whole or args.overwrite):
        return "nothing was written; the same command begins anew"
    words = [word for word in args.words if word not in ("--resume", "--overwrite")]
    again = shlex.join(["ideogram4-quant", *words, "--resume"])
    holds = f"{', '.join(left or whole)} holds what is done"
    return f"{holds}: --resume goes on with it\n{again}"


def _type_rule(text: str) -> TypeRule:
    pattern, equals, qtype = text.rpartition("=")
    if not equals or not pattern or not qtype:
        raise QuantOptionError("--type needs NAME=TYPE", found=text)
    return TypeRule(pattern, qtype)


_BUDGET = re.compile(r"(\d+(?:\.\d+)?) ?(%|[kMG]?B)")
_UNITS = {"B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9}


def _budget(text: str | None) -> dict[str, float | int]:
    """The option of QuantOptions that ``8%`` or ``700MB`` means."""
    if text is None:
        return {}
    match = _BUDGET.fullmatch(text.strip())
    if match is None:
        raise QuantOptionError("--protect-budget", found=text, needed="as 8% or 700MB")
    if match[2] == "%":
        return {"protect_share": float(match[1]) / 100}
    return {"protect_bytes": round(float(match[1]) * _UNITS[match[2]])}
