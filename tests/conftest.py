"""Settings of the test session: no network, one thread, the same random numbers for every test."""

import gc
import os
import shutil
import sysconfig
from collections import Counter
from collections.abc import Iterator
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # of what tests start as well; there is one test for each core

import pytest
import torch
from transformers.utils import logging

from .kept_models import seed

torch.set_num_threads(1)
logging.set_verbosity_error()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--damaged-adapters",
        type=int,
        default=300,
        help="how many tests/features/test_damaged_adapters.py tries",
    )


# With `--cov` a test takes twice as long, one that compiles four times. The other cases of a test run the same lines.
COUNTED_CASES = 8


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Lines that run are counted in the first cases of each test, and not in slow ones: what is found is a minimum."""
    if not config.getoption("--cov", default=None):
        return
    cases: Counter = Counter()
    for item in items:
        name = item.nodeid.partition("[")[0]
        cases[name] += 1
        if cases[name] > COUNTED_CASES or item.get_closest_marker("slow"):
            item.add_marker("no_cover")


def pytest_collection_finish() -> None:
    """What is imported stays, so the garbage collector need not look at it again; the Trainer calls it often."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)


# The modules of Python's library that the examples learn in tests, the last three about numbers.
MODULES = ("argparse", "datetime", "enum", "socket", "tarfile", "threading", "_pydecimal", "fractions", "statistics")


@pytest.fixture(scope="session")
def library_is_small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Python's library has few modules: to read all takes longer than what examples and benchmarks do with them."""
    folder, whole = tmp_path_factory.mktemp("library"), Path(sysconfig.get_path("stdlib"))
    for name in MODULES:
        shutil.copy(whole / f"{name}.py", folder)
    offline, text_classification = import_module("offline"), import_module("text_classification")
    for name in offline.PACKAGES:
        (folder / name).symlink_to(whole / name)
    with pytest.MonkeyPatch.context() as patch:
        with_trl = ["instruction_tuning"] if find_spec("trl") else []  # which needs Python 3.11
        for name in ("language_modeling", "pretraining_feedback", *with_trl):
            patch.setattr(import_module(name), "sysconfig", SimpleNamespace(get_path=lambda name: folder))
        patch.setattr(text_classification, "MODULES", {name: [folder / f"{name}.py"] for name in MODULES})
        patch.setattr(offline, "LIBRARY", folder)
        offline.docstrings.cache_clear()
        yield
        offline.docstrings.cache_clear()


@pytest.fixture(autouse=True)
def seeded() -> None:
    seed(0)
