"""Sick copies of the pocket transformer: outliers that its own training did not give it.

`channels`: a few hidden channels of every FFN are loud on all tokens. Rows of w3 times s, the same
columns of w2 divided by s: the very thing that SmoothQuant undoes.
`tokens`: a few hidden channels, each loud on about 2 % of the tokens and silent on the others.
The FFN is widened by 256 channels in cancelling pairs (equal rows of w1 and of w3, opposite columns
of w2), `pairs` of which fire loudly and seldom.
Both leave the function as it was (to 120 dB) and are exact in bf16.

There is no disease trained in by a reward for kurtosis: its outliers would come with a changed
function, so a loss could no longer be told from the damage of quantization.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from .data import prompt_batch
from .encoder import CaptionEncoder
from .export import from_canonical
from .transformer import CONFIG, build_transformer, velocity

Disease = Literal["channels", "tokens"]
StateDict = dict[str, Tensor]
MODERATE = 128.0
STRESS = {"channels": 4096.0, "tokens": 16384.0}
LOUD_CHANNELS = 4
LOUD_PAIRS = 8
EXTRA = 256
_FIRING = 0.02


def infect(
    state: StateDict,
    disease: Disease,
    strength: float,
    seed: int = 0,
    encoder: CaptionEncoder | None = None,
) -> StateDict:
    """A sick copy of a transformer's state dict (canonical names).

    Strength: 30 to 300 is like the real model, thousands are stress.

    `tokens` looks at the model's activations; with an encoder on text and image tokens, without
    one (the unconditional copy) on image tokens alone. It makes the FFN 256 wider: build the model
    with `sick_config(disease)`.
    """
    generator = torch.Generator().manual_seed(seed)
    if disease == "channels":
        return _loud_channels(state, strength, generator)
    if disease == "tokens":
        return _loud_tokens(state, strength, generator, encoder)
    raise ValueError(f"Unknown disease {disease!r}: use 'channels' or 'tokens'.")


def sick_config(disease: Disease, config: dict | None = None) -> dict:
    """The config that an infected state dict needs."""
    config = dict(config or CONFIG)
    if disease == "tokens":
        config["intermediate_size"] += EXTRA
    return config


def _layers(state: StateDict) -> range:
    return range(1 + max(int(k.split(".")[1]) for k in state if k.startswith("layers.")))


def _loud_channels(state: StateDict, strength: float, generator: torch.Generator) -> StateDict:
    scale = 2.0 ** round(torch.tensor(strength).log2().item())
    out = dict(state)
    for i in _layers(state):
        w3, w2 = f"layers.{i}.feed_forward.w3.weight", f"layers.{i}.feed_forward.w2.weight"
        out[w3], out[w2] = state[w3].clone(), state[w2].clone()
        chosen = torch.randperm(len(out[w3]), generator=generator)[:LOUD_CHANNELS]
        out[w3][chosen] *= scale
        out[w2][:, chosen] /= scale
    return out


@torch.no_grad()
def ffn_inputs(state: StateDict, encoder: CaptionEncoder | None) -> list[Tensor]:
    """Inputs [tokens, 256] of every FFN on 24 random prompts at noise levels of the schedule."""
    model = build_transformer().eval()
    model.load_state_dict({k: v.float() for k, v in from_canonical(state).items()})
    seen: list[Tensor] = []
    for layer in model.layers:
        layer.feed_forward.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    prompts = prompt_batch("infect", 24)
    features, lengths = encoder([p.caption for p in prompts]) if encoder else (None, None)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(len(prompts), 32, CONFIG["in_channels"], generator=generator)
    velocity(model, x, torch.linspace(0, 0.98, len(prompts)), features, lengths)
    return [s.flatten(0, 1) for s in seen]


def _constant_direction(x: Tensor) -> Tensor:
    """u with u . x ~ 1 on all tokens (ridge regression): what stands in for a bias."""
    gram = x.T @ x / len(x)
    ridge = 1e-3 * gram.trace() / len(gram) * torch.eye(len(gram))
    return torch.linalg.solve(gram + ridge, x.mean(0))


def _gate_row(x: Tensor, constant: Tensor, generator: torch.Generator) -> Tensor:
    """A row with a product of about 4 on the share `_FIRING` of tokens, negative on the others."""
    direction = torch.randn(x.shape[1], generator=generator)
    projected = x @ direction
    threshold = projected.quantile(1 - _FIRING)
    row = direction - threshold * constant
    fired = (x @ row).topk(max(1, int(_FIRING * len(x) / 2))).values.min().clamp_min(1e-3)
    return 4 * row / fired


def _loud_tokens(
    state: StateDict, strength: float, generator: torch.Generator, encoder: CaptionEncoder | None
) -> StateDict:
    out = dict(state)
    for i, x in enumerate(ffn_inputs(state, encoder)):
        names = [f"layers.{i}.feed_forward.{w}.weight" for w in ("w1", "w3", "w2")]
        w1, w3, w2 = (state[n].float() for n in names)
        usual = (F.silu(x @ w1.T) * (x @ w3.T)).abs().mean()
        copied = torch.randint(len(w1), (EXTRA // 2,), generator=generator)
        gates, ups, columns = w1[copied].clone(), w3[copied].clone(), w2[:, copied].clone()
        constant = _constant_direction(x)
        for pair in range(LOUD_PAIRS):
            gates[pair] = _gate_row(x, constant, generator)
            ups[pair] = constant * strength * usual / 4
        dtype = state[names[0]].dtype
        pairs = [t.to(dtype).repeat_interleave(2, 0) for t in (gates, ups)]
        both = torch.stack([columns, -columns], 2).flatten(1).to(dtype)
        out[names[0]] = torch.cat([state[names[0]], pairs[0]])
        out[names[1]] = torch.cat([state[names[1]], pairs[1]])
        out[names[2]] = torch.cat([state[names[2]], both], 1)
    return out
