"""Model files as levels and reports see them, without any file."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from ideogram4_quant.checkpoint import ModelConfig
from ideogram4_quant.checkpoint.folding import Folding
from ideogram4_quant.checkpoint.levels import Catalogue
from ideogram4_quant.checkpoint.listing import list_files
from ideogram4_quant.checkpoint.pairs import Candidate

COND, UNCOND, BOTH = ("conditional",), ("unconditional",), ("conditional", "unconditional")


@dataclass(frozen=True)
class Header:
    """What levels ask of an opened file."""

    level: str
    copies: tuple[str, ...]
    size: int = 1000
    config: ModelConfig = field(default_factory=ModelConfig)
    copy_reason: str = "its name"
    copy_assumed: bool = False
    one_branch: object = None
    attention_wish: str | None = None
    linears_only: bool = False
    origin: str = "some layout"
    protected: tuple[str, ...] = ()
    paths: tuple[Path, ...] = (Path("f"),)

    folded: Folding | None = None

    def folding(self, copy: str) -> Folding | None:
        return self.folded

    def reads_text(self, copy: str) -> bool:
        return True


def catalogue(**files: Header) -> Catalogue:
    listing = list_files("diffusion_models", ["/Models/unet", "/Models/diffusion_models"])
    return Catalogue(listing, [Candidate(name, Path(name), h) for name, h in files.items()])
