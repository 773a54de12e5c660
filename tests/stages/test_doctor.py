"""The table of `tinymim doctor`: what is found on a sound machine, and what a broken part becomes."""

from collections import namedtuple
from pathlib import Path

import pytest
import torch

from tinymim.configs.errors import UserError
from tinymim.models import hub
from tinymim.pipeline.decode import decode
from tinymim.stages import doctor

Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def levels(monkeypatch: pytest.MonkeyPatch) -> "type[Levels]":
    monkeypatch.setattr(hub, "unreachable", lambda: "no network: example.invalid")
    return Levels


class Levels:
    """The findings of a run by the name of the check."""

    def __init__(self) -> None:
        self.findings = doctor.run()
        self.by_name = {finding.check: finding for finding in self.findings}

    def __getitem__(self, name: str) -> tuple[str, str]:
        return self.by_name[name].level, self.by_name[name].hint


def test_this_machine_passes_and_an_unreachable_hub_is_a_warning(levels: type[Levels]) -> None:
    found = levels()
    doctor.refuse_failed(found.findings)
    assert found["tinymim"][0] == found["operations"][0] == found["JPEG"][0] == "ok"
    assert found["weights hub"][0] == "warning"
    text = doctor.as_text(found.findings)
    assert "weights hub: without it, use local weights" in text and "example.invalid" in text
    assert [row["check"] for row in doctor.as_json(found.findings)] == [row.check for row in found.findings]


def test_decoders_that_disagree_and_operations_that_differ_fail(
    levels: type[Levels], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tinymim.stages.doctor.decode", lambda data, reduction=1: decode(data, reduction) ^ 1)
    monkeypatch.setattr(doctor, "canary_digests", lambda: {})
    found = levels()
    assert found["JPEG"][0] == found["operations"][0] == "FAIL"
    with pytest.raises(UserError, match=r"2 check\(s\) failed: JPEG, operations") as error:
        doctor.refuse_failed(found.findings)
    assert "constraints.txt" in str(error.value)


def test_other_pixels_than_with_the_tested_versions_are_a_warning(
    levels: type[Levels], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "environment", lambda: {"canary": "0" * 16})
    assert levels()["JPEG"][0] == "warning"


def test_a_missing_or_old_library_fails(levels: type[Levels], monkeypatch: pytest.MonkeyPatch) -> None:
    lines = ["torch>=999", "no-such-library[x]>=1.2", "lightning>=2; extra == 'lightning'", "timm>=1.0.20"]
    monkeypatch.setattr("importlib.metadata.requires", lambda _name: lines)
    found = levels()
    assert found["torch"] == ("FAIL", "pip install 'torch>=999'")
    assert found["no-such-library"] == ("FAIL", "pip install 'no-such-library>=1.2'")
    assert found["timm"][0] == "ok" and "lightning" not in found.by_name


def test_little_shared_memory_disk_and_few_files_are_warnings(
    levels: type[Levels], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(doctor, "SHARED_MEMORY", tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda _path: Usage(2**26, 0, 2**26))
    monkeypatch.setattr("resource.getrlimit", lambda _kind: (100, 4096))
    found = levels()
    assert found["shared memory"][0] == "warning" and "--shm-size" in found["shared memory"][1]
    assert found["disk here"][0] == "warning"
    assert found["open files"] == ("warning", "ulimit -n 4096")


def test_a_check_that_breaks_is_a_finding(levels: type[Levels], monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> dict[str, str]:
        raise RuntimeError("illegal instruction")

    monkeypatch.setattr(doctor, "canary_digests", broken)
    found = levels()
    assert found["operations"][0] == "FAIL" and "illegal instruction" in found.by_name["operations"].found
    assert found["weights hub"][0] == "warning", "the checks after it run"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_every_gpu_multiplies_right(levels: type[Levels]) -> None:
    found = levels()
    assert {found[f"GPU {number}"][0] for number in range(torch.cuda.device_count())} == {"ok"}
