"""How much memory a call takes at its highest point, as the allocator saw it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch._C import _autograd as recorder
from torch._C._profiler import ProfilerConfig, ProfilerState, _ExperimentalConfig

from ..errors import LimitError, explain

__all__ = ["peak"]


def peak(fn: Callable[[], Any], device: torch.device) -> int:
    """The most bytes that tensors made by a call took at one time, beyond what was there before.

    On a CPU each allocation and release is reported by torch's allocator (to its profiler), those inside of kernels and of compiled
    code too: the number is exact, where the resident memory of the process is not. On CUDA it is the allocator's own peak.

    Args:
        fn: called once; what it returns is dropped.
        device: where it works.

    Raises:
        LimitError: a profiler is running, which would be told instead.
        Whatever `fn` raises.

    >>> import torch
    >>> from ftrain.tune.peak import peak
    >>> 8000 <= peak(lambda: (torch.ones(1000) + 1).sum(), torch.device("cpu")) < 8100
    True
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        fn()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    if recorder._profiler_enabled():
        raise LimitError(
            explain(
                "memory cannot be measured while a profiler runs.",
                cause="torch tells allocations to one profiler at a time",
                fix="call it outside of torch.profiler.profile",
            )
        )
    # Not torch.profiler: Kineto takes a second to start, and writes to stderr each time (2.13).
    config = ProfilerConfig(ProfilerState.CPU, False, True, False, False, False, _ExperimentalConfig())
    recorder._enable_profiler_legacy(config)
    try:
        fn()
    finally:
        threads = recorder._disable_profiler_legacy()
    most = 0
    for events in threads:
        now = highest = 0
        for event in events:
            if str(event.kind()) == "memory_alloc":  # torch's stub calls it a number
                now += event.cpu_memory_usage()
                highest = max(highest, now)
        most += highest  # where several threads make tensors, at most this
    return most
