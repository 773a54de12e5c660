"""`tinymim look`: one image of a cache: its views, and per layer what teacher, cache and students say about it."""

import difflib
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tinymim.configs.codecs.targets import TargetsConfig
from tinymim.configs.errors import CacheMismatch, RecipeError, SourceError, UserError
from tinymim.configs.place import parse_place
from tinymim.configs.schema.cache import CacheTeacherRecipe
from tinymim.configs.sections.source import SourceConfig
from tinymim.models.teacher import Teacher
from tinymim.pipeline.dataset import ImageViews
from tinymim.pipeline.decode import decode
from tinymim.pipeline.joined import lost_partners
from tinymim.pipeline.masks import visible_patches
from tinymim.pipeline.shards import ShardSet, open_shards
from tinymim.pipeline.views import law_of, view_key
from tinymim.stages.cache.opened import opened_kind
from tinymim.stages.evaluation.examples import TrainedStudent, examples, load_student
from tinymim.stages.pages.card import licence
from tinymim.stages.pages.image import ImagePage, LayerPicture, SeenView, image_page, image_png
from tinymim.stages.pages.numbers import view_law
from tinymim.stages.pages.pictures import STORED, TEACHER
from tinymim.stages.pages.views import ViewCell
from tinymim.stages.units.draft import low_digests
from tinymim.stages.units.drops import drawn_drops
from tinymim.stages.units.prepare import prepare
from tinymim.storage import layout
from tinymim.storage.atomic import write_bytes_atomic
from tinymim.storage.blocks import DIGEST
from tinymim.storage.catalog import resolve
from tinymim.storage.layout import VIEWS
from tinymim.storage.manifest import Layer, check_same, check_same_layer
from tinymim.storage.reader import CacheReader
from tinymim.targets.contract import Target

Records = dict[str, npt.NDArray[Any]]
_CPU = torch.device("cpu")
_COMPARED_KEYS: Final = 10_000  # with a key that is not there


class Options(NamedTuple):
    """What to show.

    Attributes:
        key: the sample key.
        target: the page's file; the picture gets the same name with .png.
        recipe: the recipe that made the cache, for images and teacher.
        source: the shards, for the images alone.
        students: run folders of students.
        views: most views, from the first one.
        lines: most patches of a view.
    """

    key: str
    target: Path
    recipe: CacheTeacherRecipe | None
    source: str | None
    students: Sequence[Path]
    views: int
    lines: int


class _Seen(NamedTuple):
    """The image and its views as they are drawn here; `pixels` is empty where the image is not at hand.

    Attributes:
        numbers: the view indices.
        keys: int64 [B], the view keys.
        cells: what the page shows of each view.
        named: (sample key, view index) of each view.
        pixels: uint8 [B, 3, S, S] by size.
        image: uint8 [3, H, W].
    """

    numbers: list[int]
    keys: Tensor
    cells: list[SeenView]
    named: list[tuple[str, int]]
    pixels: dict[int, Tensor]
    image: npt.NDArray[np.uint8] | None


def run(place: Path | str, options: Options) -> dict[str, Any]:
    """Write the page and the picture of one image.

    Returns:
        The two files, the shard, the views, which of them have the stored pixels, and by layer the columns and losses.

    Raises:
        UserError: the cache does not hold the image.
        RecipeError: a target that is not a page, or numbers out of range.
        CacheMismatch: recipe or source are not those of the cache, or a view cannot be drawn.
        SourceError, CheckpointError: images, teacher or a student cannot be read.
        CacheCorrupt: bytes of the cache changed.
    """
    if options.target.suffix != ".html":
        raise RecipeError("this is written as a page and a picture", got=options.target, expected="FILE.html")
    if not 1 <= options.views <= 50 or not 1 <= options.lines <= 50:
        got = f"--views {options.views}, --lines {options.lines}"
        raise RecipeError("--views or --lines is out of range", got=got, expected="1 to 50 of each")

    # ---- cache, image, teacher and students
    reader = CacheReader(resolve(place))
    shard, row = _found(reader, options.key)
    teachers, source = _made_by(options, reader)
    students = {name: load_student(folder, reader) for name, folder in _named(options.students).items()}

    # ---- the views, drawn again; the layers
    seen = _seen(reader, source, shard, row, options)
    layers = {
        name: _layer(reader, layer, (shard, row), seen, teachers.get(name), students, options.lines)
        for name, layer in reader.layers.items()
    }

    # ---- page and picture
    page = ImagePage(
        options.key, str(reader.place), shard, view_law(reader.manifest.views), seen.image, seen.cells, layers
    )
    picture = options.target.with_suffix(".png")
    write_bytes_atomic(picture, image_png(page))
    write_bytes_atomic(options.target, image_page(page).encode())
    return {
        "page": str(options.target),
        "picture": str(picture),
        "shard": shard,
        "views": seen.numbers,
        "same_pixels": [view.number for view in seen.cells if view.rendered == view.stored],
        "layers": {name: {"columns": list(each.columns), "losses": each.losses} for name, each in layers.items()},
    }


