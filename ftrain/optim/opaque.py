"""Optimizers that no graph can hold: they read values on the host, or run code that is not traced.

`refuse_trace(what, why)` stands at the head of their `update`. Inside a trace it raises `Opaque`, which dynamo reports as an
exception that nobody caught; so the step takes the next rung of the ladder, and `reason_in` finds the sentence again in dynamo's
message. Inside `vmap`, where a value is many values, it raises with the way out.
"""

from __future__ import annotations

import ast
import re

import torch

from ..errors import CompileError, ModelError, explain

__all__ = ["Opaque", "no_value_fn", "reason_in", "refuse_trace"]

# How dynamo words an exception that leaves a trace (2.13: "raised exception Opaque('...')").
_RAISED = re.compile(r"""raised exception Opaque\((?P<text>'[^'\n]*'|"[^"\n]*")""")


class Opaque(CompileError):
    """Raised where an optimizer that runs outside of a graph is traced or vmapped.

    >>> from ftrain.optim.opaque import Opaque
    >>> issubclass(Opaque, RuntimeError)
    True
    """


def refuse_trace(what: str, why: str) -> None:
    """Raise inside a trace and inside vmap; do nothing elsewhere.

    Args:
        what: the optimizer, as the reader knows it: `"L-BFGS"`.
        why: what it does that a graph cannot: `"reads values on the host"`.

    Raises:
        Opaque: with one sentence in a trace, with an explanation in vmap.

    >>> from ftrain.optim.opaque import refuse_trace
    >>> refuse_trace("L-BFGS", "reads values on the host")
    """
    if torch.compiler.is_compiling():
        raise Opaque(f"{what} {why} and runs outside of a graph")
    if torch._C._functorch.maybe_current_level() is not None:
        raise Opaque(
            explain(
                f"{what} {why}, so it cannot run inside vmap or torch.func.grad.",
                expected="an optimizer written as pure functions of tensors: ft.optim.adamw, ft.optim.sgd ...",
                fix="for state in states: state, metrics = step(state, batch)   # one after the other",
            )
        )


def reason_in(text: str) -> str | None:
    """The reason of an `Opaque` in dynamo's message about a trace that failed, or None.

    >>> from ftrain.optim.opaque import reason_in
    >>> reason_in("raised exception Opaque('L-BFGS reads values on the host and runs outside of a graph')")
    'L-BFGS reads values on the host and runs outside of a graph'
    >>> reason_in("raised exception ValueError('no')") is None
    True
    """
    found = _RAISED.search(text)
    return None if found is None else str(ast.literal_eval(found["text"]))


def no_value_fn(what: str, fix: str | None = None) -> ModelError:
    """The error of an optimizer that evaluates the loss again and was not given it.

    >>> from ftrain.optim.opaque import no_value_fn
    >>> print(no_value_fn("ft.optim.lbfgs"))
    ft.optim.lbfgs evaluates the loss again, and has no way to.
      expected: tx.update(grads, state, params, value_fn=value_fn)
      cause:    it was called by hand, or lies in a wrapper that does not hand value_fn on
      fix:      value_fn = lambda params: (loss, grads)   # ft.train_step gives one to its optimizer
    """
    return ModelError(
        explain(
            f"{what} evaluates the loss again, and has no way to.",
            expected="tx.update(grads, state, params, value_fn=value_fn)",
            cause="it was called by hand, or lies in a wrapper that does not hand value_fn on",
            fix=fix or "value_fn = lambda params: (loss, grads)   # ft.train_step gives one to its optimizer",
        )
    )
