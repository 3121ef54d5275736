"""A LoRA file of every kind, and the dense weights that it makes, by formulas written out here.

The names and shapes are those that PEFT 0.21, LyCORIS 4.1 and kohya's scripts write, and the
formulas give the weights of their training's forward pass (checked against these libraries once).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

QKV, OUT, W2 = "layers.0.attention.qkv", "layers.2.attention.o", "layers.1.feed_forward.w2"
ADALN, NORM = "layers.3.adaln_modulation", "layers.0.attention_norm1"
#: linears of `tests.tiny_model`: name -> (N, K)
SHAPES = {QKV: (768, 256), OUT: (256, 256), W2: (256, 768), ADALN: (1024, 256)}
#: parameters of other shapes that the files change
OTHERS = {f"{ADALN}.bias": (1024,), f"{NORM}.weight": (256,)}
Weights = dict[str, Tensor]
Formula = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Case:
    """A file's tensors, metadata, and ``W -> W'`` of each parameter that it changes.

    baked: how many linears are not a side path.
    """

    state: Mapping[str, Tensor]
    formulas: Mapping[str, Formula]
    baked: int

    def merged(self, weights: Mapping[str, Tensor], strength: float) -> Weights:
        """``W + s (W' - W)`` of the parameters that it changes, float32."""
        return {
            name: (w := weights[name].float()) + strength * (formula(w) - w)
            for name, formula in self.formulas.items()
        }


class _Random:
    def __init__(self, seed: int):
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, *shape: int, std: float = 1.0) -> Tensor:
        return std * torch.randn(shape, generator=self.generator)


