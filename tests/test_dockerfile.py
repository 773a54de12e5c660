"""The Dockerfile: what it copies is enough to build the wheel, and its commands exist. Docker itself is not needed."""

import fnmatch
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

from tinymim.cli import app

ROOT = Path(__file__).parent.parent
DOCKERFILE = (ROOT / "Dockerfile").read_text()


def context(target: Path) -> Path:
    """What `docker build` sends: all that .dockerignore does not leave out."""
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    kept = [line[1:] for line in lines if line.startswith("!")]
    assert "*" in lines and not any(fnmatch.fnmatch(name, "*[*?]*") for name in kept), "plain names of the root"
    for name in kept:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, target / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            target.mkdir(exist_ok=True)
            shutil.copy(ROOT / name, target / name)
    return target


def test_what_is_sent_to_docker_builds_the_whole_package(tmp_path: Path) -> None:
    source = context(tmp_path / "context")
    assert (source / "constraints.txt").exists() and "-c constraints.txt" in DOCKERFILE
    options = ["--wheel", "--no-isolation", "--outdir", str(tmp_path)]
    subprocess.run([sys.executable, "-P", "-m", "build", *options, str(source)], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    with zipfile.ZipFile(wheel) as archive:
        held = set(archive.namelist())
    assert {f"{package.replace('.', '/')}/__init__.py" for package in packages} <= held
    assert any(name.endswith(".safetensors") for name in held) and "tinymim/configs/recipes/demo-cache.yaml" in held


def test_the_image_downloads_from_pypi_alone_and_runs_the_command_as_a_user() -> None:
    instructions = "\n".join(line for line in DOCKERFILE.splitlines() if not line.startswith("#"))
    assert set(re.findall(r"https?://([^/\s]+)", instructions)) == {"pypi.org"}
    assert not re.search(r"\b(curl|wget|git|ADD)\b", instructions)
    assert 'ENTRYPOINT ["tinymim"]' in instructions and "USER tinymim" in instructions
    assert "demo" in app.resolved_commands() and re.search(r"docker run .* tinymim demo", DOCKERFILE)
