"""Orbax: the one module that faces `CheckpointManager`. A save is begun and waited for here, and arrays are read.

Nothing is listed, compared or deleted by Orbax, whose ways of doing so have traps; those that remain are noted where they are dodged.
"""

from __future__ import annotations

import importlib
import logging
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from .. import rng
from .folder import ARRAYS, DOCUMENT
from .packing import Array, nest

__all__ = ["Writer", "orbax", "read_arrays"]

TIMEOUT = 24 * 3600  # seconds for one save; Orbax's own limit of 20 minutes is short for a slow disk


class Writer:
    """Writes steps into a folder in the background, one at a time.

    Args:
        path: the folder.
        written: called in the background when all of a step is written (Orbax syncs only its arrays to the disk), before it is
            renamed to its final name.
    """

    def __init__(self, path: Path, written: Callable[[], None]) -> None:
        ocp = orbax()
        from .handler import array_handler

        self._ocp = ocp
        self._manager = ocp.CheckpointManager(
            path,
            item_handlers={ARRAYS: array_handler(), DOCUMENT: ocp.JsonCheckpointHandler()},
            options=ocp.CheckpointManagerOptions(
                cleanup_tmp_directories=True,
                todelete_subdir=".trash",  # else its own deletion is not atomic: kill -9 leaves half of a step, listed
                save_root_metadata=False,
                lightweight_initialize=True,
                async_options=ocp.AsyncOptions(
                    timeout_secs=TIMEOUT,
                    # True: a save that fails at once leaves threads that hold up the interpreter's exit for 300 s
                    create_directories_asynchronously=False,
                    post_finalization_callback=written,
                ),
            ),
        )

    def start(self, step: int, arrays: Sequence[Array], values: Sequence[Tensor], record: Mapping[str, Any]) -> None:
        """Begin to write a step. The values' memory must stay as it is until `wait` returns."""
        items = {DOCUMENT: self._ocp.args.JsonSave(record)}
        if values:
            tree = nest((array.key, one) for array, one in zip(arrays, values, strict=True))
            items[ARRAYS] = self._ocp.args.PyTreeSave(tree)
        # force: without it a step before the latest is left out, and a False that it returns is all that says so
        self._manager.save(step, args=self._ocp.args.Composite(**items), force=True)

    def wait(self) -> None:
        """Return when the step is there, or raise what went wrong."""
        self._manager.wait_until_finished()

    def reload(self) -> None:
        """Look again which steps there are."""
        self._manager.reload()

    def close(self) -> None:
        """End its threads."""
        self._manager.close()


def read_arrays(
    folder: Path,
    targets: Mapping[tuple[str, ...], Any],
    shapes: Mapping[tuple[str, ...], tuple[int, ...]],
    rows: Mapping[tuple[str, ...], tuple[int, int]],
) -> None:
    """Read arrays, or some rows of them, into memory that is there.

    Args:
        folder: where the arrays of the step lie.
        targets: the memory, as numpy arrays, by the keys of the array.
        shapes: the shape that each array must have.
        rows: for those of which only a part is read, the first row and the one after the last.
    """
    ocp = orbax()
    from .handler import Into, array_handler

    args = {key: Into(target=one, shape=shapes[key], rows=rows.get(key)) for key, one in targets.items()}
    wanted, given = nest((key, np.zeros(0)) for key in args), nest(args.items())
    with ocp.Checkpointer(array_handler()) as reader:
        reader.restore(folder, args=ocp.args.PyTreeRestore(item=wanted, restore_args=given, partial_restore=True))


def _quiet(record: logging.LogRecord) -> bool:
    """Whether a line of the log is to be shown: Orbax's are errors, or none of the user's business (60 lines for a save)."""
    return record.levelno >= logging.ERROR or f"{os.sep}orbax{os.sep}" not in record.pathname


def orbax() -> Any:
    """Orbax, imported so that JAX leaves the GPU alone, the log stays readable, and data workers start without a warning."""
    if "orbax.checkpoint" not in sys.modules:
        with rng.Isolated(0):  # something in there draws from numpy's generator
            importlib.import_module("orbax.checkpoint")
    import jax

    if jax.config.jax_platforms is None:  # type: ignore[attr-defined]  # JAX's options are set at run time
        # Making a CheckpointManager starts JAX's backend, which by default takes the GPU and three quarters of its memory.
        # Where JAX_PLATFORMS is set, that was the user's own choice.
        jax.config.update("jax_platforms", "cpu")  # type: ignore[no-untyped-call]
    from jax._src import xla_bridge

    if getattr(xla_bridge, "_backends", None) == {}:
        # Once JAX's backend runs, JAX warns at every os.fork of a deadlock, so at every start of data workers. They do not touch JAX.
        # Said to have been installed, the warning is not (jax 0.10.2, private); whoever used JAX before Orbax keeps it.
        xla_bridge._at_fork_handler_installed = True
    import orbax.checkpoint as ocp

    logging.getLogger("absl").addFilter(_quiet)  # the same filter is added only once
    return ocp
