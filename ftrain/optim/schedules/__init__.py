"""Schedules: hyper-parameters as functions of the step tensor.

A schedule takes the count of updates made so far and gives the value in float64, in the shape and on the device of the count: 0-d
inside a step, or a vector of steps at once. The count is int64 or floating. Numbers and sequences of numbers are taken too.

Laws
----
- A schedule is pure, traces, maps under `torch.func.vmap`, and is never read on the host.
- A vector of steps gives what its elements give one by one.
- Where optax has the same schedule, the arguments have its names and order, and the values are its values.
- Values may be 0-d tensors (to sweep or differentiate them); numbers of steps are plain numbers.
- A schedule behind another one (`join`, `warmup`) counts from its own beginning, and never sees a negative step.
"""

from .constant import constant as constant
from .cosine import cosine as cosine
from .cosine import cosine_restarts as cosine_restarts
from .cyclic import cyclic as cyclic
from .exponential import exponential as exponential
from .inverse_sqrt import inverse_sqrt as inverse_sqrt
from .join import join as join
from .one_cycle import one_cycle as one_cycle
from .piecewise import piecewise_constant as piecewise_constant
from .piecewise import piecewise_interpolate as piecewise_interpolate
from .polynomial import linear as linear
from .polynomial import polynomial as polynomial
from .schedule import ScheduleFn as ScheduleFn
from .staircase import multi_step as multi_step
from .staircase import step as step
from .torch_scheduler import from_torch as from_torch
from .warmup import warmup as warmup
from .warmup_cosine import warmup_cosine as warmup_cosine
from .warmup_stable_decay import warmup_stable_decay as warmup_stable_decay
