"""Labels of images that `make-shards` packs: class folders, a tar for each class, `.cls`, `.json` or `.txt` files.

A known form is read. A form that is a choice is refused with both ways out, because labels that are lost in silence are
found only after days of training.
"""

import json
import re
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tinymim.configs.errors import SourceError
from tinymim.pipeline.candidates import Candidate
from tinymim.pipeline.survey import Survey
from tinymim.pipeline.tar import LABEL_LIMIT, UNLABELLED

FORMS: Final = "auto, none, folders, tars, txt, or json:FIELD"
_SPLITS: Final = frozenset({"train", "training", "val", "valid", "validation", "dev", "eval", "test", "testing"})
_WORDNET: Final = re.compile(r"n\d{8}")  # ImageNet's archives: one tar for each class
_COMPANION_BYTES: Final = 2**20


@dataclass(frozen=True)
class Labelled:
    """Images with their class numbers (-1: none), and the names of the classes, empty where they have none."""

    images: Sequence[Candidate]
    labels: Sequence[int]
    classes: Sequence[str] = ()


def check_form(form: str) -> None:
    """Raises SourceError where `form` is none of FORMS."""
    if form not in ("auto", "none", "folders", "tars", "txt") and not re.fullmatch(r"json:.+", form):
        raise SourceError("labels have another form", got=form, expected=FORMS)


def of_folder(
    folder: Path, images: Sequence[Candidate], pictures: Collection[str], form: str, survey: Survey
) -> Labelled:
    """Labels of the images of a folder.

    Args:
        folder: the folder, for messages.
        images: its images, at least one.
        pictures: folders at the top that hold pictures, readable or not; each is a class.
        form: one of FORMS.
        survey: receives the form that was found, notes, and what is left out.

    Raises:
        SourceError: what the folders mean is a choice, or labels of the given form are missing.
    """
    if form.startswith("json:") or form == "txt":
        return _beside(images, form, survey)
    if form == "tars":
        raise SourceError("labels by tar need tars", got=f"images in {folder}", expected="a folder of tars")
    inside = [image for image in images if len(image.parts) > 1]
    if form == "none" or (form == "auto" and not inside):
        survey.labels = "none" if form == "none" else "none: a flat folder"
        return _unlabelled(images, survey)
    if not inside:
        raise SourceError("no image lies in a class folder", got=folder, expected="DIR/class/image.jpg")
    if form == "auto":
        _refuse_splits(folder, inside)
        if len(inside) < len(images):
            loose = next(image for image in images if len(image.parts) == 1)
            number = len(images) - len(inside)
            raise SourceError(
                f"{number} image(s) lie beside {len(pictures)} folder(s) of images: are these classes?",
                got=f"'{loose.origin}' beside {_listed(sorted(pictures))}",
                hint="--labels folders takes the folders as classes and leaves the images beside them out; "
                "--labels none takes all images without labels",
            )
        _refuse_nested(folder, inside)
    for image in images:
        if len(image.parts) == 1:
            survey.skip("image beside the class folders", image.origin)
    survey.labels = "class folders"
    return _by_name(inside, [image.parts[0] for image in inside], pictures)


def of_tars(images: Sequence[Candidate], classes: Sequence[str], form: str, survey: Survey) -> Labelled:
    """Labels of the images of tars.

    Args:
        images: the images, at least one.
        classes: the names of the classes by the index of the tars.
        form: one of FORMS.
        survey: as in `of_folder`.

    Raises:
        SourceError: as `of_folder`.
    """
    if form.startswith("json:") or form == "txt":
        return _beside(images, form, survey)
    depth = _common_depth(images)
    inside = [_below_common(image.parts, depth) for image in images]
    stems = [image.file.stem for image in images]
    if form == "auto" and any(image.label != UNLABELLED for image in images):
        survey.labels = ".cls beside the images"
        return Labelled(images, [image.label for image in images], classes)
    if form == "tars" or (form == "auto" and all(map(_WORDNET.fullmatch, stems))):
        survey.labels = "a tar for each class"
        return _by_name(images, stems, ())
    names = {name for name in inside if name}
    if form == "auto" and len(names) > 1 and all(inside):
        raise SourceError(
            f"the images of the tars lie in {len(names)} folders and have no .cls: are these classes?",
            got=_listed(sorted(names)),
            hint="--labels folders takes the folders as classes; --labels none takes all images without labels",
        )
    if form == "folders":
        if not all(inside):
            raise SourceError("not every image of the tars lies in a class folder", got=images[inside.index("")].origin)
        survey.labels = "class folders in the tars"
        return _by_name(images, inside, ())
    survey.labels = "none" if form == "none" else "none: no .cls beside the images"
    return _unlabelled(images, survey)


# ---------------------------------------------------------------- forms


