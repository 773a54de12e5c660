"""Connections to object stores through obstore, for shards and caches; obstore's failures become StoreError."""

import os
from datetime import timedelta
from functools import lru_cache
from typing import TYPE_CHECKING

from obstore.exceptions import BaseError, NotFoundError, PermissionDeniedError, UnauthenticatedError
from obstore.store import from_url

from tinymim.configs.errors import StoreError, first_line

if TYPE_CHECKING:
    from obstore.store import ClientConfig, ObjectStore, RetryConfig

# For server errors, timeouts and lost connections. obstore never repeats a refusal (4xx).
RETRIES: "RetryConfig" = {
    "max_retries": 15,
    "backoff": {"init_backoff": timedelta(milliseconds=100), "max_backoff": timedelta(seconds=10), "base": 3},
    "retry_timeout": timedelta(seconds=120),
}
CONNECT_TIMEOUT_S = 5.0
ABSENT = (NotFoundError, FileNotFoundError)  # obstore raises either
_ENDPOINTS = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT", "AZURE_STORAGE_ENDPOINT")

_AWS = (
    "AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_REGION, AWS_ENDPOINT_URL; "
    "AWS_SKIP_SIGNATURE=true for a public bucket"
)
_AZURE = "AZURE_STORAGE_ACCOUNT_NAME, AZURE_STORAGE_ACCOUNT_KEY or AZURE_STORAGE_SAS_KEY, AZURE_STORAGE_ENDPOINT"
_GOOGLE = "GOOGLE_APPLICATION_CREDENTIALS or GOOGLE_SERVICE_ACCOUNT; GOOGLE_SKIP_SIGNATURE=true for a public bucket"
_VARIABLES = {"s3": _AWS, "s3a": _AWS, "gs": _GOOGLE}  # by scheme; all others but web servers are Azure's


def _credentials(where: object) -> str:
    """The hint to check the credentials of a store, with the variables that its scheme reads."""
    scheme = str(where).partition("://")[0]
    if scheme in ("http", "https"):
        return "check the address; credentials for a web server are not supported"
    return f"check the credentials and the endpoint in the environment ({_VARIABLES.get(scheme, _AZURE)})"


def connect(url: str, timeout_s: float = 30.0) -> "ObjectStore":
    """The store at `url`, opened once per process and never pickled.

    Args:
        url: a bucket, or a prefix in it.
        timeout_s: seconds that one request with its body may take.

    Raises:
        StoreError: the URL names no store.
    """
    return _connect(url, timeout_s, os.getpid())


@lru_cache(maxsize=64)
def _connect(url: str, timeout_s: float, _pid: int) -> "ObjectStore":
    try:
        if url.startswith("file://"):
            return from_url(url)
        # These options replace the client settings of the environment, AWS_ALLOW_HTTP included.
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
    """The StoreError for obstore's `error` about `where`; `absent_hint` is the hint if the object is missing."""
    text, got = str(error), first_line(error)
    if isinstance(error, ABSENT) or "Unable to canonicalize" in text:
        return StoreError(f"{where} does not exist", got=got, hint=absent_hint)
    if isinstance(error, PermissionDeniedError | UnauthenticatedError):
        return StoreError(f"the store refuses access to {where}", got=got, hint=_credentials(where))
    hint = "the store failed in all retries; run the same command again when it answers"
    # Without keys in the environment obstore tries the machine's metadata service, which few machines have.
    if any(word in text.lower() for word in ("credential", "must be specified", "169.254.169.254", "metadata")):
        hint = _credentials(where)
    return StoreError(f"{where} cannot be reached", got=got, hint=hint)
