"""Ctrl-C and SIGTERM: the first asks, the second insists, and a real one costs nothing."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from safetensors import safe_open
from safetensors.torch import load_file

from tinymim import cli
from tinymim.stages.run.interrupt import StopFlag, ask_to_stop

RECIPE = """
stage: pretrain-mae
source: {{shards: {shards}}}
views: {{size: 32}}
model: {{name: vit_tiny_patch16_224, img_size: 32, patch_size: 8, embed_dim: 16, depth: 2, num_heads: 2}}
mae: {{decoder_dim: 8, decoder_depth: 1, decoder_heads: 2}}
optim: {{batch_size: 20, steps: 60, base_lr: 0.01}}
loader: {{workers: 0}}
run: {{folder: run, device: cpu, threads: 1, log_every: 1}}
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_asks_and_the_second_insists(number: int, capsys: pytest.CaptureFixture[str]) -> None:
    before = signal.getsignal(number)
    with StopFlag() as stop:
        assert stop.requested is False
        os.kill(os.getpid(), number)
        assert bool(stop.requested)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), number)
    assert signal.getsignal(number) is before
    assert capsys.readouterr().err.count("finishing current work") == 1


def test_sigterm_is_to_be_requeued_and_a_patient_flag_is_silent(capsys: pytest.CaptureFixture[str]) -> None:
    with StopFlag(has_parent=True) as stop:
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.requested and stop.requeue
    assert capsys.readouterr().err == ""


def test_a_thread_without_signals_is_asked_in_words() -> None:
    assert not ask_to_stop(requeue=True)
    seen: list[tuple[bool, bool]] = []

    def work() -> None:
        with StopFlag() as stop:
            asked.wait()
            seen.append((stop.requested, stop.requeue))

    asked, thread = threading.Event(), threading.Thread(target=work)
    thread.start()
    while not ask_to_stop(requeue=True):
        time.sleep(0.001)
    asked.set()
    thread.join()
    assert seen == [(True, True)] and not ask_to_stop(requeue=True)


def test_handlers_come_back_after_an_error() -> None:
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(ZeroDivisionError), StopFlag():
        raise ZeroDivisionError
    assert signal.getsignal(signal.SIGINT) is before


def start(folder: Path) -> "subprocess.Popen[str]":
    script = shutil.which("tinymim", path=str(Path(sys.executable).parent))
    assert script
    command = [script, "pretrain-mae", "recipe.yaml"]
    return subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def steps_logged(folder: Path) -> list[int]:
    metrics = folder / "run" / "metrics.jsonl"
    return [json.loads(line)["step"] for line in metrics.read_text().splitlines()] if metrics.exists() else []


def test_a_run_stopped_by_ctrl_c_continues_to_the_same_encoder(
    drawn_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The installed command gets a real signal: exit code 130, state saved, no traceback, same bytes in the end."""
    home, whole = tmp_path / "stopped", tmp_path / "whole"
    for folder in (home, whole):
        folder.mkdir()
        (folder / "recipe.yaml").write_text(RECIPE.format(shards=drawn_shards))
    with start(home) as process:
        deadline_s = time.monotonic() + 300
        while len(steps_logged(home)) < 2 and process.poll() is None and time.monotonic() < deadline_s:
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=300)
    assert (process.returncode, out) == (130, "")
    saved = re.search(r"interrupted: state of step (\d+) saved; the same command continues", err)
    assert saved and "Traceback" not in err
    assert 2 <= int(saved[1]) < 60 and not (home / "run" / "encoder.safetensors").exists()

    for folder in (home, whole):  # in this process: importing torch twice more would be most of the test
        monkeypatch.chdir(folder)
        assert cli.run_command(["pretrain-mae", "recipe.yaml"]) == 0
        assert f"from step {saved[1] if folder is home else 0}\n" in capsys.readouterr().err
        assert steps_logged(folder) == list(range(60))
    encoders = [folder / "run" / "encoder.safetensors" for folder in (home, whole)]
    assert encoders[0].read_bytes() == encoders[1].read_bytes()
    with safe_open(encoders[0], framework="pt") as file:
        assert file.metadata()["steps"] == "60"
    assert all(tensor.isfinite().all() for tensor in load_file(encoders[0]).values())
