"""A rise, then a fall with the inverse square root of the step: a decay without an end."""

from __future__ import annotations

import torch
from torch import Tensor

from .checks import Value, check_numbers, check_values
from .schedule import ScheduleFn, written

__all__ = ["inverse_sqrt"]


def inverse_sqrt(peak: Value, warmup_steps: float, timescale: float | None = None, *, start: Value = 0.0) -> ScheduleFn:
    """Linear from `start` to `peak` over `warmup_steps`, then falling as one over the square root of the step.

    Equation, with t the step, w = `warmup_steps`, s = `timescale`:
    `start + (peak - start) t / w` for t < w; `peak sqrt(s / (s + t - w))` for t >= w. With s = w that is `peak sqrt(w / t)`.

    Args:
        peak: the highest value.
        warmup_steps: length of the rise, in steps; 0 starts at the peak.
        timescale: how slowly it falls: half the peak is reached 3 s steps after it; default: `warmup_steps`, at least 1.
        start: value at step 0; `start=peak` holds the peak for `warmup_steps`.

    Raises:
        LimitError: a negative value, or a time scale of 0.

    Source: Vaswani et al., "Attention is all you need", NeurIPS 2017, section 5.3.

    >>> import ftrain as ft
    >>> ft.schedules.inverse_sqrt(1.0, 100)([0, 50, 100, 400, 10000])
    tensor([0.0000, 0.5000, 1.0000, 0.5000, 0.1000], dtype=torch.float64)
    """
    check_values(peak=peak, start=start)
    check_numbers(warmup_steps=warmup_steps)
    if timescale is not None:
        check_numbers(positive=True, timescale=timescale)
    scale = max(warmup_steps, 1) if timescale is None else timescale

    def value(step: Tensor) -> Tensor:
        rise = start + (peak - start) * step / max(warmup_steps, 1)
        fall = peak * torch.sqrt(scale / (scale + (step - warmup_steps).clamp(min=0.0)))
        return torch.where(step < warmup_steps, rise, fall)

    text = written("inverse_sqrt", peak, warmup_steps, timescale=(timescale, None), start=(start, 0.0))
    return ScheduleFn(value, text)
