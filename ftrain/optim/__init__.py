"""Optimizers as pure transforms, schedules, clipping. A new one is one file of pure functions and one row of the test corpus."""

from . import schedules as schedules
from .adam import AdamState as AdamState
from .adam import adam as adam
from .adam import adamw as adamw
from .clip import ClipState as ClipState
from .clip import clip_by_global_norm as clip_by_global_norm
from .clip import global_norm as global_norm
from .report import metrics as metrics
from .sgd import SgdState as SgdState
from .sgd import sgd as sgd
from .transform import Injected as Injected
from .transform import apply_updates as apply_updates
from .transform import chain as chain
from .transform import identity as identity
from .transform import inject as inject
