"""What the update rules have in common: the gradient that they descend, and the checks of what they are given.

Each option that is off costs nothing: it is known when the transform is made, and leaves no operation behind.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ... import tree
from ...errors import LimitError, ModelError, explain
from ..transform import nonnegative

__all__ = ["at_the_start", "descent", "filled", "fractions", "is_zero", "no_complex"]


def is_zero(hyper: object) -> bool:
    """Whether a hyper-parameter is the plain number 0, so that its term can be left out.

    >>> import torch
    >>> from ftrain.optim.rules.gradient import is_zero
    >>> is_zero(0.0), is_zero(torch.tensor(0.0))
    (True, False)
    """
    return isinstance(hyper, (int, float)) and hyper == 0


def descent(g: Any, p: Any, decay: Any, *, decays: bool, maximize: bool) -> Any:
    """The gradient of the penalised loss, `g + decay * p`, or `-g + decay * p` where the loss is to grow.

    >>> import torch
    >>> from ftrain.optim.rules.gradient import descent
    >>> descent(torch.ones(1), torch.ones(1), 0.5, decays=True, maximize=True)
    tensor([-0.5000])
    """
    g = -g if maximize else g
    return g + p * decay if decays else g


def filled(params: Any, value: float | Tensor) -> Any:
    """A tree like the parameters, full of one number.

    >>> import torch
    >>> from ftrain.optim.rules.gradient import filled
    >>> filled({"w": torch.ones(2)}, 0.5)
    {'w': tensor([0.5000, 0.5000])}
    """
    return tree.map(lambda p: (torch.zeros_like(p) + value).to(p.dtype), params)


def at_the_start(**hyper: Any) -> None:
    """Raise unless each hyper-parameter, which only `init` looks at, is a number of at least 0 or a 0-d tensor.

    >>> import ftrain as ft
    >>> from ftrain.optim.rules.gradient import at_the_start
    >>> at_the_start(lr=ft.schedules.constant(0.1))
    Traceback (most recent call last):
    ftrain.errors.LimitError: lr=constant(0.1) cannot be a schedule.
      expected: a number >= 0 or a 0-d tensor
      got:      constant(0.1)
      cause:    it is the value before the first update, and is not looked at again
      fix:      lr=0.01
    """
    nonnegative(**hyper)
    for name, value in hyper.items():
        if not isinstance(value, (int, float, Tensor)):
            raise LimitError(
                explain(
                    f"{name}={value!r} cannot be a schedule.",
                    expected="a number >= 0 or a 0-d tensor",
                    got=repr(value),
                    cause="it is the value before the first update, and is not looked at again",
                    fix=f"{name}=0.01",
                )
            )


def fractions(**hyper: Any) -> None:
    """Raise unless each hyper-parameter that is a plain number lies in [0, 1).

    >>> from ftrain.optim.rules.gradient import fractions
    >>> fractions(b1=1.0)
    Traceback (most recent call last):
    ftrain.errors.LimitError: b1=1.0 is not below 1.
      expected: 0 <= b1 < 1
      got:      1.0
      cause:    the average would never take in a gradient
      fix:      b1=0.9
    """
    for name, value in hyper.items():
        if isinstance(value, (int, float)) and not 0 <= value < 1:
            raise LimitError(
                explain(
                    f"{name}={value!r} is not below 1.",
                    expected=f"0 <= {name} < 1",
                    got=repr(value),
                    cause="the average would never take in a gradient",
                    fix=f"{name}=0.9",
                )
            )


def no_complex(what: str, params: Any) -> None:
    """Raise if a parameter is complex.

    >>> import torch
    >>> from ftrain.optim.rules.gradient import no_complex
    >>> no_complex("adam", {"w": torch.ones(1, dtype=torch.complex64)})
    Traceback (most recent call last):
    ftrain.errors.ModelError: adam: complex parameters are not supported.
      where:    params['w']
      expected: a real floating dtype
      got:      complex64[1] on cpu
      fix:      keep the real and the imaginary part as one real parameter: torch.view_as_real(parameter)
    """
    for path, leaf in tree.items(params, root="params"):
        if leaf.is_complex():
            raise ModelError(
                explain(
                    f"{what}: complex parameters are not supported.",
                    where=path,
                    expected="a real floating dtype",
                    got=tree.describe(leaf),
                    fix="keep the real and the imaginary part as one real parameter: torch.view_as_real(parameter)",
                )
            )
