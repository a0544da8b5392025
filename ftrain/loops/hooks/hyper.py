"""Hyper-parameters that `ft.optim.inject` made leaves of the optimizer's state: found and replaced, however deep they lie."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor

from ...errors import HookError, explain
from ...optim import Injected

__all__ = ["check_injected", "children", "injected", "rebuilt", "replace_hyper"]


def injected(opt: Any) -> Iterator[Injected]:
    """The states of `inject` inside an optimizer's state, the outer before the inner.

    >>> import torch, ftrain as ft
    >>> from ftrain.loops.hooks.hyper import injected
    >>> tx = ft.optim.chain(ft.optim.clip_by_global_norm(1.0), ft.optim.inject(ft.optim.sgd)(lr=0.1))
    >>> [one.hyper["lr"] for one in injected(tx.init({"w": torch.ones(2)}))]
    [tensor(0.1000, dtype=torch.float64)]
    """
    if isinstance(opt, Injected):
        yield opt
    for _, child in children(opt):
        yield from injected(child)


def replace_hyper(opt: Any, name: str, fn: Callable[[Tensor], Tensor]) -> Any:
    """The optimizer's state with `fn` applied to every injected hyper-parameter of this name.

    >>> import torch, ftrain as ft
    >>> from ftrain.loops.hooks.hyper import replace_hyper
    >>> opt = ft.optim.inject(ft.optim.sgd)(lr=0.1).init({"w": torch.ones(2)})
    >>> replace_hyper(opt, "lr", lambda lr: lr / 2).hyper
    {'lr': tensor(0.0500, dtype=torch.float64)}
    """
    new = {key: replace_hyper(child, name, fn) for key, child in children(opt)}
    if isinstance(opt, Injected):
        hyper = {key: fn(value) if key == name else value for key, value in opt.hyper.items()}
        return opt._replace(hyper=hyper, inner=new["inner"])
    return rebuilt(opt, list(new.values()))


def check_injected(opt: Any, name: str, who: str) -> None:
    """Raise unless a hyper-parameter of this name is injected, and would stay as a hook sets it.

    Args:
        opt: the state of an optimizer.
        name: of the hyper-parameter.
        who: who wants to change it, for the message.

    Raises:
        HookError: it is not injected anywhere, or a schedule sets it anew at each step.
    """
    found = list(injected(opt))
    holders = [one for one in found if name in one.hyper]
    fix = f"tx = ft.optim.inject(ft.optim.adamw)({name}=1e-3)"
    if not holders:
        others = sorted({key for one in found for key in one.hyper})
        raise HookError(
            explain(
                f"{who} finds no hyper-parameter {name!r} that it could change.",
                where="state.opt",
                expected=f"a leaf {name!r} made by ft.optim.inject",
                got=f"only {', '.join(map(repr, others))}"
                if others
                else "an optimizer whose hyper-parameters are constants",
                cause=f"an argument becomes a leaf when it is passed to inject(...)(...), and {name!r} was not"
                if others
                else f"{name}= is fixed when the optimizer is made, and a hook changes the state only",
                fix=fix + "   # in ft.init and ft.train_step alike",
            )
        )
    if any(name in one.scheduled for one in holders):
        raise HookError(
            explain(
                f"{who} and a schedule both set {name!r}.",
                where="state.opt",
                expected=f"an injected {name!r} that is a number",
                got="a schedule, which sets it anew at each step",
                fix=fix,
            )
        )


def children(node: Any) -> list[tuple[Any, Any]]:
    """The children of a node of a state that may hold others, by key or field.

    >>> from ftrain.loops.hooks.hyper import children
    >>> children({"a": 1}), children((2, 3)), children(4)
    ([('a', 1)], [(0, 2), (1, 3)], [])
    """
    if isinstance(node, dict):
        return list(node.items())
    if isinstance(node, tuple) and hasattr(node, "_fields"):
        return [(field, getattr(node, field)) for field in node._fields]
    return list(enumerate(node)) if isinstance(node, (tuple, list)) else []


def rebuilt(node: Any, new: list[Any]) -> Any:
    """The node with other children, in the order of `children`.

    >>> from ftrain.loops.hooks.hyper import rebuilt
    >>> rebuilt({"a": 1}, [5])
    {'a': 5}
    """
    if not new:
        return node
    if isinstance(node, dict):
        return type(node)(zip(node, new, strict=True))
    if isinstance(node, tuple) and hasattr(node, "_fields"):
        return type(node)(*new)
    return type(node)(new)
