"""How fast a run is: steps, samples and tokens per second, and what part of the hardware's arithmetic that is.

All of it comes from differences between two looks at the run's clock and counts, kept in the state, so nothing is timed inside of
the step and no device is waited for. Nor is one read: the arithmetic is done where the state lies.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...errors import HookError, LimitError, explain
from ...optim.masks import nearest
from ...state import TrainState
from ..cadences import Cadence
from ..events import Event, Hook, Outcome, on
from .asking import cadence, positive

__all__ = ["PEAKS", "throughput"]

Memory = dict[str, Tensor]

# Dense bfloat16 (tensor cores, no sparsity) in FLOP/s, from the vendors' data sheets: NVIDIA A10, A30, A40, A100, L4, L40S, H100,
# H200, B200 (sheets that give the figure with sparsity are halved); AMD Instinct MI250X and MI300X. A part before a "," must
# occur in the device's name as torch.cuda.get_device_name() tells it, as must all others; the first row that fits counts.
PEAKS: dict[str, float] = {
    "A100": 312e12,
    "A10": 125e12,
    "A30": 165e12,
    "A40": 149.7e12,
    "L40S": 362e12,
    "L4": 121e12,
    "H100,PCIe": 756e12,
    "H100,NVL": 835e12,
    "H100": 989e12,
    "H200,NVL": 835e12,
    "H200": 989e12,
    "B200": 2250e12,
    "MI250X": 383e12,
    "MI300X": 1307e12,
}


def throughput(
    *,
    every: Cadence | None = None,
    flops_per_step: float | None = None,
    flops_per_sample: float | None = None,
    flops_per_token: float | None = None,
    peak: float | str | None = None,
    name: str = "throughput",
) -> Any:
    """A hook that tells how fast the run was since its last look.

    Metrics: `steps_per_second`, `samples_per_second`; `tokens_per_second` where `ft.fit(tokens=...)` counts them;
    `tflops_per_second`, with the operations of a step given; `mfu`, with the peak given: model FLOP/s over peak. All time counts,
    that of evaluations, hooks and checkpoints too; `Record.spent` tells them apart. Time between two processes does not.

    Args:
        every: when to look; default: every 50 steps, as often as `ft.fit` records. On a GPU the host runs ahead of the device between
            two records, so give it the cadence of `log=`. The first look counts from the start of the run, compilation included.
        flops_per_step: floating-point operations of one step (forward and backward), all micro-batches together; or
        flops_per_sample: those for one sample; or
        flops_per_token: those for one token, e.g. 6 times the number of parameters of a transformer.
        peak: FLOP/s of all devices that the step runs on; or the name of one device, e.g. `"H100"` or
            `torch.cuda.get_device_name()`, for its dense bfloat16 figure in `ftrain.loops.hooks.speed.PEAKS`.
        name: of the memory in `state.extra`.

    Returns:
        A hook for `ft.fit(..., hooks=[...])`. Its memory, of the last look: `steps`, `samples`, `tokens` int64 (), `seconds` float64 ().

    Raises:
        LimitError: now, if an argument makes no sense.
        HookError: in the run, at the first look, if `flops_per_token` is given and nobody counts tokens.

    >>> import torch, ftrain as ft
    >>> model, tx = torch.nn.Linear(1, 1), ft.optim.sgd(0.1)
    >>> step = ft.train_step(model, lambda model, batch: model(batch).square().mean(), tx)
    >>> hook = ft.hooks.throughput(every=ft.every(steps=1), flops_per_sample=6 * 2, peak="H100")
    >>> data = [torch.ones(2, 1)] * 3
    >>> result = ft.fit(ft.init(model, tx), step, data, hooks=[hook], progress=False, compile=False)
    >>> sorted(result.history.last())
    ['loss', 'lr', 'mfu', 'samples_per_second', 'steps_per_second', 'tflops_per_second']
    """
    who = "ft.hooks.throughput"
    flops = {"steps": flops_per_step, "samples": flops_per_sample, "tokens": flops_per_token}
    positive(
        who, 1e12, flops_per_step=flops_per_step, flops_per_sample=flops_per_sample, flops_per_token=flops_per_token
    )
    given = [unit for unit, number in flops.items() if number is not None]
    if len(given) > 1 or (peak is not None and not given):
        raise LimitError(
            explain(
                f"{who} wants the operations of one step, one sample or one token."
                if given
                else f"{who}: peak= is what the operations of the model are compared with.",
                expected="one of flops_per_step=, flops_per_sample=, flops_per_token=",
                got=" and ".join(f"flops_per_{unit[:-1]}=" for unit in given) or "none",
                fix="flops_per_token=6 * n_parameters",
            )
        )
    limit = _peak(peak, who)

    def init(state: TrainState) -> Memory:
        zero = torch.zeros((), dtype=torch.int64, device=state.device)
        return {"steps": zero, "samples": zero.clone(), "tokens": zero.clone(), "seconds": zero.to(torch.float64)}

    def update(state: TrainState, memory: Memory, event: Event) -> Any:
        clock = event.clock
        if not clock.steps:  # ft.at(0)
            return state, memory
        if flops_per_token is not None and not clock.tokens:
            raise HookError(
                explain(
                    f"{who}: flops_per_token= is given, but nobody counts tokens.",
                    where=f"step {event.step}",
                    fix='ft.fit(..., tokens=lambda batch: batch["tokens"].numel())',
                )
            )
        new = {key: torch.full_like(value, getattr(clock, key)) for key, value in memory.items()}
        seconds = new["seconds"] - memory["seconds"]
        rates = {unit: (new[unit] - memory[unit]) / seconds for unit in ("steps", "samples", "tokens")}
        told = {f"{unit}_per_second": rate for unit, rate in rates.items() if unit != "tokens" or clock.tokens}
        for unit in given:
            done = rates[unit] * float(flops[unit] or 0.0)
            told["tflops_per_second"] = done / 1e12
            if limit is not None:
                told["mfu"] = done / limit
        return Outcome(state, told), new

    return on(cadence(every, who), Hook(name, init, update))


def _peak(peak: Any, who: str) -> float | None:
    if not isinstance(peak, str):
        positive(who, 312e12, peak=peak)
        return None if peak is None else float(peak)
    for row, number in PEAKS.items():
        if all(part.lower() in _words(peak) for part in row.split(",")):
            return number
    near = nearest(peak, [row.partition(",")[0] for row in PEAKS])
    raise LimitError(
        explain(
            f"{who}: the peak of {peak!r} is not in the table.",
            expected=f"a number in FLOP/s, or one of {', '.join(row.replace(',', ' ') for row in PEAKS)}",
            got=repr(peak),
            fix=f"peak={near or 312e12!r}",
        )
    )


def _words(name: str) -> list[str]:
    return name.lower().replace("-", " ").replace("_", " ").split()
