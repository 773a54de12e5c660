"""Without a network the hub fails at once, or gives its local copies at once."""

import socket
import time
from pathlib import Path
from typing import Any

import huggingface_hub.constants as constants
import pytest

from tinymim.configs.errors import CheckpointError
from tinymim.configs.sections.models import ModelConfig
from tinymim.models import hub
from tinymim.models.weights import build_pretrained


@pytest.fixture(autouse=True)
def online(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)


def test_no_network_is_an_error_within_seconds(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fails(*_: Any) -> None:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "create_connection", fails)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    began_s = time.monotonic()
    with pytest.raises(CheckpointError, match="cannot be fetched") as caught:
        build_pretrained(ModelConfig(name="vit_tiny_patch16_224.augreg_in21k"))
    assert caught.value.got == "no network: huggingface.co: Name or service not known"
    assert time.monotonic() - began_s < 10 and not constants.HF_HUB_OFFLINE


def test_a_silent_name_server_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def silent(*_: Any) -> socket.socket:
        time.sleep(1)
        return socket.socket()

    monkeypatch.setattr(hub, "_REACH_S", 0.1)
    monkeypatch.setattr(socket, "create_connection", silent)
    assert hub.unreachable() == "no answer from huggingface.co within 0 s"


def test_a_proxy_is_what_must_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    class Connection:
        def close(self) -> None:
            pass

    def connect(place: tuple[str, int], _timeout_s: float) -> Connection:
        asked.append(place)
        return Connection()

    monkeypatch.setattr(socket, "create_connection", connect)
    assert hub.unreachable() is None
    monkeypatch.setenv("https_proxy", "proxy.example:3128")
    assert hub.unreachable() is None
    assert asked == [("huggingface.co", 443), ("proxy.example", 3128)]
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert hub.unreachable() == "HF_HUB_OFFLINE is set"
