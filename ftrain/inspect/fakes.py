"""Fake tensors: the shape, dtype and device of a tensor without its memory. What is computed with them costs neither.

Laws
----
- What is made here shares nothing with what it was made from, so nothing that happens to it is seen there.
- Nothing has a value: code that reads one is told so, with the line of the user's code.
"""

from __future__ import annotations

import linecache
import logging
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import optree
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    UnsupportedOperatorException,
)

from .. import tree
from ..errors import InspectError, explain

__all__ = ["LIBRARIES", "Fakes", "ReadsInOptimizer", "is_abstract", "place", "quiet", "reads_nothing", "users_own"]

_FTRAIN = str(Path(__file__).parents[1])
_HERE = str(Path(__file__).parent)
LIBRARIES = (_FTRAIN, *(str(Path(str(module.__file__)).parent) for module in (torch, optree)))

# How torch words an access to memory that a fake tensor does not have (2.11 and 2.13).
_NO_MEMORY = (".numpy() is not supported for tensor subclasses", "Cannot access data pointer")


class ReadsInOptimizer(InspectError):
    """The value that was read is one that an optimizer of ftrain keeps for the host."""


def is_abstract(leaf: object) -> bool:
    """Whether a tensor has no values: it is fake, or lies on `meta`.

    >>> import torch
    >>> from ftrain.inspect.fakes import is_abstract
    >>> is_abstract(torch.zeros(2)), is_abstract(torch.zeros(2, device="meta"))
    (False, True)
    """
    return isinstance(leaf, Tensor) and (leaf.is_meta or isinstance(leaf, FakeTensor))


class Fakes:
    """Makes fake tensors of one mode out of real, meta and other fake ones.

    Args:
        *trees: what will be faked. What lies on `meta` is said to lie where the first other tensor does, or on the CPU.

    >>> import torch
    >>> from ftrain.inspect.fakes import Fakes
    >>> fakes = Fakes(batch := {"x": torch.ones(2, 3, device="meta")})
    >>> fakes.of(batch)["x"].shape, fakes.of(batch)["x"].device
    (torch.Size([2, 3]), device(type='cpu'))
    """

    def __init__(self, *trees: Any) -> None:
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        placed = [leaf.device for leaf in tree.tensors(trees) if leaf.device.type != "meta"]
        self.device = placed[0] if placed else torch.device("cpu")

    def of(self, value: Any) -> Any:
        """The tree with fake tensors in place of tensors; other leaves stay."""
        return tree.map(self.leaf, value)

    def leaf(self, leaf: Any) -> Any:
        """One leaf. Tensors that share memory give fake ones that share it."""
        if not isinstance(leaf, Tensor):
            return leaf
        if not is_abstract(leaf):
            return self.mode.from_tensor(leaf)
        where = self.device if leaf.device.type == "meta" else leaf.device
        with self.mode:
            return torch.empty_strided(
                leaf.shape, leaf.stride(), dtype=leaf.dtype, device=where, requires_grad=leaf.requires_grad
            )

    def with_numbers(self, value: Any) -> Any:
        """As `of`, but single numbers on the CPU keep their value (on `meta` it is taken to be 0), for code that needs them there."""

        def leaf(one: Any) -> Any:
            fake = self.leaf(one)
            if isinstance(one, Tensor) and one.ndim == 0 and fake.device.type == "cpu":
                # With this a fake tensor knows its value, as those do that torch.tensor(3) makes under the mode.
                fake.constant = torch.zeros((), dtype=one.dtype) if is_abstract(one) else one.detach().clone()
            return fake

        return tree.map(leaf, value)


def users_own(frames: list[traceback.FrameSummary]) -> traceback.FrameSummary | None:
    """The innermost frame of the user's own code; where there is none, the innermost of ftrain; else the innermost.

    >>> import traceback
    >>> from ftrain.inspect.fakes import users_own
    >>> users_own(
    ...     [traceback.FrameSummary("train.py", 3, "loss_fn"), traceback.FrameSummary(torch.__file__, 9, "f")]
    ... ).lineno
    3
    """
    own = [frame for frame in frames if not frame.filename.startswith((*LIBRARIES, "<frozen", "<eval_with_key"))]
    ours = [frame for frame in frames if frame.filename.startswith(_FTRAIN) and not frame.filename.startswith(_HERE)]
    return next((found[-1] for found in (own, ours, frames) if found), None)


def place(frame: traceback.FrameSummary) -> str:
    """A frame as `file:line in function: code`."""
    code = (frame.line or linecache.getline(frame.filename, frame.lineno or 0)).strip()
    return f"{frame.filename}:{frame.lineno} in {frame.name}" + (f": {code}" if code else "")


@contextmanager
def quiet() -> Iterator[None]:
    """Context in which torch does not log by itself what it raises anyhow, nor how to go on after a graph break."""

    def drop(record: logging.LogRecord) -> bool:
        return False

    loggers = [logging.getLogger(name) for name in ("torch._subclasses.fake_tensor", "torch._dynamo.variables.tensor")]
    for logger in loggers:
        logger.addFilter(drop)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(drop)


@contextmanager
def reads_nothing(what: str, thing: str = "the step") -> Iterator[None]:
    """Context in which code runs on fake tensors; what needs a value of one raises with the line of the user's code.

    Args:
        what: the public function that runs it, for the message.
        thing: what is run.

    Raises:
        InspectError: a value was read, or a shape depends on values, or an operator has no fake form.
    """
    try:
        with quiet():
            yield
    except DataDependentOutputException as error:
        raise _read(what, thing, error, f"{_operator(error.func)}, as by .item(), float(t), bool(t), if t:") from error
    except DynamicOutputShapeException as error:
        raise InspectError(
            explain(
                f"{what}: the shape of a result depends on values, and fake tensors have none.",
                where=_where(error),
                got=f"{_operator(error.func)}, as by t[mask], t.nonzero(), torch.unique(t)",
                cause=f"{thing} makes tensors whose size nobody knows beforehand; each is a wait for the device, and no one graph",
                fix="torch.where(mask, t, 0)   # keep the shape, and weigh with the mask: ft.metrics.Mean.of(losses, mask)",
            )
        ) from error
    except UnsupportedOperatorException as error:
        raise InspectError(
            explain(
                f"{what}: an operator has no fake form.",
                where=_where(error),
                got=_operator(error.func),
                fix="torch.library.register_fake(...)   # says the operator's output shapes; torch.compile needs it as well",
            )
        ) from error
    except (RuntimeError, TypeError) as error:
        if any(text in str(error) for text in _NO_MEMORY):
            raise _read(what, thing, error, str(error).splitlines()[0]) from error
        raise


def _read(what: str, thing: str, error: BaseException, got: str) -> InspectError:
    frames = traceback.extract_tb(error.__traceback__)
    frame = users_own(list(frames))
    inside = frame is not None and frame.filename.startswith(str(Path(_FTRAIN) / "optim"))
    kind: Callable[[str], InspectError] = ReadsInOptimizer if inside else InspectError
    return kind(
        explain(
            f"{what}: {thing} reads the value of a tensor, and fake tensors have none.",
            where=_where(error),
            got=got,
            cause="this optimizer decides on the host" if inside else "each such read waits for the device",
            fix="ft.optim.adamw(...)   # an optimizer of pure functions of tensors"
            if inside
            else "torch.where(condition, a, b)   # decide on the device; give numbers back as metrics",
        )
    )


def _operator(func: Any) -> str:
    return str(func).removesuffix(".default")


def _where(error: BaseException) -> str | None:
    frame = users_own(list(traceback.extract_tb(error.__traceback__)))
    return None if frame is None else place(frame)
