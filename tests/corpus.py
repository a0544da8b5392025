"""The corpus: models with a batch and a loss, and optimizers. A new one is a row here, not a new test file."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ftrain as ft


class Conv(nn.Module):
    """Convolutions with batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            # without biases, whose gradient is nothing but rounding before a batch norm
            nn.Conv2d(1, 4, 3, padding=1, bias=False),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.Conv2d(4, 4, 3, padding=1, bias=False),
            nn.BatchNorm2d(4),
        )
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.body(x)).mean((2, 3)))


class Attention(nn.Module):
    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        b, t, w = x.shape
        q, k, v = self.qkv(x).view(b, t, 3, self.heads, w // self.heads).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=self.dropout if self.training else 0.0)
        return self.out(y.transpose(1, 2).reshape(b, t, w))


class Block(nn.Module):
    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, 2, dropout)
        self.mlp = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width), nn.Dropout(dropout)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Gpt(nn.Module):
    """A small GPT with dropout; the embedding and the head are one matrix."""

    def __init__(self, vocab: int = 11, width: int = 16, dropout: float = 0.1) -> None:
        super().__init__()
        self.token, self.place = nn.Embedding(vocab, width), nn.Embedding(8, width)
        self.blocks = nn.ModuleList([Block(width, dropout) for _ in range(2)])
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocab, bias=False)
        self.head.weight = self.token.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.token(ids) + self.place(torch.arange(ids.shape[1], device=ids.device))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class Lstm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.head = nn.LSTM(4, 8, batch_first=True), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0][:, -1])


class Frozen(nn.Module):
    """A frozen backbone, a trained head."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone, self.head = nn.Linear(6, 8), nn.Linear(8, 3)
        self.backbone.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.backbone(x)))


class TwoHeads(nn.Module):
    """No forward: the heads are methods."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.one, self.two = nn.Linear(6, 8), nn.Linear(8, 3), nn.Linear(8, 1)

    def classify(self, x: Tensor) -> Tensor:
        return self.one(torch.relu(self.trunk(x)))

    def regress(self, x: Tensor) -> Tensor:
        return self.two(torch.relu(self.trunk(x))).squeeze(-1)


def _mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Dropout(0.2), nn.Linear(8, 3))


def _classify(model: nn.Module, batch: dict[str, Tensor]) -> Any:
    logits = model(batch["x"])
    return F.cross_entropy(logits, batch["y"]), {"accuracy": ft.metrics.accuracy(logits, batch["y"])}


def _language(model: nn.Module, batch: dict[str, Tensor]) -> Any:
    ids = batch["ids"]
    logits = model(ids[:, :-1])
    losses = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    return ft.metrics.Mean.of(losses), {"perplexity": ft.metrics.perplexity(logits, ids[:, 1:])}


def _two_heads(model: Any, batch: dict[str, Tensor]) -> Any:
    return F.cross_entropy(model.classify(batch["x"]), batch["y"]) + model.regress(batch["x"]).square().mean()


def _rows(*shape: int) -> Callable[[int, torch.Generator], dict[str, Tensor]]:
    def make(n: int, generator: torch.Generator) -> dict[str, Tensor]:
        x = torch.randn(n, *shape, generator=generator)
        return {"x": x, "y": torch.randint(0, 3, (n,), generator=generator)}

    return make


def _text(n: int, generator: torch.Generator) -> dict[str, Tensor]:
    return {"ids": torch.randint(0, 11, (n, 8), generator=generator)}


