"""Compare levels."""

from __future__ import annotations

from pathlib import Path

import folder_paths
from comfy_api.latest import io, ui

from .compare import compare_levels, read_captions, read_folders
from .schema import CATEGORY

_MOST_LEVELS = 10


class CompareLevels(io.ComfyNode):
    """Pictures of several levels -> a contact sheet, and how far each is from the first."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        picture = io.Image.Input(
            "level",
            optional=True,
            tooltip="All pictures of one level. The first level is the reference.",
        )
        return io.Schema(
            node_id="Ideogram4QuantCompare",
            display_name="Compare levels (Ideogram 4)",
            category=CATEGORY,
            description=(
                "Puts the pictures of several levels side by side and measures how far each level "
                "is from the first, and whether the text asked for can be read."
            ),
            search_aliases=["psnr", "ssim", "contact sheet", "quality", "ideogram compare"],
            inputs=[
                io.Autogrow.Input(
                    "pictures",
                    template=io.Autogrow.TemplatePrefix(
                        picture, prefix="level", min=0, max=_MOST_LEVELS
                    ),
                    optional=True,
                    tooltip="The same prompts and seeds in the same order at every level.",
                ),
                io.String.Input(
                    "names",
                    multiline=True,
                    default="",
                    tooltip="Names of the connected levels, one a line, in their order.",
                ),
                io.String.Input(
                    "folders",
                    multiline=True,
                    default="",
                    optional=True,
                    tooltip=(
                        "Instead of connected pictures: name = folder, one a line; folders in "
                        "ComfyUI's output folder that hold the same file names."
                    ),
                ),
                io.String.Input(
                    "captions",
                    multiline=True,
                    default="",
                    optional=True,
                    tooltip=(
                        "The caption of all connected pictures, or one a line: then the text it "
                        "asks for is looked for in the pictures (needs rapidocr)."
                    ),
                ),
                io.Boolean.Input(
                    "differences",
                    default=False,
                    optional=True,
                    tooltip="Adds a second sheet of difference maps, 8 times too strong.",
                ),
            ],
            outputs=[
                io.Image.Output(
                    id="sheet",
                    display_name="sheet",
                    tooltip="Prompts down, levels across, the scores below each picture.",
                ),
                io.String.Output(
                    id="table",
                    display_name="table",
                    tooltip="How far each level strays, means with 95 % intervals, in Markdown, "
                    "and what is missing.",
                ),
            ],
            is_output_node=True,
        )

    @classmethod
    def execute(
        cls,
        pictures: io.Autogrow.Type | None = None,
        names: str = "",
        folders: str = "",
        captions: str = "",
        differences: bool = False,
    ) -> io.NodeOutput:
        batches = [batch for batch in (pictures or {}).values() if batch is not None]
        found = read_folders(folders, Path(folder_paths.get_output_directory()))
        sheet, table = compare_levels(
            batches, names.splitlines(), found, read_captions(captions), differences=differences
        )
        shown = ui.PreviewImage(sheet, cls=cls).as_dict() | ui.PreviewText(table).as_dict()
        return io.NodeOutput(sheet, table, ui=shown)

    @classmethod
    def fingerprint_inputs(cls, folders: str = "", **_: object) -> object:
        """Folders change without the graph: look again at every run."""
        return float("nan") if folders.strip() else ""
