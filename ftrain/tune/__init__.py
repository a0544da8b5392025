"""What is tried before a run: learning rates, batch sizes, micro-batches, and the run itself with a few batches.

Laws
----
- Each works on a copy: the caller's state, step and global generators are afterwards as they were.
- What is found is a value; nothing is set anywhere.

The names are in `__init__.pyi`; each is imported when touched, so no module here is called like a function.
"""

import lazy_loader as _lazy

__getattr__, __dir__, __all__ = _lazy.attach_stub(__name__, __file__)
