"""Hooks that are often wanted. Each is a value of `ft.Hook`, made of pure functions that you could have written."""

from .average import swap_average as swap_average
from .device_stats import device_stats as device_stats
from .early_stop import early_stop as early_stop
from .garbage import garbage_collection as garbage_collection
from .learning_rate import learning_rate as learning_rate
from .nonfinite import nonfinite as nonfinite
from .plateau import plateau as plateau
from .prune import prune as prune
from .spike_guard import spike_guard as spike_guard
from .throughput import throughput as throughput
from .timer import timer as timer
from .unfreeze import unfreeze as unfreeze
