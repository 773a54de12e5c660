"""Class maps: which of a teacher's classes each stored class is, as a text file with one number a line.

The form is TinyViT's (Wu et al., ECCV 2022): line i, counted from 0, has the teacher's class of class i, or -1 where
the teacher lacks it. Imports nothing heavy.
"""

import hashlib
from pathlib import Path
from typing import Final

from tinymim.configs.errors import RecipeError

ABSENT: Final = -1
_MOST_BYTES: Final = 2**20


def read_class_map(file: Path) -> tuple[int, ...]:
    """The numbers of a class map. Raises RecipeError where the file is none."""
    try:
        with open(file, "rb") as opened:
            data = opened.read(_MOST_BYTES + 1)
    except OSError as error:
        raise RecipeError("the class map cannot be read", got=f"{file}: {error.strerror}") from error
    numbers: list[int] = []
    for number, line in enumerate(data[:_MOST_BYTES].splitlines(), start=1):
        text = line.strip()
        if not (text == b"-1" or (text.isdigit() and len(text) < 8)):
            raise RecipeError(
                f"line {number} of the class map {file} is no class",
                got=repr(text[:20].decode(errors="replace")),
                expected="one number a line: the teacher's class, from 0 on, or -1 where it has none",
            )
        numbers.append(int(text))
    if len(data) > _MOST_BYTES or all(number == ABSENT for number in numbers):
        raise RecipeError(
            f"the class map {file} maps no class",
            got="over 1 MiB" if len(data) > _MOST_BYTES else f"{len(numbers)} lines, none of them a class",
            expected="one number a line, at least one of them not -1",
        )
    return tuple(numbers)


def class_map_sha256(numbers: tuple[int, ...]) -> str:
    """The digest that identifies a class map, whatever its line ends: of the numbers, each with a newline."""
    return hashlib.sha256("".join(f"{number}\n" for number in numbers).encode()).hexdigest()
