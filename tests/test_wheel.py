"""A built wheel, installed in an empty environment: the command, the library and the demo's first steps."""

import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LEFT_OUT = (".*", "__pycache__", "*.egg-info", "build", "caches", "data", "dist", "runs", "tests")


@pytest.mark.slow  # builds, installs and starts Python several times: over 10 s; packaging seldom changes
def test_a_wheel_runs_the_first_steps_of_the_demo(tmp_path: Path) -> None:
    def call(*command: str | Path) -> str:
        # Only the packages that tinymim needs: paths from PYTHONPATH run no .pth file, so no editable install.
        packages = os.pathsep.join(path for path in sys.path if path.endswith("site-packages"))
        found = subprocess.run(
            list(map(str, command)),
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": packages, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
        )
        assert found.returncode == 0, found.stderr
        return found.stdout

    source = shutil.copytree(ROOT, tmp_path / "anything", ignore=shutil.ignore_patterns(*LEFT_OUT))
    call(sys.executable, "-P", "-m", "build", "--wheel", "--no-isolation", "--outdir", tmp_path, source)
    (wheel,) = tmp_path.glob("*.whl")
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv" / "bin" / "python"
    call(python, "-m", "pip", "install", "--no-deps", "--no-index", "--ignore-installed", wheel)
    tinymim = python.with_name("tinymim")

    own = call(python, "-P", "-c", "import tinymim; print(tinymim.__file__)")
    assert (tmp_path / "venv") in Path(own.strip()).parents
    assert "cache-teacher" in call(tinymim, "--help")
    assert "demo-cache" in call(tinymim, "recipes")
    call(tinymim, "make-shards", "drawn", "shards", "--count", "24")
    small = ["source.shards=shards", "cache=cache", "run.folder=run", "num_views=1", "loader.workers=0"]
    call(tinymim, "cache-teacher", "demo-cache", *(part for each in small for part in ("--set", each)))
    layers = call(python, "-P", "-c", "import tinymim; print(tinymim.open_cache('cache').coverage)")
    assert "num_records=24" in layers
