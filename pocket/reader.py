"""The auxiliary head that makes text bind: what an image token knows after block 2."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .data import COLOURS, COLUMNS, LETTERS, ROWS, SHAPES, STYLES, PocketPrompt

HIDDEN = 256
READ_AFTER_BLOCK = 2


def _facts(prompt: PocketPrompt) -> list[int]:
    """What a caption states besides the word, as classes (see `FACTS`)."""
    inks, grounds = list(COLOURS), list(COLOURS)
    return [
        inks.index(prompt.ink),
        grounds.index(prompt.ground),
        STYLES.index(prompt.style),
        list(ROWS).index(prompt.row) if prompt.row else len(ROWS),
        SHAPES.index(prompt.shape) if prompt.shape else len(SHAPES),
        inks.index(prompt.shape_ink) if prompt.shape else len(COLOURS),
    ]


FACTS = (len(COLOURS), len(COLOURS), len(STYLES), len(ROWS) + 1, len(SHAPES) + 1, len(COLOURS) + 1)


class Reader(torch.nn.Module):
    """The auxiliary head, thrown away later: what each image token knows after block 2.

    Which letter, or none, the token's column holds; the inks, the ground, the style, the shape.
    Without it text does not bind for thousands of steps.
    """

    def __init__(self, model, fact_weight: float):
        super().__init__()
        self.fact_weight = fact_weight
        self.linear = torch.nn.Linear(HIDDEN, len(LETTERS) + 1 + sum(FACTS))
        self.seen: list[Tensor] = []
        block = model.layers[READ_AFTER_BLOCK - 1]
        block.register_forward_hook(lambda module, args, out: self.seen.append(out))

    def forward(self, prompts: list[PocketPrompt]) -> tuple[Tensor, dict[str, float]]:
        """Cross-entropy on the tokens just seen, and the shares read right."""
        hidden = self.seen.pop()[:, -4 * COLUMNS :]
        scores = self.linear(F.rms_norm(hidden, (HIDDEN,), eps=1e-5))
        letters, *facts = scores.split([len(LETTERS) + 1, *FACTS], -1)
        loss, letters_right = self._letters(prompts, letters)
        truth = torch.tensor([_facts(p) for p in prompts])[:, None].expand(-1, hidden.shape[1], -1)
        right = 0.0
        for i, fact in enumerate(facts):
            target = truth[..., i].flatten()
            loss = loss + self.fact_weight * F.cross_entropy(fact.flatten(0, 1), target)
            right += (fact.argmax(-1).flatten() == target).float().mean().item() / len(facts)
        return loss, {"letters_right": letters_right, "facts_right": right}

    @staticmethod
    def _letters(prompts: list[PocketPrompt], scores: Tensor) -> tuple[Tensor, float]:
        target = torch.full((len(prompts), COLUMNS), len(LETTERS))
        for row, prompt in zip(target, prompts, strict=True):
            for i, letter in enumerate(prompt.word):
                row[prompt.column + i] = LETTERS.index(letter)
        target = target[:, None].expand(-1, 4, -1).flatten()
        scores = scores.flatten(0, 1)
        is_letter = target < len(LETTERS)
        weight = torch.where(is_letter, 1.0, 0.3)
        losses = F.cross_entropy(scores, target, reduction="none")
        right = (scores.argmax(-1) == target)[is_letter].float().mean().item()
        return (losses * weight).sum() / weight.sum(), right
