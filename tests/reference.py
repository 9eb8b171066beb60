"""The old name of `golden/reference.py`, for the tests of the examples."""

from .golden.reference import reference_forward

__all__ = ["reference_forward"]
