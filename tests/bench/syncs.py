"""What waits for the device, found out: as an error of CUDA's own, and on a CPU by counting the reads of values."""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def no_sync(device: str) -> Iterator[None]:
    """What waits for the device in here raises an AssertionError (on a CPU: at the end of the block)."""
    import torch

    if device == "cuda":
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        except RuntimeError as error:
            raise_waits(error)
            raise
        finally:
            default_mode(device)
        return
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        yield
    reads = sum(event.count for event in profile.key_averages() if event.key == "aten::_local_scalar_dense")
    assert not reads, f"{reads} reads of a value"


def raise_waits(error: BaseException) -> None:
    """Raise an AssertionError in place of an error, or of the one from which it came, that says that the device was waited for."""
    found: BaseException | None = error
    while found is not None:
        if isinstance(found, RuntimeError) and "synchroniz" in str(found):
            raise AssertionError(f"{found} {where(found)}") from error
        found = found.__cause__


def where(error: BaseException) -> str:
    """The innermost line of ftrain in a traceback."""
    lines = [f for f in traceback.extract_tb(error.__traceback__) if "ftrain" in Path(f.filename).parts]
    return f"at ftrain/{lines[-1].filename.rpartition('/ftrain/')[2]}:{lines[-1].lineno}" if lines else ""


def default_mode(device: str) -> None:
    import torch

    if device == "cuda":
        torch.cuda.set_sync_debug_mode("default")


class Between:
    """Data for `ft.fit` whose batches from `first` to `last` are drawn, and trained on, under `no_sync`.

    `check` tells afterwards what waited. The guard is opened and shut between two batches, since a run has no other place for it
    that is the user's.
    """

    def __init__(self, device: str, batches: list[Any], first: int, last: int) -> None:
        self.device, self.batches, self.first, self.last = device, batches, first, last
        self.steps = 0
        self._found: AssertionError | None = None

    def __call__(self, epoch: int) -> Iterator[Any]:
        guard = no_sync(self.device)
        inside = False
        try:
            for i, batch in enumerate(self.batches):
                if i == self.first:
                    guard.__enter__()
                    inside = True
                if i == self.last:
                    inside = False
                    self._shut(guard)
                self.steps += inside
                yield batch
        finally:
            if inside:
                self._shut(guard)

    def _shut(self, guard: Any) -> None:
        try:
            guard.__exit__(None, None, None)
        except AssertionError as error:  # raised by `check`: from here it would be an error of the data
            self._found = error

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Around the call of `fit`."""
        try:
            yield
        except Exception as error:
            raise_waits(error)
            raise
        finally:
            default_mode(self.device)
        if self._found is not None:
            raise self._found
        assert self.steps == self.last - self.first, f"{self.steps} steps were watched"
