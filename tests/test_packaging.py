"""The source distribution holds all that the tests need; the package says that it is typed."""

import shutil
import subprocess
import sys
import tarfile
from importlib.resources import files
from pathlib import Path

ROOT = Path(__file__).parent.parent
FILES = ("CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", "MANIFEST.in", "Makefile", "README.md", "constraints.txt")
FOLDERS = ("examples", "tests", "toast_peft")
_BUILD = "from setuptools.build_meta import build_sdist; print(build_sdist('dist'))"


def test_source_distribution_is_complete(tmp_path: Path) -> None:
    for name in (*FILES, "pyproject.toml", "setup.cfg"):
        shutil.copy(ROOT / name, tmp_path)
    for name in FOLDERS:
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    expected = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    run = subprocess.run([sys.executable, "-c", _BUILD], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    [archive] = (tmp_path / "dist").iterdir()
    with tarfile.open(archive) as contents:
        found = {name.partition("/")[2] for name in contents.getnames()}
    assert sorted(expected - found) == []


def test_package_is_marked_as_typed() -> None:
    assert (files("toast_peft") / "py.typed").is_file()
