from .entries import Entry as Entry
from .entries import best as best
from .keeping import Keep as Keep
from .keeping import keep as keep
