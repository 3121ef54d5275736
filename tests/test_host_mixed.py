"""Files of a size in a real ComfyUI: by its own loader, and as the quantizing node writes them."""

from __future__ import annotations

import json
from collections import Counter

import pytest

from ideogram4_quant.checkpoint import open_checkpoint
from ideogram4_quant.quant import QuantOptions, inspect_file, quantize_checkpoint
from ideogram4_quant.quant.target import Request, quantize_to_target
from ideogram4_quant.quant.target_files import Part
from ideogram4_quant.quant.target_goal import target_gb
from ideogram4_quant.tests.host import graphs

pytestmark = pytest.mark.host
# what this host's comfy-kitchen has without 6-bit codes, and W4A4 apart, which it rounds otherwise
NAMES = ("W4A8 g32", "INT8", "W4A8 g16", "BF16")


@pytest.fixture(scope="module")
def mix(pocket, tmp_path_factory):
    """(file, how each linear is stored): the storages in turn."""
    out = tmp_path_factory.mktemp("mixed") / "m.safetensors"
    shapes = open_checkpoint(pocket.conditional_file).shapes("conditional")
    linears = [n.removesuffix(".weight") for n, s in shapes.items()
               if n.startswith("layers.") and n.endswith(".weight") and len(s) == 2]  # fmt: skip
    stored = {f"conditional.{name}": NAMES[at % 4] for at, name in enumerate(linears)}
    options = QuantOptions(storage=stored, native=True)
    quantize_checkpoint(pocket.conditional_file, "mixed", out, options=options)
    return out, stored


def test_the_stock_loader_reads_a_mix_as_this_pack_does(mix, pocket, in_host, tmp_path):
    path, stored = mix
    listing = tmp_path / "files.json"
    listing.write_text(json.dumps({"BF16": str(pocket.conditional_file), "mixed": str(path)}))
    found = in_host("mixed.py", listing)
    assert found["loaders"] < 3e-3  # other rounding of the same product, in bf16
    assert 0.005 < found["error"] < 0.3
    counts = Counter(stored.values())
    assert found["stored"] == {
        "asym_w4a8_int8": counts["W4A8 g32"] + counts["W4A8 g16"],
        "int8_tensorwise": counts["INT8"],
        "None": counts["BF16"],
    }


def test_inspect_says_what_is_in_a_mix(mix):
    path, stored = mix
    found = inspect_file(path)
    assert found.level == "mixed"
    assert {kind.level: kind.linears for kind in found.storage} == {
        "W4A8": sum(name.startswith("W4A8") for name in stored.values()),
        "INT8 W8A8 rotated": sum(name == "INT8" for name in stored.values()),
        "BF16": sum(name == "BF16" for name in stored.values()) + 7,
    }
    said = next(line for line in found.table().splitlines() if line.startswith("level"))
    assert all(level in said for level in ("mixed", "W4A8", "INT8 W8A8 rotated", "BF16"))


@pytest.mark.parametrize(("level", "ending"), [("Q4_K", "gguf"), ("W4A8", "safetensors")])
def test_the_node_writes_the_pair_of_a_size_and_the_loader_takes_it(
    server, models, tmp_path, level, ending
):
    folder = models / "diffusion_models"
    sources = {name: folder / f"sized{end}.safetensors" for name, end in TUNE.items()}
    for name, path in sources.items():
        path.write_bytes((folder / name).read_bytes())
    names = [path.name for path in sources.values()]
    made = {f"{path.stem}-0.009GB.{ending}": path for path in sources.values()}
    chosen = {"source": names[0], "pair": names[1], "level": level, "target_gb": 0.009}
    chosen |= {"copy": "as in the file", "filename": "", "overwrite": False}
    graph = {
        "quantized": graphs.node("Ideogram4QuantQuantize", **chosen),
        "report": graphs.node("PreviewAny", source=("quantized", 1)),
    }
    try:
        run = server.run(graph)
        assert run.status == "success", run.error
        said = run.outputs["report"]["text"][0]
        assert "foretold: final latents" in said
        assert "6 to 7" in said or "7 to 6" in said
        wanted = tuple(Part(path, tmp_path / name) for name, path in made.items())
        options = QuantOptions(native=ending == "safetensors")
        quantize_to_target(Request(wanted, target_gb(0.009), options=options))
        for part in wanted:
            assert (folder / part.out.name).read_bytes() == part.out.read_bytes()
        mixed = "mixed GGUF" if ending == "gguf" else "mixed"
        loaded = server.run(
            {
                "model": graphs.parts(level=mixed)["model"],
                "shown": graphs.node("PreviewAny", source=("model", 2)),
            }
        )
        assert loaded.status == "success", loaded.error
        told = loaded.outputs["shown"]["text"][0]
        assert all(name in told for name in made), told
    finally:
        for name in (*names, *made):
            (folder / name).unlink(missing_ok=True)


TUNE = {graphs.CONDITIONAL: "", graphs.UNCONDITIONAL: "-uncond"}
