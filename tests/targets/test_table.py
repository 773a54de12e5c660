"""The table of kinds, the page that explains it, and the names and words made from a codec section."""

import re
from pathlib import Path
from typing import Any, get_args

import pytest

from tinymim.configs.codecs.kinds import codec_config, codec_label
from tinymim.targets import kinds

PAGE = (Path(__file__).parents[2] / "docs" / "targets.md").read_text()


@pytest.mark.parametrize("section", kinds._KINDS, ids=lambda section: str(section.__name__))
def test_the_page_has_a_row_for_every_codec(section: Any) -> None:
    kind = get_args(section.model_fields["kind"].annotation)[0] if "kind" in section.model_fields else "relations"
    rows, current = dict[str, set[str]](), ""
    for line in re.findall(r"^\| .*\|$", PAGE, re.M):
        first, second, *_ = (re.findall(r"`([^`]*)`", cell) for cell in line.strip("|").split("|"))
        current = first[0] if first else current
        rows.setdefault(current, set()).update(second)
    assert set(get_args(section.model_fields["name"].annotation)) <= rows[kind]


@pytest.mark.parametrize(
    ("fields", "label", "words"),
    [
        ({}, "b9-sketch", "sketch, 64 rows x 8 draws"),
        ({"kind": "features"}, "b9-features-dither", "features dither"),
        ({"kind": "features", "at": "final", "bits": 1}, "final-features-dither", "features dither, bits 1, at final"),
        ({"kind": "features", "name": "pq"}, "b9-features-pq", "features pq"),
        ({"kind": "cls", "at": "pooled", "name": "int8"}, "pooled-cls-int8", "cls int8, bits 8, at pooled"),
        ({"kind": "logits", "classes": 10}, "final-logits-draws", "logits draws, classes 10"),
        ({"kind": "ff"}, "final-ff-sketch", "ff sketch"),
        ({"kind": "gram"}, "final-gram-entries", "gram entries"),
        ({"kind": "bank", "tau": 0.1}, "final-bank-draws", "bank draws, tau 0.1"),
        ({"kind": "attention"}, "b9-attention-rows", "attention rows"),
    ],
)
def test_a_section_in_words(fields: dict[str, Any], label: str, words: str) -> None:
    config = codec_config(**fields)
    assert codec_label(config, 9) == label and kinds.describe_codec(config) == words


def test_a_kind_that_reads_the_end_of_the_model_has_place_0() -> None:
    for fields in ({"kind": "logits", "classes": 10}, {"kind": "cls"}, {"kind": "ff"}):
        [tap] = kinds.make_kind(codec_config(**fields), 9).taps
        assert tap.place == 0 and str(tap).endswith("@0")
