"""`Store`: one folder of checkpoints.

Laws
----
- When `save` returns, the tree is copied to host memory: whatever happens to the leaves afterwards does not show.
- A step is there as a whole or not at all. When `wait` returns, all that was saved is there and on the disk.
- A save that fails leaves nothing behind, and the steps before it as they were; its error is raised by the next call.
- What is read is what was saved, bit by bit, or an error.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from .. import tree as trees
from ..errors import CheckpointError, RestoreError, explain
from . import plain as plain_trees
from . import record as records
from .engine import Writer
from .folder import ARRAYS, Folder, sync, sync_tree
from .listing import Listing
from .matching import Match, describe, match
from .packing import Layout, lay_out
from .paths import Rename, Select, leaf_paths, some
from .reading import like_leaf, read
from .report import Report
from .staging import Staging

__all__ = ["RESERVED", "Store"]

RESERVED = ("format", "step", "folder", "versions")
PLAIN = "~plain"  # path of the arrays of plain trees; no key of a tree begins so


class Store:
    """The checkpoints in one folder, by step. To be used from one thread, and closed.

    Args:
        path: the folder. To write makes it where there is none, and takes its lock.
        write: whether to save and delete, or only to read.

    Raises:
        CheckpointError: the path is a file, cannot be written to, has another writer, or is another program's.

    >>> import tempfile, torch
    >>> from ftrain.checkpoint.store import Store
    >>> with tempfile.TemporaryDirectory() as path:
    ...     store = Store(path, write=True)
    ...     store.save(10, {"w": torch.ones(2)}, {"note": "first"}, plain={"place": (3, 4)})
    ...     store.wait()
    ...     like = {"w": torch.empty(2, device="meta")}
    ...     print(store.saved, store.load(10, like)[0], store.plain(10), store.document(10)["note"])
    ...     store.close()
    [10] {'w': tensor([1., 1.])} {'place': (3, 4)} first
    """

    def __init__(self, path: str | os.PathLike[str], *, write: bool) -> None:
        self._folder = Folder(path, write=write)
        self._write = write
        self._staging = Staging()
        self._writer: Writer | None = None
        self._stale = False  # whether the writer believes in a step that was deleted
        self._pending: tuple[int, int] | None = None  # step and bytes of the save in the background
        self._listing = Listing(self._folder)

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def path(self) -> str:
        """The folder."""
        return str(self._folder.path)

    def step_path(self, step: int) -> Path:
        """Where a step lies; it can be copied to another folder as a whole."""
        return self._folder.step(step)

    # -- what there is --------------------------------------------------------------------------------------------------------

    @property
    def saved(self) -> list[int]:
        """The steps that are complete, ascending. Those that are damaged are not among them: see `damaged`."""
        return self._listing.saved()

    @property
    def damaged(self) -> dict[int, str]:
        """The steps whose record cannot be read, with the reason."""
        self._listing.saved()
        return self._listing.damaged

    def nothing(self) -> CheckpointError:
        """The error for a folder in which there is nothing to be read: why, and what is meant perhaps."""
        self._listing.saved()
        return self._listing.nothing()

    @property
    def foreign(self) -> list[int]:
        """The steps that were not written in this folder (copied there, or by another program): never deleted."""
        return [step for step in self._folder.steps() if not self._listing.own(step)]

    def document(self, step: int) -> dict[str, Any]:
        """The document that was saved with a step, and under `format`, `step`, `folder` and `versions` what wrote it.

        Raises:
            CheckpointError: there is no such step, or it is damaged.
        """
        record = self._listing.record(step)
        return {**plain_trees.decode(record["document"], []), **{name: record[name] for name in RESERVED}}

    def describe(self, step: int) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Dtype and shape of each leaf, by its path.

        Raises:
            CheckpointError: there is no such step, or it is damaged.
        """
        return {path: describe(entry) for path, entry in self._leaves(step).items()}

    # -- saving ---------------------------------------------------------------------------------------------------------------

    def save(
        self,
        step: int,
        tree: Any,
        document: Mapping[str, Any],
        *,
        plain: Mapping[str, Any] | None = None,
        block: bool = False,
    ) -> None:
        """Save a tree. Returns as soon as it is copied to host memory; what is wrong later is raised by the next call or by `wait`.

        Args:
            step: under which step; one that is not there yet.
            tree: any pytree of tensors, numpy arrays and plain values.
            document: a plain tree without tensors, which `document` gives back without reading the rest.
            plain: plain trees, which `plain` gives back without a template.
            block: wait until it is complete.

        Raises:
            CheckpointError: there is such a step already; a leaf cannot be saved; the last save, or this one, failed.
        """
        what = "saving a checkpoint"
        self._may_write(what)
        if isinstance(step, bool) or not isinstance(step, int) or step < 0:
            raise CheckpointError(explain(f"{what}: step={step!r} is no step.", expected="an integer >= 0"))
        layout, record = self._compose(step, tree, document, plain, what)
        self.wait()
        if self._folder.step(step).exists():
            raise CheckpointError(
                explain(
                    f"there is a checkpoint of step {step} already.",
                    where=str(self._folder.step(step)),
                    expected="a step that is not there yet",
                    got=f"steps {some(map(str, self.saved))}",
                )
            )
        staged = self._staging.copy(layout.arrays)
        self._pending = (step, layout.nbytes)
        try:
            if self._writer is None:
                self._writer = Writer(self._folder.path, self._folder.sync_unfinished)
            elif self._stale:
                self._writer.reload()
            self._stale = False
            self._writer.start(step, layout.arrays, staged, record)
        except Exception as error:
            raise self._failure(error) from error
        if block:
            self.wait()

    def amend(self, step: int, document: Mapping[str, Any]) -> None:
        """Put another document in the place of a step's own, whose arrays stay; at every moment it is one of the two.

        Raises:
            CheckpointError: there is no such step, or it was not written in this folder.
        """
        self._may_write("amending a checkpoint")
        self.wait()
        said, _ = plain_trees.encode(dict(document), "document")
        record = records.seal({**self._listing.record(step), "document": said})
        if not self._listing.own(step):
            return  # somebody else's stays as it is
        file = self._folder.record(step)
        new = file.with_name(file.name + ".new")
        new.write_text(json.dumps(record))
        sync(new)
        new.rename(file)
        sync(file.parent)
        self._listing.forget(step)

    def _compose(
        self, step: int, tree: Any, document: Mapping[str, Any], plain: Mapping[str, Any] | None, what: str
    ) -> tuple[Layout, records.Record]:
        """Everything that can be refused is refused here, before anything is copied or written."""
        said, arrays = plain_trees.encode(dict(document), "document")
        taken = [name for name in RESERVED if name in document]
        if arrays or taken:
            raise CheckpointError(
                explain(
                    f"{what}: the document holds "
                    + (f"the key {taken[0]!r}, which is ftrain's." if taken else "tensors."),
                    expected="plain values, and other keys than " + ", ".join(RESERVED),
                    fix="Store.save(step, tree, document, plain={...})   # tensors go in here",
                )
            )
        coded, inner = plain_trees.encode(dict(plain or {}), "plain")
        leaves = list(zip(leaf_paths(tree, what), trees.leaves(tree), strict=True))
        layout = lay_out([*leaves, *((f"{PLAIN}/{i}", one) for i, one in enumerate(inner))], what)
        return layout, records.make(step, self._folder.id, layout.entries, coded, said)

    def wait(self) -> None:
        """Return when all that was saved is complete and on the disk.

        Raises:
            CheckpointError: a save failed; the cause is named. The checkpoints before it are untouched.
        """
        if self._pending is None:
            return
        try:
            assert self._writer is not None
            self._writer.wait()
            sync_tree(
                self._folder.step(self._pending[0])
            )  # its new name, that is: the rest was synced before it was renamed
        except Exception as error:
            raise self._failure(error) from error
        self._pending = None

    def _failure(self, error: Exception) -> CheckpointError:
        """Clear away what a failed save left, and say what happened."""
        assert self._pending is not None
        (step, wanted), self._pending = self._pending, None
        free = shutil.disk_usage(self._folder.path).free
        self._folder.clear()
        self._drop()
        text = f"{type(error).__name__}: {error}"
        full = "No space left" in text or "RESOURCE_EXHAUSTED" in text or "Disk quota" in text
        return CheckpointError(
            explain(
                f"the checkpoint of step {step} could not be saved" + (": the disk is full." if full else "."),
                where=str(self._folder.step(step)),
                expected=f"{wanted:,} bytes of space" if full else None,
                got=f"{free:,} bytes free" if full else None,
                cause=text if len(text) < 1000 else text[:1000] + " ...",
                fix="the earlier checkpoints are untouched: " + some(map(str, self.saved)),
            )
        )

    def _drop(self) -> None:
        """End the writer. After a failure the next save makes a new one."""
        writer, self._writer = self._writer, None
        if writer is not None:
            writer.close()

    # -- reading --------------------------------------------------------------------------------------------------------------

    def compare(
        self, step: int, like: Any, *, select: Select | None = None, rename: Rename | None = None, cast: bool = False
    ) -> Report:
        """How a step compares with a tree; no array is read.

        Raises:
            CheckpointError: there is no such step, or it is damaged.
            RestoreError: `select` or `rename` makes no sense.
        """
        return self._match(step, like, select, rename, cast).report

    def load(
        self,
        step: int,
        like: Any,
        *,
        select: Select | None = None,
        rename: Rename | None = None,
        strict: bool = True,
        cast: bool = False,
    ) -> tuple[Any, Report]:
        """A tree like `like` with the values of a step, and the comparison. For the arguments see `ftrain.restore`.

        Raises:
            CheckpointError: there is no such step, or it is damaged.
            RestoreError: `strict`, and there are differences: all are listed, and nothing was read. Or a leaf of `like` that the
                checkpoint does not give is on the meta device, so that it has no value.
        """
        found = self._match(step, like, select, rename, cast)
        report = found.report
        if strict and not report.fits:
            lines = report.differences()
            raise RestoreError(
                explain(
                    f"the checkpoint does not fit what it is restored into: {len(lines)} differences.",
                    where=str(self._folder.step(step)),
                    got="\n".join(lines[:50] + ([f"... {len(lines) - 50} more"] if len(lines) > 50 else [])),
                    fix="strict=False takes what fits; rename= and select= say what goes where"
                    + ("; cast=True converts dtypes" if report.dtypes else ""),
                )
            )
        leaves = trees.leaves(like)
        for path, leaf in zip(found.paths, leaves, strict=True):
            if path not in found.entries and isinstance(leaf, Tensor) and leaf.is_meta:
                raise RestoreError(
                    explain(
                        "a leaf that the checkpoint does not give has no value in like, either.",
                        where=path,
                        got=f"{trees.describe(leaf)}; {report}",
                        fix="pass a `like` with values for the leaves that are to stay as they are",
                    )
                )
        values = self._read(step, found.entries)
        made = [
            like_leaf(values[path], leaf) if path in values else leaf
            for path, leaf in zip(found.paths, leaves, strict=True)
        ]
        return trees.unflatten(trees.structure(like), made), report

    def plain(self, step: int) -> dict[str, Any]:
        """The plain trees that were saved with a step.

        Raises:
            CheckpointError: there is no such step, or it is damaged.
        """
        record = self._listing.record(step)
        entries = {path: entry for path, entry in record["index"].items() if path.startswith(PLAIN + "/")}
        values = self._read(step, entries)
        arrays = [values[f"{PLAIN}/{i}"] for i in range(len(entries))]
        made: dict[str, Any] = plain_trees.decode(record["plain"], arrays)
        return made

    def _leaves(self, step: int) -> dict[str, dict[str, Any]]:
        index = self._listing.record(step)["index"]
        return {path: entry for path, entry in index.items() if not path.startswith(PLAIN + "/")}

    def _match(self, step: int, like: Any, select: Select | None, rename: Rename | None, cast: bool) -> Match:
        where = (self.path, step)
        return match(
            where,
            self._leaves(step),
            (like, trees.leaves(like)),
            select=select,
            rename=rename,
            cast=cast,
            what=f"restoring step {step} of {self.path}",
        )

    def _read(self, step: int, entries: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
        folder = self._folder.step(step) / ARRAYS
        try:
            return read(folder, self._listing.record(step)["index"], entries)
        except Exception as error:
            raise CheckpointError(
                explain(
                    f"the checkpoint of step {step} is damaged: it cannot be read.",
                    where=str(folder),
                    cause=f"{type(error).__name__}: {str(error)[:1000]}",
                    fix=f"restore another step: {some(str(one) for one in self.saved if one != step)}",
                )
            ) from error

    # -- deleting -------------------------------------------------------------------------------------------------------------

    def delete(self, step: int) -> None:
        """Delete a step. At every moment it is there as a whole or not at all.

        Raises:
            CheckpointError: there is no such step, or it was not written in this folder.
        """
        self._may_write("deleting a checkpoint")
        if step not in self._folder.steps():
            raise self._listing.no_step(step)
        if not self._listing.own(step):
            raise CheckpointError(
                explain(
                    f"the checkpoint of step {step} was not written in this folder, so it is not deleted.",
                    where=str(self._folder.step(step)),
                    cause="it was copied here, or is another program's",
                    fix=f"shutil.rmtree({str(self._folder.step(step))!r})",
                )
            )
        self._folder.discard(step)
        self._listing.forget(step)
        self._stale = True

    def close(self) -> None:
        """Wait, let others write, and give the memory back.

        Raises:
            CheckpointError: a save failed.
        """
        try:
            self.wait()
            self._drop()
        finally:
            self._folder.close()
            self._staging.release()
            self._write = False

    # -------------------------------------------------------------------------------------------------------------------------

    def _may_write(self, what: str) -> None:
        if not self._write:
            raise CheckpointError(
                explain(
                    f"{what}: this store is closed, or was opened to read.",
                    where=self.path,
                    fix=f"Store({self.path!r}, write=True)",
                )
            )
