"""Rematerialisation: activations of chosen modules are computed again in the backward pass instead of being kept.

Law: loss and gradient are those of the function inside, bitwise on a CPU; only memory and time differ.
"""

from __future__ import annotations

import difflib
import fnmatch
import functools
from collections.abc import Callable, Iterable

from torch import nn

from ..errors import ModelError, explain
from .bind import Bound
from .skeleton import Skeleton

__all__ = ["Modules", "chosen_modules", "with_remat"]

Modules = str | Iterable[str] | Callable[[str, nn.Module], bool]


def with_remat(loss_fn: Bound, modules: Modules) -> Bound:
    """Compute the activations inside of some modules again in the backward pass (activation checkpointing).

    Args:
        loss_fn: what `ft.bind` gave; this wrapper comes before all others.
        modules: whose activations are not kept: a path pattern (`"blocks.*"`, `fnmatch`; a name part does not match the dots of
            its sub-modules), several, or a predicate `(path, module) -> bool`. Of nested matches the outermost counts.

    Returns:
        A loss-level function. Where a step is compiled, the loss is then compiled apart from the gradient (see `ft.compile`).

    Raises:
        ModelError: a pattern that matches no module, or something that `ft.bind` did not make.

    Source: Chen et al., "Training deep nets with sublinear memory cost", 2016.

    >>> import torch, ftrain as ft
    >>> model = torch.nn.Sequential(torch.nn.Linear(2, 8), torch.nn.ReLU(), torch.nn.Linear(8, 1))
    >>> loss = ft.with_remat(ft.bind(model, lambda model, batch: model(batch).mean()), "0")
    >>> state = ft.init(model, ft.optim.sgd(0.1))
    >>> grads, *_ = ft.value_and_grad(loss)(state.params, {}, torch.ones(4, 2), ft.rng.key(0))
    >>> grads["2.bias"]
    tensor([1.])
    """
    if not isinstance(loss_fn, Bound):
        raise ModelError(
            explain(
                "ft.with_remat wants what ft.bind made.",
                expected="ft.bind(model, loss_fn)",
                got=type(loss_fn).__name__,
                fix="ft.with_precision(ft.with_remat(ft.bind(model, loss_fn), modules), precision)",
            )
        )
    from torch.utils.checkpoint import checkpoint  # 7 ms that most runs have no use for

    own = loss_fn.skeleton
    skeleton = Skeleton(own.module, train=own.module.training)
    skeleton.outer = own.outer
    for module in chosen_modules(skeleton.module, modules, "ft.with_remat"):
        # On the private copy: the user's module is never changed.
        module.forward = functools.partial(checkpoint, module.forward, use_reentrant=False)
    return Bound(skeleton, loss_fn.loss_fn, loss_fn.wants_rng)


def chosen_modules(model: nn.Module, modules: Modules, what: str) -> list[nn.Module]:
    """The sub-modules that patterns or a predicate choose; of nested ones the outermost.

    Raises:
        ModelError: a pattern that matches none; the nearest path is suggested.

    >>> import torch
    >>> from ftrain.steps.remat import chosen_modules
    >>> model = torch.nn.Sequential(torch.nn.Linear(1, 2), torch.nn.Tanh())
    >>> chosen_modules(model, "1", "ft.with_remat")
    [Tanh()]
    """
    named = {path: module for path, module in model.named_modules() if path}
    if callable(modules):
        hits = [path for path, module in named.items() if modules(path, module)]
        patterns = ["the predicate"] if not hits else []
    else:
        patterns = [modules] if isinstance(modules, str) else list(modules)
        hits = [path for path in named if any(_matches(path, pattern) for pattern in patterns)]
        patterns = [pattern for pattern in patterns if not any(_matches(path, pattern) for path in named)]
    if patterns:
        near = difflib.get_close_matches(patterns[0], named, 1, cutoff=0.3)
        raise ModelError(
            explain(
                f"{what}: {patterns[0]!r} matches no module.",
                expected=f"a pattern for some of: {', '.join(list(named)[:8])}",
                fix=f'{what}(loss, "{near[0] if near else next(iter(named), "blocks.*")}")',
            )
        )
    outermost = [path for path in hits if not any(path.startswith(f"{other}.") for other in hits)]
    return [named[path] for path in outermost]


def _matches(path: str, pattern: str) -> bool:
    parts, wanted = path.split("."), pattern.split(".")
    return len(parts) == len(wanted) and all(map(fnmatch.fnmatchcase, parts, wanted))