def _pieces(split: bool) -> list[tuple[str, str, int, int, int]]:
    """(name in the file, the model's linear, its first row, rows, inputs)."""
    found = []
    for module, (n, k) in SHAPES.items():
        if split and module == QKV:
            for third, part in enumerate(("to_q", "to_k", "to_v")):
                found.append((QKV.replace("qkv", part), QKV, third * n // 3, n // 3, k))
        else:
            name = f"{module.removesuffix('o')}to_out.0" if split and module == OUT else module
            found.append((name, module, 0, n, k))
    return found


Made = tuple[dict[str, Tensor], Formula]


def _case(make: Callable[[_Random, int, int], Made], split: bool, spell, baked: int) -> Case:
    random, state, rows_of = _Random(len(SHAPES) + split), {}, {}
    for name, module, first, rows, k in _pieces(split):
        tensors, formula = make(random, rows, k)
        state |= {f"{spell(name)}.{tail}": tensor for tail, tensor in tensors.items()}
        rows_of.setdefault(f"{module}.weight", []).append((first, rows, formula))

    def whole(parts: list) -> Formula:
        return lambda w: torch.cat([f(w[first : first + rows]) for first, rows, f in parts])

    return Case(state, {name: whole(parts) for name, parts in rows_of.items()}, baked)


def ai_toolkit(name: str) -> str:
    return f"diffusion_model.{name}"


def peft(name: str) -> str:
    return f"base_model.model.{name}"


def diffusers(name: str) -> str:
    return f"transformer.{name}"


def kohya(name: str) -> str:
    return "lora_unet_" + name.replace(".", "_")


def lycoris(name: str) -> str:
    return "lycoris_" + name.replace(".", "_")


def one_trainer(name: str) -> str:
    return "lora_transformer_" + name.replace(".", "_")


def _halves(random: _Random, n: int, k: int, rank: int = 4) -> tuple[Tensor, Tensor]:
    return random(rank, k, std=0.6 / k**0.5), random(n, rank, std=0.6 / rank**0.5)


def _dora(random: _Random, n: int, k: int) -> Made:
    """PEFT: magnitudes [N]; the norm of each row of W + B A."""
    down, up = _halves(random, n, k)
    magnitude = 1 + random(n, std=0.2).abs()

    def formula(w: Tensor) -> Tensor:
        after = w + up @ down
        return torch.stack([m * row / row.norm() for m, row in zip(magnitude, after, strict=True)])

    tensors = {"lora_A.weight": down, "lora_B.weight": up, "lora_magnitude_vector": magnitude}
    return tensors, formula


def _dora_of_inputs(random: _Random, n: int, k: int) -> Made:
    """kohya: dora_scale [1, K]; the norm of each column of W + B A alpha / rank."""
    down, up = _halves(random, n, k)
    magnitude = 1 + random(1, k, std=0.2).abs()

    def formula(w: Tensor) -> Tensor:
        after = w + 0.5 * (up @ down)
        return torch.stack(
            [magnitude[0, i] * after[:, i] / after[:, i].norm() for i in range(k)], 1
        )

    tensors = {"lora_down.weight": down, "lora_up.weight": up, "dora_scale": magnitude}
    return tensors | {"alpha": torch.tensor(2, dtype=torch.int64)}, formula


def _loha(rank: int):
    def make(random: _Random, n: int, k: int) -> Made:
        first, second = ((random(n, rank), random(rank, k, std=k**-0.25)) for _ in range(2))
        scale = 0.3 / rank
        alpha = torch.tensor(scale * rank, dtype=torch.bfloat16)
        tensors = {"hada_w1_a": first[0], "hada_w1_b": first[1], "alpha": alpha}
        tensors |= {"hada_w2_a": second[0], "hada_w2_b": second[1]}

        def formula(w: Tensor) -> Tensor:
            return w + alpha.item() / rank * (first[0] @ first[1]) * (second[0] @ second[1])

        return tensors, formula

    return make


def _kron(a: Tensor, b: Tensor) -> Tensor:
    return torch.cat([torch.cat([entry * b for entry in row], 1) for row in a])


def _lokr(random: _Random, n: int, k: int) -> Made:
    """Whole matrices: alpha says nothing."""
    first, second = random(4, 4, std=0.5), random(n // 4, k // 4, std=0.6 / k**0.5)
    tensors = {"lokr_w1": first, "lokr_w2": second, "alpha": torch.tensor(1e10)}
    return tensors, lambda w: w + _kron(first, second)


def _lokr_halves(random: _Random, n: int, k: int) -> Made:
    first = random(8, 4, std=0.5)
    left, right = random(n // 8, 2, std=0.5), random(2, k // 4, std=k**-0.5)
    tensors = {"lokr_w1": first, "lokr_w2_a": left, "lokr_w2_b": right, "alpha": torch.tensor(1.0)}
    return tensors, lambda w: w + 0.5 * _kron(first, left @ right)


def _dora_of_lokr(random: _Random, n: int, k: int) -> Made:
    tensors, add = _lokr_halves(random, n, k)
    magnitude = 1 + random(n, 1, std=0.2).abs()

    def formula(w: Tensor) -> Tensor:
        after = add(w)
        return torch.cat([m * row / row.norm() for m, row in zip(magnitude, after, strict=True)])

    def rows(w: Tensor) -> Tensor:
        return formula(w).reshape(w.shape)

    return tensors | {"dora_scale": magnitude}, rows


def _cayley(block: Tensor) -> Tensor:
    skew, eye = block - block.T, torch.eye(len(block))
    return torch.linalg.solve(eye - skew, eye + skew, left=False)


def _oft(bound: float, rescaled: bool):
    """kohya, LyCORIS: blocks of 8 rows; alpha times the rows bounds the norm of Q."""

    def make(random: _Random, n: int, _k: int) -> Made:
        blocks = random(n // 8, 8, 8, std=0.05)
        rescale = 1 + random(n, 1, std=0.1)
        tensors = {"oft_blocks": blocks, "alpha": torch.tensor(bound)}
        if rescaled:
            tensors["rescale"] = rescale
        norm = (blocks - blocks.mT).norm().item()
        shrunk = blocks * (min(1.0, bound * n / norm) if bound else 1.0)
        rotation = torch.block_diag(*(_cayley(block) for block in shrunk)).T
        return tensors, lambda w: (rotation @ w) * (rescale if rescaled else 1.0)

    return make


def _boft(random: _Random, n: int, _k: int) -> Made:
    """LyCORIS: at stage i rows 2^i * 4 apart are in one block, which is written out by index."""
    blocks = random(2, n // 8, 8, 8, std=0.05)
    rotation = torch.eye(n)
    for stage, matrices in enumerate(blocks):
        apart = 2**stage * 4
        order = torch.arange(n).reshape(-1, 2, apart).transpose(1, 2).flatten()
        mixed = torch.zeros(n, n)
        for number, matrix in enumerate(matrices):
            place = order[8 * number : 8 * number + 8]
            mixed[place[:, None], place] = _cayley(matrix)
        rotation = mixed @ rotation
    return {"oft_blocks": blocks, "alpha": torch.tensor(0)}, lambda w: rotation @ w


def _oft_of_inputs(shared: bool):
    """PEFT, OneTrainer: blocks of 16 inputs by their upper triangles, Q^5 and on left out."""

    def make(random: _Random, _n: int, k: int) -> Made:
        count = 1 if shared else k // 16
        upper = random(count, 120, std=0.03)
        rotations = []
        for entries in upper:
            q = torch.zeros(16, 16)
            q[tuple(torch.triu_indices(16, 16, 1))] = entries
            q = q - q.T
            power = [torch.matrix_power(q, i) for i in range(5)]
            rotations.append(power[0] + 2 * (power[1] + power[2] + power[3]) + power[4])
        rotation = torch.block_diag(*(rotations * (k // 16 if shared else 1)))
        return {"oft_R.weight": upper}, lambda w: (rotation @ w.T).T

    return make


def _boft_of_inputs(random: _Random, n: int, k: int) -> Made:
    """PEFT: (I - Q) (I + Q)^-1 of Q = (B - B^T) / 2, and a factor a row."""
    blocks, factors = random(1, k // 8, 8, 8, std=0.1), 1 + random(n, 1, std=0.1)
    matrices = []
    for block in blocks[0]:
        q, eye = (block - block.T) / 2, torch.eye(8)
        matrices.append((eye - q) @ torch.linalg.inv(eye + q))
    rotation = torch.block_diag(*matrices)
    return {"boft_R": blocks, "boft_s": factors}, lambda w: (rotation @ w.T).T * factors


def _dora_scale(random: _Random, n: int, k: int) -> Made:
    """kohya's and LyCORIS' names of `_dora`."""
    tensors, formula = _dora(random, n, k)
    names = {"lora_down.weight": "lora_A.weight", "lora_up.weight": "lora_B.weight"}
    renamed = {new: tensors[old] for new, old in names.items()}
    return renamed | {"dora_scale": tensors["lora_magnitude_vector"][:, None]}, formula


def _diff(random: _Random, n: int, k: int) -> Made:
    diff = random(n, k, std=0.3 / k**0.5)
    return {"diff": diff}, lambda w: w + diff


def _with_biases_and_norms(case: Case, spell, norm: str) -> Case:
    random = _Random(9)
    bias, vector = random(1024, std=0.1), random(256, std=0.2)
    state = {f"{spell(ADALN)}.diff_b": bias, f"{spell(NORM)}.{norm}": vector}
    added = {f"{ADALN}.bias": lambda b: b + bias, f"{NORM}.weight": lambda w: w + vector}
    return Case({**case.state, **state}, {**case.formulas, **added}, case.baked)


def _lora(random: _Random, n: int, k: int) -> Made:
    down, up = _halves(random, n, k)
    return {"lora_A.my_own.weight": down, "lora_B.my_own.weight": up}, lambda w: w + up @ down


def _lora_plain(random: _Random, n: int, k: int) -> Made:
    down, up = _halves(random, n, k)
    return {"lora_A.weight": down, "lora_B.weight": up}, lambda w: w + up @ down


def _lora_with_bias() -> Case:
    random = _Random(3)
    n, k = SHAPES[ADALN]
    down, up = _halves(random, n, k)
    bias = random(n, std=0.2)
    name = peft(ADALN)
    state = {f"{name}.lora_A.default.weight": down, f"{name}.lora_B.default.weight": up}
    state |= {f"{name}.lora_B.default.bias": bias, f"{name}.alpha": torch.tensor(2.0)}
    return Case(
        state,
        {f"{ADALN}.weight": lambda w: w + up @ down / 2, f"{ADALN}.bias": lambda b: b + bias / 2},
        0,
    )


CASES = {
    "LoRA, an adapter's name": _case(_lora, False, peft, 0),
    "LoRA with a bias": _lora_with_bias(),
    "DoRA, fused": _case(_dora, False, ai_toolkit, 4),
    "DoRA, split": _case(_dora, True, diffusers, 4),
    "DoRA of inputs, fused": _case(_dora_of_inputs, False, kohya, 4),
    "DoRA of inputs, split": _case(_dora_of_inputs, True, one_trainer, 4),
    "LoHa, rank 4": _case(_loha(4), False, kohya, 0),
    "LoHa, rank 4, split": _case(_loha(4), True, lycoris, 0),
    "LoHa, rank 16": _case(_loha(16), False, ai_toolkit, 4),
    "LoHa, rank 16, split": _case(_loha(16), True, one_trainer, 4),
    "LoKr, halves": _case(_lokr_halves, False, ai_toolkit, 0),
    "LoKr, halves, split": _case(_lokr_halves, True, lycoris, 0),
    "LoKr, whole": _case(_lokr, False, ai_toolkit, 4),
    "LoKr, whole, split": _case(_lokr, True, diffusers, 4),
    "LoKr with DoRA, split": _case(_dora_of_lokr, True, lycoris, 4),
    "OFT, fused": _case(_oft(0.0, False), False, kohya, 4),
    "OFT, split": _case(_oft(0.0, True), True, lycoris, 4),
    "OFT with a bound": _case(_oft(1e-3, False), False, ai_toolkit, 4),
    "BOFT, fused": _case(_boft, False, lycoris, 4),
    "BOFT, split": _case(_boft, True, lycoris, 4),
    "OFT of inputs, fused": _case(_oft_of_inputs(False), False, peft, 4),
    "OFT of inputs, split": _case(_oft_of_inputs(True), True, one_trainer, 4),
    "BOFT of inputs": _case(_boft_of_inputs, False, peft, 4),
    "BOFT of inputs, split": _case(_boft_of_inputs, True, peft, 4),
    "diff": _with_biases_and_norms(_case(_diff, False, ai_toolkit, 4), ai_toolkit, "diff"),
    "diff, split": _with_biases_and_norms(_case(_diff, True, kohya, 4), kohya, "w_norm"),
}

#: one of each kind under the names that stock ComfyUI reads, for the table in docs/ground.md
KINDS = {
    name: _case(make, False, ai_toolkit, 4)
    for name, make in {
        "lora_A, lora_B": _lora_plain,
        "lora_A, lora_B, lora_magnitude_vector": _dora,
        "dora_scale [N, 1]": _dora_scale,
        "dora_scale [1, K]": _dora_of_inputs,
        "hada_*": _loha(16),
        "lokr_*": _lokr,
        "oft_blocks [n, b, b]": _oft(0.0, False),
        "oft_blocks, alpha > 0": _oft(1e-3, False),
        "oft_blocks, rescale": _oft(0.0, True),
        "oft_blocks [m, n, b, b]": _boft,
        "oft_R": _oft_of_inputs(False),
        "boft_R, boft_s": _boft_of_inputs,
        "diff": _diff,
    }.items()
}
KINDS["diff_b, w_norm"] = _with_biases_and_norms(Case({}, {}, 0), ai_toolkit, "w_norm")
#: what stock ComfyUI 0.33 makes of them at the strengths 1 and -0.5
_RIGHT, _OTHER, _NOTHING = "right", "**other weights**", "**nothing**"
STOCK = dict.fromkeys(KINDS, (_RIGHT, _RIGHT)) | {
    "lora_A, lora_B, lora_magnitude_vector": (_OTHER, _OTHER),
    "dora_scale [N, 1]": (_OTHER, _OTHER),
    "oft_blocks [n, b, b]": (_RIGHT, _OTHER),
    "oft_blocks, alpha > 0": (_OTHER, _OTHER),
    "oft_blocks, rescale": (_OTHER, _OTHER),
    "oft_blocks [m, n, b, b]": (_RIGHT, _OTHER),
    "oft_R": (_NOTHING, _NOTHING),
    "boft_R, boft_s": (_NOTHING, _NOTHING),
}
