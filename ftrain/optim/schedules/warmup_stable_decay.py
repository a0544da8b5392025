"""A rise, a plateau, a decay: the end of training can be moved without another run (WSD)."""

from __future__ import annotations

import torch
from torch import Tensor

from .checks import Value, check_numbers, check_values, one_of, refuse
from .schedule import ScheduleFn, written
from .shapes import SHAPES

__all__ = ["warmup_stable_decay"]

DECAYS = ("linear", "cosine", "sqrt", "exponential")


def warmup_stable_decay(
    peak: Value,
    warmup_steps: float,
    stable_steps: float,
    decay_steps: float,
    *,
    start: Value = 0.0,
    end: Value = 0.0,
    decay: str = "linear",
) -> ScheduleFn:
    """Linear from `start` to `peak`, then `peak`, then down to `end`.

    Equation, with t the step, w = `warmup_steps`, s = w + `stable_steps`, x = (t - s) / `decay_steps`:
    `start + (peak - start) t / w` for t < w; `peak` for w <= t <= s; after that, with x held to 1,
    `peak + (end - peak) f(x)` with f = x (linear), (1 - cos(pi x)) / 2 (cosine) or sqrt(x) (sqrt), or
    `peak (end / peak)^x` (exponential).

    Args:
        peak: the highest value.
        warmup_steps: length of the rise, in steps; 0 starts at the peak.
        stable_steps: length of the plateau.
        decay_steps: length of the decay.
        start: value at step 0.
        end: value after the decay; above 0 if it is exponential.
        decay: `"linear"`, `"cosine"`, `"sqrt"` (known as 1 - sqrt) or `"exponential"`.

    Raises:
        LimitError: a negative value, a decay without length, an unknown decay, or an exponential decay to 0.

    Source: Hu et al., "MiniCPM: Unveiling the potential of small language models with scalable training strategies", 2024;
    the forms of the decay: Hägele et al., "Scaling laws and compute-optimal training beyond fixed training durations", 2024.

    >>> import ftrain as ft
    >>> lr = ft.schedules.warmup_stable_decay(1.0, 10, 80, 20, decay="sqrt")
    >>> lr([0, 5, 10, 90, 95, 110])
    tensor([0.0000, 0.5000, 1.0000, 1.0000, 0.5000, 0.0000], dtype=torch.float64)
    """
    check_values(peak=peak, start=start, end=end)
    check_numbers(warmup_steps=warmup_steps, stable_steps=stable_steps)
    check_numbers(positive=True, decay_steps=decay_steps)
    between = SHAPES[one_of("decay", decay, DECAYS)]
    if decay == "exponential":
        for name, bound in (("peak", peak), ("end", end)):
            if not isinstance(bound, Tensor) and bound == 0:
                raise refuse(
                    f"warmup_stable_decay: an exponential decay cannot have {name}=0.",
                    expected=f"{name} > 0",
                    got=bound,
                    fix='warmup_stable_decay(3e-4, 100, 800, 100, end=3e-6, decay="exponential")',
                )
    falls = warmup_steps + stable_steps

    def value(step: Tensor) -> Tensor:
        rise = start + (peak - start) * step / max(warmup_steps, 1)
        fall = between(peak, end, ((step - falls) / decay_steps).clamp(0.0, 1.0))
        return torch.where(step < warmup_steps, rise, fall)

    text = written(
        "warmup_stable_decay",
        peak,
        warmup_steps,
        stable_steps,
        decay_steps,
        start=(start, 0.0),
        end=(end, 0.0),
        decay=(decay, "linear"),
    )
    return ScheduleFn(value, text)
