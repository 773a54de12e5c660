"""ImageNet ReaL: several right labels per image of the validation set, or none (Beyer et al., 2020).

The published file, `real.json`, is a list of 50,000 lists; entry i, from 0 on, has the labels of the image whose
number is i + 1, `ILSVRC2012_val_00000001.JPEG` to `ILSVRC2012_val_00050000.JPEG`. timm ships a copy.
"""

import json
import re
from importlib.resources import files
from pathlib import Path, PurePosixPath
from typing import Any, Final

from tinymim.configs.errors import SourceError, first_line

_MOST_BYTES: Final = 2**28
_NUMBER: Final = re.compile(r"ILSVRC2012_val_(\d{8})$")
_EXPECTED: Final = "a list of lists of labels, such as ImageNet's real.json, or an object {image name: labels}"


def real_file(given: str | Path) -> Path:
    """The file of a recipe's `real_labels`; "timm" is the copy in timm."""
    return Path(str(files("timm.data") / "_info" / "imagenet_real_labels.json")) if given == "timm" else Path(given)


class RealLabels:
    """The labels of a file, by the key of a sample.

    Raises:
        SourceError: the file cannot be read or holds something else.
    """

    def __init__(self, file: Path, num_classes: int) -> None:
        self.file = file
        try:
            with open(file, "rb") as opened:
                data = opened.read(_MOST_BYTES + 1)
            content: Any = json.loads(data) if len(data) <= _MOST_BYTES else "over 256 MiB"
        except OSError as error:
            raise SourceError("the ReaL labels cannot be read", got=f"{file}: {error.strerror}") from error
        except (ValueError, RecursionError) as error:
            raise SourceError(f"{file} is not JSON", got=first_line(error), expected=_EXPECTED) from error
        entries: list[tuple[str, Any]]
        if isinstance(content, list):
            entries = [(f"ILSVRC2012_val_{number:08d}", labels) for number, labels in enumerate(content, start=1)]
        elif isinstance(content, dict):
            entries = [(_stem(name), labels) for name, labels in content.items()]
        else:
            raise SourceError(f"{file} has no ReaL labels", got=type(content).__name__, expected=_EXPECTED)
        self._labels: dict[str, frozenset[int]] = {}
        for name, labels in entries:
            if not isinstance(labels, list) or not all(
                type(label) is int and 0 <= label < num_classes for label in labels
            ):
                raise SourceError(
                    f"{file} has no ReaL labels for {name[:100]}",
                    got=repr(labels)[:80],
                    expected=f"a list of labels from 0 to {num_classes - 1}",
                )
            self._labels[name] = frozenset(labels)

    def of(self, key: str) -> frozenset[int] | None:
        """The labels of a sample: an empty set where annotators found none right; None where the file lacks it."""
        name = _stem(key)
        if (found := self._labels.get(name)) is not None:
            return found
        number = _NUMBER.search(name)  # keys such as n01440764_ILSVRC2012_val_00000293
        return None if number is None else self._labels.get(number[0])


def _stem(name: str) -> str:
    return PurePosixPath(name).name.partition(".")[0]
