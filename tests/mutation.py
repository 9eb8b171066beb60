"""Mutation run: changes that break the package, one at a time, and whether a test notices.

    python -m tests.mutation                    # every mutant, with the tests most likely to notice it
    python -m tests.mutation clamp cache        # those whose description has one of these words
    python -m tests.mutation --all survived     # with all tests

Each mutant is made in a copy of the tree in a temporary folder and tested in a forked process, so that torch and
transformers are imported once. To be run by hand, where there is `fork`.
"""

import argparse
import os
import re
import shlex
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import accelerate  # noqa: F401
import datasets  # noqa: F401
import peft  # noqa: F401
import pytest

from . import zoo  # noqa: F401  # imports the models of transformers, and nothing of the package
from .mutants import MUTANTS, Mutant

ROOT = Path(__file__).parents[1]
PACKAGE = "toast_peft"
SECONDS = 300  # for the tests of one mutant


def place_of(mutant: Mutant, root: Path = ROOT) -> Path | None:
    """The file that the mutant changes; `None` unless its old text is there exactly once in the whole package."""
    files = sorted((root / PACKAGE).rglob("*.py"))
    places = [path for path in files for _ in range(path.read_text(encoding="utf-8").count(mutant.old))]
    return places[0] if len(places) == 1 else None


def run_tests(root: Path, arguments: list[str], log: Path) -> str:
    """Run pytest in a forked process: "survived", or the first test that failed, or "time limit"."""
    child = os.fork()
    if child == 0:
        _run_pytest(root, arguments, log)
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return _outcome(os.waitstatus_to_exitcode(status), log.read_text(encoding="utf-8"))
        time.sleep(0.1)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return "time limit"


def _run_pytest(root: Path, arguments: list[str], log: Path) -> None:
    """Never returns."""
    os.setpgid(0, 0)  # with what the tests start
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(output, stream)
    for name in [name for name in sys.modules if name.partition(".")[0] in ("tests", PACKAGE)]:
        del sys.modules[name]
    os.chdir(root)
    sys.path.insert(0, str(root))
    os._exit(pytest.main(["-x", "-q", "--tb=line", "-p", "no:cacheprovider", "-p", "no:xdist", *arguments]))


def _outcome(exit_code: int, output: str) -> str:
    if exit_code == pytest.ExitCode.OK:
        return "survived"
    failed = re.search(r"^(?:FAILED|ERROR) (\S+)", output, re.MULTILINE)
    return failed.group(1) if failed else f"no test ran, exit code {exit_code}: {output[-500:]}"


def try_mutant(mutant: Mutant, root: Path, with_all: bool) -> str:
    """What became of a mutant."""
    shutil.rmtree(root / PACKAGE, ignore_errors=True)
    shutil.copytree(ROOT / PACKAGE, root / PACKAGE)
    place = place_of(mutant, root)
    if place is None:
        return "text not found once"
    text = place.read_text(encoding="utf-8").replace(mutant.old, mutant.new)
    place.write_text(text, encoding="utf-8")
    tests = [f"tests/{part}" if part.partition("/")[2] else part for part in shlex.split(mutant.tests)]
    return run_tests(root, ["tests"] if with_all else tests, root / "log")


def main() -> None:
    """Try the mutants and print what became of each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", help="only mutants whose description has one of these words")
    parser.add_argument("--all", action="store_true", help="run all tests for each")
    options = parser.parse_args()
    chosen = [m for m in MUTANTS if not options.words or any(word in m.what for word in options.words)]
    counts: Counter = Counter()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for name in ("tests", "examples"):
            shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
        for name in ("pyproject.toml", "README.md"):
            shutil.copy(ROOT / name, root)
        for mutant in chosen:
            outcome = try_mutant(mutant, root, options.all)
            counts["killed" if "::" in outcome else "not killed"] += 1
            print(f"{mutant.what:70} {outcome}", flush=True)
    print(f"{counts['killed']} of {len(chosen)} killed")
    sys.exit(counts["not killed"] > 0)


if __name__ == "__main__":
    main()
