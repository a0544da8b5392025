"""Randomness as a function of keys, and the guard that keeps the global generators out of it.

Laws
----
- A key is a 0-d int64 tensor. Drawing from the same key twice gives the same numbers, on every device and backend.
- `fold_in(key, n)` for different `n`, and the rows of `split(key, n)`, are independent streams.
- `fold_in` gives the same key for tensors on a device and, as `fold_in_host`, for Python integers on the host.
- Whatever runs inside `seeded(...)` draws from generators that are a function of the seed alone, and afterwards the global
  generators are as they were before.

The bits come from the finaliser of SplitMix64 (Steele, Lea & Flood, "Fast splittable pseudorandom number generators", OOPSLA
2014) used as a counter-based generator: the n-th number is n, mixed twice with two words derived from the key. It is plain
integer arithmetic on tensors, so it traces, vmaps and compiles. It is not meant for cryptography. torch has stateless keys of its own from 2.13 on
(`torch.func._random`), which are experimental and absent from 2.11.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from types import TracebackType
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

__all__ = [
    "Isolated",
    "bernoulli",
    "bits",
    "fold_in",
    "fold_in_host",
    "key",
    "normal",
    "permutation",
    "randint",
    "seeded",
    "split",
    "uniform",
]

_numpy: Any = np.random  # its stubs lack the two functions that swap the global generator

_GOLDEN = 0x9E3779B97F4A7C15
_MIX1 = 0xBF58476D1CE4E5B9
_MIX2 = 0x94D049BB133111EB
_MASK = (1 << 64) - 1
_FOLD, _SPLIT, _BITS = 1, 2, 3  # purposes: the same key gives unrelated numbers to each


def _signed(value: int) -> int:
    """A 64-bit pattern as the int64 that has the same bits."""
    return value - (1 << 64) if value >= 1 << 63 else value


def _shift(x: Tensor, by: int) -> Tensor:
    """Logical right shift (torch's shift of int64 is arithmetic)."""
    return (x >> by) & ((1 << (64 - by)) - 1)


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shift(x, 30)) * _signed(_MIX1)
    x = (x ^ _shift(x, 27)) * _signed(_MIX2)
    return x ^ _shift(x, 31)


def _mix_host(x: int) -> int:
    x &= _MASK
    x = ((x ^ (x >> 30)) * _MIX1) & _MASK
    x = ((x ^ (x >> 27)) * _MIX2) & _MASK
    return x ^ (x >> 31)


def _stream(key: Tensor, counter: Tensor | int, domain: int) -> Tensor:
    """The numbers at positions `counter` of the stream that belongs to a key and a purpose."""
    # The counter meets the key in an xor, never in a product with a constant: Inductor folds a constant times an arange
    # into an index expression, which overflows (pytorch #175966) and, on a 2.13 CPU with so large a constant, breaks the heap.
    one = _mix(key + _signed(domain * _GOLDEN & _MASK))
    return _mix(_mix(one ^ counter) + _mix(one + _signed(_GOLDEN)))


def _stream_host(key: int, counter: int, domain: int) -> int:
    one = _mix_host(key + domain * _GOLDEN)
    return _mix_host(_mix_host(one ^ (counter & _MASK)) + _mix_host(one + _GOLDEN))


def key(seed: int, device: torch.device | str | None = None) -> Tensor:
    """A key made from an integer.

    Args:
        seed: any integer; only its lowest 64 bits count.
        device: where the key lies (default: CPU).

    Returns:
        int64 tensor of shape ().

    >>> from ftrain import rng
    >>> rng.key(7)
    tensor(7)
    """
    return torch.tensor(_signed(seed & _MASK), dtype=torch.int64, device=device)


def fold_in(key: Tensor, data: Tensor | int) -> Tensor:
    """A new key from a key and a number (step, rank, index ...), independent for different numbers.

    Args:
        key: int64 tensor of shape ().
        data: integer, or integer tensor of any shape (one new key per element).

    Returns:
        int64 tensor of the shape of `data`.

    >>> from ftrain import rng
    >>> int(rng.fold_in(rng.key(0), 1)) == rng.fold_in_host(0, 1)
    True
    """
    return _stream(key, data.to(torch.int64) if isinstance(data, Tensor) else _signed(data & _MASK), _FOLD)


def fold_in_host(key: int, *data: int) -> int:
    """`fold_in` for Python integers, once for each number; the result is a signed 64-bit integer.

    >>> from ftrain import rng
    >>> rng.fold_in_host(0, 1, 2) == rng.fold_in_host(rng.fold_in_host(0, 1), 2)
    True
    """
    for number in data:
        key = _stream_host(key, number, _FOLD)
    return _signed(key & _MASK)


def split(key: Tensor, n: int = 2) -> Tensor:
    """`n` independent keys.

    Args:
        key: int64 tensor of shape ().
        n: how many.

    Returns:
        int64 tensor of shape (n,); iterate or unpack it.

    >>> from ftrain import rng
    >>> a, b = rng.split(rng.key(0))
    >>> bool(a != b)
    True
    """
    return _stream(key, torch.arange(n, dtype=torch.int64, device=key.device), _SPLIT)


