"""Classes of labelled sets: count them, and compare them between sets."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from tinymim.configs.errors import SourceError
from tinymim.pipeline.shards import ShardSet, labels_of


def count_classes(train: ShardSet, val: ShardSet) -> int:
    """Number of classes of `train`. Reads labels, but no image.

    Raises:
        SourceError: an unlabelled sample, a class of `val` that `train` lacks, or class lists that differ.
    """
    if train.classes and val.classes and train.classes != val.classes:
        longest = max(len(train.classes), len(val.classes))
        padded = [[*names, *["(none)"] * (longest - len(names))] for names in (train.classes, val.classes)]
        number, (ours, theirs) = next((i, pair) for i, pair in enumerate(zip(*padded, strict=True)) if len({*pair}) > 1)
        raise SourceError(
            f"train and val number their classes differently: class {number} is not the same",
            got=f"val: {theirs}",
            expected=f"train: {ours}",
            hint="make both sets with the same class folders",
        )
    labels = labels_of(train.shards)
    refuse_unseen(labels, labels_of(val.shards), train.classes)
    return len(np.unique(labels))


def refuse_unseen(train: npt.NDArray[np.int64], val: npt.NDArray[np.int64], names: Sequence[str]) -> None:
    """Raises SourceError where the labels `val` hold a class that the labels `train` lack."""
    unseen = np.setdiff1d(val, train).tolist()
    if unseen:
        named = [f"{label} ({names[label]})" if label < len(names) else str(label) for label in unseen[:10]]
        raise SourceError(
            "val holds classes that train lacks",
            got=", ".join(named) + (f" and {len(unseen) - 10} more" if len(unseen) > 10 else ""),
            expected=f"some of train's {len(np.unique(train))} classes",
        )