def _found(reader: CacheReader, key: str) -> tuple[str, int]:
    """The shard of an image, and its place among the shard's cached images."""
    seen: list[str] = []
    for shard in reader.by_shard():
        keys = reader.keys(shard)
        if key in keys:
            return shard, keys.index(key)
        seen += keys[: max(0, _COMPARED_KEYS - len(seen))]
    near = difflib.get_close_matches(key, seen, 3, 0.0)
    raise UserError(
        f"the cache {reader.place} holds no image of this key",
        got=key,
        expected=f"one of its keys, such as {', '.join(near) or 'none: it is empty'}",
        hint="keys are the names in the tars without their endings",
    )


def _made_by(options: Options, reader: CacheReader) -> tuple[dict[str, Teacher], ShardSet | None]:
    """The recipe's teachers by layer of the cache that they made, and the images."""
    recipe = options.recipe
    if recipe is None:
        source = options.source
        return {}, None if source is None else open_shards(SourceConfig(shards=parse_place(source)))
    if options.source is not None:
        recipe = recipe.model_copy(update={"source": SourceConfig(shards=parse_place(options.source))})
    # One image: not worth a GPU, which may be in use.
    parts = prepare(recipe.model_copy(update={"run": recipe.run.model_copy(update={"device": "cpu"})}))
    check_same(reader.manifest, parts.manifest)
    taught = parts.layers.keys() & reader.layers.keys()
    for name in taught:
        check_same_layer(reader.layers[name], parts.layers[name])
    return {name: parts.teachers[name] for name in taught}, parts.source


def _named(folders: Sequence[Path]) -> dict[str, Path]:
    """Run folders by a title of their column: the last part of the path, or all of it where that is not enough."""
    short = Counter(folder.name for folder in folders)
    return {folder.name if short[folder.name] == 1 else str(folder): folder for folder in folders}


def _stored(reader: CacheReader, layer: str, shard: str, row: int, numbers: Collection[int]) -> dict[int, Records]:
    """The records of an image in a layer by view, of those of `numbers` that the layer holds."""
    found: dict[int, Records] = {}
    for info in reader.by_shard(layer).get(shard, ()):
        if wanted := [number for number in info.unit.views if number in numbers]:
            for number, records in reader.each_view(info, wanted):
                found[number] = {name: values[row] for name, values in records.items()}
    return found


