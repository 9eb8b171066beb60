"""The mutants of `mutation.py`."""

from .forward import IN_A_FORWARD
from .method import AROUND_IT
from .mutant import Mutant
from .stored import OF_STORED_FEATURES

MUTANTS = [*IN_A_FORWARD, *AROUND_IT, *OF_STORED_FEATURES]

__all__ = ["MUTANTS", "Mutant"]
