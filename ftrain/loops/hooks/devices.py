"""Memory of the devices and of this process, and how busy the machine is: all of it known to the host, so no device is waited for."""

from __future__ import annotations

import importlib
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from ...errors import ArgumentError, DeviceError, HookError, explain
from ...state import TrainState
from ..cadences import Cadence
from ..events import Event, Outcome, on
from .asking import cadence

__all__ = ["device_stats"]

_CUDA = {
    "allocated": "allocated_bytes.all.current",
    "peak_allocated": "allocated_bytes.all.peak",
    "reserved": "reserved_bytes.all.current",
    "retries": "num_alloc_retries",
}
_STATM = "/proc/self/statm"


def device_stats(*, every: Cadence | None = None, devices: Any = None, process: bool = True) -> Any:
    """A hook that tells how much memory is in use, and how busy the processor is.

    For each CUDA device, from the allocator's own books (`torch.cuda.memory_stats`): `cuda0_allocated`, `cuda0_peak_allocated`,
    `cuda0_reserved` in bytes, and `cuda0_retries`, how often memory had to be given back and asked for again. For this process:
    `resident` in bytes, `cpu_percent` since the look before (of one core, so 400 is four cores), and `load`, the machine's load
    average over a minute, where there is one.

    Args:
        every: when to look; default: every 50 steps, as often as `ft.fit` records.
        devices: CUDA devices, as for `torch.device`; default: the state's, if it is one.
        process: whether to tell of this process, too.

    Returns:
        A hook for `ft.fit(..., hooks=[...])`; it leaves the state alone.

    Raises:
        LimitError, DeviceError, ArgumentError: now, if an argument makes no sense.
        HookError: in the run, where nothing tells the memory of a process: on a system without /proc, if psutil is not installed.

    >>> import torch, ftrain as ft
    >>> model, tx = torch.nn.Linear(1, 1), ft.optim.sgd(0.1)
    >>> step = ft.train_step(model, lambda model, batch: model(batch).square().mean(), tx)
    >>> hook = ft.hooks.device_stats(every=ft.every(steps=1))
    >>> data = [torch.ones(2, 1)] * 2
    >>> result = ft.fit(ft.init(model, tx), step, data, hooks=[hook], progress=False, compile=False)
    >>> result.history.last()["resident"] > 1e6
    True
    """
    who = "ft.hooks.device_stats"
    chosen = None if devices is None else [_cuda(one, who) for one in devices]
    if not process and devices is not None and not chosen:
        raise ArgumentError(
            explain(f"{who}: there is nothing to tell.", got=f"devices={devices!r}, process=False", fix="process=True")
        )
    usage = _usage()

    def look(state: TrainState, event: Event) -> Outcome:
        own = [state.device] if state.device.type == "cuda" else []
        told: dict[str, float] = {}
        for device in own if chosen is None else chosen:
            stats = torch.cuda.memory_stats(device)
            told |= {f"cuda{device.index or 0}_{name}": float(stats.get(key, 0)) for name, key in _CUDA.items()}
        return Outcome(state, (told | usage()) if process else told)

    return on(cadence(every, who), look)


def _usage() -> Callable[[], dict[str, float]]:
    """What tells about this process, since it told before. What it remembers is this process's, so it is not in the state."""
    before = [time.process_time(), time.perf_counter()]

    def tell() -> dict[str, float]:
        now = [time.process_time(), time.perf_counter()]
        busy, passed = now[0] - before[0], now[1] - before[1]
        before[:] = now
        told = {"resident": _resident(), "cpu_percent": 100.0 * busy / max(passed, 1e-9)}
        if hasattr(os, "getloadavg"):
            told["load"] = os.getloadavg()[0]
        return told

    return tell


def _resident() -> float:
    """Bytes of this process that lie in memory."""
    if os.path.exists(_STATM):
        with open(_STATM) as file:
            return float(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    try:
        psutil = importlib.import_module("psutil")
    except ImportError:
        raise HookError(
            explain(
                "ft.hooks.device_stats: nothing tells how much memory this process has.",
                expected=f"{_STATM}, or the package psutil",
                got=f"{sys.platform}, without either",
                fix="pip install psutil   # or ft.hooks.device_stats(process=False)",
            )
        ) from None
    return float(psutil.Process().memory_info().rss)


def _cuda(given: Any, who: str) -> torch.device:
    try:
        device = torch.device("cuda", given) if isinstance(given, int) else torch.device(given)
    except (RuntimeError, TypeError):
        device = torch.device("meta")
    if device.type != "cuda":
        raise DeviceError(
            explain(
                f"{who}: {given!r} keeps no books on its memory.",
                expected="CUDA devices",
                got=repr(given),
                fix='devices=["cuda:0"]   # or leave it out',
            )
        )
    if not torch.cuda.is_available():
        raise DeviceError(
            explain(
                f"{who}: this machine (or this build of torch) has no CUDA.", got=repr(given), fix="leave out devices="
            )
        )
    return torch.device("cuda", torch.cuda.current_device()) if device.index is None else device
