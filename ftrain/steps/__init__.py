"""From the user's loss to a compiled step: bind, value_and_grad, make_step, train_step, eval_step, compile, and the wrappers."""

from .accumulate import with_accumulation as with_accumulation
from .average import with_ema as with_ema
from .average import with_swa as with_swa
from .bind import bind as bind
from .compile import CompiledStep as CompiledStep
from .compile import compile as compile
from .evaluate import eval_step as eval_step
from .evaluate import predict_step as predict_step
from .evaluate import to_module as to_module
from .float8 import with_float8 as with_float8
from .grad import value_and_grad as value_and_grad
from .loss_scale import with_loss_scale as with_loss_scale
from .mask import with_mask as with_mask
from .precision import with_precision as with_precision
from .remat import with_remat as with_remat
from .sam import with_sam as with_sam
from .skip import with_skip as with_skip
from .stats import with_grad_stats as with_grad_stats
from .train import as_step as as_step
from .train import make_step as make_step
from .train import train_step as train_step
from .update import make_update as make_update
