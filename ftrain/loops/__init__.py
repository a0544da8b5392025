"""The loop as a generator, and what consumes it: fit, evaluate, predict (not named `loop`: that is the function)."""

from . import hooks as hooks
from .batch_norm import update_bn as update_bn
from .cadences import Cadence as Cadence
from .cadences import Clock as Clock
from .evaluate import Evaluator as Evaluator
from .evaluate import evaluate as evaluate
from .evaluate import predict as predict
from .events import Event as Event
from .events import Hook as Hook
from .events import Outcome as Outcome
from .events import compose as compose
from .events import on as on
from .events import once as once
from .events import when as when
from .fit import Result as Result
from .fit import fit as fit
from .loop import loop as loop
from .position import Position as Position
from .predictions import write_predictions as write_predictions
from .snapshot import Failure as Failure
from .snapshot import Snapshot as Snapshot
from .ticks import Tick as Tick
from .units import after as after
from .units import at as at
from .units import every as every
from .units import until as until