def _seen(reader: CacheReader, source: ShardSet | None, shard: str, row: int, options: Options) -> _Seen:
    """Draw the first views again where the images are at hand, and compare them with the stored digests."""
    held = sorted(number for info in reader.by_shard()[shard] for number in info.unit.views)[: options.views]
    digests = {number: int(each[DIGEST]) for number, each in _stored(reader, VIEWS, shard, row, held).items()}
    numbers, seed = list(digests), int(reader.manifest.views["seed"])
    keys = torch.tensor([view_key(seed, options.key, number) for number in numbers], dtype=torch.int64)
    law = law_of(reader.manifest.views, reader.manifest.environment)
    named = [(options.key, number) for number in numbers]
    if source is None:
        if law.pairs is not None:  # the identity of a mixed view is that of both images
            raise UserError("views of this cache are mixed with those of other images", hint="name them with --source")
        return _Seen(numbers, keys, [SeenView(n, digests[n], None, None) for n in numbers], named, {}, None)
    own = source.by_name().get(shard)
    if own is None or own.content_hash != reader.manifest.shards[shard].content_hash:
        raise CacheMismatch(
            f"the source's shard {shard} is not the one the teacher saw" if own else "the source lacks a shard",
            got=own.content_hash if own else ", ".join(list(source.by_name())[:3]),
            expected=reader.manifest.shards[shard].content_hash if own else shard,
            hint="name the shards that the cache was made from with --source",
        )
    sizes = [layout.size_of(name, reader.manifest) for name in reader.view_layers if name != VIEWS]
    lost = None if law.pairs is None else lost_partners(reader.by_shard())
    views = ImageViews((own,), law, seed, lost, [law.at(size) for size in sizes])
    sample = own.members().keys.index(options.key)
    batch = views.batch(np.array([[0, sample, n] for n in numbers], dtype=np.int64))
    if batch.unreadable:
        raise SourceError(f"image '{options.key}' can no longer be read", got=batch.unreadable[0][1])
    cells = [
        SeenView(
            number, digests[number], rendered, ViewCell(number, view, law.steps(options.key, number), pixels, None)
        )
        for number, rendered, view, pixels in zip(
            numbers, low_digests(batch).tolist(), batch.views, batch.pixels.numpy(), strict=True
        )
    ]
    pixels = {size: batch.at(size) for size in (law.size, *sizes)}
    return _Seen(numbers, batch.view_keys, cells, named, pixels, decode(own.read(sample)).numpy())


@torch.no_grad()
def _layer(
    reader: CacheReader,
    layer: Layer,
    at: tuple[str, int],
    seen: _Seen,
    teacher: Teacher | None,
    students: Mapping[str, TrainedStudent],
    lines: int,
) -> LayerPicture:
    """What a layer stores of the views, beside what its teacher and the students say."""
    records = _stored(reader, layer.name, *at, seen.numbers)
    about = {
        "teacher": f"{layer.teacher['name']}, {', '.join(layer.target['taps'])}, licence {licence(layer.teacher)}",
        "codec": f"{layer.target['name']} version {layer.target['version']}",
        "arrays": "; ".join(f"{a} {dtype} {list(shape)}" for a, (dtype, shape) in reader.arrays(layer.name).items()),
    }
    places = [place for place, number in enumerate(seen.numbers) if number in records]
    if not places:
        return LayerPicture(about | {"records": "none of these views"}, [], [], {})
    learners = {name: student for name, student in students.items() if layer.name in student.layers}
    # A student that learns a part of the records is compared on that part.
    targets = next((student.targets[layer.name] for student in learners.values()), TargetsConfig())
    kind, keys = opened_kind(reader, layer, targets, _CPU), seen.keys[places]
    numbers = [seen.numbers[place] for place in places]
    arrays = {
        name: torch.from_numpy(np.stack([records[number][name] for number in numbers])) for name in records[numbers[0]]
    }
    stored: Target = kind.decode(arrays, keys, layer.shapes)
    pixels = {size: each[places] for size, each in seen.pixels.items()}
    named = [seen.named[place] for place in places]
    columns: dict[str, Target] = {}
    kept = visible_patches(layer.mask, named, layer.shapes.grid, _CPU)
    if teacher is not None and pixels:
        drops = drawn_drops(teacher, keys)
        tapped = teacher(pixels[teacher.config.img_size], taps=kind.taps, kept=kept, drops=drops)
        columns[TEACHER] = kind.exact(tapped)
    columns[STORED] = stored
    losses = {}
    for name, student in learners.items():
        if not pixels:
            continue
        answers = student.answers(pixels[student.size], named)[layer.name]
        columns[name] = kind.answered(answers, layer.shapes)
        found = kind.losses(answers, stored)
        losses[name] = {f"{kind.measure} {loss}": float(value.mean()) for loss, value in found.items()}
    shown = pixels.get(layout.size_of(VIEWS, reader.manifest))
    pictures = list(examples(kind, layer.shapes, columns, shown, lines, len(places), kept))
    return LayerPicture(about, list(columns), pictures, losses)
