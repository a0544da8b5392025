"""Which optimizers of torch can be run as a transform, and what is said of those that cannot."""

from __future__ import annotations

import inspect
from typing import Any

import torch

from ..errors import LimitError, ModelError, explain
from .masks import nearest

Values = dict[str, Any]

__all__ = ["cannot_run", "changes_by_itself", "check_class", "check_settings", "needs_closure", "refused"]


def needs_closure(kind: type) -> bool:
    """Whether `step` demands a closure."""
    parameters = inspect.signature(kind.step).parameters  # type: ignore[attr-defined]  # an Optimizer
    return "closure" in parameters and parameters["closure"].default is inspect.Parameter.empty


def check_class(optimizer: Any, hyper: Values) -> None:
    """Raise unless this is the class of an optimizer that works on dense gradients and on copies."""
    if isinstance(optimizer, torch.optim.Optimizer):
        name = type(optimizer).__name__
        raise ModelError(
            explain(
                "from_torch wants the class of an optimizer, not an optimizer, which holds parameters of its own.",
                got=f"{name}(...)",
                fix=f"ft.optim.from_torch(torch.optim.{name}, lr=1e-3)",
            )
        )
    if not (isinstance(optimizer, type) and issubclass(optimizer, torch.optim.Optimizer)):
        raise ModelError(
            explain(
                "from_torch wants the class of an optimizer.",
                expected="a subclass of torch.optim.Optimizer",
                got=repr(optimizer),
                fix="ft.optim.from_torch(torch.optim.AdamW, lr=1e-3)",
            )
        )
    if issubclass(optimizer, torch.optim.SparseAdam):
        raise ModelError(
            explain(
                "from_torch: SparseAdam takes sparse gradients alone, and the gradients of a step are dense.",
                fix="ft.optim.adam(1e-3)",
            )
        )
    if hyper.get("differentiable"):
        raise ModelError(
            explain(
                "from_torch: differentiable=True has no effect here, since the optimizer works on copies.",
                cause="a step that is differentiated needs an optimizer written as pure functions",
                fix="ft.optim.adamw(1e-3)   # as all of ft.optim, differentiable as it is",
            )
        )


def check_settings(optimizer: torch.optim.Optimizer, groups: dict[str, Values]) -> None:
    """Raise for a setting of a group that the optimizer does not know, which torch itself would not notice.

    An optimizer of somebody else may read settings that no constructor has an argument for: there only a name that is nearly
    right is refused.
    """
    kind = type(optimizer)
    known = {*optimizer.defaults, *inspect.signature(kind).parameters} - {"params"}
    theirs = not kind.__module__.startswith("torch.optim.")
    for group, own in groups.items():
        for name in own if group else ():
            near = nearest(name, known)
            if name not in known and not (theirs and near is None):
                raise LimitError(
                    explain(
                        f"from_torch: {kind.__name__} knows no setting {name!r}, so it would do nothing.",
                        where=f"groups[{group!r}]",
                        expected=f"some of: {', '.join(sorted(known))}",
                        got=f"{name}={own[name]!r}",
                        fix=f"groups={{{group!r}: {{{near or 'lr'!r}: {own[name]!r}}}}}",
                    )
                )


def refused(kind: type, hyper: Values, error: Exception) -> LimitError:
    """The error of arguments that an optimizer refuses, with the nearest name for an unknown one."""
    known = [name for name in inspect.signature(kind).parameters if name != "params"]
    unknown = [name for name in hyper if name not in known]
    near = nearest(unknown[0], known) if unknown and "unexpected keyword" in str(error) else None
    return LimitError(
        explain(
            f"from_torch: {kind.__name__} refuses its arguments.",
            expected=f"{kind.__name__}(params, {', '.join(known)})",
            got=", ".join(f"{key}={value!r}" for key, value in hyper.items()) or "none",
            cause=str(error).splitlines()[0] if str(error) else type(error).__name__,
            fix=f"{near}={hyper[unknown[0]]!r}" if near else None,
        )
    )


def cannot_run(kind: type, error: Exception) -> ModelError:
    """The error of an optimizer whose step fails on tensors like the parameters."""
    return ModelError(
        explain(
            f"from_torch: {kind.__name__} cannot take a step with these parameters.",
            got=f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}",
            expected="an optimizer whose step() works with dense gradients of ones",
            fix=f"the pattern groups, or ft.optim.partition, to give it only the parameters that {kind.__name__} can take",
        )
    )


def changes_by_itself(kind: type, name: str) -> ModelError:
    """The error of a schedule for something that the optimizer sets."""
    return ModelError(
        explain(
            f"from_torch: {kind.__name__} changes its {name} by itself, so a schedule for it would not be followed.",
            expected=f"{name} as a number, which it starts from",
            fix=f"ft.optim.from_torch({kind.__name__}, {name}=0.01)",
        )
    )
