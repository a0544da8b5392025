"""How many floating-point operations code does: torch's counter, with the formulas that it lacks.

A multiplication and an addition count as two. Counted are matrix products, convolutions, attention and recurrent layers;
element by element operations are not, as is usual: they are few beside the others.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

__all__ = ["counter"]

_aten = torch.ops.aten


def counter() -> FlopCounterMode:
    """A mode that counts; `get_total_flops()` says how many so far.

    >>> import torch
    >>> from ftrain.inspect.operations import counter
    >>> with counter() as operations:
    ...     _ = torch.ones(2, 3) @ torch.ones(3, 4)
    >>> operations.get_total_flops()
    48
    """
    return FlopCounterMode(display=False, custom_mapping=_MORE)


def _attention(query: Any, key: Any, value: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    """softmax(Q K^T) V: two products for each head."""
    pairs = math.prod(query[:-1]) * key[-2]
    return int(2 * pairs * (query[-1] + value[-1]))


def _attention_backward(
    grad_out: Any, query: Any, key: Any, value: Any, *args: Any, out_shape: Any = None, **kwargs: Any
) -> int:
    """Q K^T again, then the gradients of the scores, of V, of Q and of K: five products."""
    pairs = math.prod(query[:-1]) * key[-2]
    return int(2 * pairs * (3 * query[-1] + 2 * value[-1]))


def _rnn_layer(x: Any, ih: Any, hh: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    """An LSTM layer of oneDNN in one direction: each time step multiplies by both matrices."""
    return int(2 * math.prod(x[:-1]) * (math.prod(ih) + math.prod(hh)))


def _rnn_layer_backward(*args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    """Two products (for the weights and for what went in) for each one of the forward pass."""
    return 2 * _rnn_layer(*args)


def _cudnn(x: Any, weights: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    """Recurrent layers of cuDNN, all at once."""
    return int(2 * math.prod(x[:-1]) * sum(math.prod(shape) for shape in weights if len(shape) == 2))


def _cudnn_backward(*args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return 2 * _cudnn(*args)


# What torch's own table (2.13) leaves out.
_MORE: dict[Any, Any] = {
    _aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
    _aten.mkldnn_rnn_layer: _rnn_layer,
    _aten.mkldnn_rnn_layer_backward: _rnn_layer_backward,
    _aten._cudnn_rnn: _cudnn,
    _aten._cudnn_rnn_backward: _cudnn_backward,
}
