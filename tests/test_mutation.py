"""The mutants of `mutation.py` are changes of the package as it is now."""

from .mutation import MUTANTS, place_of


def test_each_mutant_can_be_made() -> None:
    assert [mutant.what for mutant in MUTANTS if place_of(mutant) is None] == []
