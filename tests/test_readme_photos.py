"""README's "Your own images" runs as printed on a folder of photos, offline, on a CPU."""

import json
import re
import shlex
import socket
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import PIL.Image
import pytest
import timm
import torch

from tinymim import cli
from tinymim.pipeline.drawn import samples

README = Path(__file__).parent.parent / "README.md"
QUICK = {  # the documented ways to shorten a run; the slow test adds nothing
    "plan": ["--seconds", "1", "--set", "loader.workers=0", "--set", "audit_views=1"],
    "cache-teacher": ["--set", "loader.workers=0", "--set", "audit_views=1"],
    "train-student": ["--set", "optim.steps=3", "--set", "loader.workers=0"],
    "evaluate": ["--set", "loader.workers=0"],
    "finetune": ["--set", "optim.steps=2", "--set", "loader.workers=0"],
}


def printed() -> list[str]:
    """The lines of the section, in order."""
    section = README.read_text().partition("## Your own images")[2].partition("\n## ")[0]
    return re.findall(r"^    (.*)$", section, re.M)


def take_photos(folder: Path) -> None:
    """Photos of several sizes and shapes in class folders: 40 in `train`, 12 in `val`, some grey or turned on edge."""
    shapes = [(400, 300), (300, 400), (640, 480), (90, 70), (257, 255)]
    for split, first, count in (("train", 0, 40), ("val", 40, 12)):
        for number, (key, _, label) in enumerate(samples(seed=3, first=first, count=count)):
            rng = np.random.default_rng(first + number)
            small = PIL.Image.fromarray(rng.integers(0, 256, (6, 8, 3), np.uint8))
            image = small.resize(shapes[number % len(shapes)], PIL.Image.Resampling.BICUBIC)
            image = image.convert("L") if number % 7 == 6 else image
            path = folder / split / f"class {label % 4}" / f"IMG {key}.JPG"
            path.parent.mkdir(parents=True, exist_ok=True)
            image.save(path, quality=90)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with photos and nothing else, without a network."""

    def refuse(*_: Any) -> NoReturn:
        raise AssertionError("the section says offline")

    take_photos(tmp_path / "photos")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    return tmp_path


def check_outputs(place: Path, steps: int, finetune_steps: int) -> None:
    """What the section promises lies where it says."""
    index = json.loads((place / "shards/train/index.json").read_text())
    assert index["num_samples"] == 40 and len(index["classes"]) == 4
    report = json.loads((place / "runs/own-eval/evaluation.json").read_text())
    assert 0 <= report["knn_top1"] <= 1 and 0 <= report["linear_top1"] <= 1
    tuned = json.loads((place / "runs/own-finetune/finetuned.json").read_text())
    assert 0 <= tuned["weights"]["best.safetensors"]["top1"] <= 1
    model = timm.create_model(f"local-dir:{place}/runs/own-student/student", pretrained=True)
    assert model.eval()(torch.zeros(1, 3, 64, 64)).shape == (1, 96)
    for run, last in (("own-student", steps), ("own-finetune", finetune_steps)):
        logged = [json.loads(line) for line in (place / "runs" / run / "metrics.jsonl").read_text().splitlines()]
        assert max(line["step"] for line in logged if "step" in line) in (last - 1, last)
    assert "own-finetune" in (place / "compare.html").read_text()
    assert (place / "cache.yaml").read_text().startswith("#")


def test_every_line_of_the_section_runs_on_a_folder_of_photos(place: Path) -> None:
    verbs = []
    for line in printed():
        words = shlex.split(line, comments=True)
        words, out = (words[:-2], words[-1]) if ">" in words else (words, "/dev/null")
        assert words[0] == "tinymim"
        verbs.append(words[1])
        with open(out, "w") as file, redirect_stdout(file):
            assert cli.run_command([*words[1:], *QUICK.get(words[1], [])]) == 0, line
    assert set(QUICK) < set(verbs)
    check_outputs(place, 3, 2)


@pytest.mark.slow  # three minutes: the lines as printed, by a shell, at their full length
def test_the_section_as_one_script(place: Path) -> None:
    script = "\n".join(["set -e", f"export PATH={shlex.quote(str(Path(sys.executable).parent))}:$PATH", *printed()])
    done = subprocess.run(["bash", "-c", script], cwd=place, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    check_outputs(place, 500, 300)
