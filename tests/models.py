"""The old name of `zoo.py` and `helpers.py`, for the tests of the examples."""

from .helpers import adapted, assert_same, output_of, steered
from .zoo import HIDDEN_SIZE, MODELS, NUM_BLOCKS, VARIANTS, VOCAB_SIZE, add_noise, inputs_of, tiny_model

__all__ = [
    "HIDDEN_SIZE",
    "MODELS",
    "NUM_BLOCKS",
    "VARIANTS",
    "VOCAB_SIZE",
    "adapted",
    "add_noise",
    "assert_same",
    "inputs_of",
    "output_of",
    "steered",
    "tiny_model",
]
