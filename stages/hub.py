"""`tinymim hub`: push caches and trained models to the Hugging Face hub, and pull them.

A cache becomes a dataset repository of tars, which `hf://datasets/OWNER/NAME` reads in place. A run becomes a model
repository, which timm loads as `hf-hub:OWNER/NAME`.
"""

import json
import re
import tempfile
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Final

from tinymim.configs.errors import StoreError, UserError, first_line
from tinymim.models.checkpoints import read_metadata
from tinymim.models.files import RANDOM
from tinymim.stages.cache import copy, pack
from tinymim.stages.cache.info import describe
from tinymim.stages.pages.card import card, licence, model_card
from tinymim.stages.run.folder import (
    BEST_NAME,
    ENCODER_NAME,
    EVALUATION_NAME,
    PROJECTOR_NAME,
    RECIPE_NAME,
    STUDENT_NAME,
    TRAINED_NAME,
    VERSIONS_NAME,
    read_metrics,
)
from tinymim.stages.run.progress import logger
from tinymim.storage.catalog import resolve
from tinymim.storage.hub import explained
from tinymim.storage.packed import CARD, INDEX
from tinymim.storage.reader import CacheReader

REPO: Final = r"(?:hf://)?(?:(?P<kind>datasets|models)/)?(?P<name>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w.-]+))?"
# Licences that let anyone share what is made from the work; the non-commercial ones, without selling it.
_SHARED: Final = re.compile(
    r"apache-2\.0|mit|isc|bsd(-[23]-clause)?|cc0-1\.0|unlicense|cc-by(-nc)?(-sa)?-\d\.\d|openrail|afl-3\.0",
    re.IGNORECASE,
)


def push(
    source: str | Path,
    repo: str,
    *,
    public: bool = False,
    allow_licence: Collection[str] = (),
    images_licence: str | None = None,
    message: str | None = None,
) -> dict[str, Any]:
    """Push a cache, packed or not, or a trained model to a repository, which is made if it does not exist.

    Args:
        source: a cache (folder or URL), a run folder with finished weights, or a folder that timm loads.
        repo: OWNER/NAME.
        public: make a new repository public.
        allow_licence: licences of teachers that are not known to let you share what is made from their weights, and
            that you have read.
        images_licence: the licence of the images, for a cache's card.
        message: the message of the commit.

    Returns:
        repo, kind, url, commit, files and bytes, as JSON values.

    Raises:
        UserError: there is nothing to push, or a teacher's licence may forbid it.
        StoreError: the hub cannot be reached or refuses.
    """
    match = re.fullmatch(REPO, repo)
    if match is None or match["revision"]:
        raise UserError("this is no repository of the hub", got=repo, expected="OWNER/NAME")
    weights = _weights_of(Path(source)) if "://" not in str(source) else None
    kind = "dataset" if weights is None else "model"
    if match["kind"] not in (None, f"{kind}s"):
        raise UserError(f"{source} becomes a {kind} repository", got=repo, expected=match["name"])
    if weights is not None:
        files, text, licences = _of_model(Path(source), weights)
        _require_licences(licences, allow_licence)
        return _upload(match["name"], kind, {**files, CARD: text.encode()}, public, message)
    place = CacheReader(resolve(source)).place  # refuses format 1
    info = describe(place)
    _require_licences({licence(layer["teacher"]) for layer in info["layers"] if "teacher" in layer}, allow_licence)
    text = card(info, images_licence)
    beside = place.parent if isinstance(place, Path) else None
    with tempfile.TemporaryDirectory(prefix=".tinymim-push-", dir=beside) as made:
        folder = Path(place) if isinstance(place, Path) and (place / INDEX).is_file() else Path(made)
        if folder == Path(made):
            pack.run(place, folder)
        found: dict[str, Path | bytes] = {path.name: path for path in sorted(folder.iterdir()) if path.name != CARD}
        return _upload(match["name"], kind, {**found, CARD: text.encode()}, public, message)


