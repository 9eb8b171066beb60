"""The notebook runs from its first cell to its last."""

from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_the_quickstart_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    notebook = nbformat.read(ROOT / "examples" / "quickstart.ipynb", as_version=4)
    client = nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}})
    client.execute()
    printed = [output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", [])]
    [line] = [line for line in "".join(printed).splitlines() if line.startswith("accuracy before")]
    before, after = (float(part.split()[-1]) for part in line.split(", "))
    assert after > before + 0.2
    assert (tmp_path / "outputs" / "adapter" / "adapter_model.safetensors").is_file()


def test_the_quickstart_is_saved_without_warnings_of_the_machine_it_ran_on() -> None:
    notebook = nbformat.read(ROOT / "examples" / "quickstart.ipynb", as_version=4)
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert outputs and not [output for output in outputs if output.get("name") == "stderr"]
