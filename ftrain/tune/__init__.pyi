from .batch_sizes import BatchSizeFound as BatchSizeFound
from .batch_sizes import Trial as Trial
from .batch_sizes import find_batch_size as find_batch_size
from .learning_rates import LrCurve as LrCurve
from .learning_rates import lr_find as lr_find
from .micro_batches import AutoAccumulated as AutoAccumulated
from .micro_batches import auto_accumulate as auto_accumulate