def pull(repo: str, target: str | Path) -> dict[str, Any]:
    """Fetch a repository: a cache is unpacked and compared with its digests, and has the bytes that were pushed.

    Args:
        repo: OWNER/NAME, or hf://[datasets/]OWNER/NAME[@REVISION].
        target: a new folder; for a cache also a URL. A stopped pull of a cache resumes.

    Returns:
        repo, kind, target, and the report of the copy for a cache, as JSON values.

    Raises:
        StoreError: there is no such repository, or the hub cannot be reached.
        UserError: `target` holds something else.
    """
    match = re.fullmatch(REPO, repo)
    if match is None:
        raise UserError("this is no repository of the hub", got=repo, expected="OWNER/NAME[@REVISION]")
    from huggingface_hub import HfApi, snapshot_download

    name, revision = match["name"], match["revision"]
    with explained(repo):
        is_cache = match["kind"] == "datasets" or (
            match["kind"] is None and HfApi().repo_exists(name, repo_type="dataset")
        )
    if is_cache:
        place = f"hf://datasets/{name}" + (f"@{revision}" if revision else "")
        return {"repo": name, "kind": "dataset", "target": str(target), "copy": copy.run(place, target)}
    folder = Path(target)
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"{folder} is not empty", hint="name a new folder")
    with explained(repo):
        snapshot_download(name, revision=revision, local_dir=folder)
    return {"repo": name, "kind": "model", "target": str(folder)}


def _upload(
    name: str, kind: str, files: Mapping[str, Path | bytes], public: bool, message: str | None
) -> dict[str, Any]:
    """Commit files to a repository, all in one commit."""
    from huggingface_hub import CommitOperationAdd, HfApi

    size = sum(len(each) if isinstance(each, bytes) else each.stat().st_size for each in files.values())
    logger.info(f"hub push: {len(files)} files, {size:,} bytes, to the {kind} repository {name}")
    api = HfApi(library_name="tinymim")
    with explained(name):
        api.create_repo(name, repo_type=kind, private=not public, exist_ok=True)
        operations = [CommitOperationAdd(path, each) for path, each in files.items()]
        commit = api.create_commit(
            name, operations, repo_type=kind, commit_message=message or "Push with tinymim", num_threads=2
        )
    place = f"datasets/{name}" if kind == "dataset" else name
    return {
        "repo": name,
        "kind": kind,
        "url": f"hf://{place}",
        "commit": commit.oid,
        "files": len(files),
        "bytes": size,
    }


# ---------------------------------------------------------------- licences


def _require_licences(licences: Collection[str], allowed: Collection[str]) -> None:
    """Raises UserError for a licence that is not known to permit sharing, unless it is named in `allowed`."""
    refused = sorted({each for each in licences if not _SHARED.fullmatch(each.strip())} - set(allowed))
    if refused:
        raise UserError(
            "the licence of a teacher may forbid to share what is made from its weights",
            got="; ".join(refused),
            expected="a licence that is known to permit it, such as apache-2.0, mit or cc-by-nc-4.0",
            hint=f"read it; if it permits this push, add {' '.join(f'--allow-licence {each!r}' for each in refused)}",
        )


# ---------------------------------------------------------------- models


def _weights_of(source: Path) -> Path | None:
    """The file of weights in a run folder or a folder for timm; None: it is none."""
    names = (STUDENT_NAME, ENCODER_NAME, BEST_NAME, "model.safetensors")
    return next((source / name for name in names if (source / name).is_file()), None)


def _of_model(source: Path, weights: Path) -> tuple[dict[str, Path | bytes], str, set[str]]:
    """The files of a model repository, its card, and the licences of the teachers, or of the weights it began from."""
    folder = weights.with_suffix("") if weights.name != "model.safetensors" else weights.parent
    files: dict[str, Path | bytes] = {}
    for path in (
        folder / "config.json",
        folder / "model.safetensors",
        folder / PROJECTOR_NAME,
        *(source / name for name in (RECIPE_NAME, VERSIONS_NAME, TRAINED_NAME, EVALUATION_NAME)),
    ):
        if path.is_file():
            files[path.name] = path
    metadata = read_metadata(weights)
    try:
        teachers: dict[str, Any] = json.loads(metadata.get("teachers", "{}"))
        licences = {licence(teacher) for teacher in teachers.values()}
        if not teachers and metadata.get("made_by") != "tinymim pretrain-mae":
            start = json.loads(metadata.get("start", "{}"))  # fine-tuned models do not state theirs
            licences = set() if start.get("weights") == RANDOM else {licence(start)}
        config = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise StoreError(f"{source} does not describe its weights", got=first_line(error)) from error
    metrics = read_metrics(source)
    return files, model_card(config, metadata, teachers, sorted(licences), metrics[-1] if metrics else {}), licences
