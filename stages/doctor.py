"""`tinymim doctor`: whether this machine can run tinymim: one table, which names what limits and what to do."""

import base64
import io
import os
import platform
import re
import resource
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple

import numpy as np
import torch
from PIL import Image

from tinymim import __version__
from tinymim.configs.errors import UserError, first_line
from tinymim.models import hub
from tinymim.pipeline.decode import decode, environment, pixel_digest
from tinymim.pipeline.operations.registry import CANARIES, canary_digests
from tinymim.stages.pages.numbers import format_bytes
from tinymim.stages.pages.tables import plain_table
from tinymim.targets.relations.kernels.triton_works import triton_works

Level = Literal["ok", "warning", "FAIL"]

SHARED_MEMORY: Final = Path("/dev/shm")
_LEAST_SHARED_BYTES = 2**30  # batches of a few loader workers
_LEAST_FREE_BYTES = 10 * 2**30
_LEAST_FILES = 1024
_LEAST_PROCESSES = 256
# A small JPEG, and the digests of its pixels at full and at half size, and of the canary resize, with the versions in
# constraints.txt.
_JPEG = base64.b64decode(
    "/9j/4AAQSkZJRgABAQAAAQABAAD/2wBDAA4KCw0LCQ4NDA0QDw4RFiQXFhQUFiwgIRokNC43NjMuMjI6QVNGOj1OPjIySGJJTlZYXV5dOEVm"
    "bWVabFNbXVn/2wBDAQ8QEBYTFioXFypZOzI7WVlZWVlZWVlZWVlZWVlZWVlZWVlZWVlZWVlZWVlZWVlZWVlZWVlZWVlZWVlZWVlZWVn/wAAR"
    "CAAoADgDASIAAhEBAxEB/8QAHwAAAQUBAQEBAQEAAAAAAAAAAAECAwQFBgcICQoL/8QAtRAAAgEDAwIEAwUFBAQAAAF9AQIDAAQRBRIhMUEG"
    "E1FhByJxFDKBkaEII0KxwRVS0fAkM2JyggkKFhcYGRolJicoKSo0NTY3ODk6Q0RFRkdISUpTVFVWV1hZWmNkZWZnaGlqc3R1dnd4eXqDhIWG"
    "h4iJipKTlJWWl5iZmqKjpKWmp6ipqrKztLW2t7i5usLDxMXGx8jJytLT1NXW19jZ2uHi4+Tl5ufo6erx8vP09fb3+Pn6/8QAHwEAAwEBAQEB"
    "AQEBAQAAAAAAAAECAwQFBgcICQoL/8QAtREAAgECBAQDBAcFBAQAAQJ3AAECAxEEBSExBhJBUQdhcRMiMoEIFEKRobHBCSMzUvAVYnLRChYk"
    "NOEl8RcYGRomJygpKjU2Nzg5OkNERUZHSElKU1RVVldYWVpjZGVmZ2hpanN0dXZ3eHl6goOEhYaHiImKkpOUlZaXmJmaoqOkpaanqKmqsrO0"
    "tba3uLm6wsPExcbHyMnK0tPU1dbX2Nna4uPk5ebn6Onq8vP09fb3+Pn6/9oADAMBAAIRAxEAPwDprSWNlHSrMixsvauNttTKAZNXF1oY5avm"
    "o4Kaeh6OIwksND3S7fWiODgVzl5pm4nArX/tNZO9TRMkp7V7eG9pS3PjsTi63PY5E6Q2eFqaLT3j7Gu3hsUk7Cpm0lSvC160Md0Z72V4jrM4"
    "5C8I70Vv3umbQcCivSpzhJXPpXjqKOVuYHizwayp55EPU13moWKsDgVzN7phJOBXzeCrRlueLjM4hP3WY8V+4bqa3dO1E5GTWQdLcN0q1BaS"
    "Rnoa9zkpzWhyYbC08TK53On36kDJrbjvEZeorz6CZ4hVoasyd65/qHM9D16uXRpQvE66+mj8okYyeBRXETa7vk27uF4orwMa67quNKTSWmjP"
    "la6qRmbTX6Sd6RUSY9qKK0hTUFoeViV+8LEemI/apG0cY4WiitoVZp7n0OWTcVoZ13phQHArm9SieFGIznoKKK9ynXnChKS3sexXxVRq1znH"
    "aRW70UUV5sEmjzn7zuz/2Q=="
)
_FULL, _HALF, _RESIZED = "ed700baa578e1c60", "0e1267684799b1dd", "6bd3bd716049e8ec"
_REQUIREMENT = re.compile(r"([\w.-]+)(?:\[[\w,-]*\])?>=([\d.]+)")


