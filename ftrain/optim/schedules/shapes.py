"""The ways from one value to another, as functions of the fraction that is done."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from .checks import Value

__all__ = ["SHAPES", "Shape"]

Shape = Callable[[Value, Value, Tensor], Tensor]  # (from, to, fraction in [0, 1]) -> value

SHAPES: dict[str, Shape] = {
    "linear": lambda a, b, part: a + (b - a) * part,
    "cosine": lambda a, b, part: b + (a - b) * 0.5 * (1.0 + torch.cos(math.pi * part)),
    "sqrt": lambda a, b, part: a + (b - a) * torch.sqrt(part),
    "exponential": lambda a, b, part: a * torch.pow(b / a * torch.ones_like(part), part),
    "constant": lambda a, b, part: a + 0.0 * part,
}
