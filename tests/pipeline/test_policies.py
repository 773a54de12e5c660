"""The laws of timm and torchvision, drawn from another stream: compared as distributions."""

import random
from collections import Counter
from collections.abc import Iterator
from itertools import count, islice
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from timm.data import rand_augment_transform
from timm.data.random_erasing import RandomErasing as TimmErasing
from torchvision.transforms import ColorJitter as TheirJitter

from tinymim.configs.rand_augment import parse_rand_augment
from tinymim.configs.sections.views import ViewConfig
from tinymim.models.vit import IMAGENET_MEAN, IMAGENET_STD
from tinymim.pipeline import views
from tinymim.pipeline.operations.registry import OPERATIONS, Step
from tinymim.pipeline.policies import (
    ColorJitter,
    Constants,
    GaussianBlur,
    Policy,
    RandAugment,
    RandomErasing,
    Sometimes,
)
from tinymim.pipeline.views import _BOX_DRAWS, RandomViews, operation_rng, view_rng

CONSTANTS = Constants.of(IMAGENET_MEAN, IMAGENET_STD)
VIEWS = 6000


@pytest.fixture(autouse=True)
def seeded_generators() -> Iterator[None]:
    """The peers draw from the global generators."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    yield
    random.setstate(states[0])
    np.random.set_state(states[1])
    torch.set_rng_state(states[2])


def drawn(policy: Policy, height: int = 100, width: int = 80, number: int = VIEWS) -> list[list[Step]]:
    return [policy.draw(operation_rng(3, f"image-{k}", k % 7), height, width) for k in range(number)]


def assert_same_law(ours: npt.ArrayLike, theirs: npt.ArrayLike, about: str) -> None:
    """Two-sample Kolmogorov-Smirnov; the bound is passed by equal laws in all but 0.1 % of the cases."""
    a, b = np.sort(np.asarray(ours, float)), np.sort(np.asarray(theirs, float))
    places = np.concatenate([a, b]).round(9)
    distance = np.abs(
        np.searchsorted(a.round(9), places, "right") / len(a) - np.searchsorted(b.round(9), places, "right") / len(b)
    ).max()
    assert distance < 1.95 * np.sqrt(1 / len(a) + 1 / len(b)), f"{about}: {distance:.3f}"


# ---------------------------------------------------------------- RandAugment


def timms(text: str) -> list[list[tuple[str, tuple[Any, ...]]]]:
    """For each of VIEWS images what timm applies, in our names and arguments."""
    transform = rand_augment_transform(text, {"img_mean": CONSTANTS.fill})
    applied: list[tuple[str, tuple[Any, ...]]] = []

    def recorded(name: str) -> Any:
        def record(image: None, *arguments: Any, **_: Any) -> None:
            if name == "desaturate":
                applied.append(("color", (min(1.0, max(0.0, 1.0 - arguments[0])),)))
            else:
                applied.append((name.removesuffix("_rel"), arguments))

        return record

    for op in transform.ops:
        op.aug_fn = recorded(op.aug_fn.__name__)
    found = []
    for _ in range(VIEWS):
        applied.clear()
        transform(None)
        found.append(list(applied))
    return found


@pytest.mark.parametrize(
    "text",
    [
        "rand-m9-mstd0.5-inc1",
        "rand-m5-n3-p0.7-mstd101",
        "rand-m9-mmax14-mstd4-inc1",
        "rand-mstd1-tweights",
        "rand-t3aw",
    ],
)
def test_rand_augment_is_timms_law(text: str) -> None:
    height, width = 100, 80
    theirs = timms(text)
    ours = drawn(RandAugment(parse_rand_augment(text), CONSTANTS.fill), height, width)
    assert_same_law([len(steps) for steps in ours], [len(steps) for steps in theirs], "operations per image")
    for place in range(max(map(len, theirs))):
        of_place = [[steps[place][0] for steps in each if len(steps) > place] for each in (ours, theirs)]
        a, b = map(Counter, of_place)
        assert a.keys() <= OPERATIONS.keys()
        for name in a.keys() | b.keys():
            assert abs(a[name] - b[name]) < 4.5 * np.sqrt(a[name] + b[name]), f"{place}: {name}"
    for name in {name for steps in theirs for name, _ in steps}:
        values = [[step[1] for steps in each for step in steps if step[0] == name] for each in (ours, theirs)]
        if not values[1][0]:
            assert not any(values[0])
            continue
        numbers = np.array([value[0] for value in values[0]])
        numbers = numbers / {"translate_x": width, "translate_y": height}.get(name, 1)
        allowed = {"posterize": (0, 8), "solarize": (0, 256), "solarize_add": (0, 128)}
        limits = allowed.get(name, (-np.inf, np.inf))
        assert_same_law(numbers, np.clip([value[0] for value in values[1]], *limits), name)
        assert {value[1:] for value in values[0]} <= {(), (CONSTANTS.fill,)}


def test_filled_operations_carry_their_colour() -> None:
    filled = {
        step.operation
        for steps in drawn(RandAugment(parse_rand_augment("rand"), (1, 2, 3)))
        for step in steps
        if step.arguments[-1:] == ((1, 2, 3),)
    }
    assert filled == {"rotate", "shear_x", "shear_y", "translate_x", "translate_y"}


# ---------------------------------------------------------------- erasing


def test_random_erasing_is_timms_law() -> None:
    height, width = 100, 80
    theirs = TimmErasing(0.6, mode="pixel", device="cpu")
    boxes = []
    for _ in range(VIEWS):
        touched = theirs(torch.zeros(3, height, width))[0] != 0
        rows, columns = touched.any(1).nonzero().flatten().tolist(), touched.any(0).nonzero().flatten().tolist()
        if rows:
            boxes.append((rows[0], columns[0], len(rows), len(columns)))
    for mode in ("const", "pixel"):
        steps = [found[0] for found in drawn(RandomErasing(0.6, mode, CONSTANTS), height, width) if found]
        assert {step.operation for step in steps} == {f"erase_{mode}"}
        assert abs(len(steps) - len(boxes)) < 4 * np.sqrt(VIEWS * 0.48)
        for k, name in enumerate(("top", "left", "height", "width")):
            assert_same_law([step.arguments[k] for step in steps], [box[k] for box in boxes], name)
    assert steps[0].arguments[5:] == (CONSTANTS.mean, CONSTANTS.deviation)
    assert len({step.arguments[4] for step in steps}) == len(steps)
    assert CONSTANTS.fill == (124, 116, 104) and CONSTANTS.deviation == pytest.approx((58.395, 57.12, 57.375))


# ---------------------------------------------------------------- the laws of contrastive methods


def test_colour_jitter_is_torchvisions_law() -> None:
    theirs = TheirJitter(0.4, 0.4, 0.2, 0.1)
    params = [
        TheirJitter.get_params(theirs.brightness, theirs.contrast, theirs.saturation, theirs.hue) for _ in range(VIEWS)
    ]
    ours = drawn(ColorJitter(0.4, 0.4, 0.2, 0.1))
    names = ("brightness", "contrast", "color", "hue")
    for k, name in enumerate(names):
        assert_same_law([dict(steps)[name][0] for steps in ours], [param[1 + k] for param in params], name)
    orders = [
        Counter(tuple(names.index(step.operation) for step in steps) for steps in ours),
        Counter(tuple(param[0].tolist()) for param in params),
    ]
    assert len(orders[0]) == len(orders[1]) == 24
    assert all(abs(orders[0][order] - orders[1][order]) < 4.5 * np.sqrt(VIEWS / 12) for order in orders[1])
    some = drawn(ColorJitter(0.4, 0, 0, probability=0.8))
    assert sum(map(len, some)) == pytest.approx(0.8 * VIEWS, rel=0.03)


def test_blur_grayscale_and_solarize_are_drawn_with_their_shares() -> None:
    blurs = [steps[0] for steps in drawn(GaussianBlur(0.5)) if steps]
    assert len(blurs) == pytest.approx(VIEWS / 2, rel=0.05)
    assert_same_law([step.arguments[0] for step in blurs], np.linspace(0.1, 2.0, VIEWS), "sigma")
    for step in (Step("grayscale"), Step("solarize", (128,))):
        found = [steps for steps in drawn(Sometimes(0.2, step)) if steps]
        assert len(found) == pytest.approx(0.2 * VIEWS, rel=0.1) and found[0] == [step]


# ---------------------------------------------------------------- draws


def test_draws_are_a_function_of_seed_key_and_view_and_none_is_the_boxs(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = RandAugment(parse_rand_augment("rand-m9-mstd0.5-inc1-p1.0"), CONSTANTS.fill)

    def steps(seed: int, key: str, view: int) -> list[Step]:
        return policy.draw(operation_rng(seed, key, view), 32, 32)

    assert steps(0, "a", 1) == steps(0, "a", 1)
    assert len({str(steps(*name)) for name in ((0, "a", 1), (1, "a", 1), (0, "b", 1), (0, "a", 2))}) == 4
    taken = count()

    def counted(*name: Any) -> Iterator[float]:
        for number in view_rng(*name):
            next(taken)
            yield number

    monkeypatch.setattr(views, "view_rng", counted)
    RandomViews(ViewConfig(size=32, scale=(1.0, 1.0), ratio=(9.0, 10.0)))("a", 0, 50, 50)  # ten tries, none fits
    assert next(taken) <= _BOX_DRAWS
    assert list(islice(operation_rng(0, "a", 0), 3)) == list(islice(view_rng(0, "a", 0), _BOX_DRAWS + 3))[-3:]


def test_golden_steps_fix_the_law() -> None:
    """Draws may never change, or no cache of strong views could be replayed."""
    policies: list[Policy] = [
        RandAugment(parse_rand_augment("rand-m9-n4-p0.8-mstd0.5-inc1"), CONSTANTS.fill),
        RandomErasing(0.9, "pixel", CONSTANTS),
        ColorJitter(0.4, 0.4, 0.2, 0.1),
    ]
    draws = operation_rng(0, "n01440764/10026", 3)
    found = [step for policy in policies for step in policy.draw(draws, 224, 224)]
    assert found == GOLDEN


GOLDEN: list[Step] = [
    Step("shear_y", (-0.3, CONSTANTS.fill)),
    Step("color", (0.15307220458984372,)),
    Step("translate_y", (89.38601806640625, CONSTANTS.fill)),
    Step("erase_pixel", (13, 69, 68, 125, 4489765979253570, *CONSTANTS[1:])),
    Step("brightness", (0.7713500867905628,)),
    Step("contrast", (1.3021126936294976,)),
    Step("color", (0.9320001019548145,)),
    Step("hue", (-0.097297308074713,)),
]