@dataclass(frozen=True)
class Case:
    """A model, its loss, and how its batches are made. `rough`: draws random numbers in training."""

    name: str
    make: Callable[[], nn.Module]
    loss_fn: Callable[..., Any]
    rows: Callable[[int, torch.Generator], dict[str, Tensor]]
    random: bool = False

    def model(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return self.make().to(dtype)

    def batch(self, n: int = 8, seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        found = self.rows(n, torch.Generator().manual_seed(seed))
        return {k: v.to(dtype) if v.is_floating_point() else v for k, v in found.items()}

    def batches(self, count: int, n: int = 8, dtype: torch.dtype = torch.float32) -> list[dict[str, Tensor]]:
        return [self.batch(n, seed, dtype) for seed in range(count)]


MODELS = {
    case.name: case
    for case in (
        Case("mlp", _mlp, _classify, _rows(6), random=True),
        Case("conv_bn", Conv, _classify, _rows(1, 6, 6)),
        Case("gpt", Gpt, _language, _text, random=True),
        Case("lstm", Lstm, _classify, _rows(5, 4)),
        Case("frozen", Frozen, _classify, _rows(6)),
        Case("two_heads", TwoHeads, _two_heads, _rows(6)),
    )
}

# The few that go through the slow products of test_laws.py; all stand in ALL_OPTIMIZERS below.
OPTIMIZERS: dict[str, Callable[[], ft.Transform]] = {
    "sgd": lambda: ft.optim.sgd(0.1),
    "sgd_nesterov": lambda: ft.optim.sgd(0.05, momentum=0.9, nesterov=True, weight_decay=1e-2),
    "adam": lambda: ft.optim.adam(1e-2, weight_decay=1e-2),
    "adamw_clip_warmup": lambda: ft.optim.chain(
        ft.optim.clip_by_global_norm(0.5),
        ft.optim.adamw(ft.schedules.warmup_cosine(1e-2, 2, 50, start=1e-3), mask=lambda path, p: p.ndim >= 2),
    ),
    "injected": lambda: ft.optim.inject(ft.optim.adamw)(lr=1e-2),
}


@dataclass(frozen=True)
class Rule:
    """An optimizer for the laws of test_optimizers.py: its function, and the options of its row.

    `quadratic`, `rosenbrock`: further options with which it solves these problems. `signed`: arguments that may be negative.
    `atol`: how far a vmapped update may be from a loop, where matrix products in bfloat16 are rounded otherwise in a batch.
    """

    make: Callable[..., ft.Transform]
    options: dict[str, Any]
    quadratic: dict[str, Any]
    rosenbrock: dict[str, Any]
    signed: tuple[str, ...] = ()
    atol: float = 1e-14

    def __call__(self) -> ft.Transform:
        return self.make(**self.options)


RULES: dict[str, Rule] = {
    "sgd_dampened": Rule(
        ft.optim.sgd,
        {"lr": 0.05, "momentum": 0.9, "dampening": 0.3, "weight_decay": 1e-2},
        {"lr": 0.1, "weight_decay": 0.0},
        {"lr": 0.02, "weight_decay": 0.0},
    ),
    "sgd_plain": Rule(ft.optim.sgd, {"lr": 0.1}, {}, {"lr": 0.019}),
    "sgd_momentum": Rule(ft.optim.sgd, {"lr": 0.05, "momentum": 0.9, "nesterov": True}, {"lr": 0.1}, {"lr": 0.01}),
    "adam_l2": Rule(
        ft.optim.adam,
        {"lr": 1e-2, "weight_decay": 1e-2},
        {"lr": 0.1, "weight_decay": 0.0},
        {"lr": 0.1, "weight_decay": 0.0},
    ),
    "amsgrad": Rule(ft.optim.adam, {"lr": 1e-2, "amsgrad": True}, {"lr": 0.1}, {"lr": 0.1, "b2": 0.99}),
    "adamw": Rule(
        ft.optim.adamw,
        {"lr": 1e-2, "weight_decay": 0.1},
        {"lr": 0.1, "weight_decay": 0.0},
        {"lr": 0.1, "weight_decay": 0.0},
    ),
    "adamax": Rule(
        ft.optim.adamax,
        {"lr": 1e-2, "weight_decay": 1e-2},
        {"lr": 0.1, "weight_decay": 0.0},
        {"lr": 0.3, "weight_decay": 0.0},
    ),
    "nadam": Rule(
        ft.optim.nadam,
        {"lr": 1e-2, "weight_decay": 1e-2},
        {"lr": 0.05, "weight_decay": 0.0},
        {"lr": 0.05, "momentum_decay": 0.1, "weight_decay": 0.0},
    ),
    "nadam_decoupled": Rule(
        ft.optim.nadam,
        {"lr": 1e-2, "weight_decay": 0.1, "decoupled_weight_decay": True},
        {"lr": 0.05, "weight_decay": 0.0},
        {"lr": 0.05, "momentum_decay": 0.1, "weight_decay": 0.0},
    ),
    "radam": Rule(
        ft.optim.radam,
        {"lr": 1e-2, "weight_decay": 1e-2},
        {"lr": 0.1, "weight_decay": 0.0},
        {"lr": 0.05, "weight_decay": 0.0},
    ),
    "radam_decoupled": Rule(
        ft.optim.radam,
        {"lr": 1e-2, "weight_decay": 0.1, "decoupled_weight_decay": True, "b2": 0.9},
        {"lr": 0.1, "weight_decay": 0.0},
        {"lr": 0.05, "weight_decay": 0.0},
    ),
    "adagrad": Rule(
        ft.optim.adagrad,
        {"lr": 0.1, "lr_decay": 0.1, "initial_accumulator_value": 0.1, "weight_decay": 1e-2},
        {"lr": 0.5, "lr_decay": 0.0, "weight_decay": 0.0},
        {"lr": 0.5, "lr_decay": 0.0, "weight_decay": 0.0},
    ),
    "adadelta": Rule(
        ft.optim.adadelta,
        {"eps": 1e-2, "weight_decay": 1e-2},
        {"lr": 0.3, "eps": 1e-4, "weight_decay": 0.0},
        {"lr": 0.1, "rho": 0.5, "eps": 1e-4, "weight_decay": 0.0},
    ),
    "rmsprop": Rule(
        ft.optim.rmsprop,
        {"lr": 1e-2, "weight_decay": 1e-2},
        {"decay": 0.999, "weight_decay": 0.0},
        {"decay": 0.999, "weight_decay": 0.0},
    ),
    "rmsprop_centered": Rule(
        ft.optim.rmsprop,
        {"lr": 1e-2, "decay": 0.9, "eps": 1e-3, "centered": True, "momentum": 0.9},
        {"lr": 1e-3, "decay": 0.999},
        {"lr": 1e-3, "decay": 0.999},
    ),
    "rprop": Rule(ft.optim.rprop, {"lr": 1e-2}, {}, {"lr": 0.1}),
    "asgd": Rule(
        ft.optim.asgd,
        {"lr": 0.1, "lambd": 1e-2, "t0": 2.0, "weight_decay": 1e-2},
        {"lambd": 0.0, "weight_decay": 0.0},
        {"lr": 0.019, "lambd": 0.0, "weight_decay": 0.0},
    ),
    "adafactor": Rule(
        ft.optim.adafactor,
        {"lr": 0.03, "weight_decay": 1e-2},
        {"weight_decay": 0.0},
        {"weight_decay": 0.0},
        signed=("beta2_decay",),
    ),
    "lion": Rule(
        ft.optim.lion,
        {"lr": 1e-2, "weight_decay": 0.1},
        {"weight_decay": 0.0},
        {"b2": 0.9, "weight_decay": 0.0},
    ),
    "lamb": Rule(
        ft.optim.lamb,
        {"lr": 0.01, "eps_root": 1e-8, "weight_decay": 1e-2},
        {"weight_decay": 0.0},
        {"b2": 0.9, "weight_decay": 0.0},
    ),
    "muon": Rule(
        ft.optim.muon,
        {"lr": 0.02},
        {"weight_decay": 0.0},
        {"weight_decay": 0.0},
        atol=2e-3,
    ),
}

ALL_OPTIMIZERS: dict[str, Callable[[], ft.Transform]] = {**OPTIMIZERS, **RULES}

# What is no optimizer by itself: pieces to chain, and wrappers, for the laws of test_algebra.py.
PIECES: dict[str, Callable[[], ft.Transform]] = {
    "identity": ft.optim.identity,
    "scale": lambda: ft.optim.scale(-0.3),
    "scale_by_learning_rate": lambda: ft.optim.scale_by_learning_rate(
        ft.schedules.warmup_cosine(0.1, 2, 9, start=0.01)
    ),
    "scale_by_schedule": lambda: ft.optim.scale_by_schedule(ft.schedules.warmup_cosine(1.0, 2, 9, start=0.5)),
    "add_decayed_weights": lambda: ft.optim.add_decayed_weights(0.1, mask=ft.optim.no_bias_or_norm),
    "add_noise": lambda: ft.optim.add_noise(1e-2, 0.55, seed=3),
    "centralize": ft.optim.centralize,
    "clip": lambda: ft.optim.clip(0.5),
    "clip_by_norm": lambda: ft.optim.clip_by_norm(0.7),
    "clip_by_global_norm": lambda: ft.optim.clip_by_global_norm(1.0),
    "adaptive_grad_clip": lambda: ft.optim.adaptive_grad_clip(0.1),
    "masked": lambda: ft.optim.masked(ft.optim.sgd(0.1, momentum=0.9), lambda path, p: p.ndim >= 2),
    "freeze": lambda: ft.optim.freeze(lambda path, p: p.ndim < 2),
    "set_to_zero": ft.optim.set_to_zero,
    "conditionally_mask": lambda: ft.optim.conditionally_mask(ft.optim.adam(0.1), lambda t: t % 2 == 0),
    "partition": lambda: ft.optim.partition(
        lambda path, p: "tensors" if p.ndim >= 2 else "rest",
        {"tensors": ft.optim.adamw(0.1), "rest": ft.optim.sgd(0.1, momentum=0.9)},
    ),
    "skip_nonfinite": lambda: ft.optim.skip_nonfinite(ft.optim.adam(0.1)),
    "master_weights": lambda: ft.optim.master_weights(ft.optim.adam(0.1)),
    "stochastic_rounding": lambda: ft.optim.stochastic_rounding(ft.optim.adam(0.1), seed=5),
    "inject": lambda: ft.optim.inject(ft.optim.adamw)(0.1, b1=0.8),
}


def setup(
    model: str, optimizer: str = "adam", dtype: torch.dtype = torch.float32, seed: int = 0
) -> tuple[Any, Any, Any]:
    """`(case, step, state)` for a row of the corpus."""
    case, tx = MODELS[model], ALL_OPTIMIZERS[optimizer]()
    module = case.model(dtype)
    return case, ft.train_step(module, case.loss_fn, tx), ft.init(module, tx, seed=seed)
