"""Random damage of bytes, and the count of what a reader made of it; shared by the fuzz of every format."""

import random
from collections import Counter
from collections.abc import Callable

from tinymim.configs.errors import TinymimError


def damaged(whole: bytes, rng: random.Random) -> bytes:
    """A copy with bytes changed, removed or added, or cut short; more often near the ends, where headers are."""
    data = bytearray(whole)
    for _ in range(rng.choice((1, 1, 2, 8))):
        size = len(data)
        near = rng.randrange(min(size, 3000))
        place = rng.choice((rng.randrange(size), near, size - 1 - near))
        match rng.randrange(5):
            case 0:
                data[place] = rng.randrange(256)
            case 1:
                data[place] ^= 1 << rng.randrange(8)
            case 2:
                del data[place : place + rng.choice((1, 2, 8, 100))]
            case 3:
                data[place:place] = rng.randbytes(rng.choice((1, 4, 16)))
            case 4:
                del data[place:]
        data = data or bytearray(b"x")
    return bytes(data)


def outcomes(read: Callable[[int], str], count: int) -> Counter[str]:
    """Call `read` with 0, 1, ... `count` - 1 and count what it returns, or the class of its TinymimError.

    Raises:
        AssertionError: an input led to any other exception, or to an internal error; names the input's number.
    """
    found: Counter[str] = Counter()
    for number in range(count):
        try:
            found[read(number)] += 1
        except TinymimError as error:
            if error.exit_code != 2:
                raise AssertionError(f"input {number}: {error}") from error
            found[type(error).__name__] += 1
        except Exception as error:
            raise AssertionError(f"input {number}: {type(error).__name__}: {error}") from error
    return found
