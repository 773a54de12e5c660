"""The hub of timm's weights where there is no network: its local copies are used at once, without retries."""

import contextlib
import socket
import threading
from collections.abc import Iterator
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

import huggingface_hub.constants as hub

_REACH_S = 5.0


def unreachable() -> str | None:
    """Why the hub cannot be reached, found out within a few seconds; None if it answers."""
    if hub.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    place = urlsplit(hub.ENDPOINT)
    proxy = getproxies().get(place.scheme)
    if proxy and not proxy_bypass(place.hostname or ""):
        place = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
    host, port = place.hostname or "", place.port or (443 if place.scheme == "https" else 80)
    found = [f"no answer from {host} within {_REACH_S:.0f} s"]

    def reach() -> None:
        try:
            socket.create_connection((host, port), _REACH_S).close()
            found[0] = ""
        except OSError as error:
            found[0] = f"no network: {host}: {error.strerror or error}"

    thread = threading.Thread(target=reach, daemon=True)  # a name server that is silent knows no time limit
    thread.start()
    thread.join(_REACH_S)
    return found[0] or None


@contextlib.contextmanager
def without_retries() -> Iterator[str | None]:
    """Use the hub's local copies alone, within the context, if it cannot be reached; yields the reason."""
    reason, before = unreachable(), hub.HF_HUB_OFFLINE
    hub.HF_HUB_OFFLINE = before or reason is not None
    try:
        yield reason
    finally:
        hub.HF_HUB_OFFLINE = before
