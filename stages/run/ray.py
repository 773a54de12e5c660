"""Join a Ray cluster, for both stages; an address that does not answer fails at once, not after minutes as in Ray."""

import logging
import os
import re
import socket
from typing import Any
from urllib.parse import urlsplit

import ray
from ray.exceptions import RayError

from tinymim.configs.errors import RecipeError, first_line

_REACH_S = 10.0
_HINT = (
    "is it up (`ray start --head`), and does it require a token that this machine lacks (~/.ray/auth_token)? "
    "Without RAY_ADDRESS tinymim starts a Ray of its own"
)


def join_ray(address: str = "auto", **settings: Any) -> None:
    """Make this process a driver of a cluster.

    Args:
        address: HOST:PORT, ray://HOST:PORT, "local" or "auto". "local" starts a Ray for this process. "auto" joins
            the cluster of RAY_ADDRESS, else the Ray that runs on this machine, else starts one as "local" does.
        settings: further arguments of `ray.init`.

    Raises:
        RecipeError: the address does not answer, or the cluster refuses.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    named = os.environ.get("RAY_ADDRESS", address) if address == "auto" else address
    try:
        if re.fullmatch(r"(ray://)?[^/\s]+:\d+", named):
            place = urlsplit(f"//{named.removeprefix('ray://')}")
            socket.create_connection((place.hostname or "", place.port or 0), _REACH_S).close()
        ray.init(address=None if address == "auto" else address, logging_level=logging.WARNING, **settings)
    except (OSError, RuntimeError, ValueError, RayError) as error:  # a ConnectionError is an OSError
        raise RecipeError(f"cannot join the Ray cluster: {first_line(error)}", got=named, hint=_HINT) from error
