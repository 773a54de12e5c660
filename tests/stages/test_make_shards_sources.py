"""All that goes into make-shards is taken, or counted and named: folders and tars of people and of other tools."""

import io
import json
import os
import shlex
import shutil
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tinymim import cli
from tinymim.configs.errors import SourceError, UserError
from tinymim.configs.load import load_recipe
from tinymim.pipeline.index import INDEX_NAME
from tinymim.stages import cache_teacher, train_student
from tinymim.stages.pages.shards import next_commands
from tinymim.tests.stages.test_make_shards import contents, fill, make, picture
from tinymim.tests.stages.tiny import cache_recipe, copied, student_recipe


def labels(folder: Path) -> dict[str, int]:
    return {key: label for key, (_, label) in contents(folder).items()}


def left_out(index: dict[str, Any]) -> dict[str, int]:
    return {row["reason"]: row["count"] for row in index["report"]["skipped"]}


def tar(path: Path, files: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as packed:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            packed.addfile(info, io.BytesIO(data))
    return path


def refused(source: Path, *matches: str, **options: Any) -> None:
    """Refused with a message that has all of `matches`, and nothing written."""
    target = source.parent / "refused"
    with pytest.raises(SourceError) as caught:
        make(source, target, **options)
    for match in matches:
        assert match in str(caught.value)
    assert not target.exists()


CLASSES = {f"{name}/{i}.jpg": picture(i) for i, name in enumerate(["a", "b", "c"] * 2)}


# ---------------------------------------------------------------- folders


def test_links_to_class_folders_are_followed_and_loops_cut(tmp_path: Path) -> None:
    source = fill(tmp_path / "src", CLASSES)
    elsewhere = fill(tmp_path / "elsewhere", {"deep/9.jpg": picture(9)})
    (source / "bb").symlink_to(elsewhere)
    (source / "a" / "loop").symlink_to(source)
    (source / "a" / "self").symlink_to(source / "a")
    (elsewhere / "deep" / "up").symlink_to(elsewhere)
    (source / "c" / "again.jpg").symlink_to(source / "a" / "0.jpg")
    index = make(source, tmp_path / "dst")
    assert index["classes"] == ["a", "b", "bb", "c"]
    assert labels(tmp_path / "dst")["bb/deep/9"] == 2 and labels(tmp_path / "dst")["c/again"] == 3
    assert left_out(index) == {"link to a folder above itself": 3} and index["num_samples"] == 8


FORMATS = {"bmp": "BMP", "gif": "GIF", "tif": "TIFF", "tiff": "TIFF", "jfif": "JPEG", "jpe": "JPEG", "avif": "AVIF"}


def test_every_format_that_is_decoded_is_taken_and_the_rest_counted_by_ending(tmp_path: Path) -> None:
    files = {f"a/{ending}.{ending.upper()}": picture(1, fmt) for ending, fmt in FORMATS.items()}
    files |= {
        "a/x.jpg": picture(2),
        "b/only.gif": picture(3, "GIF"),
        "bb/only.heic": b"?",
        "c/y.png": picture(4, "PNG"),
    }
    files |= {"a/clip.mp4": b"?", "a/photos.zip": b"PK", "notes/list.txt": b"?", "a/raw.NEF": b"?", "README": b"?"}
    index = make(fill(tmp_path / "src", files), tmp_path / "dst")
    assert index["classes"] == ["a", "b", "bb", "c"], "a class keeps its number where no picture of it can be read"
    assert index["num_samples"] == len(FORMATS) + 3 and labels(tmp_path / "dst")["c/y"] == 3
    assert index["report"]["classes"] == {"a": len(FORMATS) + 1, "b": 1, "bb": 0, "c": 1}
    assert "bb" in index["report"]["near_empty_classes"]
    assert left_out(index) == {
        "picture in a format that is not read (.heic); convert it to JPEG or PNG": 1,
        "picture in a format that is not read (.nef); convert it to JPEG or PNG": 1,
        "archive that is not opened (.zip); unpack it": 1,
        "no image by its ending": 3,
    }
    seen = index["report"]["seen"]
    assert seen["heic"] == seen["mp4"] == seen["(none)"] == 1 and seen["jpg"] == 1 and seen["gif"] == 2
    again = make(tmp_path / "dst", tmp_path / "again")  # and out of tars
    assert contents(tmp_path / "again") == contents(tmp_path / "dst") and again["classes"] == index["classes"]


def test_folders_of_systems_are_no_classes(tmp_path: Path) -> None:
    junk = [".ipynb_checkpoints", ".Trash-0", "@eaDir", "__MACOSX", "lost+found", ".thumbnails"]
    files = CLASSES | {f"{name}/x.jpg": picture(9) for name in junk}
    files |= {"a/._0.jpg": b"AppleDouble", "a/Thumbs.db": b"?", "b/@eaDir/1.jpg/thumb.jpg": picture(9)}
    index = make(fill(tmp_path / "src", files), tmp_path / "dst")
    assert index["classes"] == ["a", "b", "c"] and index["num_samples"] == 6
    assert left_out(index) == {"hidden or system folder": 7, "hidden or system file": 2}


def test_a_picture_beside_class_folders_is_a_choice(tmp_path: Path) -> None:
    source = fill(tmp_path / "src", CLASSES | {"cover.jpg": picture(9)})
    refused(
        source, "1 image(s) lie beside 3 folder(s)", "'cover.jpg' beside a, b, c", "--labels folders", "--labels none"
    )
    index = make(source, tmp_path / "folders", labels="folders")
    assert index["classes"] == ["a", "b", "c"] and index["num_samples"] == 6
    assert left_out(index) == {"image beside the class folders": 1}
    index = make(source, tmp_path / "none", labels="none")
    assert index["classes"] == [] and set(labels(tmp_path / "none").values()) == {-1} and index["num_samples"] == 7


@pytest.mark.parametrize("sets", [("train", "val"), ("Train",), ("training", "validation", "test")])
@pytest.mark.parametrize("above", ["", "ILSVRC/Data/"])
def test_a_root_of_several_sets_is_recognised(tmp_path: Path, sets: tuple[str, ...], above: str) -> None:
    files = {f"{above}{name}/{path}": data for name in sets for path, data in CLASSES.items()}
    source = fill(tmp_path / "src", files)
    first = source / above / min(sets)
    refused(source, "set", f"`tinymim make-shards {first} DST`", "--labels folders", *sets)
    assert make(first, tmp_path / "one")["classes"] == ["a", "b", "c"]
    assert make(source, tmp_path / "all", labels="folders")["num_samples"] == 6 * len(sets)


def test_sets_inside_every_class_are_recognised(tmp_path: Path) -> None:
    files = {f"{name}/{part}/{i}.jpg": picture(i) for i, name in enumerate("ab") for part in ("train", "test")}
    source = fill(tmp_path / "src", files)
    refused(source, "every class", "test, train", "--labels folders")
    assert make(source, tmp_path / "all", labels="folders")["classes"] == ["a", "b"]


def test_a_train_among_other_vehicles_is_a_class(tmp_path: Path) -> None:
    files = {f"{name}/{i}.jpg": picture(i) for i, name in enumerate(["bus", "car", "train"])}
    assert make(fill(tmp_path / "src", files), tmp_path / "dst")["classes"] == ["bus", "car", "train"]


def test_one_folder_around_all_classes_is_recognised(tmp_path: Path) -> None:
    source = fill(tmp_path / "src", {f"images/{path}": data for path, data in CLASSES.items()})
    refused(source, "all images lie in one folder, 'images'", f"make-shards {source / 'images'} DST", "--labels none")
    one = fill(tmp_path / "one", {"cats/1.jpg": picture(1), "cats/2.jpg": picture(2)})
    assert make(one, tmp_path / "dst")["classes"] == ["cats"]


def test_what_cannot_be_read_is_counted(tmp_path: Path) -> None:
    source = fill(tmp_path / "src", {"a.jpg": picture(1), "b.jpg": picture(2)})
    (source / "gone.jpg").symlink_to(source / "nothing.jpg")
    (source / "ring.jpg").symlink_to(source / "ring.jpg")
    os.mkfifo(source / "pipe.jpg")
    index = make(source, tmp_path / "dst")
    assert index["num_samples"] == 2 and left_out(index) == {"link to nothing": 2, "no regular file": 1}


def test_images_that_vanish_or_fail_while_they_are_read_are_listed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = fill(tmp_path / "src", {"a.jpg": picture(1), "b.jpg": picture(2)})
    original = Path.read_bytes

    def failing(path: Path) -> bytes:
        if path.name == "a.jpg":
            raise OSError(5, "Input/output error")
        return original(path)

    monkeypatch.setattr(Path, "read_bytes", failing)
    index = make(source, tmp_path / "dst")
    assert index["unreadable"] == [{"origin": "a.jpg", "reason": "[Errno 5] Input/output error"}]
    assert left_out(index) == {"unreadable image": 1}


# ---------------------------------------------------------------- tars


def test_half_a_shard_is_never_packed_in_silence(drawn_shards: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(drawn_shards, tmp_path / "src"))
    path = source / "shard-000000.tar"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2] + bytes(len(whole) - len(whole) // 2))
    refused(source, "shard-000000.tar")
    (source / INDEX_NAME).unlink()
    refused(source, "shard-000000.tar", "ends in zeros")
    path.write_bytes(whole + (source / "shard-000001.tar").read_bytes())
    refused(source, "bytes follow the end of the archive shard-000000.tar")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_samples": 12}, "shard-000000.tar is not the file that index.json describes\n  got: 25 images"),
        ({"content_hash": "sha256:" + "0" * 64}, "expected: sha256:000"),
        ({"name": "lost.tar"}, "1 of the 3 shards of index.json are missing\n  got: lost.tar"),
    ],
)
def test_an_index_that_differs_from_its_tars_is_refused(
    drawn_shards: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    source = Path(shutil.copytree(drawn_shards, tmp_path / "src"))
    index = json.loads((source / INDEX_NAME).read_text())
    index["shards"][0] |= change
    del index["num_samples"]
    (source / INDEX_NAME).write_text(json.dumps(index))
    refused(source, message)


def test_screenshots_in_a_tar_are_taken_or_refused(tmp_path: Path) -> None:
    shot = "Screenshot 2024-01-01 at 10.15.{}.jpg"
    source = tar(tmp_path / "src" / "x.tar", {shot.format(30): picture(1), "b.jpg": picture(2)}).parent
    assert make(source, tmp_path / "one")["num_samples"] == 2
    assert set(contents(tmp_path / "one")) == {"Screenshot 2024-01-01 at 10_15_30", "b"}
    tar(source / "x.tar", {shot.format(30): picture(1), shot.format(31): picture(2)})
    refused(source, "webdataset's rule", "--last-dot")
    assert make(source, tmp_path / "two", last_dot=True)["num_samples"] == 2


def test_samples_of_two_pictures_are_a_choice(tmp_path: Path) -> None:
    files = {"a.jpg": picture(1), "a.png": picture(2, "PNG"), "a.seg.png": picture(3, "PNG"), "a.cls": b"4"}
    source = tar(tmp_path / "src" / "x.tar", files).parent
    refused(source, "sample 'a' of shard x.tar has several images", "--prefer jpg")
    index = make(source, tmp_path / "dst", prefer="png")
    assert contents(tmp_path / "dst") == {"a": (files["a.png"], 4)}
    assert left_out(index) == {"further picture of a sample": 2}


def test_tars_of_any_case_are_read_and_compressed_ones_named(tmp_path: Path) -> None:
    source = tar(tmp_path / "src" / "X.TAR", {"a.jpg": picture(1)}).parent
    (source / "y.tar.gz").write_bytes(b"\x1f\x8b")
    index = make(source, tmp_path / "dst")
    assert index["num_samples"] == 1 and left_out(index) == {"archive that is not opened (.gz); unpack it": 1}
    (source / "X.TAR").unlink()
    refused(source, "no images found", "1 .gz", "decompress the tars first")
    shutil.copy(source / "y.tar.gz", source / "z.tar")
    refused(source, "shard z.tar is compressed", "gzip")


def test_tars_in_a_sub_folder_or_in_a_tar_are_named(tmp_path: Path) -> None:
    path = tar(tmp_path / "src" / "train" / "x.tar", {"a.jpg": picture(1)})
    refused(tmp_path / "src", "no images found", "1 .tar", f"make-shards {path.parent} DST")
    tar(tmp_path / "imagenet" / "ILSVRC2012_img_train.tar", {"n01440764.tar": path.read_bytes()})
    refused(tmp_path / "imagenet", "no images found", "ILSVRC2012_img_train.tar holds tars: unpack it")


def test_tars_beside_images_are_a_choice(tmp_path: Path) -> None:
    source = tar(tmp_path / "src" / "x.tar", {"a.jpg": picture(1)}).parent
    fill(source, {"b.jpg": picture(2)})
    refused(source, "holds both tars and images", "x.tar and b.jpg")


def test_links_and_odd_members_of_a_tar(tmp_path: Path) -> None:
    path = tar(tmp_path / "src" / "x.tar", {"a.jpg": picture(1), "a.cls": b"1", "photo.heic": b"?", "in.zip": b"?"})
    with tarfile.open(path, "a") as packed:
        for name, target, kind in (("b.jpg", "a.jpg", tarfile.LNKTYPE), ("c.jpg", "gone.jpg", tarfile.SYMTYPE)):
            link = tarfile.TarInfo(name)
            link.type, link.linkname = kind, target
            packed.addfile(link)
    index = make(path.parent, tmp_path / "dst")
    assert {key: data for key, (data, _) in contents(tmp_path / "dst").items()} == {"a": picture(1), "b": picture(1)}
    assert left_out(index) == {
        "unreadable image: a link to 'gone.jpg', which is not in the tar": 1,
        "picture in a format that is not read (.heic); convert it to JPEG or PNG": 1,
        "archive that is not opened (.zip); unpack it": 1,
    }
    assert index["report"]["unlabelled"] == 1


@pytest.mark.parametrize("data", [{}, {"notes.txt": b"?"}])
def test_a_tar_without_an_image_is_named(tmp_path: Path, data: dict[str, bytes]) -> None:
    source = tar(tmp_path / "src" / "x.tar", {"a.jpg": picture(1)}).parent
    tar(source / "y.tar", data)
    assert left_out(make(source, tmp_path / "dst"))["tar without an image"] == 1


# ---------------------------------------------------------------- labels in tars


def test_a_tar_for_each_class_is_known_from_imagenet_and_an_option_for_others(tmp_path: Path) -> None:
    for name in ("n01440764", "n01443537"):
        tar(tmp_path / "imagenet" / f"{name}.tar", {f"{name}_{i}.JPEG": picture(i) for i in range(2)})
        tar(tmp_path / "other" / f"class-{name}.tar", {f"{name}_{i}.JPEG": picture(i) for i in range(2)})
    index = make(tmp_path / "imagenet", tmp_path / "dst")
    assert index["classes"] == ["n01440764", "n01443537"] and list(labels(tmp_path / "dst").values()) == [0, 0, 1, 1]
    assert make(tmp_path / "other", tmp_path / "none")["classes"] == []
    index = make(tmp_path / "other", tmp_path / "tars", labels="tars")
    assert index["classes"] == ["class-n01440764", "class-n01443537"]


def test_class_folders_in_a_tar_are_a_choice(tmp_path: Path) -> None:
    source = tar(tmp_path / "src" / "x.tar", {f"data/{path}": data for path, data in CLASSES.items()}).parent
    refused(source, "lie in 3 folders and have no .cls", "a, b, c", "--labels folders", "--labels none")
    index = make(source, tmp_path / "dst", labels="folders")
    assert index["classes"] == ["a", "b", "c"] and index["report"]["labels"] == "class folders in the tars"
    assert labels(tmp_path / "dst")["data/c/5"] == 2
    assert make(source, tmp_path / "none", labels="none")["report"]["unlabelled"] == 6


@pytest.mark.parametrize("in_tar", [True, False])
def test_labels_of_json_and_text_are_read_by_an_option_and_else_named(tmp_path: Path, in_tar: bool) -> None:
    rows = [{"label": 5, "name": "dog", "wide": 2**40}, {"label": 0, "name": "ant", "wide": True}]
    files: dict[str, bytes] = {}
    for number, row in enumerate(rows):
        files |= {
            f"{number}.jpg": picture(number),
            f"{number}.json": json.dumps(row).encode(),
            f"{number}.txt": b"10\n",
        }
    source = tmp_path / "src"
    if in_tar:
        tar(source / "x.tar", files)
    else:
        fill(source, files)
    index = make(source, tmp_path / "none")
    assert "--labels json:FIELD" in index["report"]["notes"][0] and ".json and .txt" in index["report"]["notes"][0]
    make(source, tmp_path / "number", labels="json:label")
    assert labels(tmp_path / "number") == {"0": 5, "1": 0}
    assert make(source, tmp_path / "name", labels="json:name")["classes"] == ["ant", "dog"]
    assert labels(tmp_path / "name") == {"0": 1, "1": 0}
    make(source, tmp_path / "text", labels="txt")
    assert labels(tmp_path / "text") == {"0": 10, "1": 10}
    refused(source, "2 of 2 images have no label of the form json:wide", labels="json:wide")
    refused(source, "2 of 2 images have no label of the form json:nothing", labels="json:nothing")


@pytest.mark.parametrize(
    "text", [b"", b"[" * 99_999, b"\xff", b"[1]", b'{"label": -1}', b'{"label": [1]}', b"{" * 2**21]
)
def test_labels_that_are_none_are_refused(tmp_path: Path, text: bytes) -> None:
    files = {"a.jpg": picture(1), "a.json": b'{"label": 1}', "b.jpg": picture(2), "b.json": text}
    source = tar(tmp_path / "src" / "x.tar", files).parent
    refused(source, "1 of 2 images have no label of the form json:label", "x.tar:b", labels="json:label")


# ---------------------------------------------------------------- both stages


def test_a_tar_without_an_image_is_refused_by_both_stages(home: Path) -> None:
    tar(home / "shards" / "zz.tar", {"notes.txt": b"?"})
    with pytest.raises(SourceError, match=r"zz.tar holds no image\n.*\n.*\n  hint: remove it"):
        cache_teacher.run(cache_recipe(home))
    with pytest.raises(SourceError, match=r"zz.tar holds no image\n.*\n.*\n  hint: remove it"):
        train_student.run(student_recipe(home))
    (home / "shards" / "zz.tar").unlink()
    train_student.run(student_recipe(home, optim={"batch_size": 8, "steps": 1, "base_lr": 0.1}))


def test_stage_one_commits_nothing_of_a_shard_that_its_index_does_not_describe(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    home = copied(made, tmp_path / "home")
    shutil.rmtree(home / "cache")
    path = home / "shards" / "shard-000001.tar"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)  # of equal size
    with pytest.raises(UserError, match=r"shard-000001\.tar"):
        cache_teacher.run(cache_recipe(home))
    commits = sorted(path.parent.name for path in (home / "cache" / "layers").glob("*/*/v*.json"))
    assert commits == ["shard-000000", "shard-000002"]
    assert "is not the file that index.json describes" in capsys.readouterr().err


# ---------------------------------------------------------------- the next commands


@pytest.mark.parametrize(
    ("count", "short", "batch"), [(1, 10, 1), (3, 10, 1), (36, 500, 16), (500, 64, 32), (3068, 64, 32)]
)
def test_the_next_commands_are_recipes_that_fit(tmp_path: Path, count: int, short: int, batch: int) -> None:
    index = {"num_samples": count, "report": {"short_side": {"median": short}}}
    target = tmp_path / "my shards"
    for line in next_commands(index, target):
        verb, recipe, *settings = shlex.split(line)[1:]
        loaded: Any = load_recipe(Path(recipe), verb, [each for each in settings if each != "--set"])
        assert loaded.source.shards == target and loaded.source.pattern == "*.tar"
        if verb == "train-student":
            assert loaded.optim.batch_size == batch
    large = next_commands({"num_samples": 1_281_167, "report": {"short_side": {"median": 375}}}, target)
    assert "imagenet-mae-l-cache" in large[0] and "optim.batch_size=4096" in large[1]


def test_the_next_commands_run_as_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    files = {f"{'ab'[i % 2]}/{i}.png": photo(i) for i in range(6)}
    index = make(fill(tmp_path / "photos", files), tmp_path / "shards")
    for line in next_commands(index, Path("shards")):
        shorter = ["--set", "optim.steps=2"] if "train-student" in line else []
        assert cli.run_command([*shlex.split(line)[1:], *shorter]) == 0
    assert (tmp_path / "runs" / "shards" / "student.safetensors").exists()


def photo(seed: int) -> bytes:
    pixels = np.random.Generator(np.random.Philox(seed)).integers(0, 255, (90, 80, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()
