"""Precision as a value: in which dtypes parameters are kept, computed with, and handed out.

| name        | parameters | computation                                      | loss and metrics |
|-------------|------------|--------------------------------------------------|------------------|
| `32-true`   | float32    | float32                                          | float32          |
| `64-true`   | float64    | float64                                          | float64          |
| `bf16-mixed`| float32    | bfloat16 where torch's autocast says so          | float32          |
| `16-mixed`  | float32    | float16 where autocast says so, with loss scale  | float32          |
| `bf16-true` | bfloat16   | bfloat16                                         | float32          |
| `16-true`   | float16    | float16                                          | float32          |
| `fp8-mixed` | float32    | as `bf16-mixed`, linear layers in float8         | float32          |

A policy is applied by `ftrain.with_precision` (computation) and `ftrain.init` (parameters).
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass

import torch

from .errors import DeviceError, PrecisionError, explain

__all__ = ["NAMED", "Policy", "as_policy", "check_supported"]

_HALF = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Policy:
    """In which dtypes a model is trained.

    Attributes:
        param: dtype of floating parameters and buffers in the state.
        compute: dtype of the forward pass. Where it is another than `param`, torch's autocast decides operation by operation
            (matrix products in `compute`, sums and losses in float32).
        output: dtype of the loss and of floating metrics.
        loss_scale: whether `ftrain.train_step` scales the loss, which float16 gradients need.
        float8: whether `ftrain.train_step` multiplies the matrices of linear layers in float8.

    >>> import torch, ftrain as ft
    >>> ft.Policy(compute=torch.bfloat16)
    Policy(param=torch.float32, compute=torch.bfloat16, output=torch.float32, loss_scale=False, float8=False)
    """

    param: torch.dtype = torch.float32
    compute: torch.dtype = torch.float32
    output: torch.dtype = torch.float32
    loss_scale: bool = False
    float8: bool = False

    def __post_init__(self) -> None:
        for name in ("param", "compute", "output"):
            dtype = getattr(self, name)
            if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
                raise PrecisionError(
                    explain(f"Policy: {name}={dtype!r} is no floating dtype.", fix=f"Policy({name}=torch.bfloat16)")
                )
        if self.mixed and self.compute not in _HALF:
            raise PrecisionError(
                explain(
                    f"Policy: computing in {self.compute} with parameters in {self.param} is not a mixed precision.",
                    expected="compute=torch.bfloat16 or torch.float16, or the dtype of the parameters",
                    fix=f"Policy(param={self.compute}, compute={self.compute})",
                )
            )

    @property
    def mixed(self) -> bool:
        """Whether parameters are kept in another dtype than they are computed with."""
        return self.param != self.compute


NAMED = {
    "32-true": Policy(),
    "64-true": Policy(torch.float64, torch.float64, torch.float64),
    "bf16-mixed": Policy(compute=torch.bfloat16),
    "16-mixed": Policy(compute=torch.float16, loss_scale=True),
    "bf16-true": Policy(torch.bfloat16, torch.bfloat16),
    "16-true": Policy(torch.float16, torch.float16),
    "fp8-mixed": Policy(compute=torch.bfloat16, float8=True),
}
_SHORT = {"32": "32-true", "64": "64-true", "16": "16-mixed", "bf16": "bf16-mixed"}


def as_policy(precision: str | int | Policy, what: str = "precision") -> Policy:
    """A policy by its name; a policy stands for itself.

    Args:
        precision: `"32-true"`, `"64-true"`, `"bf16-mixed"`, `"16-mixed"`, `"bf16-true"`, `"16-true"`, `"fp8-mixed"`, or short `32`, `64`,
            `"bf16"`, `16`.
        what: how the error calls it.

    Raises:
        PrecisionError: an unknown name; the nearest one is suggested.

    >>> from ftrain.precision import as_policy
    >>> as_policy("bf16-mixed").compute
    torch.bfloat16
    """
    if isinstance(precision, Policy):
        return precision
    name = str(precision)
    name = _SHORT.get(name, name)
    if name not in NAMED or isinstance(precision, bool):
        near = difflib.get_close_matches(name, [*NAMED, *_SHORT], 1, cutoff=0.3)
        raise PrecisionError(
            explain(
                f"{what}: there is no precision {precision!r}.",
                expected=", ".join(NAMED) + ", or an ft.Policy",
                fix=f"precision={near[0]!r}" if near else 'precision="bf16-mixed"',
            )
        )
    return NAMED[name]


def check_supported(policy: Policy, device: torch.device, what: str) -> None:
    """Raise where a device cannot compute in this precision.

    Raises:
        DeviceError: float16 on a CPU, or bfloat16 on a GPU without it.

    >>> import torch
    >>> from ftrain.precision import as_policy, check_supported
    >>> check_supported(as_policy("bf16-mixed"), torch.device("cpu"), "ft.train_step")
    """
    kind = "mixed" if policy.mixed else "true"
    if device.type == "cpu" and policy.compute == torch.float16:
        raise DeviceError(
            explain(
                f"{what}: float16 is not supported on a CPU.",
                expected="bfloat16 or float32 on cpu",
                got=f"16-{kind} on {device}",
                cause="CPUs have no fast float16 arithmetic, and its range needs a loss scale",
                fix=f'precision="bf16-{kind}"   # or a CUDA device for 16-{kind}',
            )
        )
    # Emulated, as on GPUs before Ampere, it is slower than float32, and not what was asked for.
    if device.type == "cuda" and policy.compute == torch.bfloat16 and not torch.cuda.is_bf16_supported(False):
        raise DeviceError(
            explain(
                f"{what}: this GPU has no bfloat16.",
                got=f"bf16-{kind} on {torch.cuda.get_device_name(device)}",
                fix='precision="16-mixed"',
            )
        )
