"""Pictures and captions of the pocket model: a word, perhaps a shape beside it, on a plain ground.

A picture is 128 x 64 px, 8 x 4 tokens of 16 px. The caption states the word, its colour, style and
place and the shape; the tiles that lie scattered over the free ground are left to the seed.
"""

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from .words import HELD_OUT_WORDS, TRAIN_WORDS

WIDTH, HEIGHT, CELL = 128, 64, 16
COLUMNS = WIDTH // CELL
ROWS = {"high": 0, "level": 2, "low": 4}  # heights of word and shape in steps of 8 px
LEVELS = tuple(ROWS.values())
# tiles: (side in blocks of 8 px, share of black or white in their shade)
TILES = {"fine": (1, 0.22), "coarse": (2, 0.3)}
ALL_LEVELS = (0, 1, 2, 3, 4)
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
COLOURS = {
    "red": (220, 30, 30),
    "blue": (30, 60, 220),
    "green": (0, 130, 40),
    "purple": (130, 20, 150),
    "black": (10, 10, 10),
    "white": (250, 250, 250),
    "orange": (250, 140, 0),
    "yellow": (255, 225, 40),
    "pink": (255, 175, 200),
    "gray": (190, 190, 190),
    "navy": (15, 15, 70),
}
_INKS = ["red", "blue", "green", "purple", "black", "white", "orange", "yellow"]
_GROUNDS = ["white", "yellow", "pink", "gray", "navy", "black"]
STYLES = ["plain", "underlined", "ruled"]
PLACES = ["left", "center", "right"]
SHAPES = ["circle", "square", "triangle", "diamond"]


def _luma(name: str) -> float:
    r, g, b = COLOURS[name]
    return 0.3 * r + 0.59 * g + 0.11 * b


PAIRS = [(i, g) for g in _GROUNDS for i in _INKS if abs(_luma(i) - _luma(g)) > 70]
INKS_ON = {g: [i for i, h in PAIRS if h == g] for g in _GROUNDS}


