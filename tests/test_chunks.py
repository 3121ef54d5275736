"""Sizes of chunks: one place for them, and slices that cover everything once."""

from __future__ import annotations

import ast
import hashlib
import io
import re
from pathlib import Path

import pytest
import torch

from ideogram4_quant.files import pieces as file_pieces
from ideogram4_quant.ops import chunks
from ideogram4_quant.quant.provenance import hash_files

ROOT = Path(__file__).resolve().parents[1]
SOURCES = [
    path
    for path in ROOT.rglob("*.py")
    if not {"tests", "benchmarks", ".venv"} & set(path.relative_to(ROOT).parts)
]
CUDA = torch.device("cuda")


@pytest.mark.parametrize("shape", [(1, 1), (63, 100), (3, 5_000_000), (9, 2, 3), (5,)], ids=str)
@pytest.mark.parametrize("device", [None, torch.device("cpu"), CUDA])
@pytest.mark.parametrize("values", [1, 250, chunks.CACHED, chunks.FED_BACK])
def test_chunks_cover_every_row_once(shape, device, values):
    slices = list(chunks.row_chunks(shape, device, values))
    assert [i for rows in slices for i in range(rows.start, rows.stop)] == list(range(shape[0]))
    held = chunks.ON_ACCELERATOR if device == CUDA else values
    width = torch.Size(shape[1:]).numel()
    assert all(r.stop - r.start == 1 or (r.stop - r.start) * width <= held for r in slices)


def test_no_rows_no_chunks():
    assert list(chunks.row_chunks((0, 7))) == []
    assert list(chunks.row_chunks(())) == []
    assert list(chunks.row_chunks((3, 0))) == [slice(0, 3)]


def test_sizes_are_kept_in_one_place_with_their_reasons():
    """A size of a chunk, tile or piece elsewhere would be a second truth about this machine."""
    names, docs = [], []
    for path in SOURCES:
        body = ast.parse(path.read_text(encoding="utf-8")).body
        found = [
            (node, after)
            for node, after in zip(body, [*body[1:], None], strict=True)
            if isinstance(node, ast.Assign) and "<<" in ast.unparse(node.value)
        ]
        where = path.relative_to(ROOT).as_posix()
        if where in ("ops/chunks.py", "files/pieces.py"):
            docs += [isinstance(after, ast.Expr) for _, after in found]
            continue
        names += [(where, ast.unparse(node.targets[0])) for node, _ in found]
        functions = [node.name for node in body if isinstance(node, ast.FunctionDef)]
        assert not {"row_chunks", "tile_values"} & set(functions), where
    assert len(docs) >= 8
    assert all(docs)
    assert [n for n in names if re.search("CHUNK|TILE|PIECE|HASH|BUFFER", n[1])] == []


@pytest.mark.parametrize("size", [0, 1, 99, 100, 101, 250])
def test_pieces_are_the_file(size, monkeypatch, tmp_path):
    monkeypatch.setattr(file_pieces, "PIECE", 100)
    data = bytes(i % 251 for i in range(size))
    found = list(file_pieces.pieces(io.BytesIO(data)))
    assert b"".join(found) == data
    assert all(0 < len(piece) <= 100 for piece in found)
    assert b"".join(file_pieces.pieces(io.BytesIO(data), 120)) == data[:120]
    path = tmp_path / "data"
    path.write_bytes(data)
    advanced = []
    (hashed,) = hash_files([path], advanced.append)
    assert (hashed.size, hashed.sha256) == (size, hashlib.sha256(data).hexdigest())
    assert sum(advanced) == size
