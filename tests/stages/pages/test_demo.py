"""The report says what it is given: escaped, self-contained, in plain ASCII on the terminal."""

import re
from pathlib import Path

import numpy as np
import torch

from tinymim.stages.pages.demo import (
    RELATIONS_NAME,
    Arm,
    Report,
    page,
    table_cells,
    text_table,
    write_report,
)
from tinymim.stages.pages.pictures import STORED, Example
from tinymim.targets.contract import PictureLine

ARMS = (
    Arm("teacher", 1_223_040, "masked autoencoder", None, "-", 0.42, 0.433),
    Arm("wide student", 472_416, "distilled from the cache", 350, "1 for both", 0.3, 0.3544),
)
PNG_DATA = re.compile(r'src="data:image/png;base64,iVBORw0KGgo')


def report(**changes: object) -> Report:
    maps = {who: torch.full((4, 4), 1 / 17) for who in ("teacher", STORED, "wide")}
    curve = [{"step": step, "kl_qk": 1 / (1 + step), "kl_vv": 0.5 / (1 + step)} for step in range(3)]
    line = PictureLine("head 1", (2, 3), {"qk": maps, "vv": maps}, frozenset({STORED}))
    example = Example(np.zeros((32, 32, 3), np.uint8), line)
    fields: dict[str, object] = {
        "arms": ARMS,
        "lesson": "A lesson.",
        "teacher": "A teacher.",
        "caveat": "A caveat.",
        "student_curves": {"wide student": curve},
        "mae_curves": {"wide student": [{"step": 0, "loss": 1.5}, {"step": 1, "loss": 1.0}]},
        "examples": [example],
        "bytes_per_view": {"sketches": 750.0, "overhead": 250.0},
        "dense_bytes": 67_600,
        "head_k": 0,
        "tail_k": 8,
        "provenance": {"cache (spec id)": "0123"},
    }
    return Report(**(fields | changes))  # type: ignore[arg-type]


def test_text_table_is_ascii_and_aligned() -> None:
    lines = text_table(ARMS).splitlines()
    assert all(line.isascii() for line in lines)
    assert len({len(line) for line in lines}) == 1
    assert lines[2].split()[-2:] == ["42.0%", "43.3%"]
    assert "  ?  " in lines[2]  # steps that nobody knows are not zero


def test_every_arm_is_in_the_page_and_the_taught_one_is_set_off(tmp_path: Path) -> None:
    page = write_report(report(), tmp_path).read_text()
    for cell in {cell for row in table_cells(ARMS) for cell in row}:
        assert f">{cell}<" in page
    assert page.count('<tr class="s">') == 2  # and the total of the bytes
    assert '<tr class="s"><td>wide student</td>' in page


def test_the_page_needs_no_other_file(tmp_path: Path) -> None:
    page = write_report(report(), tmp_path).read_text()
    assert len(PNG_DATA.findall(page)) == 2
    assert not re.search(r'(src|href)="(?!data:)', page)
    assert "http" not in page and "<script" not in page and "@import" not in page and "url(" not in page
    assert (tmp_path / RELATIONS_NAME).read_bytes().startswith(b"\x89PNG")


def test_everything_is_escaped(tmp_path: Path) -> None:
    evil = "<b>&\"'</b>"
    arms = (Arm(evil, 1, evil, 1, evil, 0.1, 0.1),)
    texts = {"lesson": evil, "teacher": evil, "caveat": evil}
    changes = {"arms": arms, **texts, "provenance": {evil: evil}, "bytes_per_view": {evil: 1.0}}
    page = write_report(report(**changes), tmp_path).read_text()
    assert "<b>" not in page
    assert page.count("&lt;b&gt;&amp;&quot;&#x27;&lt;/<wbr>b&gt;") == 6


def test_bytes_add_up_and_are_compared_with_dense_maps(tmp_path: Path) -> None:
    page = write_report(report(), tmp_path).read_text()
    assert '<tr class="s"><td>total</td><td></td><td class="n">1,000</td><td class="n">100.0%</td>' in page
    assert '<td>all rows in fp16</td><td class="n">67,600</td><td class="n">68 x</td>' in page


def test_the_same_report_twice_is_the_same_file(tmp_path: Path) -> None:
    first = write_report(report(), tmp_path).read_bytes()
    assert write_report(report(), tmp_path).read_bytes() == first


def test_the_page_says_what_the_codec_keeps_of_a_row() -> None:
    assert "cache keeps 8 random draws from the row." in page(report(), b"", b"")
    both = page(report(head_k=2, tail_k=6), b"", b"")
    assert "keeps its 2 largest entries and 6 random draws from the rest." in both
