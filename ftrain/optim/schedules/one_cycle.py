"""One rise to a high value and one fall far below the first: the 1cycle policy."""

from __future__ import annotations

from .checks import Value, check_numbers, check_values, one_of, refuse
from .piecewise import interpolated
from .schedule import ScheduleFn, written

__all__ = ["one_cycle"]


def one_cycle(
    transition_steps: int,
    peak_value: Value,
    pct_start: float = 0.3,
    div_factor: float = 25.0,
    final_div_factor: float = 1e4,
    *,
    pct_final: float | None = None,
    kind: str = "cosine",
) -> ScheduleFn:
    """Up to `peak_value` and down again, once (`optax.cosine_onecycle_schedule`; `optax.linear_onecycle_schedule`).

    With T = `transition_steps` and i = `peak_value / div_factor`, the values at certain steps, and `kind` between them:

    | step                  | without `pct_final`    | with `pct_final`       |
    |-----------------------|------------------------|------------------------|
    | 0                     | i                      | i                      |
    | `int(pct_start * T)`  | `peak_value`           | `peak_value`           |
    | `int(pct_final * T)`  |                        | i                      |
    | T and later           | `i / final_div_factor` | `i / final_div_factor` |

    optax's linear schedule is `kind="linear", pct_final=0.85`. Torch's `OneCycleLR(..., total_steps=n)` is at its peak one step
    earlier, and at its end at step n - 1: use `from_torch` for its very numbers.

    Args:
        transition_steps: length of the cycle, in steps.
        peak_value: the highest value.
        pct_start: the part of the cycle in which the value rises, in [0, 1].
        div_factor: the peak divided by the first value.
        final_div_factor: the first value divided by the last.
        pct_final: the part of the cycle after which the first value is reached again, in (`pct_start`, 1).
        kind: `"cosine"` or `"linear"`.

    Raises:
        LimitError: a negative value, no length, a part outside of its range, or a factor of 0.

    Source: Smith & Topin, "Super-convergence: Very fast training of neural networks using large learning rates", 2017.

    >>> import ftrain as ft
    >>> ft.schedules.one_cycle(100, 1.0, div_factor=10.0, final_div_factor=2.0)([0, 15, 30, 100, 200])
    tensor([0.1000, 0.5500, 1.0000, 0.0500, 0.0500], dtype=torch.float64)
    """
    check_numbers(positive=True, transition_steps=transition_steps)
    check_values(peak_value=peak_value)
    check_numbers(positive=True, div_factor=div_factor, final_div_factor=final_div_factor)
    check_numbers(pct_start=pct_start)
    one_of("kind", kind, ("cosine", "linear"))
    if pct_start > 1:
        raise refuse("one_cycle: the rise is longer than the cycle.", expected="0 <= pct_start <= 1", got=pct_start)
    if pct_final is not None:
        check_numbers(pct_final=pct_final)
        if not pct_start < pct_final < 1:
            raise refuse(
                "one_cycle: the fall to the first value ends outside of the cycle.",
                expected=f"pct_start ({pct_start}) < pct_final < 1",
                got=pct_final,
                fix="ft.schedules.one_cycle(1000, 0.1, pct_start=0.3, pct_final=0.85)",
            )
    first = peak_value / div_factor
    points = [(0.0, first), (int(pct_start * transition_steps), peak_value)]
    if pct_final is not None:
        points.append((int(pct_final * transition_steps), first))
    points.append((transition_steps, first / final_div_factor))
    text = written(
        "one_cycle",
        transition_steps,
        peak_value,
        pct_start=(pct_start, 0.3),
        div_factor=(div_factor, 25.0),
        final_div_factor=(final_div_factor, 1e4),
        pct_final=(pct_final, None),
        kind=(kind, "cosine"),
    )
    return ScheduleFn(interpolated(points, kind), text)
