"""Regions: the parts of a step that the second rung of the ladder compiles, each by itself.

A part of the library that can be compiled alone calls itself through `region(owner, fn)`. That is `fn`, unless a compiled step
on its second rung is running: then it is the compiled form of `fn`, kept with that step under `owner`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

import torch

__all__ = ["region", "using"]

F = TypeVar("F", bound=Callable[..., Any])
Compiler = Callable[[object, Callable[..., Any], bool], Callable[..., Any]]

_active: ContextVar[Compiler | None] = ContextVar("ftrain_region_compiler", default=None)


def region(owner: object, fn: F, *, needed: bool = True) -> F:
    """`fn`, or its compiled form where a compiled step asks for it.

    Args:
        owner: with whom the compiled form is kept.
        fn: the part of the step.
        needed: whether the rung fails where this part does not compile; else it then runs as it is.
    """
    if torch.compiler.is_compiling():
        return fn
    compiler = _active.get()
    return fn if compiler is None else compiler(owner, fn, needed)  # type: ignore[return-value]  # same signature by contract


@contextmanager
def using(compiler: Compiler) -> Iterator[None]:
    """Context in which regions are compiled by `compiler(owner, fn, needed)`."""
    token = _active.set(compiler)
    try:
        yield
    finally:
        _active.reset(token)
