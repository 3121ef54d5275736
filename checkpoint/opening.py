"""From a path to a :class:`Checkpoint`: files, keys, copies, config."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import CHECK_DOWNLOAD, CorruptFileError, PairMismatchError
from .beside import config_beside, told_beside
from .branches import OneBranch, tell_one_branch, tell_preset
from .canonical import TEXT_ONLY
from .checkpoints import Checkpoint
from .config import ModelConfig, config_from, sizes_from_shapes
from .copies import COPY_FOLDERS, Verdict, check_copy_name, tell_copy
from .entries import Entry, main_level
from .files import RawTensor
from .folding import FOLDED, LORA_BASIS_KEYS, StoredFolding
from .grammar import (
    CONDITIONAL,
    PREFIXES,
    UNCONDITIONAL,
    Key,
    build_entries,
    parse_fold_key,
    parse_key,
    stored_twice,
)
from .origins import check_is_ideogram4, origin_of
from .placing import check_placed
from .saved import with_words
from .statements import check_heeded, matched, stated_quantization, told_mix
from .tensor_files import TensorFiles, json_object, open_tensor_files

logger = logging.getLogger(__name__)

PathLike = str | os.PathLike[str]
Base = PathLike | Checkpoint


def open_checkpoint(
    path: PathLike,
    base: Base | Sequence[Base] | None = None,
    *,
    copy: str | None = None,
    one_branch: bool | None = None,
) -> Checkpoint:
    """What the file or folder at ``path`` holds, from its headers alone.

    ``path``: a safetensors or GGUF file of any origin, an index of shards, a folder with one model,
    or one with ``transformer/`` and ``unconditional_transformer/``. ``base``: a file (or several)
    that gives the tensors missing there, as norms and embeddings are from Transformer Lab's INT8.
    ``copy``: which copy a file holds that does not say so itself, or which one to take of two.
    ``one_branch``: the user's word for whether it needs no guidance (see `branches`).

    Raises NotIdeogram4Error, TruncatedFileError, CorruptFileError, PairMismatchError (``copy`` or
    ``base`` contradicts the file) and CheckpointError (no such file, formats that are not read).
    """
    path = Path(path)
    if copy is not None:
        check_copy_name(copy)
    bases = _open_bases(base)
    folders = {name: path / folder for name, folder in COPY_FOLDERS.items()}
    if path.is_dir() and any(folder.is_dir() for folder in folders.values()):
        found = _open_pair(folders)
        verdict = Verdict("", "the folders name the copies", certain=True)
    else:
        found, verdict = _open_single(open_tensor_files(path), copy)
    branch = _one_branch(path, found, one_branch)
    if branch is not None:
        verdict = _conditional(verdict, branch, path, copy)
        found = {CONDITIONAL: next(iter(found.values()))}
    if copy is not None and copy not in found:
        raise PairMismatchError(
            "the copy is not there",
            file=path,
            found=f"{', '.join(found)} ({verdict.reason})",
            needed=copy,
        )
    chosen = {name: part for name, part in found.items() if copy in (None, name)}
    opened = tuple({id(c): c for c, _, _ in chosen.values()}.values())
    entries = {name: part for name, (_, _, part) in chosen.items()}
    config = _config(entries, opened, bases)
    for tensor_files in opened:
        own = [
            e for files, _, part in chosen.values() if files is tensor_files for e in part.values()
        ]
        check_heeded(tensor_files, own, told_beside(tensor_files))
    check_placed(opened, entries, config)
    keys = {key: raw for _, part, _ in found.values() for key, raw in part.items()}
    stated = bool(stated_quantization(opened[0]))
    origin = origin_of(opened[0], keys, stated=stated)
    mix = told_mix(opened)
    return Checkpoint(
        origin=origin.name if mix is None else f"ideogram4-quant, {mix}",
        level=mix or main_level(entry for part in entries.values() for entry in part.values()),
        linears_only=origin.linears_only,
        copies=tuple(chosen),
        copy_reason=verdict.reason,
        copy_assumed=verdict.assumed,
        config=config,
        tensor_files=opened,
        entries=entries,
        bases=bases,
        one_branch=branch,
    )


Part = tuple[TensorFiles, dict[Key, RawTensor], dict[str, Entry]]


def _one_branch(path: Path, found: Mapping[str, Part], said: bool | None) -> OneBranch | None:
    """Why a model needs no guidance; the user's word ``said`` goes before what the file says."""
    (tensor_files, _, entries), *others = found.values()
    if others or said is False or not any(name in entries for name in TEXT_ONLY):
        return None
    metadata = tensor_files.metadata
    told = (
        OneBranch("as asked", preset=tell_preset(path, metadata))
        if said
        else tell_one_branch(path, metadata)
    )
    if told is None or told.certain or UNCONDITIONAL not in found:
        return told
    return None if tell_copy(tensor_files, TEXT_ONLY, None).copy == UNCONDITIONAL else told


