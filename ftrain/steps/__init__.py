"""From the user's loss to a compiled step: bind, value_and_grad, make_step, train_step, eval_step, compile."""

from .bind import bind as bind
from .compile import CompiledStep as CompiledStep
from .compile import compile as compile
from .evaluate import eval_step as eval_step
from .evaluate import predict_step as predict_step
from .evaluate import to_module as to_module
from .grad import value_and_grad as value_and_grad
from .train import make_step as make_step
from .train import train_step as train_step
