"""Connections to object stores through obstore, for shards and caches alike; its failures as errors of ours."""

import os
from datetime import timedelta
from functools import lru_cache
from typing import TYPE_CHECKING

from obstore.exceptions import BaseError, NotFoundError, PermissionDeniedError, UnauthenticatedError
from obstore.store import from_url

from tinymim.configs.errors import StoreError, first_line

if TYPE_CHECKING:
    from obstore.store import ClientConfig, ObjectStore, RetryConfig

# Server errors, timeouts and connections lost before or within a body; a refusal (4xx) is never repeated.
RETRIES: "RetryConfig" = {
    "max_retries": 15,
    "backoff": {"init_backoff": timedelta(milliseconds=100), "max_backoff": timedelta(seconds=10), "base": 3},
    "retry_timeout": timedelta(seconds=120),
}
CONNECT_TIMEOUT_S = 5.0
ABSENT = (NotFoundError, FileNotFoundError)  # obstore raises either
_ENDPOINTS = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT", "AZURE_STORAGE_ENDPOINT")

_CREDENTIALS = (
    "check the credentials and the endpoint in the environment (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_REGION, "
    "AWS_ENDPOINT_URL; AWS_SKIP_SIGNATURE=true for a public bucket)"
)


def connect(url: str, timeout_s: float = 30.0) -> "ObjectStore":
    """The store at `url`, opened once per process and never pickled.

    Args:
        url: of a bucket, or a prefix in it.
        timeout_s: for one request with its body.

    Raises:
        StoreError: the URL names no store.
    """
    return _connect(url, timeout_s, os.getpid())


@lru_cache(maxsize=64)
def _connect(url: str, timeout_s: float, _pid: int) -> "ObjectStore":
    try:
        if url.startswith("file://"):
            return from_url(url)
        # Options given here replace what the environment says about clients, AWS_ALLOW_HTTP included.
        places = [url, *(os.environ.get(name, "") for name in _ENDPOINTS)]
        plain = any(place.startswith("http://") for place in places)
        client: ClientConfig = {
            "timeout": timedelta(seconds=timeout_s),
            "connect_timeout": timedelta(seconds=CONNECT_TIMEOUT_S),
            "allow_http": plain,
        }
        return from_url(url, client_options=client, retry_config=RETRIES)
    except (BaseError, OSError, ValueError) as error:
        raise store_error(url, error) from error


def store_error(where: object, error: Exception, absent_hint: str | None = None) -> StoreError:
    """What obstore says about `where`, as an error of ours; `absent_hint` is the remedy where nothing is there."""
    text, got = str(error), first_line(error)
    if isinstance(error, ABSENT) or "Unable to canonicalize" in text:
        return StoreError(f"{where} does not exist", got=got, hint=absent_hint)
    if isinstance(error, PermissionDeniedError | UnauthenticatedError):
        return StoreError(f"the store refuses access to {where}", got=got, hint=_CREDENTIALS)
    hint = "the store kept failing through all retries; start the command again when it answers"
    # Without keys in the environment obstore asks the machine's metadata service, which few machines have.
    if any(word in text.lower() for word in ("credential", "must be specified", "169.254.169.254", "metadata")):
        hint = _CREDENTIALS
    return StoreError(f"{where} cannot be reached", got=got, hint=hint)
