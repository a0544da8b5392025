"""Which steps a folder holds, by their records."""

from __future__ import annotations

from typing import Any

from ..errors import CheckpointError, explain
from . import record as records
from .folder import Folder

__all__ = ["Listing"]


class Listing:
    """The steps of a folder. A record is read once, and again only if its step was forgotten or is gone.

    Attributes:
        damaged: the steps whose record could not be read when `saved` was last asked for, with the reason.
    """

    def __init__(self, folder: Folder) -> None:
        self._folder = folder
        self._records: dict[int, records.Record] = {}
        self.damaged: dict[int, str] = {}

    def saved(self) -> list[int]:
        """The steps that are complete and can be read, ascending."""
        found = []
        self.damaged = {}
        for step in self._folder.steps():
            if not self._folder.record(step).exists() and not self._ours_without_record(step):
                continue
            try:
                self._read(step)
            except CheckpointError as error:
                self.damaged[step] = str(error)
            else:
                found.append(step)
        return found

    def _ours_without_record(self, step: int) -> bool:
        """Whether a step in a folder of ftrain's looks like one of ours that lost its record."""
        return bool(self._folder.id) and self._folder.record(step).parent.exists()

    def own(self, step: int) -> bool:
        """Whether a step was written in this folder."""
        try:
            return bool(self._read(step)["folder"] == self._folder.id)
        except CheckpointError:
            return False

    def record(self, step: int) -> records.Record:
        """The record of a step.

        Raises:
            CheckpointError: there is no such step (those that there are are named), or it is damaged.
        """
        if step not in self._folder.steps():
            raise self.no_step(step)
        return self._read(step)

    def forget(self, step: int) -> None:
        """A step was deleted."""
        self._records.pop(step, None)

    def no_step(self, step: Any) -> CheckpointError:
        """The error for a step that does not exist."""
        saved = self.saved()
        if not saved:
            return self.nothing()
        return CheckpointError(
            explain(
                f"there is no checkpoint of step {step}.",
                where=str(self._folder.path),
                expected=f"one of {', '.join(map(str, saved))}",
            )
        )

    def nothing(self) -> CheckpointError:
        """The error for a folder that has no checkpoint that can be read."""
        path, own = self._folder.path, self._folder.own_step()
        if own is not None:
            return CheckpointError(
                explain(
                    f"this is the checkpoint itself: give the folder that it is in, and step={own}.",
                    where=str(path),
                    fix=f'ft.restore("{path.parent}", step={own}, like=...)',
                )
            )
        broken = "; ".join(map(str, self.damaged))
        return CheckpointError(
            explain(
                f"the checkpoints are damaged: steps {broken}." if broken else "there are no checkpoints.",
                where=str(path),
                expected="a folder with checkpoints",
                got=None if path.is_dir() else "no such folder",
            )
        )

    def _read(self, step: int) -> records.Record:
        file = self._folder.record(step)
        if step not in self._records or not file.exists():
            self._records[step] = records.read(file)
        return self._records[step]
