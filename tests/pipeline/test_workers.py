"""The fork server: started before torch is imported, small, and deaf to Ctrl-C from its first moment."""

import subprocess
import sys
from pathlib import Path

from tinymim.pipeline.workers import PRELOADED


def _run(code: str, folder: Path) -> str:
    done = subprocess.run([sys.executable, "-P", "-c", code], cwd=folder, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def test_workers_import_neither_torchvision_nor_timm_nor_dynamo(tmp_path: Path) -> None:
    imports = "\n".join(f"import {name}" for name in PRELOADED)
    heavy = '{"timm", "torchvision", "torch._dynamo", "sympy", "zarr", "ray", "matplotlib"}'
    assert _run(f"import sys\n{imports}\nprint({heavy} & sys.modules.keys())", tmp_path) == "set()\n"


def test_the_server_starts_without_torch_and_outlives_ctrl_c(tmp_path: Path) -> None:
    code = """
import os, signal, sys
from multiprocessing import forkserver
from tinymim.pipeline.workers import start_server, worker_context
start_server()
server = forkserver._forkserver._forkserver_pid
assert "torch" not in sys.modules
os.kill(server, signal.SIGINT)  # it is importing torch
worker = worker_context().Process(target=print, args=("a worker",))
worker.start()
worker.join()
assert worker.exitcode == 0 and forkserver._forkserver._forkserver_pid == server
assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, ())
"""
    assert _run(code, tmp_path) == "a worker\n"
