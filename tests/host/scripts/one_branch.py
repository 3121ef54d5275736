"""One branch in the host: ONE (its file), FILES (JSON: conditional, unconditional, encoder).

ONE lies alone in its folder.
"""

from __future__ import annotations

import json
from pathlib import Path

import inside
from folded import load_stock


def main() -> None:
    pack, (one, files) = inside.start()
    import folder_paths
    import torch

    files = {part: Path(path) for part, path in json.loads(files).items()}
    loading = inside.load(pack, "nodes.model_loading")
    clip = inside.load(pack, "nodes.encoder_loading").load_encoder(files["encoder"])
    with torch.inference_mode():
        positive = clip.encode_from_tokens_scheduled(clip.tokenize("a red word"))
        branch = loading.load_model(loading.ModelSource(Path(one), "conditional"))
        plain = loading.load_model(loading.ModelSource(files["conditional"], "conditional"))
        other = loading.load_model(loading.ModelSource(files["unconditional"], "unconditional"))
        runs = Runs(pack, positive)
        found = {
            "chosen": chosen(pack, one),
            "instant": runs.sampled(branch, "instant"),
            "default": runs.sampled(branch, "default"),
            "turbotime": runs.sampled(plain, "turbotime"),
            "plain instant": runs.sampled(plain, "instant"),
            "unsettled": runs.sampled(branch, "instant", schedule_mu="0.5", last_sigma="5.53e-4"),
            "same": runs.difference(branch, plain),
            "second copy": runs.refused(branch, other, "instant"),
            "second copy, default": runs.refused(branch, other, "default"),
            "guidance": runs.refused(branch, None, "instant", guidance="7*8"),
            "preset": runs.refused(plain, other, "instant"),
            "guidance 1": runs.refused(branch, None, "default", guidance="1*20"),
            "own guidance": runs.refused(plain, other, "turbotime", guidance="2"),
            "stock": stock(pack, plain, one, files["conditional"]),
            "inputs": inputs(pack),
            "saved": saved(pack, branch, Path(folder_paths.get_output_directory())),
        }
    inside.report(found)


class Runs:
    """The sampler node on the pocket's size."""

    def __init__(self, pack: str, positive: list):
        self.pack, self.positive = pack, positive
        self.node = inside.load(pack, "nodes.node_sampler").Sampler
        self.error = inside.load(pack, "errors").Ideogram4QuantError

    def run(self, model, other, preset: str, **settings):
        size = {"width": 128, "height": 64, "seed": 3}
        return self.node.execute(
            conditional=model, unconditional=other, positive=self.positive, preset=preset,
            **size, **settings,
        ).result  # fmt: skip

    def sampled(self, model, preset: str, **settings) -> str:
        """The report of a run."""
        return self.run(model, None, preset, **settings)[1]

    def difference(self, branch, plain) -> float:
        """One branch against the same weights sampled as a conditional copy at guidance 1."""
        wanted = self.run(plain, None, "fast", guidance="1", steps=8)[0]["samples"]
        found = self.run(branch, None, "instant")[0]["samples"]
        return inside.relative(found, wanted)

    def refused(self, model, other, preset: str, **settings) -> str:
        try:
            self.run(model, other, preset, steps=settings.pop("steps", 0), **settings)
        except self.error as error:
            return str(error)
        return "taken"


def inputs(pack: str) -> dict:
    """Names of each node's widgets in their order, and the presets there are."""
    nodes = {
        "load": inside.load(pack, "nodes.node_model").LoadIdeogram4,
        "sampler": inside.load(pack, "nodes.node_sampler").Sampler,
        "preset": inside.load(pack, "nodes.node_guider").SamplingPreset,
    }
    schemas = {name: node.define_schema().inputs for name, node in nodes.items()}
    found = {name: [i.id for i in schema] for name, schema in schemas.items()}
    (preset,) = [i for i in schemas["sampler"] if i.id == "preset"]
    return found | {"presets": list(preset.options)}


def chosen(pack: str, one: str) -> dict:
    """What the loader makes of a folder that holds one branch alone."""
    import folder_paths

    choice = inside.load(pack, "nodes.model_choice")
    report = inside.load(pack, "nodes.report")
    before = folder_paths.folder_names_and_paths["diffusion_models"]
    folder_paths.folder_names_and_paths["diffusion_models"] = ([str(Path(one).parent)], before[1])
    try:
        auto, _ = choice.choose_files("auto")
        picked, _ = choice.choose_files("auto", conditional_file=Path(one).name)
        two, _ = choice.choose_files("BF16", branches="two")
        forced, _ = choice.choose_files("BF16", branches="one")
        options = inside.load(pack, "ops.linear").LinearOptions()
        text = report.text(auto, "auto", options, choice.machine())
        half = report.text(two, "BF16", options, choice.machine())
    finally:
        folder_paths.folder_names_and_paths["diffusion_models"] = before
    return {
        "auto": auto.one_branch.reason,
        "second": auto.unconditional is None,
        "picked": picked.one_branch is not None and picked.unconditional is None,
        "two": two.one_branch is None,
        "forced": forced.one_branch is not None,
        "text": text,
        "half": half,
        "note": report.summary(auto, "auto", options, choice.machine())["one_branch"],
    }


def stock(pack: str, plain, one: str, other: Path) -> list[str | None]:
    """Why models of the stock loader are of one branch: the host keeps which file they are."""
    of = inside.load(pack, "nodes.one_branch").one_branch_of
    found = (of(load_stock(plain, str(path))) for path in (one, other))
    return [branch and branch.reason for branch in found]


def saved(pack: str, branch, out: Path) -> str:
    """What the host's ModelSave leaves of the mark."""
    from comfy_extras.nodes_model_merging import ModelSave

    ModelSave().save(branch, "marked/plain")
    (path,) = (out / "marked").glob("plain*.safetensors")
    return inside.load(pack, "checkpoint").open_checkpoint(path).one_branch.reason


if __name__ == "__main__":
    main()
