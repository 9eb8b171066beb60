"""The mutants of `mutation.py`."""

from .forward import IN_A_FORWARD
from .method import AROUND_IT
from .mutant import Mutant

MUTANTS = [*IN_A_FORWARD, *AROUND_IT]

__all__ = ["MUTANTS", "Mutant"]