def _conditional(verdict: Verdict, branch: OneBranch, path: Path, copy: str | None) -> Verdict:
    """One branch reads the caption; PairMismatchError if it was asked for as the other copy."""
    if copy == UNCONDITIONAL:
        raise PairMismatchError(
            "a one-branch model is no unconditional copy",
            file=path,
            found=branch.reason,
            hint="Leave the unconditional copy out: one branch needs no guidance.",
        )
    return Verdict(CONDITIONAL, f"one branch: {branch.reason}") if verdict.assumed else verdict


def _open_bases(base: Base | Sequence[Base] | None) -> tuple[Checkpoint, ...]:
    if base is None:
        return ()
    several = [base] if isinstance(base, str | os.PathLike | Checkpoint) else base
    return tuple(b if isinstance(b, Checkpoint) else open_checkpoint(b) for b in several)


def _open_pair(folders: Mapping[str, Path]) -> dict[str, Part]:
    """The copies of a folder that has one folder for each."""
    found = {}
    for copy, folder in folders.items():
        if folder.is_dir():
            tensor_files = open_tensor_files(folder)
            keys = _parse(tensor_files)
            check_is_ideogram4(keys, tensor_files)
            stated = matched(tensor_files, keys.items(), parse_key, PREFIXES.get)
            found[copy] = _part(tensor_files, keys, stated, _folds(tensor_files).get(None, {}))
    return found


def _open_single(tensor_files: TensorFiles, copy: str | None) -> tuple[dict[str, Part], Verdict]:
    """(copy -> part of its files, how the copies were told apart)."""
    tensor_files = with_words(tensor_files, PREFIXES)
    groups: dict[str | None, dict[Key, RawTensor]] = {}
    keys = _parse(tensor_files)
    check_is_ideogram4(keys, tensor_files)
    stated = matched(tensor_files, keys.items(), parse_key, PREFIXES.get)
    for key, raw in keys.items():
        groups.setdefault(PREFIXES[key.prefix], {})[key] = raw
    folds = _folds(tensor_files)
    if set(groups) <= {None}:
        part = _part(tensor_files, groups.get(None, {}), stated, folds.get(None, {}))
        verdict = tell_copy(tensor_files, part[2], copy)
        return {verdict.copy: part}, verdict
    if None in groups:  # sd.cpp: the other copy has a prefix of its own
        if CONDITIONAL in groups:
            raise CorruptFileError(
                "tensors of the conditional copy are stored with and without its prefix",
                file=tensor_files.path,
                tensor=next(iter(groups[None].values())).key,
            )
        groups[CONDITIONAL] = groups.pop(None)
        folds[CONDITIONAL] = folds.pop(None, {})
    reason = "the prefixes of the keys name the copies"
    found = {n: _part(tensor_files, groups[n], stated, folds.get(n, {})) for n in sorted(groups)}
    return found, Verdict("", reason, certain=True)