class Finding(NamedTuple):
    """One finding of `doctor` about this machine.

    Attributes:
        check: the name of what was checked.
        level: `ok`, `warning` where tinymim is slower or lacks a part, or `FAIL` where it cannot work or would give
            wrong results.
        found: what was found.
        hint: what to do; "" if nothing.
    """

    check: str
    level: Level
    found: str
    hint: str = ""


def run() -> list[Finding]:
    """Check this machine: versions, GPUs, decoders, limits, disk. Makes one connection to the hub; writes nothing.

    Returns:
        The findings, also those that need nothing done. A failed check is data here, not an error.
    """
    findings: list[Finding] = []
    for check in _CHECKS:
        try:
            findings += check()
        except Exception as error:  # a library that is broken in any way is a finding, not the end of the table
            findings.append(Finding(check.__name__.strip("_"), "FAIL", f"{type(error).__name__}: {first_line(error)}"))
    return findings


def as_json(findings: list[Finding]) -> list[dict[str, Any]]:
    """The findings as JSON values."""
    return [finding._asdict() for finding in findings]


def as_text(findings: list[Finding]) -> str:
    """The table, and below it a line for each hint."""
    table = plain_table([("check", "result", "found"), *(finding[:3] for finding in findings)], ())
    hints = [f"{finding.check}: {finding.hint}" for finding in findings if finding.hint]
    return "\n".join([table, *(["", *hints] if hints else [])])


def refuse_failed(findings: list[Finding]) -> None:
    """Raises UserError where a check failed; warnings are no failure."""
    failed = [finding for finding in findings if finding.level == "FAIL"]
    if failed:
        names = ", ".join(finding.check for finding in failed)
        raise UserError(f"{len(failed)} check(s) failed: {names}", got=failed[0].found, hint=failed[0].hint or None)


# ---------------------------------------------------------------- the checks


def _versions() -> Iterator[Finding]:
    machine = f"{platform.system()} {platform.machine()}"
    yield Finding("tinymim", "ok", f"{__version__}, Python {platform.python_version()}, {machine}")
    for name, least, found in _requirements(metadata.requires("tinymim") or []):
        if found is None:
            yield Finding(name, "FAIL", "not installed", f"pip install '{name}>={least}'")
        elif _number(found) < _number(least):
            yield Finding(name, "FAIL", f"{found}, needs at least {least}", f"pip install '{name}>={least}'")
        elif name in ("torch", "timm", "simplejpeg", "pillow", "zarr"):
            yield Finding(name, "ok", found)


def _requirements(lines: list[str]) -> Iterator[tuple[str, str, str | None]]:
    """(name, lower bound, installed version or None) of every requirement that is no extra."""
    for line in lines:
        match = _REQUIREMENT.match(line.replace(" ", ""))
        if match is None or "extra==" in line.replace(" ", ""):
            continue
        try:
            yield match[1], match[2], metadata.version(match[1])
        except metadata.PackageNotFoundError:
            yield match[1], match[2], None


def _number(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version.split("+")[0])[:3])


def _processor() -> Iterator[Finding]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    yield Finding("processor", "ok", f"{cores} cores for this process, {torch.get_num_threads()} torch threads")


def _devices() -> Iterator[Finding]:
    if not torch.cuda.is_available():
        if Path("/dev/nvidia0").exists():
            built = f"torch {torch.__version__} was built for CUDA {torch.version.cuda}"
            yield Finding("GPU", "FAIL", f"there is one, and torch cannot use it; {built}", "install a matching torch")
            return
        yield Finding("GPU", "ok", "none; device `auto` is the CPU")
        return
    for number in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(number)
        name = f"{torch.cuda.get_device_name(number)}, {format_bytes(free)} of {format_bytes(total)} free"
        square = torch.eye(64, device=f"cuda:{number}")
        right = bool(torch.equal(square @ square, square))
        yield Finding(f"GPU {number}", "ok" if right else "FAIL", name if right else f"{name}; a product is wrong")


def _triton() -> Iterator[Finding]:
    if not torch.cuda.is_available():
        yield Finding("Triton", "ok", "not needed without a GPU")
        return
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        works = triton_works()
    if works:
        yield Finding("Triton", "ok", metadata.version("triton"))
    else:
        reason = str(caught[0].message) if caught else "not installed; slower operations are used"
        yield Finding("Triton", "warning", reason, "install triton, a C compiler and Python's headers")