def bits(key: Tensor, shape: tuple[int, ...] = ()) -> Tensor:
    """Uniformly distributed 64-bit patterns, as int64.

    Args:
        key: int64 tensor of shape ().
        shape: shape of the result.

    >>> from ftrain import rng
    >>> rng.bits(rng.key(0), (2,)).dtype
    torch.int64
    """
    return _stream(key, torch.arange(math.prod(shape), dtype=torch.int64, device=key.device).reshape(shape), _BITS)


def uniform(
    key: Tensor, shape: tuple[int, ...] = (), low: float = 0.0, high: float = 1.0, dtype: torch.dtype | None = None
) -> Tensor:
    """Uniform numbers in [low, high).

    Args:
        key: int64 tensor of shape ().
        shape: shape of the result.
        low: lower end, included.
        high: upper end, excluded up to rounding.
        dtype: floating dtype of the result (default: torch's default dtype).

    >>> from ftrain import rng
    >>> x = rng.uniform(rng.key(0), (1000,))
    >>> bool((x >= 0).all() and (x < 1).all() and abs(x.mean() - 0.5) < 0.03)
    True
    """
    dtype = dtype or torch.get_default_dtype()
    width = {torch.float64: 53, torch.float32: 24, torch.bfloat16: 8, torch.float16: 11}[dtype]
    unit = _shift(bits(key, shape), 64 - width).to(dtype) * 2.0**-width
    return unit * (high - low) + low


def normal(key: Tensor, shape: tuple[int, ...] = (), dtype: torch.dtype | None = None) -> Tensor:
    """Standard normal numbers (Box & Muller, "A note on the generation of random normal deviates", 1958).

    Args:
        key: int64 tensor of shape ().
        shape: shape of the result.
        dtype: floating dtype of the result (default: torch's default dtype).

    >>> from ftrain import rng
    >>> x = rng.normal(rng.key(0), (10000,))
    >>> bool(abs(x.mean()) < 0.05 and abs(x.std() - 1) < 0.05)
    True
    """
    dtype = dtype or torch.get_default_dtype()
    one, two = split(key)
    radius = (-2.0 * torch.log1p(-uniform(one, shape, dtype=torch.float64))).sqrt()
    return (radius * torch.cos(2.0 * math.pi * uniform(two, shape, dtype=torch.float64))).to(dtype)


def bernoulli(key: Tensor, p: float | Tensor = 0.5, shape: tuple[int, ...] = ()) -> Tensor:
    """Booleans that are true with probability `p`.

    Args:
        key: int64 tensor of shape ().
        p: probability, a number or a tensor that broadcasts with `shape`.
        shape: shape of the result.

    >>> from ftrain import rng
    >>> rng.bernoulli(rng.key(0), 1.0, (3,))
    tensor([True, True, True])
    """
    return uniform(key, shape, dtype=torch.float64) < p


def randint(key: Tensor, low: int, high: int, shape: tuple[int, ...] = ()) -> Tensor:
    """Integers in [low, high), int64; the bias of the multiplication method is below (high - low) / 2**53.

    Args:
        key: int64 tensor of shape ().
        low: lower end, included.
        high: upper end, excluded.
        shape: shape of the result.

    >>> from ftrain import rng
    >>> x = rng.randint(rng.key(0), 2, 5, (100,))
    >>> sorted(set(x.tolist()))
    [2, 3, 4]
    """
    unit = uniform(key, shape, dtype=torch.float64)
    return (unit * (high - low)).to(torch.int64) + low


def permutation(key: Tensor, n: int) -> Tensor:
    """A permutation of 0 .. n-1, int64 of shape (n,).

    >>> from ftrain import rng
    >>> sorted(rng.permutation(rng.key(0), 4).tolist())
    [0, 1, 2, 3]
    """
    return torch.argsort(bits(key, (n,)), stable=True)


def _generator(device: torch.device) -> torch.Generator:
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        return torch.cuda.default_generators[index]
    return torch.default_generator


class seeded:
    """Context in which torch's default generators draw from `seed`, which it gives; afterwards they are as they were.

    Args:
        seed: any integer.
        device: its generator is seeded as well as the CPU's.

    >>> import torch
    >>> from ftrain import rng
    >>> with rng.seeded(0, torch.device("cpu")):
    ...     a = torch.rand(2)
    >>> with rng.seeded(0, torch.device("cpu")):
    ...     b = torch.rand(2)
    >>> torch.equal(a, b)
    True
    """

    __slots__ = ("_device", "_saved", "_seed")

    def __init__(self, seed: int, device: torch.device) -> None:
        self._seed = seed
        self._device = device

    def __enter__(self) -> int:
        cpu = torch.default_generator
        saved = [(cpu, cpu.get_state())]
        cpu.manual_seed(self._seed & ((1 << 63) - 1))
        if self._device.type == "cuda":
            gpu = _generator(self._device)
            saved.append((gpu, gpu.get_state()))
            gpu.manual_seed(self._seed & ((1 << 63) - 1))
        self._saved = saved
        return self._seed

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        for generator, state in self._saved:
            generator.set_state(state)


