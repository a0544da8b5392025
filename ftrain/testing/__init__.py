"""The laws as checks that a user runs on his own step: `ftrain.testing.check_step(step, state, batch)`."""

from .laws import LawError as LawError
from .laws import check_compiled as check_compiled
from .laws import check_donation as check_donation
from .laws import check_moves as check_moves
from .laws import check_pure as check_pure
from .laws import check_random as check_random
from .laws import check_recompiles as check_recompiles
from .laws import check_step as check_step
from .laws import check_structure as check_structure
