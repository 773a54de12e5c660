"""The error tree. Every error that a user can cause states what is wrong, got, expected and a hint.

TinymimError
├── UserError (exit 2)
│   ├── RecipeError       the recipe or a flag is wrong
│   ├── SourceError       the images or shards are wrong
│   ├── StoreError        an object store refuses, fails, or holds another object than before
│   ├── CheckpointError   weights do not exist, do not fit or cannot be trusted
│   ├── CacheMismatch     a cache was made from something else than the recipe states (I6)
│   ├── CacheCorrupt      bytes of a cache are missing or changed
│   ├── UnitsFailed       some units of a cache failed, all others are committed (exit 3)
│   ├── ViewMismatch      the pixels of a view are not the pixels the teacher saw (I2)
│   └── LoaderKilled      the system killed a loader worker
└── InternalError (exit 1)
"""

import contextlib
import errno
import os
import re
import shutil
from collections.abc import Iterator
from reprlib import Repr
from typing import ClassVar

# Refusals of the machine. They are no bugs of ours, and the system's message suffices.
_FULL = (errno.ENOSPC, errno.EDQUOT)
_SYSTEM_REFUSALS = (
    *(errno.EACCES, errno.EPERM, errno.EROFS, *_FULL),
    *(errno.ENOENT, errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR, errno.EISDIR),
    *(errno.EIO, errno.EFBIG, errno.EMFILE, errno.ENFILE, errno.ESTALE),
)

# Characters that a terminal obeys or that reorder a line, and halves of characters. Line feed and tab are not here.
_COMMANDS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")

# Cuts values in messages: a recipe may hold a section where a number belongs.
short = Repr()
short.maxstring = short.maxother = 60


class TinymimError(Exception):
    """Base of all errors that tinymim raises on purpose.

    Args:
        what: one sentence that names the thing that is wrong.
        got: the value found.
        expected: the value that would have been right.
        hint: what the user can do next.
    """

    exit_code: ClassVar[int] = 1

    def __init__(
        self,
        what: str,
        *,
        got: object = None,
        expected: object = None,
        hint: str | None = None,
    ) -> None:
        self.what, self.got, self.expected, self.hint = what, got, expected, hint
        super().__init__(str(self))

    def __str__(self) -> str:
        lines = [self.what]
        if self.got is not None:
            lines.append(f"  got: {self.got}")
        if self.expected is not None:
            lines.append(f"  expected: {self.expected}")
        if self.hint is not None:
            lines.append(f"  hint: {self.hint}")
        return "\n".join(lines)

    def __reduce__(self) -> tuple[object, ...]:
        # Errors cross process borders (loader workers); the default would drop the keyword arguments.
        return _rebuild, (type(self), self.what, self.got, self.expected, self.hint)


def is_refusal(error: BaseException) -> bool:
    """Return whether the machine refused something that the user can fix: a permission, disk space."""
    return isinstance(error, OSError) and error.errno in _SYSTEM_REFUSALS


def is_final(error: BaseException) -> bool:
    """Return whether an error would come again at every restart: ours, or a refusal of the machine."""
    return (isinstance(error, TinymimError) and not isinstance(error, LoaderKilled)) or is_refusal(error)


def printable(text: str, line_feeds: str = "\n(?!  )") -> str:
    """The text with characters that a terminal would obey written as escapes, such as `\\x1b`.

    Names of files, keys of samples and recipes come from other people. Everything printed goes through here, once.

    Args:
        text: a message.
        line_feeds: a pattern of the line feeds to escape too. By default those whose next line is not indented: the
            further lines of our own messages are. "" escapes none, "\\n" all of them.
    """
    shown = _COMMANDS.sub(_escaped, text)
    return re.sub(line_feeds, r"\\n", shown) if line_feeds else shown


def _escaped(match: re.Match[str]) -> str:
    code = ord(match[0])
    return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"


@contextlib.contextmanager
def naming(path: os.PathLike[str]) -> Iterator[None]:
    """Name the file in an OSError of a write, which knows only a number: a full disk would not say where it is full."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            error.filename = str(path)
        raise


def refusal_text(error: OSError) -> str:
    """What the machine refused, and which file; for a full disk also the file system and its free space."""
    named = error.filename if error.filename is not None else "a file of the run"
    text = f"{error.strerror}: {named}"
    if error.errno not in _FULL or error.filename is None:
        return text
    folder = os.path.abspath(os.path.dirname(os.fspath(error.filename)) or ".")
    while not os.path.exists(folder):
        folder = os.path.dirname(folder)
    free, total = (size / 2**30 for size in (shutil.disk_usage(folder).free, shutil.disk_usage(folder).total))
    while not os.path.ismount(folder):
        folder = os.path.dirname(folder)
    return f"{text}\n  got: {free:.2f} of {total:,.2f} GiB are free on {folder}\n  hint: make room there (quotas count)"


def first_line(error: BaseException) -> str:
    """Return the first line of a foreign error message, at most 200 characters, or its type if it is empty."""
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


def in_one_line(error: TinymimError) -> str:
    """Return what, got and expected of an error as one line, for lists of errors."""
    values = {"got": error.got, "expected": error.expected}
    stated = [f"{name} {value}" for name, value in values.items() if value is not None]
    return " ".join(", ".join([error.what, *stated]).split())


def _rebuild(kind: type[TinymimError], what: str, got: object, expected: object, hint: str | None) -> TinymimError:
    return kind(what, got=got, expected=expected, hint=hint)


class UserError(TinymimError):
    """A mistake that the user can fix."""

    exit_code = 2


class RecipeError(UserError):
    """A recipe or a flag is wrong."""


class SourceError(UserError):
    """Images or shards are missing, unreadable or inconsistent."""


class StoreError(UserError):
    """An object store refuses, fails, or holds another object than before.

    It is no SourceError, because those count as unreadable images and are skipped up to a limit. A store that is down
    must never cost a cache its images.
    """


class CheckpointError(UserError):
    """Weights do not exist, do not fit the model, or cannot be loaded safely."""


class CacheMismatch(UserError):
    """A cache was made from something else than the recipe states; names the field."""


class CacheCorrupt(UserError):
    """A committed unit of a cache is missing bytes or has changed bytes; names unit and array."""


class UnitsFailed(UserError):
    """Some units of a cache failed; all others are committed. Exit code 3: partial."""

    exit_code = 3


class ViewMismatch(UserError):
    """The pixels of a replayed view differ from those the teacher saw; names image and view."""


class LoaderKilled(UserError):
    """The system killed a loader worker, as it does where memory is short. The same command may well succeed."""


class InternalError(TinymimError):
    """A bug of ours or of the machine."""
