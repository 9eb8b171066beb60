"""Settings of the test session: no network, one thread, the same random numbers for every test."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
from transformers.utils import logging

torch.set_num_threads(1)
logging.set_verbosity_error()


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)
