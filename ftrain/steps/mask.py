"""Parameters that are held at zero by masks in the state: what pruning needs, inside the compiled step.

The masks are a sub-state in `state.extra`, so they are compiled, donated and saved like everything else. `ft.hooks.prune` sets
them; so may anybody.

Law: with masks that hold everywhere the step is the step inside, bitwise; after each step `params = where(mask, params, 0)`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..errors import LimitError, StateError, StructureError, explain
from ..optim.masks import Mask, no_bias_or_norm, resolve, some, take
from ..state import TrainState
from ..types import Batch, Metrics, Params
from .regions import region
from .train import Stepped
from .wrap import check_level, check_name, step_result

__all__ = ["with_mask"]


class Masked(Stepped):
    """Made by `with_mask`."""

    def __init__(
        self, step: Callable[[TrainState, Batch], tuple[TrainState, Metrics]], select: Mask, name: str
    ) -> None:
        super().__init__(step, ())
        self.step, self.select, self.name = step, select, name
        self.advances = bool(getattr(step, "advances", False))  # as the step inside does

    def __repr__(self) -> str:
        return f"with_mask({self.step!r}, name={self.name!r})"

    def init(self, state: TrainState) -> TrainState:
        """The state with masks that hold everywhere, and with what the step inside needs, where they are not there yet."""
        inner = getattr(self.step, "init", None)
        if inner is not None:
            state = inner(state)
        if self.name in state.extra:
            return state
        part = take(state.params, resolve(self.select, state.params, "with_mask: select"))
        if not part:
            raise StructureError(
                explain(
                    "ft.with_mask: no parameter is selected.",
                    where="select=",
                    expected=f"some of: {some(list(state.params))}",
                    fix='ft.with_mask(step, "*.weight")',
                )
            )
        masks = {name: torch.ones_like(leaf, dtype=torch.bool) for name, leaf in part.items()}
        return state.replace(extra={**state.extra, self.name: masks})

    def names(self) -> set[str]:
        """The names of the sub-states that the step keeps in `state.extra`."""
        return {self.name} | (self.step.names() if isinstance(self.step, Stepped) else set())

    def check(self, state: TrainState, batch: Batch | None = None) -> None:
        """Raise unless the state has masks for its own parameters, and suits the step inside."""
        inner = getattr(self.step, "check", None)
        if inner is not None:
            inner(state, batch)
        masks = state.extra.get(self.name)
        if not isinstance(masks, dict):
            raise StateError(
                explain(
                    f"the state has no masks {self.name!r}.",
                    where=f"state.extra[{self.name!r}]",
                    expected="a dict of masks by parameter",
                    got=f"state.extra with {', '.join(state.extra) or 'nothing'}",
                    fix="state = step.init(state)   # once, before the first step; ft.fit and ft.loop do it themselves",
                )
            )
        for key, mask in masks.items():
            leaf = state.params.get(key)
            if leaf is None or mask.shape != leaf.shape or mask.dtype != torch.bool:
                raise StructureError(
                    explain(
                        "a mask does not fit its parameter.",
                        where=f"state.extra[{self.name!r}][{key!r}]",
                        expected=f"bool{list(leaf.shape)}"
                        if leaf is not None
                        else f"one of {some(list(state.params))}",
                        got=f"{str(mask.dtype).removeprefix('torch.')}{list(mask.shape)}",
                    )
                )

    def check_rows(self, n: int) -> None:
        """As the step inside."""
        inner = getattr(self.step, "check_rows", None)
        if inner is not None:
            inner(n)

    def __call__(self, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        if not torch.compiler.is_compiling():
            if torch.is_inference_mode_enabled():  # tensors made in there could never be trained
                with torch.inference_mode(False):
                    return self(state, batch)
            self.check(state, batch)
        new, metrics = step_result(self.step(state, batch), repr(self))
        params = region(self, masked_params, needed=False)(new.params, new.extra[self.name])
        return new.replace(params=params), metrics


def masked_params(params: Params, masks: dict[str, Tensor]) -> Params:
    """The parameters with zeros where a mask says so.

    >>> import torch
    >>> from ftrain.steps.mask import masked_params
    >>> masked_params({"w": torch.ones(2)}, {"w": torch.tensor([True, False])})
    {'w': tensor([1., 0.])}
    """
    return {name: torch.where(masks[name], leaf, 0.0) if name in masks else leaf for name, leaf in params.items()}


def with_mask(
    step: Callable[[TrainState, Batch], tuple[TrainState, Metrics]],
    select: Mask = no_bias_or_norm,
    *,
    name: str = "mask",
) -> Any:
    """Hold parameters at zero where masks in the state say so, after each step and inside of its graph.

    Args:
        step: a step that is not compiled yet.
        select: which parameters have masks: path patterns, a predicate or a tree of bools; default: all but biases and norms.
        name: key in `state.extra`, of `{parameter: bool mask of its shape}`. `state = step.init(state)` puts masks there that hold
            nothing; `ft.fit` does it by itself, and `ft.hooks.prune` sets them.

    Returns:
        A step. An average goes around it: `ft.with_ema(ft.with_mask(step))`. The optimizer inside goes on as if it had moved what is
        masked: its moments, and a norm by which it clips, contain it.

    Raises:
        ArgumentError, StateError, LimitError: now, if the step is none, is compiled already, or uses the name.
        ModelError, StructureError: from `init`, if `select` fits nothing.

    >>> import torch, ftrain as ft
    >>> model, tx = torch.nn.Linear(2, 1), ft.optim.sgd(0.1)
    >>> step = ft.with_mask(ft.train_step(model, lambda model, batch: model(batch).square().mean(), tx))
    >>> state = step.init(ft.init(model, tx))
    >>> state = state.replace(extra={"mask": {"weight": torch.tensor([[True, False]])}})
    >>> state, metrics = step(state, torch.ones(4, 2))
    >>> state.params["weight"] != 0
    tensor([[ True, False]])
    """
    check_level(step, "step", "ft.with_mask")
    check_name(name, "ft.with_mask")
    if hasattr(step, "rung"):
        raise StateError(
            explain(
                "ft.with_mask wants a step that is not compiled yet.",
                expected="a function (state, batch) -> (state, metrics)",
                got=repr(step),
                fix="step = ft.compile(ft.with_mask(step))",
            )
        )
    if isinstance(step, Stepped) and name in step.names():
        raise LimitError(
            explain(
                f"ft.with_mask: the step inside keeps something under the name {name!r} already.",
                where=f"state.extra[{name!r}]",
                expected="a name for each wrapper",
                fix=f'ft.with_mask(step, name="{name}_2")',
            )
        )
    return Masked(step, select, name)
