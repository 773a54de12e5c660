"""Pushes to and pulls from a local hub: the same bytes, cards with licences, refusals, and tokens that stay unseen."""

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import safetensors
import timm
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

from tinymim.configs.errors import CheckpointError, StoreError, UserError
from tinymim.models import files
from tinymim.stages import hub, train_student
from tinymim.storage import hub as hub_store
from tinymim.storage.layout import layer_group
from tinymim.storage.reader import CacheReader
from tinymim.storage.store import open_store
from tinymim.tests import hub_server
from tinymim.tests.hub_server import TOKEN, Hub
from tinymim.tests.stages.tiny import cache_recipe, losses, run_in, student_recipe, tree

Json = dict[str, Any]
Run = Callable[..., tuple[int, str, str]]
LOCAL = "unknown (local file)"  # the licence of the drawn set's teacher
EVERY: dict[str, Any] = {"allow_licence": [LOCAL]}
pytestmark = pytest.mark.filterwarnings("ignore")  # of the client, about itself


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub of its own, to which the client of this process is logged in."""
    with hub_server.serve() as running:
        monkeypatch.setattr(constants, "ENDPOINT", running.endpoint)
        template = running.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))
        monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", running.endpoint)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        huggingface_hub.HfFileSystem.clear_instance_cache()
        hub_store._pinned.cache_clear()
        files._from_hub.cache_clear()
        yield running
        huggingface_hub.HfFileSystem.clear_instance_cache()


def test_a_cache_comes_back_byte_identical(made: Path, tmp_path: Path, server: Hub) -> None:
    report = hub.push(made / "cache", "me/mine", images_licence="cc0-1.0", **EVERY)
    assert report["kind"] == "dataset" and report["url"] == "hf://datasets/me/mine"
    repo = server.repos["datasets/me/mine"]
    assert repo.private and sum(map(len, repo.commits[-1].values())) == report["bytes"]
    text = repo.commits[-1]["README.md"].decode()
    assert LOCAL in text and "images (not included): licence **cc0-1.0**" in text
    hub.pull("me/mine", tmp_path / "pulled")
    assert tree(tmp_path / "pulled") == tree(made / "cache")
    assert list((made).glob(".tinymim-push-*")) == []  # the pack beside the cache is gone
    # A packed cache is sent as it is, and a second push of the same is no new content.
    from tinymim.stages.cache import pack

    pack.run(made / "cache", tmp_path / "packed")
    sent = len(server.large)
    hub.push(tmp_path / "packed", "me/mine", **EVERY)
    assert len(server.large) == sent


def test_students_train_from_caches_shards_and_weights_on_the_hub(made: Path, tmp_path: Path, server: Hub) -> None:
    hub.push(made / "cache", "me/cache", **EVERY)
    api = huggingface_hub.HfApi()
    api.create_repo("me/shards", repo_type="dataset")
    api.upload_folder(folder_path=made / "shards", path_in_repo="train", repo_id="me/shards", repo_type="dataset")
    changes: dict[str, Any] = {"optim": {"batch_size": 8, "steps": 4, "base_lr": 0.1}}
    place, shards = "hf://datasets/me/cache", {"shards": "hf://datasets/me/shards@main/train"}
    shards["spool"] = {"folder": tmp_path / "spool"}  # type: ignore[assignment]
    run = run_in(tmp_path / "run-student") | {"log_every": 1}
    train_student.run(student_recipe(made, cache=place, source=shards, run=run, **changes))
    hub_losses = losses(tmp_path)
    run = run_in(tmp_path / "local" / "run-student") | {"log_every": 1}
    train_student.run(student_recipe(made, run=run, **changes))
    assert hub_losses == losses(tmp_path / "local")
    # The student goes there, too: timm loads it, and recipes name its weights.
    report = hub.push(tmp_path / "run-student", "me/student", **EVERY)
    assert report["kind"] == "model"
    held = server.repos["models/me/student"].commits[-1]
    assert {"README.md", "config.json", "model.safetensors", "recipe.yaml"} <= held.keys()
    assert LOCAL in held["README.md"].decode() and "stage: train-student" in held["README.md"].decode()
    hub.pull("me/student", tmp_path / "pulled")
    model: Any = timm.create_model(f"local-dir:{tmp_path / 'pulled'}", pretrained=True)
    own: Any = timm.create_model(f"local-dir:{tmp_path / 'run-student' / 'student'}", pretrained=True)
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(model.eval().forward_features(images), own.eval().forward_features(images))
    fetched = files.weights_file("hf://me/student/model.safetensors").path
    assert fetched.read_bytes() == (tmp_path / "run-student" / "student.safetensors").read_bytes()
    assert files.weights_file("hf://me/student").path == fetched
    with pytest.raises(CheckpointError, match="cannot be fetched"):
        files.weights_file("hf://me/student/absent.safetensors")


def test_a_licence_that_may_forbid_it_is_refused_unless_told(made: Path, tmp_path: Path, server: Hub, run: Run) -> None:
    for source in (made / "cache", made / "run-student"):
        code, _, err = run("hub", "push", source, "me/refused")
        assert code == 2 and "may forbid" in err and f"--allow-licence '{LOCAL}'" in err
        code, _, _ = run("hub", "push", source, "me/refused", "--allow-licence", "other")
        assert code == 2
    assert server.repos == {} and server.large == {}
    for licence in ("apache-2.0", "MIT", "cc-by-nc-4.0", "cc-by-nc-sa-4.0", "bsd-3-clause"):
        hub._require_licences({licence}, ())
    for licence in ("cc-by-nd-4.0", "dinov3-license", "unknown", "other", "proprietary; apache-2.0"):
        with pytest.raises(UserError, match="may forbid"):
            hub._require_licences({licence, "mit"}, ())


@pytest.mark.parametrize(
    ("start", "licences"),
    [
        ({"weights": "random"}, set()),
        ({"weights": "mine.safetensors", "license": LOCAL}, {LOCAL}),
        ({"weights": "hub", "license": "apache-2.0"}, {"apache-2.0"}),
        ({}, {"unknown"}),
    ],
    ids=["random", "file", "hub", "not-stated"],
)
def test_an_encoder_without_a_teacher_has_the_licence_of_its_start(
    start: Json, licences: set[str], made: Path, tmp_path: Path
) -> None:
    shutil.copytree(made / "run-student", tmp_path / "own")
    weights = tmp_path / "own" / "student.safetensors"
    metadata = {"made_by": "tinymim pretrain"} | ({"start": json.dumps(start)} if start else {})
    save_file(load_file(weights), weights, metadata)
    assert hub._of_model(tmp_path / "own", weights)[2] == licences


@pytest.mark.parametrize("stated", [{}, {"license": None}, {"license": ""}], ids=["absent", "null", "empty"])
def test_a_run_that_does_not_state_a_licence_counts_as_unknown(stated: Json, made: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "run-student", tmp_path / "old")
    weights = tmp_path / "old" / "student.safetensors"
    with safetensors.safe_open(weights, "pt") as file:
        metadata = file.metadata()
    teachers = json.loads(metadata["teachers"])
    old = {layer: {"name": own["name"], "weights_sha256": own["weights_sha256"]} for layer, own in teachers.items()}
    metadata["teachers"] = json.dumps({layer: own | stated for layer, own in old.items()})
    save_file(load_file(weights), weights, metadata)
    with pytest.raises(UserError, match="may forbid") as caught:
        hub.push(tmp_path / "old", "me/old")
    assert caught.value.got == "unknown" and "--allow-licence 'unknown'" in str(caught.value.hint)
    _, text, licences = hub._of_model(tmp_path / "old", weights)
    assert licences == {"unknown"} and "licence **unknown**" in text and "None" not in text.partition("## Recipe")[0]


def test_a_cache_that_does_not_state_a_licence_counts_as_unknown(home: Path, server: Hub, run: Run) -> None:
    [layer] = CacheReader(home / "cache").layers.values()
    old = replace(layer, teacher={**layer.teacher, "license": None})
    (home / "cache" / "layers" / layer.name / "zarr.json").write_bytes(layer_group(old))
    code, _, err = run("hub", "push", home / "cache", "me/old")
    assert code == 2 and "got: unknown" in err and "--allow-licence 'unknown'" in err
    assert hub.push(home / "cache", "me/old", allow_licence=["unknown"])["kind"] == "dataset"
    text = server.repos["datasets/me/old"].commits[-1]["README.md"].decode()
    assert "licence **unknown**" in text and 'license_name: "unknown"' in text and "None" not in text
    assert "license unknown" in run("cache", "info", home / "cache")[1]


def test_a_cache_in_format_1_is_refused_with_the_upgrade(run: Run) -> None:
    code, _, err = run("hub", "push", Path(__file__).parents[1] / "data" / "cache_v1", "me/old")
    assert code == 2 and "--format 2" in err


def test_the_token_is_sent_to_the_hub_and_shown_nowhere(made: Path, tmp_path: Path, server: Hub, run: Run) -> None:
    shown: tuple[Any, ...] = run("hub", "push", made / "cache", "me/mine", "--allow-licence", LOCAL, "--public")
    assert shown[0] == 0 and json.loads(shown[1])["repo"] == "me/mine"
    shown += run("--debug", "hub", "pull", "me/mine", tmp_path / "pulled")
    shown += run("--debug", "hub", "pull", "me/absent", tmp_path / "absent")
    assert shown[-3] == 2 and "does not exist" in shown[-1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
        huggingface_hub.HfFileSystem.clear_instance_cache()
        hub_store._pinned.cache_clear()
        shown += run("--debug", "cache", "info", "hf://datasets/me/mine")
    assert f"Bearer {TOKEN}" in server.tokens
    assert TOKEN not in "".join(map(str, shown))
    stored = b"".join(b"".join(files.values()) for repo in server.repos.values() for files in repo.commits)
    assert TOKEN.encode() not in stored


def test_a_repository_is_a_store_that_is_only_read(made: Path, server: Hub) -> None:
    hub.push(made / "cache", "me/mine", **EVERY)
    store = open_store("hf://datasets/me/mine")
    [name] = [entry.path for entry in store.list() if entry.path.endswith(".tar")]
    data = server.repos["datasets/me/mine"].commits[-1][name]
    assert store.exists(name) and not store.exists("absent") and store.read(name, len(data)) == data
    ranges = [(0, 10), (10, 20), (600, 700), (len(data) - 5, len(data) + 5), (len(data) + 9, len(data) + 10)]
    assert [bytes(part) for part in store.read_ranges(name, ranges)] == [data[a:b] for a, b in ranges]
    with pytest.raises(FileNotFoundError):
        store.read("absent", 10)
    with pytest.raises(StoreError, match="can only be read"):
        store.write("new", b"")
    # The commit of the first look stays, whatever is pushed afterwards.
    server.repos["datasets/me/mine"].commits.append({})
    assert store.exists(name)
    with pytest.raises(StoreError, match="does not exist"):
        next(iter(open_store("hf://datasets/me/absent").list()))


@pytest.mark.parametrize("place", ["hf://mine", "hf://datasets/mine", "hf://a/b?c", "hf://token@host/a"])
def test_wrong_places(place: str, run: Run) -> None:
    code, _, err = run("cache", "info", place)
    assert code == 2 and "neither a folder nor an object store" in err


def test_no_cache_is_written_to_the_hub_but_by_push(made: Path) -> None:
    with pytest.raises(ValueError, match="only read: write to a folder"):
        cache_recipe(made, cache="hf://datasets/me/mine")


def test_offline_the_hub_is_not_asked(server: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(StoreError, match="cannot be reached") as caught:
        open_store("hf://datasets/me/mine").exists("cache.json")
    assert caught.value.hint == "unset HF_HUB_OFFLINE" and server.requests == []
