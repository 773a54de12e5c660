"""The report of make-shards: one dictionary on screen and page, foreign text escaped on both."""

import re
from pathlib import Path
from typing import Any

import pytest

from tinymim.stages.pages.shards import format_report, headline, report_page
from tinymim.tests.stages.test_make_shards import fill, make, photograph, picture

HOSTILE = "<script>alert(1)</script> \x1b[2J\n&"


def text_of(page: str) -> str:
    return re.sub(r"\s+", " ", re.sub(r"<style>.*?</style>|<[^>]+>", " ", page.replace("<wbr>", ""), flags=re.DOTALL))


@pytest.fixture
def index(tmp_path: Path) -> dict[str, Any]:
    files = {f"many/{i}.jpg": photograph(100 + i, 80) for i in range(25)}
    files |= {"one/cmyk.png": picture(1, "PNG"), "many/cut.jpg": picture(2)[:99], "many/x.heic": b"?"}
    return make(fill(tmp_path / "photos", files), tmp_path / "dst")


def test_screen_and_page_hold_every_part_of_the_report(index: dict[str, Any]) -> None:
    assert headline(index) == "make-shards: 26 images in 1 shard, 1 unreadable"
    parts = ["class folders, 2 classes", "unreadable image", "many/cut.jpg", "heic", "RGB"]
    parts += ["tinymim cache-teacher own-cache", "tinymim train-student own-student", "optim.batch_size=8", "124"]
    for text in (format_report(index, Path("shards")), text_of(report_page(index, Path("shards")))):
        for part in parts:
            assert part in text, part
    assert "near empty  one (1)" in format_report(index, Path("shards"))
    assert "one (near empty)" in report_page(index, Path("shards"))


def test_turned_images_and_one_class_are_said(index: dict[str, Any]) -> None:
    assert "EXIF orientation, which" not in format_report(index, Path("shards"))
    index["report"]["orientations"] = {"1": 20, "6": 5, "8": 1}
    index["report"] |= {"classes": {"only": 26}, "near_empty_classes": []}
    for text in (format_report(index, Path("shards")), text_of(report_page(index, Path("shards")))):
        assert "6 images with an EXIF orientation" in text and "all images are of one class" in text


def test_foreign_text_is_escaped_on_screen_and_page(index: dict[str, Any]) -> None:
    report = index["report"]
    report |= {"classes": {HOSTILE: 3}, "notes": [HOSTILE], "near_empty_classes": [HOSTILE], "seen": {HOSTILE: 1}}
    report["skipped"] = [{"reason": HOSTILE, "count": 1, "first": HOSTILE}]
    index["unreadable"] = [{"origin": HOSTILE + "\udcff", "reason": HOSTILE}]
    index["made_by"]["source"] = HOSTILE
    screen, page = format_report(index, Path(f"a{HOSTILE}")), report_page(index, Path(f"a{HOSTILE}"))
    page.encode()
    assert "<script" not in page and page.count("&lt;script&gt;") >= 8
    for text in (screen, page):
        assert "\x1b" not in text and "\\x1b[2J\\n" in text
    assert not any("alert" in line and not line.startswith("  ") for line in screen.splitlines())


def test_long_lists_are_cut_and_say_so(index: dict[str, Any]) -> None:
    index["report"] |= {"classes": {f"class {i}": i for i in range(1000)}, "near_empty_classes": []}
    screen = format_report(index, Path("x"))
    assert "class 999 999, class 998 998" in screen and "and 992 more" in screen
    page = text_of(report_page(index, Path("x")))
    assert "class 49" in page and "class 50 " not in page and "and 950 more" in page


def test_the_page_is_written_beside_the_shards_or_anywhere(tmp_path: Path) -> None:
    source = fill(tmp_path / "photos", {"a.jpg": picture(1)})
    index = make(source, tmp_path / "dst", report=tmp_path / "page.html")
    assert (tmp_path / "page.html").read_text() == report_page(index, tmp_path / "dst")
