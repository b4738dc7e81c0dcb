"""The notebooks under recipes/examples run as they are, one after the other, in one kernel."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")

FOLDER = Path(__file__).parents[1] / "recipes/examples/notebooks"
NOTEBOOKS = {path.stem: nbformat.read(path, as_version=4) for path in sorted(FOLDER.glob("*.ipynb"))}


@pytest.fixture(scope="module")
def executed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """Return what each notebook showed; the kernel forgets its names between them."""
    cells = []
    for name, notebook in NOTEBOOKS.items():
        cells.append(nbformat.v4.new_code_cell("%reset -f", metadata={"of": name}))
        cells += [nbformat.from_dict({**cell, "metadata": {"of": name}}) for cell in notebook.cells]
    whole = nbformat.v4.new_notebook(cells=cells)
    folder = tmp_path_factory.mktemp("notebooks")
    nbclient.NotebookClient(whole, timeout=200, resources={"metadata": {"path": str(folder)}}).execute()
    shown: dict[str, list[str]] = {name: [] for name in NOTEBOOKS}
    for cell in whole.cells:
        for output in cell.get("outputs", ()):
            kinds = output.get("data", {output.get("name"): output.get("text")})
            shown[cell.metadata["of"]] += [f"{kind}: {text}" for kind, text in kinds.items()]
    return shown


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_runs_and_shows_what_it_made(name: str, executed: dict[str, list[str]]) -> None:
    kinds = [output.partition(":")[0] for output in executed[name]]
    assert kinds.count("text/plain") >= 3
    assert "stderr" not in kinds
    if name != "own_module":  # trained by kw-fit, which tells a line an epoch
        assert [output for output in executed[name] if output.startswith("stdout: epoch 1/")]
        assert {"image/png", "text/html"} <= set(kinds)
        accuracies = re.findall(r"epoch \d+/.*val/accuracy ([\d.]+)", "\n".join(executed[name]))
        assert max(map(float, accuracies)) > 0.5  # of ten classes: it does not guess
    assert not [output for output in executed[name] if "it/s" in output]  # no bar, which a saved notebook would keep


def test_notebooks_are_kept_without_outputs() -> None:
    assert len(NOTEBOOKS) == 3
    cells = [cell for notebook in NOTEBOOKS.values() for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.source for cell in cells if cell.outputs or cell.execution_count] == []
