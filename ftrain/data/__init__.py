"""Data as a function of the epoch, and batches on the state's device."""

from .batches import to_device as to_device
from .epochs import Epochs as Epochs
from .epochs import as_epochs as as_epochs
from .feed import Feed as Feed
from .reader import Reader as Reader
from .reader import close_iterator as close_iterator
from .window import Window as Window
from .window import Windows as Windows
from .window import window as window
