"""Where records go: the history, the console, plots, and any function of a record."""

from .console import Progress as Progress
from .console import console as console
from .record import History as History
from .record import Record as Record
