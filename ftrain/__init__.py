"""ftrain: a trainer for PyTorch in the functional style of JAX. The names are in `__init__.pyi`; each is imported when touched."""

import lazy_loader as _lazy

__getattr__, __dir__, __all__ = _lazy.attach_stub(__name__, __file__)
