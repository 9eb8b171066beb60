"""The mutants of `mutation.py`."""

from .drafting import OF_DRAFTING
from .forward import IN_A_FORWARD
from .method import AROUND_IT
from .mutant import Mutant
from .stored import OF_STORED_FEATURES

MUTANTS = [*IN_A_FORWARD, *AROUND_IT, *OF_STORED_FEATURES, *OF_DRAFTING]

__all__ = ["MUTANTS", "Mutant"]
