"""The iterations of L-BFGS: what one update of `ft.optim.lbfgs` does.

It follows `torch.optim.LBFGS` step by step, and borrows its line search, so that both come to the same point. What decides how it goes
on is read on the host: `# sync:` stands at each place.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import lbfgs as reference

from ... import tree
from ...errors import ModelError, explain
from ...types import ValueFn

__all__ = ["LbfgsState", "Run", "Settings", "flatten"]

_search: Any = reference._strong_wolfe  # private, but no other search would come to the same points
_CURVATURE = 1e-10  # a pair with a smaller y s is not kept: the matrix would not stay positive


class LbfgsState(NamedTuple):
    """`n` is the number of all parameters' elements (a complex one counts twice), `m` the history's size.

    `count`: int64 (), updates made; `lr`: float32 (), that of the last one; `iterations`, `pairs`: int64 (), all iterations, and all
    pairs that entered the history; `grad`, `direction`: (n,), at the last iteration; `length`: float64 (), of its step;
    `scale`: (), the first guess of the inverse Hessian; `changes`, `steps`: (m, n), of the gradient and of the parameters, newest at
    row `(pairs - 1) % m`; `inverse`: (m,), `1 / (y s)` of each pair.
    """

    count: Tensor  # type: ignore[assignment]  # hides tuple.count, as in optax
    lr: Tensor
    iterations: Tensor
    pairs: Tensor
    grad: Tensor
    direction: Tensor
    length: Tensor
    scale: Tensor
    changes: Tensor
    steps: Tensor
    inverse: Tensor

    def metrics(self) -> dict[str, Tensor]:
        return {"lr": self.lr}


class Settings(NamedTuple):
    """The hyper-parameters of an update that are constant."""

    max_iter: int
    max_eval: int
    tolerance_grad: float
    tolerance_change: float
    history_size: int
    search: bool


class Run:
    """One update: the algorithm's variables while it runs, of which `state` makes the next state.

    All reading on the host is here. The state that comes in is not changed: what is written to is copied first.
    """

    def __init__(
        self, settings: Settings, lr: float, state: LbfgsState, params: Any, grads: Any, value_fn: ValueFn | None
    ) -> None:
        self.settings, self.lr, self.params, self.value_fn = settings, lr, params, value_fn
        self.first = tree.leaves(params)
        self.x = list(self.first)
        self.given = grads
        self.iterations = int(state.iterations)  # sync: how far the algorithm is
        self.pairs = int(state.pairs)  # sync: the same
        self.length: Any = float(state.length)  # sync: the same
        self.fresh = self.iterations == 0
        self.grad, self.direction, self.scale = state.grad, state.direction, state.scale
        self.changes, self.steps, self.inverse = state.changes, state.steps, state.inverse
        self.owned = False

    def state(self, count: Tensor, lr: Tensor) -> LbfgsState:
        """The state after the update."""
        length = float(self.length)  # sync: the line search's result may be a tensor
        return LbfgsState(
            count,
            lr,
            torch.full_like(count, self.iterations),
            torch.full_like(count, self.pairs),
            self.grad,
            self.direction,
            torch.full_like(count, length, dtype=torch.float64),
            self.scale,
            self.changes,
            self.steps,
            self.inverse,
        )

    def update(self) -> Any:
        """Run the iterations; give the change of the parameters."""
        settings = self.settings
        evals, loss = 0, 0.0
        grad = flatten(self.given, self.params)
        if self.value_fn is not None:
            loss, own = self._evaluate(self.x)
            if self.fresh:
                self._check_same_gradient(grad, own)
            grad, evals = own, 1
        done = bool(grad.abs().max() <= settings.tolerance_grad)  # sync: nothing to do at an optimum
        step = 0
        while not done and step < settings.max_iter:
            step += 1
            self.iterations += 1
            self._turn(grad)
            before = loss
            self.length = self._first_length(grad) if self.iterations == 1 else self.lr
            slope = grad.dot(self.direction)
            if slope > -settings.tolerance_change:  # sync: no way down in this direction
                break
            if settings.search:
                loss, grad, used = self._search(loss, grad, slope, settings.max_eval - evals)
                evals += used
                self.x = self._moved(self.x, self.length)
            else:
                self.x = self._moved(self.x, self.length)
                if step < settings.max_iter:
                    loss, grad = self._evaluate(self.x)
                    evals += 1
            done = (
                evals >= settings.max_eval
                or bool(grad.abs().max() <= settings.tolerance_grad)  # sync: convergence
                or bool((self.direction * self.length).abs().max() <= settings.tolerance_change)  # sync: convergence
                or abs(loss - before) < settings.tolerance_change
            )
        changes = [_change(new, old) for new, old in zip(self.x, self.first, strict=True)]
        return tree.unflatten(tree.structure(self.given), changes)

    def _first_length(self, grad: Tensor) -> Tensor:
        """Of a step of which no curvature is known: no element sum above 1, times the learning rate."""
        return torch.clamp(1.0 / grad.abs().sum(), max=1.0) * self.lr

    def _turn(self, grad: Tensor) -> None:
        """Put the last pair into the history, and make the new direction from it."""
        if self.iterations == 1:
            self.direction = -grad
        else:
            y, s = grad - self.grad, self.direction * self.length
            curvature = y.dot(s)
            if curvature > _CURVATURE:  # sync: whether the pair is kept
                self._remember(y, s, curvature)
            self.direction = self._two_loops(grad)
        self.grad = grad

    def _remember(self, y: Tensor, s: Tensor, curvature: Tensor) -> None:
        if not self.owned:
            self.changes, self.steps, self.inverse = self.changes.clone(), self.steps.clone(), self.inverse.clone()
            self.owned = True
        row = self.pairs % self.settings.history_size
        for history, value in ((self.changes, y), (self.steps, s), (self.inverse, 1.0 / curvature)):
            history[row].copy_(value)  # mutates: a copy of the state's history, made just above
        self.pairs += 1
        self.scale = curvature / y.dot(y)

    def _two_loops(self, grad: Tensor) -> Tensor:
        """The approximate inverse Hessian times the negative gradient."""
        size = self.settings.history_size
        rows = [number % size for number in range(max(0, self.pairs - size), self.pairs)]  # oldest first
        q = -grad
        parts: dict[int, Tensor] = {}
        for row in reversed(rows):
            parts[row] = self.steps[row].dot(q) * self.inverse[row]
            q = torch.add(q, self.changes[row] * -parts[row])
        r = q * self.scale
        for row in rows:
            r = r + self.steps[row] * (parts[row] - self.changes[row].dot(r) * self.inverse[row])
        return r

    def _search(self, loss: float, grad: Tensor, slope: Tensor, max_ls: int) -> tuple[float, Tensor, int]:
        def at(x: list[Tensor], length: Any, direction: Tensor) -> tuple[float, Tensor]:
            return self._evaluate(self._moved(x, length))

        found, new, self.length, used = _search(
            at, self.x, self.length, self.direction, loss, grad, slope, max_ls=max_ls
        )
        return found, new, used

    def _evaluate(self, x: list[Tensor]) -> tuple[float, Tensor]:
        assert self.value_fn is not None  # checked before the run
        params = tree.unflatten(tree.structure(self.params), [leaf.detach() for leaf in x])
        with torch.enable_grad():
            value, grads = self.value_fn(params)
        return float(value), flatten(grads, self.params)  # sync: the algorithm compares losses

    def _moved(self, x: list[Tensor], length: Any) -> list[Tensor]:
        """The parameters after a step along the direction, each in its own dtype."""
        moved, offset = [], 0
        for leaf in x:
            real = torch.view_as_real(leaf) if leaf.is_complex() else leaf
            part = self.direction[offset : offset + real.numel()].view_as(real)
            offset += real.numel()
            new = torch.add(real, part, alpha=float(length)).to(real.dtype)  # sync: a number or the search's tensor
            moved.append(torch.view_as_complex(new) if leaf.is_complex() else new)
        return moved

    def _check_same_gradient(self, given: Tensor, own: Tensor) -> None:
        if (given - own).norm() > 0.05 * own.norm() + self.settings.tolerance_grad:  # sync: once, at the first update
            raise ModelError(
                explain(
                    "lbfgs: the gradient that it was given is not that of the loss that it evaluates.",
                    expected=f"a gradient of norm {float(own.norm()):.4g}",
                    got=f"one of norm {float(given.norm()):.4g}",
                    cause="transforms before lbfgs in a chain (clipping, decay) change the gradient, but not the loss",
                    fix="leave them out, and put a penalty into the loss itself",
                )
            )


def flatten(values: Any, params: Any) -> Tensor:
    """All leaves as one vector, in the widest dtype of the parameters; a complex number is two elements of it."""
    flat = torch.cat([_real(leaf.detach()).reshape(-1) for leaf in tree.leaves(values)])
    if values is params:
        return flat
    dtypes = [_real(leaf).dtype for leaf in tree.leaves(params)]
    dtype = dtypes[0]
    for other in dtypes[1:]:
        dtype = torch.promote_types(dtype, other)
    return flat.to(dtype)


def _real(leaf: Tensor) -> Tensor:
    return torch.view_as_real(leaf) if leaf.is_complex() else leaf


def _change(new: Tensor, old: Tensor) -> Tensor:
    return new.float() - old.float() if old.dtype in (torch.float16, torch.bfloat16) else new - old
