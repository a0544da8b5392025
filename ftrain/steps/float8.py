"""Matrix products in float8, through torchao: linear layers whose inputs, weights and gradients are cast with a scale of their own.

Law: names, shapes and dtypes of the parameters are those of the model; only how its linear layers multiply changes.
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import DeviceError, ModelError, explain
from ..types import Params
from .bind import Bound
from .remat import Modules, chosen_modules
from .skeleton import Skeleton

__all__ = ["with_float8"]


class Float8(Bound):
    """Made by `with_float8`: refuses devices without float8 before anything is computed."""

    emulate = False

    def scope(self, params: Params, buffers: Params) -> AbstractContextManager[nn.Module]:
        self._check(params)
        return super().scope(params, buffers)

    def __call__(self, params: Params, buffers: Params, batch: Any, rng: Tensor) -> Any:
        self._check(params)
        return super().__call__(params, buffers, batch, rng)

    def _check(self, params: Params) -> None:
        device = next(iter(params.values())).device
        # A trace cannot ask a GPU what it can do.
        if not self.emulate and not (device.type == "cuda" and torch.compiler.is_compiling()):
            check_float8(device)


def check_float8(device: torch.device) -> None:
    """Raise unless a device multiplies float8 matrices.

    >>> import torch
    >>> from ftrain.steps.float8 import check_float8
    >>> check_float8(torch.device("cpu"))
    Traceback (most recent call last):
    ftrain.errors.DeviceError: float8 is not supported on this device.
      expected: a CUDA device of compute capability 8.9 or more (Ada, Hopper, Blackwell)
      got:      cpu
      fix:      precision="bf16-mixed"   # or, slow, to try it out: ft.with_float8(loss, emulate=True)
    """
    got = str(device)
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        if capability >= (8, 9):
            return
        got = f"{torch.cuda.get_device_name(device)}, {capability[0]}.{capability[1]}"
    raise DeviceError(
        explain(
            "float8 is not supported on this device.",
            expected="a CUDA device of compute capability 8.9 or more (Ada, Hopper, Blackwell)",
            got=got,
            fix='precision="bf16-mixed"   # or, slow, to try it out: ft.with_float8(loss, emulate=True)',
        )
    )


def with_float8(loss_fn: Bound, modules: Modules | None = None, *, emulate: bool = False) -> Float8:
    """Multiply the matrices of linear layers in float8 (e4m3 forward, e5m2 for gradients), with dynamic scales per tensor.

    Args:
        loss_fn: what `ft.bind` or `ft.with_remat` gave; goes well inside `ft.with_precision(..., "bf16-mixed")`.
        modules: which linear layers: a path pattern, several, or a predicate `(path, module) -> bool`. Default: all whose
            sides are multiples of 16, which the hardware asks for.
        emulate: compute the same rounding in higher precision, on any device; slow.

    Returns:
        A loss-level function.

    Raises:
        ModelError: torchao is not installed, or no linear layer is chosen.
        DeviceError (when called): the device has no float8.

    Source: Micikevicius et al., "FP8 formats for deep learning", 2022; `torchao.float8`.

    >>> import torch, ftrain as ft
    >>> model = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.ReLU(), torch.nn.Linear(32, 16))
    >>> loss = ft.with_float8(ft.bind(model, lambda model, batch: model(batch).square().mean()), emulate=True)
    >>> state = ft.init(model, ft.optim.sgd(0.1))
    >>> value, _ = loss(state.params, state.buffers, torch.ones(16, 16), ft.rng.key(0))
    >>> value.compute().dtype
    torch.float32
    """
    if not isinstance(loss_fn, Bound):
        raise ModelError(
            explain(
                "ft.with_float8 wants what ft.bind made.",
                expected="ft.bind(model, loss_fn)",
                got=type(loss_fn).__name__,
                fix='ft.with_precision(ft.with_float8(ft.bind(model, loss_fn)), "bf16-mixed")',
            )
        )
    convert, config = _torchao(emulate)
    own = loss_fn.skeleton
    wanted: set[int] | None = None
    if modules is not None:
        wanted = {id(module) for module in chosen_modules(own.module, modules, "ft.with_float8")}
    linear = [module for module in own.modules if isinstance(module, nn.Linear)]
    chosen = {id(module) for module in linear if (_fits(module) if wanted is None else id(module) in wanted)}
    if not chosen:
        raise ModelError(
            explain(
                "ft.with_float8: no linear layer is chosen.",
                expected="an nn.Linear whose sides are multiples of 16",
                got=f"{len(linear)} linear layers" + (f", the first {tuple(linear[0].weight.shape)}" if linear else ""),
                fix="leave out ft.with_float8, or pad the layers",
            )
        )
    paths = {path for path, module in own.module.named_modules() if id(module) in chosen}
    skeleton = Skeleton(own.module, train=own.module.training)
    skeleton.outer = own.outer
    # On the private copy, in place; the parameters keep their names, so that the slots can be found again.
    module = convert(skeleton.module, module_filter_fn=lambda module, path: path in paths, config=config)
    again = Skeleton(module, train=own.module.training)
    again.outer = own.outer
    made = Float8(again, loss_fn.loss_fn, loss_fn.wants_rng)
    made.emulate = emulate
    return made


def _fits(module: nn.Linear) -> bool:
    return module.in_features % 16 == 0 and module.out_features % 16 == 0


def _torchao(emulate: bool) -> tuple[Callable[..., nn.Module], Any]:
    try:
        with _quietly():
            from torchao.float8 import Float8LinearConfig, convert_to_float8_training
    except ImportError as error:
        raise ModelError(
            explain(
                "ft.with_float8 needs torchao.",
                cause=str(error),
                fix="python -m pip install 'ftrain[float8]'   # or precision=\"bf16-mixed\"",
            )
        ) from None
    return convert_to_float8_training, Float8LinearConfig(emulate=emulate)


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Torchao tells at its import of kernels that this machine has no use for."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
