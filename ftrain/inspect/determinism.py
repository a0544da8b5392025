"""Deterministic algorithms for the time of a block: every switch that torch has, set together and put back together.

Law: after the context, by whatever way it is left, each switch is as it was before.
"""

from __future__ import annotations

import os
import warnings
from contextlib import ContextDecorator
from types import TracebackType
from typing import Any

import torch
import torch.utils.deterministic

from ..errors import ArgumentError, DeterminismWarning, explain

__all__ = ["deterministic"]

_CUBLAS = "CUBLAS_WORKSPACE_CONFIG"
_REPRODUCIBLE = (":4096:8", ":16:8")  # the two values with which cuBLAS gives the same sums each time


def deterministic(*, warn_only: bool = False) -> _Deterministic:
    """Context (and decorator) in which torch uses only algorithms that give the same bits each time.

    On one machine, the same state, step and data then give the same result bit by bit, on CUDA as well; `fit` by itself sees to the
    seeds and the order of data. Sets, and puts back: `torch.use_deterministic_algorithms`, cuDNN's `deterministic` and `benchmark`,
    `torch.utils.deterministic.fill_uninitialized_memory`, and the environment variable `CUBLAS_WORKSPACE_CONFIG`, where it is not
    one of the two values that make cuBLAS reproducible.

    Args:
        warn_only: an operation that has no deterministic algorithm warns, in place of the error that torch raises.

    Returns:
        A context, to be entered as often as one likes, also inside itself; `@ft.deterministic()` over a function does the same.

    Raises:
        ArgumentError: `warn_only` is not a bool.

    Warns:
        DeterminismWarning: CUDA is in use already, and `CUBLAS_WORKSPACE_CONFIG` was not set before: cuBLAS reads it once.

    >>> import torch, ftrain as ft
    >>> with ft.deterministic():
    ...     torch.are_deterministic_algorithms_enabled()
    True
    >>> torch.are_deterministic_algorithms_enabled()
    False
    """
    if not isinstance(warn_only, bool):
        raise ArgumentError(
            explain(
                "ft.deterministic: warn_only= is a bool.",
                expected="True or False",
                got=repr(warn_only),
                cause="@ft.deterministic without its brackets" if callable(warn_only) else None,
                fix="with ft.deterministic(warn_only=True): ...",
            )
        )
    return _Deterministic(warn_only)


class _Deterministic(ContextDecorator):
    def __init__(self, warn_only: bool) -> None:
        self._warn_only = warn_only
        self._before: list[dict[str, Any]] = []  # one for each time that it was entered

    def __enter__(self) -> None:
        before = _switches()
        # First, since a warning may be an error.
        if before["cublas"] not in _REPRODUCIBLE and _cuda_in_use():
            _too_late(before["cublas"])
        cublas = before["cublas"] if before["cublas"] in _REPRODUCIBLE else _REPRODUCIBLE[0]
        self._before.append(before)
        _set(
            {
                "algorithms": (True, self._warn_only),
                "cudnn": (True, False),
                "fill": True,
                "cublas": cublas,
            }
        )

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        _set(self._before.pop())


def _switches() -> dict[str, Any]:
    return {
        "algorithms": (
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
        ),
        "cudnn": (torch._C._get_cudnn_deterministic(), torch._C._get_cudnn_benchmark()),
        "fill": torch.utils.deterministic.fill_uninitialized_memory,  # type: ignore[attr-defined]  # of the module's class
        "cublas": os.environ.get(_CUBLAS),
    }


def _set(switches: dict[str, Any]) -> None:
    mode, warn_only = switches["algorithms"]
    torch.use_deterministic_algorithms(mode, warn_only=warn_only)
    deterministic_, benchmark = switches["cudnn"]
    # Not through torch.backends.cudnn: where torch's flags are frozen (importing torch.testing._internal does that) its
    # attributes cannot be assigned to.
    torch._C._set_cudnn_deterministic(deterministic_)
    torch._C._set_cudnn_benchmark(benchmark)
    torch.utils.deterministic.fill_uninitialized_memory = switches["fill"]  # type: ignore[attr-defined]  # of the module's class
    if switches["cublas"] is None:
        os.environ.pop(_CUBLAS, None)
    else:
        os.environ[_CUBLAS] = switches["cublas"]


def _cuda_in_use() -> bool:
    return torch.cuda.is_available() and bool(torch.cuda.is_initialized())  # type: ignore[no-untyped-call]


def _too_late(found: str | None) -> None:
    warnings.warn(
        explain(
            f"ft.deterministic: {_CUBLAS} is set too late to count: CUDA is in use already.",
            expected=f"{' or '.join(_REPRODUCIBLE)}, before the first use of CUDA in the process",
            got="no such variable" if found is None else repr(found),
            cause="cuBLAS reads it once; matrix products may differ in their last bits, or torch refuses them",
            fix=f"{_CUBLAS}={_REPRODUCIBLE[0]} python train.py\n"
            f'os.environ["{_CUBLAS}"] = "{_REPRODUCIBLE[0]}"   # or at the top of the script',
        ),
        DeterminismWarning,
        stacklevel=3,
    )
