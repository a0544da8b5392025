from .learning_rates import LrCurve as LrCurve
from .learning_rates import lr_find as lr_find
