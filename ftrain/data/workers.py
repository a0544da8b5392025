"""The worker processes of a DataLoader's iterator: started deaf to Ctrl-C, watched only while a batch is awaited, and ended.

torch tells of a worker's death by an exception out of its handler of SIGCHLD, wherever the main process is by then: in the middle of
a step that has given its memory away, or while the other workers are being ended. Here it is heard where the next batch is awaited.
"""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from multiprocessing.connection import wait
from types import TracebackType
from typing import Any

from torch._C import _error_if_any_worker_fails, _remove_worker_pids, _set_worker_pids

__all__ = ["Watched", "deaf", "end_workers", "fallen"]


@contextlib.contextmanager
def deaf() -> Iterator[None]:
    """Processes started in here do not hear Ctrl-C, which a terminal sends to all: the main one decides when they end.

    Workers that die of it are an error in the main process, which would then end with that, in the middle of a step.
    """
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class Watched:
    """Context in which the death of one of an iterator's workers is an error at once; outside of it, it is not heard.

    A death outside is told of on entering. An iterator without workers, or of another make than torch's, is left alone.
    """

    __slots__ = ("_iterator",)

    def __init__(self, iterator: Any) -> None:
        self._iterator = iterator if hasattr(iterator, "_worker_pids_set") else None

    def __enter__(self) -> None:
        found = self._iterator
        if found is not None and not found._worker_pids_set and not found._shutdown:
            _set_worker_pids(id(found), tuple(one.pid for one in found._workers))
            found._worker_pids_set = True
            _error_if_any_worker_fails()

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        found = self._iterator
        if found is not None and found._worker_pids_set:
            _remove_worker_pids(id(found))
            found._worker_pids_set = False


def fallen(iterator: Any, error: Exception) -> list[tuple[int, Any]]:
    """Workers that ended otherwise than by themselves, with their numbers.

    A connection that broke, or what torch says, may be known before the process is seen to have ended: then it is waited for.
    """
    workers = getattr(iterator, "_workers", ())
    if workers and (isinstance(error, (EOFError, OSError)) or "DataLoader worker (pid" in str(error)):
        ready = wait([one.sentinel for one in workers], timeout=1)
        for one in workers:
            if one.sentinel in ready:  # its files are closed, which comes shortly before its end
                one.join(timeout=1)
    return [(i, one) for i, one in enumerate(workers) if one.exitcode not in (None, 0)]


def end_workers(iterator: Any, loader: Any) -> None:
    """End the workers of a DataLoader's iterator now: an exception's traceback may keep it alive for long."""
    shutdown = getattr(iterator, "_shutdown_workers", None)
    if shutdown is None:
        return
    shutdown()
    if getattr(loader, "persistent_workers", False) and getattr(loader, "_iterator", None) is iterator:
        loader._iterator = None  # it would be used again
