"""The table of LoRA key forms (docs/ground.md): what ours, stock ComfyUI and diffusers load."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import save_file

from ideogram4_quant.checkpoint.loras import parse_lora
from ideogram4_quant.tests.lora_forms import FORMS, REFUSED, SHAPES

TABLE = Path(__file__).parents[1] / "docs" / "ground.md"


@pytest.mark.parametrize("name", FORMS)
def test_ours_loads_every_form_whole(name):
    found = parse_lora(FORMS[name].state, SHAPES, "f")
    assert found.unknown == []
    assert sum(map(len, found.updates.values())) == FORMS[name].ours


@pytest.mark.parametrize("name", FORMS)
def test_what_diffusers_loads(name):
    loaders = pytest.importorskip("diffusers.loaders.lora_pipeline")
    form = FORMS[name]
    try:
        state = loaders.Ideogram4LoraLoaderMixin.lora_state_dict(dict(form.state))
    except ValueError:
        assert form.diffusers == REFUSED
        return
    if not all("lora" in key for key in state):  # load_lora_weights then raises
        assert form.diffusers == REFUSED
        return
    loaded = {k.removeprefix("transformer.") for k in state if k.startswith("transformer.")}
    fused = {"to_q": "qkv", "to_k": "qkv", "to_v": "qkv"}
    names = {k.partition(".lora_")[0] for k in loaded}
    linears = {".".join(fused.get(part, part) for part in n.split(".")) for n in names}
    assert len(linears) == form.diffusers


@pytest.mark.host
def test_what_stock_loads(in_host, tiny, tmp_path):
    files = {}
    for number, (name, form) in enumerate(FORMS.items()):
        files[name] = str(tmp_path / f"{number}.safetensors")
        save_file(dict(form.state), files[name])
    listing = tmp_path / "files.json"
    listing.write_text(json.dumps(files))
    found = in_host("lora_forms.py", listing, tiny.conditional_file)
    assert found == {name: form.stock for name, form in FORMS.items()}


def test_the_table_says_so():
    """Each form is a row: ours, stock, diffusers; 0 reads ``nothing``."""
    text = TABLE.read_text(encoding="utf-8")
    for name, form in FORMS.items():
        whole = form.ours
        cells = (_cell(value, whole) for value in (form.ours, form.stock, form.diffusers))
        assert f"| `{name}` | {' | '.join(cells)} |" in text, name


def _cell(value: int | str, whole: int | str) -> str:
    if value in (REFUSED, whole):
        return "all" if value == whole else REFUSED
    return "**nothing**" if value == 0 else f"**{value} of {whole}**"
