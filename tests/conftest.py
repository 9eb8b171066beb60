"""Settings of the test session: no network, one thread, the same random numbers for every test."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
from transformers.utils import logging

torch.set_num_threads(1)
logging.set_verbosity_error()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--damaged-adapters",
        type=int,
        default=300,
        help="how many tests/features/test_damaged_adapters.py tries",
    )


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)