class Isolated:
    """Streams of torch's, numpy's and Python's global generators that belong to a piece of user code (a data loader, say).

    Entering it puts the streams in place of the user's own, leaving it takes them out again and remembers where they were; so
    the code inside draws one continuous stream that is a function of the seed, whatever happens between two entries. (The
    second number of a pair that numpy's old `randn` keeps is dropped when it is left.)

    >>> import random
    >>> from ftrain import rng
    >>> before = random.getstate()
    >>> streams = rng.Isolated(seed=0)
    >>> with streams:
    ...     a = random.random()
    >>> kept = streams.state()
    >>> with streams:
    ...     b = random.random()
    >>> a != b and random.getstate() == before
    True
    >>> streams.take(kept)
    >>> with streams:
    ...     c = random.random()
    >>> b == c
    True
    """

    __slots__ = ("_gauss", "_half", "_inner", "_outer")
    _entered: ClassVar[int] = 0  # how many are entered now: the generators are the process's

    def __init__(self, seed: int) -> None:
        seed &= (1 << 63) - 1
        torch_state = torch.Generator().manual_seed(seed).get_state()
        self._inner: tuple[Any, Any, Any] = (
            torch_state,
            np.random.MT19937(seed),
            random.Random(seed).getstate(),
        )
        self._outer: tuple[Any, Any, Any] | None = None
        self._gauss: float | None = None  # the kept half of a pair: the user's, while the streams are entered
        self._half: float | None = None  # the streams', where `take` was given one before they are entered

    def state(self) -> dict[str, Any]:
        """Where the streams are, as a tree of arrays and numbers; also while they are entered."""
        if self._outer is None:
            half = {"has_gauss": int(self._half is not None), "gauss": self._half or 0.0}
            torch_state, numpy_state = self._inner[0], {**self._inner[1].state, **half}
            python_state = self._inner[2]
        else:
            torch_state, python_state = torch.default_generator.get_state(), random.getstate()
            numpy_state = np.random.get_state(legacy=False)
        version, words, gauss = python_state
        return {
            "torch": torch_state.clone(),
            "numpy": _copied(numpy_state),
            "random": {"version": version, "words": np.array(words, dtype=np.uint32), "gauss": gauss},
        }

    def take(self, state: Mapping[str, Any]) -> None:
        """Go on from where `state()` was, of these streams or others."""
        numpy_state, python = dict(state["numpy"]), state["random"]
        bits: Any = getattr(np.random, numpy_state["bit_generator"])()
        # a copy: the generators write into what they are given
        bits.state = _copied({key: numpy_state[key] for key in bits.state})
        words = tuple(int(word) for word in np.asarray(python["words"]))
        new = (torch.as_tensor(state["torch"]).clone(), bits, (python["version"], words, python["gauss"]))
        # numpy can put the half of a pair back for its default generator only
        default = numpy_state["bit_generator"] == "MT19937"
        half = numpy_state["gauss"] if numpy_state["has_gauss"] and default else None
        if self._outer is None:
            self._inner, self._half = new, half
            return
        self._swap(new)
        if half is not None:
            _put_half(half)

    def _swap(self, to: tuple[Any, Any, Any]) -> tuple[Any, Any, Any]:
        was = (torch.default_generator.get_state(), _numpy.get_bit_generator(), random.getstate())
        torch.default_generator.set_state(to[0])
        _numpy.set_bit_generator(to[1])
        random.setstate(to[2])
        return was

    def __enter__(self) -> None:
        # Exchanging numpy's bit generator forgets the kept half of a pair. The user's own is put back; between our streams it
        # may go, since that is the same in every run, and asking for it takes longer than all of the rest.
        if Isolated._entered == 0:
            found = np.random.get_state(legacy=False)
            self._gauss = found["gauss"] if found["has_gauss"] and found["bit_generator"] == "MT19937" else None
        Isolated._entered += 1
        self._outer = self._swap(self._inner)
        if self._half is not None:
            _put_half(self._half)
            self._half = None

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        assert self._outer is not None, "left without having been entered"
        self._inner = self._swap(self._outer)
        self._outer = None
        Isolated._entered -= 1
        if self._gauss is not None:
            _put_half(self._gauss)
            self._gauss = None


def _put_half(gauss: float) -> None:
    """Let numpy's global generator keep this half of a pair."""
    np.random.set_state({**np.random.get_state(legacy=False), "has_gauss": 1, "gauss": gauss})


def _copied(state: Mapping[str, Any]) -> dict[str, Any]:
    """The state of a bit generator of numpy, with arrays of its own."""
    copied: dict[str, Any] = {}
    for key, value in state.items():
        if isinstance(value, Mapping):
            copied[key] = _copied(value)
        else:
            copied[key] = value.copy() if isinstance(value, np.ndarray) else value
    return copied
