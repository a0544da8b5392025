"""Reading a node batch by batch: in this process, or in the worker processes of torch's DataLoader.

Laws
----
- Batch b of epoch e is the same in both ways, and wherever reading began: it is made under streams that are a function of
  (seed, e, b), and by nothing that another batch left behind.
- Workers live from the first epoch to the last, and end with the reading: when it is closed, when it fails, when nobody holds it any more.
- What fails in a worker, and a worker that dies, is a `DataError` that names the batch.

The DataLoader gets a map-style dataset whose index is `(seed, epoch, batch)`, and a sampler that begins where reading begins.
"""

from __future__ import annotations

import itertools
import signal
import traceback
from collections.abc import Iterator
from contextlib import nullcontext
from multiprocessing.reduction import ForkingPickler
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from .. import tree
from ..errors import DataError, FtrainError, explain
from .node import At, Node
from .streams import streams
from .workers import Watched, deaf, end_workers, fallen

__all__ = ["Direct", "Loaded", "Loading", "Pool", "build"]

_BATCH = 0xDA7A


class Loading(NamedTuple):
    """How batches are made: in how many worker processes, how far ahead, and how they are started.

    >>> from ftrain.data.loading import Loading
    >>> Loading(workers=2).prefetch
    2
    """

    workers: int = 0
    prefetch: int = 2
    timeout: float = 0.0
    context: str | None = None


def build(node: Node, at: At, index: int) -> Any:
    """One item of a node (a batch, say), under the streams of its position.

    >>> from ftrain.data.items import Items
    >>> from ftrain.data.loading import At, build
    >>> build(Items("abc", batched=True), At(0, 0), 1)
    'b'
    """
    with streams(at.seed, at.epoch, _BATCH, index) if node.foreign else nullcontext():
        try:
            return node.items(at, range(index, index + 1))[0]
        except StopIteration as error:  # it would end the epoch, and nobody would know
            raise DataError(
                explain("code of the data raised StopIteration.", where=_called(node, at, index))
            ) from error
        except Exception as error:
            error.add_note(f"ftrain: while {_called(node, at, index)} was made.")
            raise


def _called(node: Node, at: At, index: int) -> str:
    return f"{'batch' if node.batched else 'item'} {index} of epoch {at.epoch}"


class Direct(Iterator[Any]):
    """The items of an epoch from `start` on, made in this process when they are asked for."""

    def __init__(self, node: Node, at: At, start: int) -> None:
        self.node, self.at, self.next = node, at, start
        self.stop = node.size(at)

    def __next__(self) -> Any:
        if self.next >= self.stop:
            raise StopIteration
        found = build(self.node, self.at, self.next)
        self.next += 1
        return found


class _Failure(NamedTuple):
    """What a worker sends where a batch could not be made. Text: an exception need not survive the way between processes."""

    kind: str
    text: str
    own: bool  # an error of ftrain, whose text says everything


class _Places(torch.utils.data.Dataset[Any]):
    """The dataset of the workers: its indices are places."""

    def __init__(self, node: Node) -> None:
        self.node = node

    def __getitem__(self, place: tuple[int, int, int]) -> Any:
        seed, epoch, index = place
        try:
            batch = build(self.node, At(seed, epoch), index)
            _check_sendable(batch)
            return batch
        except FtrainError as error:
            return _Failure(type(error).__name__, _with_notes(error), own=True)
        except Exception as error:
            return _Failure(type(error).__name__, "".join(traceback.format_exception(error)), own=False)


def _with_notes(error: BaseException) -> str:
    return "\n".join([str(error), *getattr(error, "__notes__", [])])


def _check_sendable(batch: Any) -> None:
    """Raise where a batch cannot be sent: a queue of multiprocessing would lose it without a word, and the reader wait for ever."""
    for path, leaf in tree.items(batch, root="batch"):
        if isinstance(leaf, Tensor) and leaf.requires_grad and not leaf.is_leaf:
            raise DataError(
                explain(
                    "a tensor with a history of gradients cannot leave the worker that made it.",
                    where=path,
                    fix=f"{path}.detach()",
                )
            )
    try:
        ForkingPickler.dumps(tree.map(lambda leaf: None if isinstance(leaf, Tensor) else leaf, batch))
    except Exception as error:
        raise DataError(
            explain(
                "a batch cannot leave the worker that made it.",
                expected="a tree of tensors, arrays and numbers",
                got=f"{type(batch).__name__}, which cannot be pickled ({error})",
            )
        ) from error


class _Plan:
    """The sampler: the places that are to be read next. The loader asks it anew for each epoch."""

    def __init__(self) -> None:
        self.at, self.start, self.stop = At(0, 0), 0, 0.0

    def __iter__(self) -> Iterator[tuple[int, int, int]]:
        places: Iterator[int] = itertools.count(self.start)
        if self.stop != float("inf"):
            places = iter(range(self.start, int(self.stop)))
        return ((*self.at, i) for i in places)


