"""What wrappers have in common: they hand on what the function inside them carries.

- A loss-level wrapper keeps `scope`, and `outer`, with which the grad level tells a foreign parameter by its name.
- A grad-level wrapper keeps `states`, the sub-states that wrappers inside it keep in `state.extra`, and `guards`, the names of
  those whose `finite` decides whether an update is made.

A wrapper that is a plain function keeps them with `functools.wraps(inner)`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor

from ..types import GradFn, LossFn, Params

__all__ = ["GradWrapper", "LossWrapper"]


class LossWrapper:
    """Base of the loss-level wrappers."""

    def __init__(self, inner: LossFn) -> None:
        self.inner = inner

    def scope(self, params: Params, buffers: Params) -> AbstractContextManager[Any]:
        """The scope of the function inside."""
        return self.inner.scope(params, buffers)

    def outer(self, tensor: Tensor) -> str | None:
        """The name that a tensor has in the module outside, if it is one of its parameters."""
        found = getattr(self.inner, "outer", None)
        return None if found is None else found(tensor)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.inner!r})"


class GradWrapper:
    """Base of the grad-level wrappers."""

    def __init__(self, inner: GradFn) -> None:
        self.inner = inner
        self.states: Mapping[str, Callable[[Params], Any]] = dict(getattr(inner, "states", {}))
        self.guards: tuple[str, ...] = tuple(getattr(inner, "guards", ()))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.inner!r})"
