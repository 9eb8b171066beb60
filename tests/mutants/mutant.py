"""The changes that `mutation.py` tries, one for each thing that may go wrong."""

from typing import NamedTuple


class Mutant(NamedTuple):
    """A change of the package.

    Args:
        what: what it breaks.
        old: a text that is once in the whole package, whatever the file.
        new: what it is replaced by.
        tests: arguments of pytest for the tests most likely to notice; paths are below `tests/`.
    """

    what: str
    old: str
    new: str
    tests: str
