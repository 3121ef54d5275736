"""Step counts and rates of the stages: the run that made the committed weights."""

from .train_dit import Stage

TRANSFORMER_STAGES = {
    "letters": Stage("letters", steps=1400, stream="cond", letter_weight=0.3, pictures="free"),
    "facts": Stage(
        "facts",
        steps=600,
        stream="cond",
        seed=1,
        letter_weight=0.2,
        fact_weight=1.0,
        pictures="coupled",
    ),
    "cond": Stage(
        "cond",
        steps=1200,
        seed=5,
        letter_weight=0.1,
        fact_weight=1.0,
        start_from="model",
        pictures="fine",
        early=1 / 8,
        mean=0.0,
        fade_from=0.75,
    ),
    "uncond": Stage(
        "uncond",
        steps=1600,
        batch=32,
        seed=2,
        conditional=False,
        pictures="fine",
        cooldown=600,
        block_lr=7e-3,
        early=1 / 8,
        mean=0.0,
        fade_from=0.75,
    ),
    "cond_end": Stage(
        "cond_end",
        steps=1100,
        seed=6,
        cooldown=900,
        letter_weight=0.05,
        fact_weight=1.0,
        start_from="model",
        early=1 / 8,
        mean=0.0,
        fade_from=0.75,
    ),
    "uncond_end": Stage(
        "uncond_end",
        steps=800,
        batch=32,
        seed=7,
        conditional=False,
        cooldown=700,
        block_lr=5e-3,
        early=1 / 8,
        mean=0.0,
        fade_from=0.75,
    ),
}
# where a stage's weights come from
STARTS = {
    "letters": None,
    "facts": "letters",
    "cond": "facts",
    "uncond": "facts",
    "cond_end": "cond",
    "uncond_end": "uncond",
}
