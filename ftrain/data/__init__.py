"""Data as a function of the epoch, and batches on the state's device."""

from .batches import to_device as to_device
from .collating import collate as collate
from .combine import chain as chain
from .combine import curriculum as curriculum
from .combine import mix as mix
from .epochs import Epochs as Epochs
from .epochs import as_epochs as as_epochs
from .feed import Feed as Feed
from .making import source as source
from .making import tokens as tokens
from .reader import Reader as Reader
from .reader import close_iterator as close_iterator
from .sources import Source as Source
from .window import Window as Window
from .window import Windows as Windows
from .window import window as window
from .zips import zip as zip
from .zips import zip_cycle as zip_cycle
from .zips import zip_longest as zip_longest
from .zips import zip_shortest as zip_shortest