def _decoders() -> Iterator[Finding]:
    """JPEG is decoded by two libraries, which must agree in every bit; a cache records the canary resize."""
    whole, half = decode(_JPEG), decode(_JPEG, 2)
    with Image.open(io.BytesIO(_JPEG)) as image:
        pillow = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    if not torch.equal(whole, pillow):
        hint = "install the versions of simplejpeg and pillow in constraints.txt"
        yield Finding("JPEG", "FAIL", "simplejpeg and Pillow decode one image differently", hint)
        return
    found = {"full size": _hex(whole), "half size": _hex(half), "resize": environment()["canary"]}
    wanted = {"full size": _FULL, "half size": _HALF, "resize": _RESIZED}
    differing = [name for name in wanted if found[name] != wanted[name]]
    if differing:
        hint = "caches made elsewhere may refuse this machine's views; use the versions in constraints.txt"
        yield Finding("JPEG", "warning", f"other pixels than with the tested versions: {', '.join(differing)}", hint)
    else:
        yield Finding("JPEG", "ok", "pixels as with the tested versions, at full and half size and resized")


def _hex(pixels: torch.Tensor) -> str:
    return f"{pixel_digest(pixels.contiguous()) & (2**64 - 1):016x}"


def _operations() -> Iterator[Finding]:
    found = canary_digests()
    differing = [name for name, digest in CANARIES.items() if found.get(name) != digest]
    if differing:
        text = f"{len(differing)} of {len(CANARIES)} give other pixels: {', '.join(differing)}"
        yield Finding("operations", "FAIL", text, "use the versions of numpy and pillow in constraints.txt")
    else:
        yield Finding("operations", "ok", f"all {len(CANARIES)} operations on views give the recorded pixels")


def _memory() -> Iterator[Finding]:
    if not SHARED_MEMORY.is_dir():
        yield Finding("shared memory", "ok", f"no {SHARED_MEMORY} on this system")
        return
    usage = shutil.disk_usage(SHARED_MEMORY)
    text = f"{format_bytes(usage.free)} of {format_bytes(usage.total)} free in {SHARED_MEMORY}"
    if not os.access(SHARED_MEMORY, os.W_OK):
        yield Finding("shared memory", "FAIL", f"{SHARED_MEMORY} cannot be written", "or set loader.workers: 0")
    elif usage.free < _LEAST_SHARED_BYTES:
        hint = "loader workers may be killed: `docker run --shm-size=8g`, or fewer loader.workers"
        yield Finding("shared memory", "warning", text, hint)
    else:
        yield Finding("shared memory", "ok", text)


def _limits() -> Iterator[Finding]:
    for name, kind, least, flag in (
        ("open files", resource.RLIMIT_NOFILE, _LEAST_FILES, "-n"),
        ("processes", resource.RLIMIT_NPROC, _LEAST_PROCESSES, "-u"),
    ):
        soft, hard = resource.getrlimit(kind)
        shown = [("unlimited" if value == resource.RLIM_INFINITY else f"{value:,}") for value in (soft, hard)]
        enough = soft == resource.RLIM_INFINITY or soft >= least
        hint = "" if enough else f"ulimit {flag} {4 * least}"
        yield Finding(name, "ok" if enough else "warning", f"{shown[0]} (hard limit {shown[1]})", hint)


def _disk() -> Iterator[Finding]:
    for name, folder in (("disk here", Path.cwd()), ("disk for temporary files", Path(tempfile.gettempdir()))):
        free = shutil.disk_usage(folder).free
        text = f"{format_bytes(free)} free in {folder}"
        if not os.access(folder, os.W_OK | os.X_OK):
            yield Finding(name, "FAIL", f"{folder} cannot be written", "work in another folder, or set TMPDIR")
        elif free < _LEAST_FREE_BYTES:
            yield Finding(name, "warning", text, "`tinymim plan` estimates the size of a cache")
        else:
            yield Finding(name, "ok", text)


def _hub() -> Iterator[Finding]:
    reason = hub.unreachable()
    if reason is None:
        yield Finding("weights hub", "ok", "answers")
    else:
        hint = "without it, use local weights; the demo needs none"
        yield Finding("weights hub", "warning", reason, hint)


_CHECKS: Final[tuple[Callable[[], Iterator[Finding]], ...]] = (
    *(_versions, _processor, _devices, _triton, _decoders, _operations),
    *(_memory, _limits, _disk, _hub),
)