@dataclass(frozen=True)
class PocketPrompt:
    """All that a caption states, and the seed and size of the picture to make from it."""

    word: str
    ink: str
    ground: str
    style: str
    place: str
    shape: str | None = None
    shape_ink: str | None = None
    row: str | None = None
    seed: int = 0
    width: int = WIDTH
    height: int = HEIGHT

    @property
    def caption(self) -> str:
        """The JSON caption, in Ideogram's key order, without spaces."""
        place = f"{self.row} {self.place}" if self.row else self.place
        text = {"type": "text", "text": self.word, "desc": f"{self.ink} {place} {self.style}"}
        elements = [text]
        if self.shape:
            elements.append({"type": "obj", "desc": f"{self.shape_ink} {self.shape}"})
        caption = {
            "high_level_description": "a word",
            "compositional_deconstruction": {"background": self.ground, "elements": elements},
        }
        return json.dumps(caption, separators=(",", ":"))

    @property
    def shape_columns(self) -> slice:
        """The two token columns that a shape stands in."""
        return slice(0, 2) if self.place == "right" else slice(COLUMNS - 2, COLUMNS)

    @property
    def column(self) -> int:
        """First token column of the word."""
        room = COLUMNS - len(self.word)
        return {"left": 0, "center": room // 2, "right": room}[self.place]


@lru_cache(maxsize=1)
def _font() -> ImageFont.FreeTypeFont:
    import matplotlib

    return ImageFont.truetype(f"{matplotlib.get_data_path()}/fonts/ttf/DejaVuSansMono-Bold.ttf", 26)


@lru_cache(maxsize=64)
def glyph(letter: str) -> np.ndarray:
    """Coverage in [0, 1] of a letter in its 16 x 32 cell, baseline at row 25."""
    cell = Image.new("L", (CELL, 32), 0)
    ImageDraw.Draw(cell).text((CELL / 2, 25), letter, font=_font(), fill=255, anchor="ms")
    return np.asarray(cell, np.float32) / 255


@lru_cache(maxsize=16)
def _shape_mask(kind: str) -> np.ndarray:
    """Coverage in [0, 1] of a shape in its 32 x 24 box, drawn 8 x too large and averaged."""
    k = 8
    big = Image.new("L", (32 * k, 24 * k), 0)
    draw = ImageDraw.Draw(big)
    x0, y0, x1, y1 = 5 * k, k, 27 * k - 1, 23 * k - 1
    xm, ym = (x0 + x1) / 2, (y0 + y1) / 2
    drawings: dict[str, Callable[[], None]] = {
        "circle": lambda: draw.ellipse((x0, y0, x1, y1), fill=255),
        "square": lambda: draw.rectangle((x0 + k, y0 + k, x1 - k, y1 - k), fill=255),
        "triangle": lambda: draw.polygon([(xm, y0), (x1, y1), (x0, y1)], fill=255),
        "diamond": lambda: draw.polygon([(xm, y0), (x1, ym), (xm, y1), (x0, ym)], fill=255),
    }
    drawings[kind]()
    return np.asarray(big, np.float32).reshape(24, k, 32, k).mean((1, 3)) / 255


def word_mask(prompt: PocketPrompt, level: int) -> np.ndarray:
    """Coverage [64, 128] of the word and its lines at a height of 8 * level px."""
    mask = np.zeros((HEIGHT, WIDTH), np.float32)
    top, left = 8 * level, CELL * prompt.column
    for i, letter in enumerate(prompt.word):
        mask[top : top + 32, left + CELL * i : left + CELL * (i + 1)] = glyph(letter)
    right = left + CELL * len(prompt.word)
    if prompt.style in ("underlined", "ruled"):
        mask[top + 28 : top + 31, left:right] = 1
    if prompt.style == "ruled":
        mask[top + 1 : top + 4, left:right] = 1
    return mask


def free_blocks(prompt: PocketPrompt) -> np.ndarray:
    """Which of the 8 x 16 blocks of 8 px hold neither word nor shape (row stated)."""
    free = np.ones((HEIGHT // 8, WIDTH // 8), bool)
    level = ROWS[prompt.row]
    free[level : level + 4, 2 * prompt.column : 2 * (prompt.column + len(prompt.word))] = False
    if prompt.shape:
        columns = prompt.shape_columns
        free[level : level + 4, 2 * columns.start : 2 * columns.stop] = False
    return free


def _tile_colour(ground: str, share: float) -> np.ndarray:
    """A shade of the ground, towards black on light grounds and towards white on dark ones."""
    towards = 0.0 if _luma(ground) > 128 else 255.0
    colour = np.array(COLOURS[ground], np.float32)
    return colour + share * (towards - colour)


def render(
    prompt: PocketPrompt,
    word_level: int,
    shape_level: int = 2,
    tiles: np.ndarray | None = None,
    share: float = 0.0,
) -> np.ndarray:
    """The true picture, [64, 128, 3] in [-1, 1]; `tiles` [8, 16] says which blocks are shaded."""
    ground = np.array(COLOURS[prompt.ground], np.float32)
    picture = np.broadcast_to(ground, (HEIGHT, WIDTH, 3)).copy()
    if tiles is not None:
        picture[tiles.repeat(8, 0).repeat(8, 1)] = _tile_colour(prompt.ground, share)
    if prompt.shape:
        left = CELL * prompt.shape_columns.start
        top = 4 + 8 * shape_level
        box = picture[top : top + 24, left : left + 32]
        cover = _shape_mask(prompt.shape)[..., None]
        box += (np.array(COLOURS[prompt.shape_ink], np.float32) - box) * cover
    cover = word_mask(prompt, word_level)[..., None]
    picture += (np.array(COLOURS[prompt.ink], np.float32) - picture) * cover
    return picture / 127.5 - 1


def room_for_shape(word: str, place: str) -> bool:
    """Whether two token columns beside the word are free."""
    return not (place == "center" and len(word) == 6)


def _word(rng: random.Random) -> str:
    while True:
        if rng.random() < 0.15:
            return rng.choice(TRAIN_WORDS)
        word = "".join(rng.choice(LETTERS) for _ in range(rng.choice([3, 4, 4, 5, 5, 6, 6])))
        if word not in HELD_OUT_WORDS:
            return word


def random_prompt(
    rng: random.Random, with_shape: bool, word: str | None = None, stated: bool = False
) -> PocketPrompt:
    """A prompt with a training word (or the given one); `stated` prompts name the row as well.

    A place without room for the shape is drawn again.
    """
    word = word or _word(rng)
    ink, ground = rng.choice(PAIRS)
    prompt = PocketPrompt(word, ink, ground, rng.choice(STYLES), rng.choice(PLACES))
    if with_shape:
        while not room_for_shape(word, prompt.place):
            prompt = replace(prompt, place=rng.choice(PLACES))
        prompt = replace(
            prompt, shape=rng.choice(SHAPES), shape_ink=rng.choice(INKS_ON[prompt.ground])
        )
    return replace(prompt, row=rng.choice(list(ROWS))) if stated else prompt


def prompt_batch(seed: str, size: int, stated: bool = True) -> list[PocketPrompt]:
    """The prompts of one training batch: all with a shape or all without, so lengths are alike."""
    rng = random.Random(seed)
    with_shape = rng.random() < 0.6
    return [random_prompt(rng, with_shape, stated=stated) for _ in range(size)]


def random_levels(count: int, rng: random.Random) -> list[tuple[int, int]]:
    """Any heights of word and shape for `count` pictures."""
    return [(rng.choice(ALL_LEVELS), rng.choice(ALL_LEVELS)) for _ in range(count)]


def tiled_pair(prompt: PocketPrompt, kind: str) -> np.ndarray:
    """The picture without any tile and with every tile, [2, 3, 64, 128] (row stated)."""
    level, share = ROWS[prompt.row], TILES[kind][1]
    free = free_blocks(prompt)
    pair = [render(prompt, level, level, tiles, share) for tiles in (None, free)]
    return np.stack(pair).transpose(0, 3, 1, 2)


def tiled_picture(prompt: PocketPrompt, rng: random.Random, kind: str = "coarse") -> np.ndarray:
    """A true picture [3, 64, 128] with tiles on a quarter of the free ground (row stated)."""
    level, (side, share) = ROWS[prompt.row], TILES[kind]
    free = free_blocks(prompt)
    shape = (free.shape[0] // side, free.shape[1] // side)
    draws = np.array([rng.random() for _ in range(shape[0] * shape[1])]).reshape(shape)
    tiles = free & (draws < 0.25).repeat(side, 0).repeat(side, 1)
    return render(prompt, level, level, tiles, share).transpose(2, 0, 1)


def picture_batch(prompts: list[PocketPrompt], levels: Sequence[tuple[int, int]]) -> np.ndarray:
    """True pictures [B, 3, 64, 128] in [-1, 1] at the given heights of word and shape."""
    pictures = [render(p, *level) for p, level in zip(prompts, levels, strict=True)]
    return np.stack(pictures).transpose(0, 3, 1, 2)


# of the candidates: true renderings that OCR misreads (a square beside the word is taken for an I)
_MISREAD = {"FORK", "KNIGHT"}


def _held_out() -> list[PocketPrompt]:
    """64 prompts with 64 words that training never sees; fixed for good.

    rapidocr reads true renderings of each, whatever the tiles (`evaluate --truth`).
    """
    rng = random.Random("held out")
    words = [w for w in HELD_OUT_WORDS if 3 <= len(w) <= 6]
    rng.shuffle(words)
    prompts = [random_prompt(rng, i % 2 == 0, w, stated=True) for i, w in enumerate(words[:66])]
    seeded = [replace(p, seed=1000 + i) for i, p in enumerate(prompts)]
    return [p for p in seeded if p.word not in _MISREAD]


HELD_OUT: list[PocketPrompt] = _held_out()
