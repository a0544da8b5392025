"""Hooks that are often wanted. Each is a value of `ft.Hook`, made of pure functions that you could have written."""

from .nonfinite import nonfinite as nonfinite
from .plateau import plateau as plateau
