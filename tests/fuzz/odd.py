"""Odd values in any place of a JSON value; shared by the fuzz of recipes, caches and run folders."""

import copy
import json
import math
import random
from collections.abc import Iterator
from typing import Any

VALUES: list[Any] = [
    *(None, True, False, "", " ", "x" * 5000, "a\nb", "\x1b[31m", "null", "/", "..", "s3:/b", "s3://b/x", "~", "é"),
    *(0, 1, -1, 3, 255, 2**31 - 1, 2**31, 2**63 - 1, 2**63, -(2**63) - 1, 10**40),
    *(0.0, -0.0, 0.5, 1e-320, 1e-9, 1.5, 1e308, -1e308, math.inf, -math.inf, math.nan),
    *([], [[]], {}, {"": {}}, {"a": {}}, {"name": "knn"}, {1: 2}, [0.5, 0.5], [1, 2, 3], [math.nan] * 3, ["qk", "qk"]),
    *("cuda:0", "auto", "random", "hub", "*.tar", "[", "**", "rand-m9", "rand-m", "rand--", "local-dir:", "a.b", "a:b"),
]


def places(section: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Keys that lead to every value of a recipe, sections and entries of lists included."""
    items = section.items() if isinstance(section, dict) else enumerate(section) if isinstance(section, list) else ()
    for key, value in items:
        yield (*at, key)
        yield from places(value, (*at, key))


def put(section: Any, keys: tuple[Any, ...], value: Any) -> None:
    for key in keys[:-1]:
        section = section[key]
    section[keys[-1]] = value


def altered(stored: Any, rng: random.Random) -> Any:
    """A copy of a JSON value with one or two of its values replaced, removed, or given a neighbour."""
    changed = copy.deepcopy(stored)
    for _ in range(rng.choice((1, 1, 2))):
        found = list(places(changed))
        if not found:
            return changed
        keys = rng.choice(found)
        owner = changed
        for key in keys[:-1]:
            owner = owner[key]
        match rng.randrange(8):
            case 0:
                del owner[keys[-1]]
            case 1 if isinstance(owner, dict):
                owner["more"] = copy.deepcopy(rng.choice(VALUES))
            case 2:
                owner[keys[-1]] = copy.deepcopy(owner[rng.choice(list(owner)) if isinstance(owner, dict) else 0])
            case _:
                owner[keys[-1]] = copy.deepcopy(rng.choice(VALUES))
    return json.loads(json.dumps(changed))