def _parse(tensor_files: TensorFiles) -> dict[Key, RawTensor]:
    """The tensors of Ideogram 4 among those of the files.

    Raises CorruptFileError for one that is there under both of its module's names.
    """
    found: dict[Key, RawTensor] = {}
    for name, raw in tensor_files.tensors.items():
        key = parse_key(name)
        if key is not None and found.setdefault(key, raw) is not raw:
            raise stored_twice(raw, found[key])
    return found


def _folds(tensor_files: TensorFiles) -> dict[str | None, dict[tuple[str, str], RawTensor]]:
    """copy (None: not named) -> what was folded into it; CorruptFileError if that got lost."""
    found: dict[str | None, dict[tuple[str, str], RawTensor]] = {}
    for name, raw in tensor_files.tensors.items():
        parsed = parse_fold_key(name)
        if parsed is not None:
            prefix, module, kind = parsed
            found.setdefault(PREFIXES[prefix], {})[module, kind] = raw
    stated = next(
        (tensor_files.metadata[k] for k in LORA_BASIS_KEYS if k in tensor_files.metadata), None
    )
    if stated == FOLDED and not found:
        raise CorruptFileError(
            "smoothing was folded into these weights, and the record of it was removed",
            file=tensor_files.path,
            needed="its fold.* tensors",
            hint="Loaded so, every LoRA would come out wrong: use the file as it was written.",
        )
    return found


def _part(
    tensor_files: TensorFiles,
    keys: dict[Key, RawTensor],
    stated: Mapping[str, Mapping[str, Any]],
    folds: Mapping[tuple[str, str], RawTensor],
) -> Part:
    """One copy of a file, every tensor of it understood."""
    check_is_ideogram4(keys, tensor_files)
    built = build_entries(keys.items(), stated)
    built.check()
    entries = built.entries
    if folds:
        for (module, _), raw in folds.items():
            if f"{module}.weight" not in entries:
                raise CorruptFileError(
                    "the record of what was folded: this linear is not in the file",
                    file=tensor_files.path,
                    tensor=raw.key,
                    needed=f"{module}.weight",
                    hint=CHECK_DOWNLOAD,
                )
        stored = StoredFolding(folds)
        entries = {
            name: dataclasses.replace(entry, stored_folding=stored)
            for name, entry in entries.items()
        }
    return tensor_files, keys, entries


def _config(
    entries: Mapping[str, Mapping[str, Entry]],
    opened: Sequence[TensorFiles],
    bases: Sequence[Checkpoint],
) -> ModelConfig:
    """Stated by the file, else by a base, else read off the shapes; all must agree."""
    own = next(iter(entries.values()))
    sizes = sizes_from_shapes(own, lambda name: own[name].shape)
    path = opened[0].path
    for base in bases:
        # an unconditional copy without its text part cannot tell how wide the text is
        ignored = () if any(map(base.reads_text, base.copies)) else ("llm_features_dim",)
        differing = [
            f"{key} {getattr(base.config, key)} against {size}"
            for key, size in sizes.items()
            if key not in ignored and getattr(base.config, key) != size
        ]
        if differing:
            raise PairMismatchError(
                f"the base is not of the model in {path}",
                file=base.paths[0],
                found=", ".join(differing),
                hint="Give the FP8 or BF16 files that the quantized ones were made from.",
            )
    stated = _stated_config(opened)
    if stated is None and bases:
        stated = {**bases[0].config.to_dict(), **sizes}
    return config_from(stated, sizes, path)


def _stated_config(opened: Sequence[TensorFiles]) -> dict[str, Any] | None:
    """The config in a file's metadata, or in the ``config.json`` beside it; None if neither."""
    for tensor_files in opened:
        for key in ("ideogram4.config", "config"):
            text = tensor_files.metadata.get(key)
            if isinstance(text, str):
                return json_object(text, key, tensor_files.path)
        beside = config_beside(tensor_files)
        if beside is not None:
            return beside
    return None
