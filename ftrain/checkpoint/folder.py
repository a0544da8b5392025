"""The folder of a run's checkpoints: who writes to it, which steps are in it, and how one is taken away.

    ftrain.json                   the marker: this folder is ftrain's, and its id
    300/                          the checkpoint of step 300, as Orbax writes it; renamed to this name when it is complete
    300/document/metadata         its record (JSON, see `record`)
    300/arrays/                   its arrays (zarr in OCDBT), for anyone who has Orbax
    history.jsonl                 the records of the run (see `journal`)
    .trash/                       checkpoints on their way out: renamed first, so that none is ever half there
    .lock  .writer                the lock of whoever writes, and who that is

Laws
----
- One process writes at a time. The lock is the system's: it is gone when that process is, however it ended.
- Nothing is deleted that was not written in this folder: the record of a step holds the folder's id.
- At every moment a step is there as a whole or not at all.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import socket
import uuid
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, explain

__all__ = ["Folder", "sync_tree"]

MARKER = "ftrain.json"
ARRAYS, DOCUMENT = "arrays", "document"
UNFINISHED = "*.orbax-checkpoint-tmp*"
# `Path("gs://bucket")` is "gs:/bucket" by the time that it gets here, so the usual ones are known without the second slash.
REMOTE = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://|(?:gs|gcs|s3a?|r2|az|abfss?|hdfs|https?|file|ftp|sftp|ssh):/")


class Folder:
    """One folder, opened to read or to write. To write takes the lock, and clears away what a writer that was killed left behind.

    Raises:
        CheckpointError: the path is a URL or a file, cannot be written to, has another writer, or holds steps that are not ftrain's.
    """

    def __init__(self, path: str | os.PathLike[str], *, write: bool) -> None:
        if REMOTE.match(os.fspath(path)):
            raise CheckpointError(
                explain(
                    "remote folders are not supported; save to a local folder and copy it.",
                    where=os.fspath(path),
                    expected="a folder of this machine, or one that is mounted on it",
                    fix='"run/checkpoints"',
                )
            )
        self.path = Path(path).absolute()
        self.id = ""
        self._lock: Any = None
        if self.path.exists() and not self.path.is_dir():
            raise CheckpointError(
                explain(
                    "the path of the checkpoints is a file.",
                    where=str(self.path),
                    expected="a folder" + (", or nothing yet" if write else ""),
                    fix=f'"{self.path.parent / "checkpoints"}"',
                )
            )
        if not write:
            self._open()
            return
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._acquire()
            try:
                self._open()
                self._mark()
                self.clear()
            except BaseException:
                self.close()
                raise
        except OSError as error:
            raise CheckpointError(
                explain(
                    "the folder of the checkpoints cannot be written to.",
                    where=str(self.path),
                    got=f"{type(error).__name__}: {error.strerror or error}",
                    cause="a read-only file system, or a folder of another user",
                )
            ) from error

    def steps(self) -> list[int]:
        """The steps that have a folder, ascending."""
        if not self.path.is_dir():
            return []
        names = [entry.name for entry in os.scandir(self.path) if entry.name.isdecimal() and entry.is_dir()]
        return sorted(int(name) for name in names if str(int(name)) == name)

    def step(self, step: int) -> Path:
        """Where a step lies."""
        return self.path / str(step)

    def record(self, step: int) -> Path:
        """The file with the record of a step."""
        return self.step(step) / DOCUMENT / "metadata"

    def own_step(self) -> int | None:
        """The step that this path itself is the checkpoint of, where someone gave that in the place of its folder."""
        name, record = self.path.name, self.path / DOCUMENT / "metadata"
        return int(name) if name.isdecimal() and str(int(name)) == name and record.exists() else None

    def discard(self, step: int) -> None:
        """Take a step away: by one rename, then at leisure."""
        trash = self.path / ".trash"
        trash.mkdir(exist_ok=True)
        gone = trash / f"{step}-{uuid.uuid4().hex}"
        self.step(step).rename(gone)
        sync(self.path)
        shutil.rmtree(gone)

    def clear(self) -> None:
        """Remove what is neither complete nor to be kept: unfinished saves, and the trash."""
        for left in (*self.path.glob(UNFINISHED), self.path / ".trash"):
            if left.exists():
                shutil.rmtree(left)

    def sync_unfinished(self) -> None:
        """Return when the files of a save that is about to be renamed are on the disk."""
        for one in self.path.glob(UNFINISHED):
            sync_tree(one)

    def close(self) -> None:
        """Let others write."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def _open(self) -> None:
        marker = self.path / MARKER
        if marker.exists():
            try:
                self.id = str(json.loads(marker.read_text())["folder"])
            except (ValueError, KeyError, TypeError) as error:
                raise CheckpointError(
                    explain(
                        f"the marker {MARKER} of this folder is damaged.",
                        where=str(marker),
                        cause=f"{type(error).__name__}: {error}",
                        fix="delete the marker: its steps can be read then, but none of them will be deleted any more",
                    )
                ) from None
            return
        foreign = [step for step in self.steps() if not self.record(step).exists()]
        if foreign:
            raise CheckpointError(
                explain(
                    "this folder holds checkpoints of another program.",
                    where=str(self.path),
                    got=f"{', '.join(str(step) for step in foreign[:5])} without the marker {MARKER} of ftrain",
                    fix="save to a folder of its own",
                )
            )

    def _mark(self) -> None:
        if self.id:
            return
        self.id = uuid.uuid4().hex
        marker, new = self.path / MARKER, self.path / f".{MARKER}"
        new.write_text(json.dumps({"folder": self.id, "made by": "ftrain"}) + "\n")
        sync(new)
        new.rename(marker)
        sync(self.path)

    def _acquire(self) -> None:
        import filelock

        writer = self.path / ".writer"
        lock = filelock.FileLock(self.path / ".lock", timeout=0)
        try:
            lock.acquire()
        except filelock.Timeout:
            who = "unknown"
            with contextlib.suppress(OSError, ValueError, KeyError):
                found = json.loads(writer.read_text())
                who = f"process {found['pid']} on {found['host']}"
            raise CheckpointError(
                explain(
                    "another process writes checkpoints to this folder.",
                    where=str(self.path),
                    got=who,
                    cause="two runs with one path; or, in this process, a run that was not closed",
                    fix="give each run a path of its own, or end the other one",
                )
            ) from None
        self._lock = lock
        writer.write_text(json.dumps({"pid": os.getpid(), "host": socket.gethostname()}))


def sync(path: Path) -> None:
    """Return when a file, or the names in a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_tree(path: Path) -> None:
    """`sync` for everything under a folder, and for its own name."""
    for root, _, files in os.walk(path, topdown=False):
        for name in files:
            sync(Path(root) / name)
        sync(Path(root))
    sync(path.parent)