def _unlabelled(images: Sequence[Candidate], survey: Survey) -> Labelled:
    kinds = {kind for kind in ("json", "txt") for image in images[:100] if image.has_beside(kind)}
    if kinds:
        survey.notes.append(
            f"{' and '.join(f'.{kind}' for kind in sorted(kinds))} files lie beside the images and are not read; "
            "--labels json:FIELD or --labels txt takes class numbers or names from them"
        )
    dropped = sum(image.label != UNLABELLED for image in images)
    if dropped:
        survey.notes.append(f"{dropped} class numbers are left out, as --labels none says")
    return Labelled(images, [UNLABELLED] * len(images))


def _by_name(images: Sequence[Candidate], names: Sequence[str], also: Collection[str]) -> Labelled:
    classes = sorted({*names, *also})
    number = {name: place for place, name in enumerate(classes)}
    return Labelled(images, [number[name] for name in names], [_text(name) for name in classes])


def _text(name: str) -> str:
    """A name of a folder as UTF-8."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def _beside(images: Sequence[Candidate], form: str, survey: Survey) -> Labelled:
    """Labels from the `.json` or `.txt` of each image: numbers, or names of classes."""
    kind, _, field = form.partition(":")
    values: list[int | str] = []
    without: list[str] = []
    for image in images:
        try:
            data = image.read_beside(kind, _COMPANION_BYTES)
            value = None if data is None else _value(data, field)
        except (OSError, ValueError, RecursionError):
            value = None
        if value is None:
            without.append(image.origin)
        else:
            values.append(value)
    if without:
        raise SourceError(
            f"{len(without)} of {len(images)} images have no label of the form {form}",
            got=f"the first is '{without[0]}'",
            expected=f"a class number below {LABEL_LIMIT} or a name, in .{kind}{f', field {field}' if field else ''}",
            hint="--labels none packs the images without labels",
        )
    survey.labels = f"{form} beside the images"
    numbers = [value for value in values if isinstance(value, int)]
    if len(numbers) == len(values):
        return Labelled(images, numbers)
    return _by_name(images, [str(value) for value in values], ())


def _value(data: bytes, field: str) -> int | str | None:
    """A class number or name; None where there is neither."""
    value: object = data.decode().strip()
    if field:
        parsed = json.loads(data)
        value = parsed.get(field) if isinstance(parsed, dict) else None
    if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) < 11:
        value = int(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return value if 0 <= value < LABEL_LIMIT else None
    return value or None if isinstance(value, str) else None


# ---------------------------------------------------------------- choices


def _common_depth(images: Sequence[Candidate]) -> int:
    """The number of folders that all images share."""
    shared = images[0].parts[:-1]
    for image in images:
        while image.parts[:-1][: len(shared)] != shared:
            shared = shared[:-1]
    return len(shared)


def _below_common(parts: tuple[str, ...], depth: int) -> str:
    """The first folder below the shared ones, "" where an image lies in none; the last shared one is no class."""
    return parts[depth] if len(parts) > depth + 1 else ""


def _refuse_splits(folder: Path, inside: Sequence[Candidate]) -> None:
    """Refuse a root of several sets, like ImageNet's, whose folders would become the classes train and val."""
    depth = _common_depth(inside)
    path = folder.joinpath(*inside[0].parts[:depth])
    if depth and inside[0].parts[depth - 1].lower() in _SPLITS:
        raise _split_error(path, f"'{path.name}' is a set, not a class", path)
    names = Counter(_below_common(image.parts, depth) for image in inside)
    if _are_splits(names):
        raise _split_error(path, f"the folders of {path} are sets, not classes", path / min(names))
    second = Counter(image.parts[depth + 1] if len(image.parts) > depth + 2 else "" for image in inside)
    if _are_splits(second):
        raise SourceError(
            f"every class of {path} holds sets of its own",
            got=_listed(sorted(second)),
            hint="move them to SET/CLASS/image.jpg to keep them apart; --labels folders packs all of them as one set",
        )


def _are_splits(names: Collection[str]) -> bool:
    known = {name for name in names if name.lower() in _SPLITS}
    return len(known) > 1 or (bool(known) and len(known) == len(names))


def _split_error(path: Path, what: str, one: Path) -> SourceError:
    got = _listed(sorted(entry.name for entry in path.iterdir() if entry.is_dir()))
    return SourceError(
        what,
        got=got,
        expected="one set, with a folder for each class",
        hint=f"pack one set: `tinymim make-shards {one} DST`; or take them as classes: --labels folders",
    )


def _refuse_nested(folder: Path, inside: Sequence[Candidate]) -> None:
    depth = _common_depth(inside)
    names = {_below_common(image.parts, depth) for image in inside} - {""}
    if depth and names:
        path = folder.joinpath(*inside[0].parts[:depth])
        raise SourceError(
            f"all images lie in one folder, '{'/'.join(inside[0].parts[:depth])}', which would be the only class",
            got=f"folders below it: {_listed(sorted(names))}",
            hint=f"pack that folder: `tinymim make-shards {path} DST`; or --labels folders, or --labels none",
        )


def _listed(names: Sequence[str]) -> str:
    return ", ".join(map(_text, names[:4])) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
