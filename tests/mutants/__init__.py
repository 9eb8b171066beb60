"""The mutants of `mutation.py`."""

from .drafting import OF_DRAFTING
from .forward import IN_A_FORWARD
from .gates import OF_A_GATE
from .method import AROUND_IT
from .mutant import Mutant
from .open_rows import OF_OPEN_ROWS_WITH_A_CACHE
from .scale import OF_A_SCALE
from .second_pass import OF_THE_SECOND_PASS
from .several_adapters import OF_SEVERAL_ADAPTERS
from .shared import OF_A_SHARED_CACHE
from .steering import OF_STEERING
from .stored import OF_STORED_FEATURES

MUTANTS = [
    *(*IN_A_FORWARD, *AROUND_IT, *OF_STORED_FEATURES, *OF_A_SHARED_CACHE, *OF_DRAFTING),
    *(*OF_STEERING, *OF_A_SCALE, *OF_A_GATE, *OF_THE_SECOND_PASS, *OF_SEVERAL_ADAPTERS),
    *OF_OPEN_ROWS_WITH_A_CACHE,
]

__all__ = ["MUTANTS", "Mutant"]