def _start_worker(worker: int) -> None:
    if hasattr(signal, "SIGUSR1"):  # SLURM's warning goes to every process: the main one decides what it means
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)


class Pool:
    """The workers of one use of the data, from its first epoch to its last.

    Args:
        node: what they read.
        how: how many there are, and how far ahead they read.
    """

    def __init__(self, node: Node, how: Loading) -> None:
        self.node, self.how = node, how
        self._plan = _Plan()
        self._loader: DataLoader[Any] | None = None
        self._iterator: Any = None
        self.busy = False

    def open(self, at: At, start: int) -> Iterator[Any]:
        """Begin an epoch; the workers are started where there are none."""
        self._plan.at, self._plan.start, self._plan.stop = at, start, self.node.size(at)
        if self._loader is None:
            how = self.how
            self._loader = DataLoader(
                _Places(self.node),
                batch_size=None,
                sampler=self._plan,
                num_workers=how.workers,
                prefetch_factor=how.prefetch,
                persistent_workers=True,
                timeout=how.timeout,
                multiprocessing_context=how.context,
                pin_memory=torch.cuda.is_available(),
                worker_init_fn=_start_worker,
                # else it would draw from the user's generator, and only where workers begin
                generator=torch.Generator().manual_seed(0),
            )
        self.busy = True
        with deaf():
            self._iterator = iter(self._loader)
        with Watched(self._iterator):
            pass  # from here on, a worker's death is heard where a batch is waited for
        return self._iterator  # type: ignore[no-any-return]  # of a loader of Any

    def fates(self, error: Exception) -> list[str]:
        """How the workers ended that are no more."""
        found = []
        for i, worker in fallen(self._iterator, error):
            code = worker.exitcode
            how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
            found.append(f"worker {i} (pid {worker.pid}) {how}")
        return found

    def close(self) -> None:
        """End the workers; a later `open` starts new ones."""
        iterator, loader, self._iterator, self._loader, self.busy = self._iterator, self._loader, None, None, False
        if iterator is not None:
            end_workers(iterator, loader)

    def __del__(self) -> None:
        self.close()


class Loaded(Iterator[Any]):
    """The items of an epoch from `start` on, made by the workers of a pool.

    Args:
        pool: the workers.
        at: the epoch.
        start: the first item.
        keep: whether the workers wait for another epoch once this one was read to its end.
    """

    def __init__(self, pool: Pool, at: At, start: int, *, keep: bool) -> None:
        self.pool, self.at, self.next, self.keep = pool, at, start, keep
        self.open = True
        self.error: DataError | None = None
        self.stop = pool.node.size(at)
        self.inner: Any = pool.open(at, start) if start < self.stop else iter(())

    def __next__(self) -> Any:
        if self.error is not None:
            raise self.error
        if not self.open:
            raise StopIteration
        try:
            with Watched(self.inner):
                found = next(self.inner)
        except StopIteration:
            self._end()
            raise
        except (RuntimeError, OSError) as error:
            self.error = self._lost(error)
            self.close()
            raise self.error from error
        except BaseException:
            self.close()
            raise
        if isinstance(found, _Failure):
            self.close()
            self.error = _error(found, _called(self.pool.node, self.at, self.next))
            raise self.error
        self.next += 1
        return found

    def _lost(self, error: Exception) -> DataError:
        """Say which batch did not come, and what became of the workers."""
        how = self.pool.how
        ahead = min(self.next + how.workers * how.prefetch, self.stop) - 1
        return DataError(
            explain(
                f"a worker died, or did not answer, while {_called(self.pool.node, self.at, self.next)} was waited for.",
                where=f"it was at one of {self.next} to {ahead:g}, which are made ahead" if ahead > self.next else None,
                got="\n".join([*self.pool.fates(error), str(error).splitlines()[0]]),
                cause="it was killed (out of memory?), crashed in native code, or ran into the timeout",
                fix="source.load(workers=0)   # makes the batch in this process, where it can be looked at",
            )
        )

    def _end(self) -> None:
        """The epoch was read whole."""
        self.open, self.inner, self.pool.busy = False, None, False
        if not self.keep:
            self.pool.close()

    def close(self) -> None:
        if self.open:
            self.open, self.inner = False, None
            self.pool.close()

    def __del__(self) -> None:
        if getattr(self, "open", False):
            self.close()


def _error(failure: _Failure, where: str) -> DataError:
    if failure.own:
        return DataError(f"{failure.text}\nftrain: raised in a worker.")
    return DataError(
        explain(
            f"a worker could not make {where}: {failure.kind}.",
            where=where,
            got=failure.text.rstrip(),
            fix="source.load(workers=0)   # makes it in this process, where a debugger can look at it",
        )
    )
