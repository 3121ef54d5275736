"""The tensors of one module in a LoRA file, handed out checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from ...errors import CorruptFileError
from .kinds import Strength


@dataclass(frozen=True)
class Found:
    """A module's tensors: part -> (name in the file, tensor); names: the spellings of its own."""

    file: str
    module: str
    spelled: str
    parts: Mapping[str, tuple[str, Tensor]]
    strength: Strength

    def tensor(self, part: str, *needed: tuple[int, ...]) -> Tensor:
        """The part in float32, of one of the shapes ``needed`` (none given: of any).

        CorruptFileError where it is missing, of another shape or not finite.
        """
        if part not in self.parts:
            raise CorruptFileError(
                "one part of this update is missing",
                file=self.file,
                tensor=f"{self.spelled}.{part}",
                found=", ".join(name for name, _ in self.parts.values()),
                needed=part,
                hint="Download the file again.",
            )
        name, stored = self.parts[part]
        if needed and tuple(stored.shape) not in needed:
            raise self.wrong_shape(part, " or ".join(str(list(shape)) for shape in needed))
        if not (stored.is_floating_point() or part == "alpha"):
            raise CorruptFileError(
                "an update is of a dtype that it cannot have",
                file=self.file,
                tensor=name,
                found=str(stored.dtype),
                needed="floats",
            )
        tensor = stored.float()
        if not tensor.isfinite().all():
            raise CorruptFileError(
                "an update holds NaN or infinity",
                file=self.file,
                tensor=name,
                hint="It was saved after its training had failed.",
            )
        return tensor

    def wrong_shape(self, part: str, needed: str) -> CorruptFileError:
        """What to raise for a part of a shape that does not fit."""
        name, stored = self.parts[part]
        return CorruptFileError(
            "an update does not fit this model: it has another shape",
            file=self.file,
            tensor=name,
            found=list(stored.shape),
            needed=needed,
            hint="It was trained for a model of another size.",
        )

    def alpha(self) -> float | None:
        """The alpha tensor, of any dtype."""
        if "alpha" not in self.parts:
            return None
        alpha = self.tensor("alpha")
        if alpha.numel() != 1:
            raise self.wrong_shape("alpha", "one number")
        return alpha.item()

    def scale(self, rank: int | None) -> float:
        """alpha / rank, as a tensor or the file's metadata states it.

        rank None: of whole matrices, for which an alpha tensor says nothing.
        """
        alpha = self.alpha()
        if alpha is not None:
            return 1.0 if rank is None else alpha / rank
        return self.strength.scale((self.module, self.spelled), rank)
