"""Hooks that are often wanted. Each is a value of `ft.Hook`, made of pure functions that you could have written.

The names are in `__init__.pyi`; each is imported when touched, so no module here is called like a function.
"""

import lazy_loader as _lazy

__getattr__, __dir__, __all__ = _lazy.attach_stub(__name__, __file__)
