"""Optimizers by name, for configuration files and sweeps. The table is read off the package, so that it cannot fall behind."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from typing import Any

from ..errors import ModelError, explain
from ..types import Transform
from .masks import nearest

__all__ = ["make", "optimizers"]


def optimizers() -> dict[str, Callable[..., Transform]]:
    """The optimizers by name: the public functions of `ft.optim` that take a learning rate `lr` and return a transform.

    >>> import ftrain as ft
    >>> ft.optim.optimizers()["adamw"] is ft.optim.adamw
    True
    """
    package = sys.modules[__package__]  # an import here would be a circle
    found = {name: getattr(package, name) for name in sorted(package.__all__)}
    return {name: value for name, value in found.items() if _is_optimizer(name, value)}


def make(name: str, **hyper: Any) -> Transform:
    """An optimizer by its name.

    Args:
        name: e.g. `"adamw"`; the names are `ft.optim.optimizers()`.
        **hyper: its arguments, by name.

    Raises:
        ModelError: there is no such optimizer, or it has no such argument, or one is missing.

    >>> import ftrain as ft
    >>> tx = ft.optim.make("adamw", lr=3e-4, weight_decay=0.1)
    >>> ft.optim.make("adamv", lr=3e-4)
    Traceback (most recent call last):
    ftrain.errors.ModelError: there is no optimizer 'adamv'.
      expected: one of: ...
      got:      'adamv'
      fix:      ft.optim.make("adam", ...)
    """
    known = optimizers()
    if name not in known:
        like = nearest(str(name).lower(), known)
        raise ModelError(
            explain(
                f"there is no optimizer {name!r}.",
                expected=f"one of: {', '.join(known)}",
                got=repr(name),
                fix=f'ft.optim.make("{like or "adamw"}", ...)',
            )
        )
    parameters = inspect.signature(known[name]).parameters
    for given, value in hyper.items():
        if given not in parameters:
            like = _SYNONYMS.get(given, nearest(given, parameters))
            raise ModelError(
                explain(
                    f"the optimizer {name!r} has no argument {given!r}.",
                    expected=f"some of: {', '.join(parameters)}",
                    got=f"{given}={value!r}",
                    fix=f'ft.optim.make("{name}", {like}=...)' if like in parameters else None,
                )
            )
    missing = [key for key, one in parameters.items() if one.default is one.empty and key not in hyper]
    if missing:
        raise ModelError(
            explain(
                f"the optimizer {name!r} needs {', '.join(missing)}.",
                got=", ".join(f"{key}={value!r}" for key, value in hyper.items()) or "no arguments",
                fix=f'ft.optim.make("{name}", {missing[0]}=1e-3)',
            )
        )
    return known[name](**hyper)


# What other libraries call it, where that looks unlike our name.
_SYNONYMS = {"learning_rate": "lr", "step_size": "lr", "betas": "b1", "beta1": "b1", "beta2": "b2", "epsilon": "eps"}


def _is_optimizer(name: str, value: Any) -> bool:
    """`scale_by_learning_rate` has an `lr` as well, but is a piece of one."""
    if name.startswith(("_", "scale_by_")) or not inspect.isfunction(value):
        return False
    signature = inspect.signature(value)
    return "lr" in signature.parameters and signature.return_annotation in ("Transform", "Partition")
