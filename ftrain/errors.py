"""Errors and warnings of ftrain.

Every error says what was done, where (as code), what was expected and what was got, and shows the corrected call. All of them
are subclasses of the built-in error that a reader would expect (`TypeError`, `ValueError`, `RuntimeError`), so that nobody has
to import this module in order to catch one.
"""

from __future__ import annotations

__all__ = [
    "ArgumentError",
    "BatchError",
    "CheckpointError",
    "CheckpointWarning",
    "CompileError",
    "CompileWarning",
    "DataError",
    "DataWarning",
    "DeterminismWarning",
    "DeviceError",
    "DonatedStateError",
    "FtrainError",
    "HookError",
    "InspectError",
    "LimitError",
    "LossError",
    "MemoryWarning",
    "MetricError",
    "ModelError",
    "OutputError",
    "PrecisionError",
    "ProfileWarning",
    "RecompileWarning",
    "ReplayWarning",
    "RestoreError",
    "RestoreWarning",
    "StateError",
    "StructureError",
    "explain",
]


class FtrainError(Exception):
    """Base of every error that ftrain raises by itself.

    >>> from ftrain.errors import FtrainError, LossError
    >>> issubclass(LossError, FtrainError) and issubclass(LossError, ValueError)
    True
    """


class ArgumentError(FtrainError, TypeError):
    """An argument is another kind of thing than the one that it must be."""


class StateError(FtrainError, TypeError):
    """Something that is not a `TrainState` stands where one is needed."""


class StructureError(FtrainError, ValueError):
    """Two trees that must be alike differ in structure, shape, dtype or device."""


class DonatedStateError(FtrainError, RuntimeError):
    """A state whose memory was given to a compiled step is used again."""


class ModelError(FtrainError, ValueError):
    """The model, or the choice of its trainable parameters, cannot be used."""


class PrecisionError(FtrainError, ValueError):
    """There is no such precision, or the state is kept in another one."""


class DeviceError(FtrainError, ValueError):
    """The device is not one that ftrain supports, or cannot do what is asked of it."""


class LossError(FtrainError, ValueError):
    """The loss is not a scalar, is connected to no parameter, or is not finite at the first step."""


class MetricError(FtrainError, TypeError):
    """A metric is neither a scalar nor a monoid of `ftrain.metrics`."""


class BatchError(FtrainError, ValueError):
    """A batch holds something that is not a tensor, or lies on another device than the state."""


class DataError(FtrainError, ValueError):
    """The data gives no batches, or cannot be iterated in the way that was asked for."""


class LimitError(FtrainError, ValueError):
    """A number, a limit or a choice makes no sense: `epochs=0`, `steps=-1`, `mode="cubic"`."""


class HookError(FtrainError, TypeError):
    """A hook returned something that is not a state of the same structure, or cannot work with this run."""


class OutputError(FtrainError, RuntimeError):
    """What was computed cannot be written where it is to go."""


class CompileError(FtrainError, RuntimeError):
    """A step could not be compiled in the way that was asked for."""


class InspectError(FtrainError, RuntimeError):
    """A step or a model cannot be looked at without running it."""


class CheckpointError(FtrainError, RuntimeError):
    """A checkpoint could not be written or read, or its folder is not one to write into."""


class RestoreError(FtrainError, ValueError):
    """What a checkpoint holds does not fit what it is restored into."""


class DataWarning(UserWarning):
    """Data works, but not in the best way: it has to be read again to come to a place, say."""


class CheckpointWarning(UserWarning):
    """Checkpoints are written, but not as was asked for."""


class RestoreWarning(UserWarning):
    """A restore that was allowed to be partial left something out."""


class DeterminismWarning(UserWarning):
    """Results may differ in their last bits all the same, since a setting came too late."""


class ProfileWarning(UserWarning):
    """What was to be profiled did not happen, or only in part."""


class ReplayWarning(UserWarning):
    """A step that was done again gave another loss than the run recorded, or that could not be seen."""


class HookWarning(UserWarning):
    """A hook had nothing to do in the whole run, though it was to watch something."""


class MemoryWarning(UserWarning):
    """Memory ran out, and a step runs in smaller pieces."""


class CompileWarning(UserWarning):
    """A step runs on a lower rung of the ladder than the whole step in one graph."""


class RecompileWarning(UserWarning):
    """A step was compiled again because an input changed."""


def explain(
    what: str,
    *,
    where: str | None = None,
    expected: str | None = None,
    got: str | None = None,
    cause: str | None = None,
    fix: str | None = None,
) -> str:
    """Lay out an error message: one sentence, then the facts, then the corrected code.

    >>> from ftrain.errors import explain
    >>> print(explain("the loss is not a scalar.", got="float32[8]", fix="return loss.mean()"))
    the loss is not a scalar.
      got:      float32[8]
      fix:      return loss.mean()
    """
    rows = (("where", where), ("expected", expected), ("got", got), ("cause", cause), ("fix", fix))
    lines = [what]
    for name, text in rows:
        if text is not None:
            body = text.replace("\n", "\n" + " " * 12)
            lines.append(f"  {name + ':':<9} {body}")
    return "\n".join(lines)
