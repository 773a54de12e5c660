"""docs/tutorial.ipynb: its cells run in order in a fresh process, and what is committed of their output is small."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

NOTEBOOK = Path(__file__).parent.parent / "docs" / "tutorial.ipynb"


def cells(kind: str) -> list[dict[str, Any]]:
    return [cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == kind]


@pytest.mark.slow
def test_the_cells_run_in_a_fresh_process(tmp_path: Path) -> None:
    code = "\n".join("".join(cell["source"]) for cell in cells("code"))
    threads = "import matplotlib, torch\nmatplotlib.use('Agg')\ntorch.set_num_threads(1)\n"
    done = subprocess.run(
        [sys.executable, "-P", "-c", threads + code], cwd=tmp_path, capture_output=True, text=True, timeout=540
    )
    assert done.returncode == 0, done.stderr
    before, after = map(float, done.stdout.rpartition("loss ")[2].split(" in ")[0].split(" -> "))
    assert after < before
    assert (tmp_path / "rings.png").stat().st_size > 10_000
    assert (tmp_path / "runs" / "wide" / "student" / "config.json").exists()


def test_what_is_committed_is_a_small_notebook() -> None:
    content = json.loads(NOTEBOOK.read_text())
    assert (content["nbformat"], NOTEBOOK.stat().st_size < 50_000) == (4, True)
    assert len({cell["id"] for cell in content["cells"]}) == len(content["cells"])
    assert [cell["execution_count"] for cell in cells("code")] == list(range(1, len(cells("code")) + 1))
    text = "".join(part for cell in cells("markdown") for part in cell["source"])
    for page in ("tutorial.md", "api.md", "looking.md"):
        assert f"({page})" in text and (NOTEBOOK.parent / page).exists()
