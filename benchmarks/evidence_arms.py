"""What `evidence.py` runs: ten experiments, their arms and the caches that these read.

Every arm is a shipped recipe (`tinyimagenet40-*`) and what is set beyond it, so that the command of each run can be
printed and repeated. All arms of an experiment take as many steps of as many images, and those of one seed begin with
the same weights and see the same images in the same order: differences between arms are paired by seed.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

# How an arm's student is made: from a cache; with the teacher at its side, by its relations, by its features, or by its
# relations of another image; by `pretrain-mae`; by `finetune` from random weights; not at all.
Kind = Literal["cached", "online", "features", "strange", "mae", "supervised", "random"]

SEEDS = (0, 1, 2)
STEPS = 400
FINETUNE_STEPS = 600
# `optim.base_lr` (at batch 256) by kind: the best of `evidence.py tune`, by k-NN and linear probe together.
# `online` and `strange` take that of `cached`.
RATES: dict[Kind, float] = {
    "cached": 4.8e-2,
    "online": 4.8e-2,
    "features": 4.8e-2,
    "strange": 4.8e-2,
    "mae": 4e-3,
    "supervised": 1.2e-2,
}


@dataclass(frozen=True)
class Arm:
    """One way to make a student.

    Attributes:
        name: unique; as pages print it.
        kind: see `Kind`.
        cache: a key of `CACHES`; of `cached` arms.
        sets: `--set` beyond the base recipe.
        judged: whether its held-out KL means something: it was trained on the relations of the base target.
        finetuned: seeds whose student is fine-tuned, too.
        seeds: more of them where a difference is to be resolved.
        steps: of the training.
        target: what sets its learning rate, where that is not `kind`: the best that `evidence.py tune` found for it.
    """

    name: str
    kind: Kind = "cached"
    cache: str = "64x8"
    sets: tuple[str, ...] = ()
    judged: bool = True
    finetuned: tuple[int, ...] = ()
    seeds: tuple[int, ...] = SEEDS
    steps: int = STEPS
    target: str = ""


@dataclass(frozen=True)
class Experiment:
    """Arms that are compared with one another; the first is the one that others are measured against."""

    title: str
    question: str
    arms: tuple[Arm, ...]


@dataclass(frozen=True)
class Cache:
    """`--set`s of `cache-teacher` with a shipped recipe.

    Attributes:
        sets: `--set`s beyond the recipe.
        recipe: the shipped recipe.
        after: name of the cache that it adds a layer to; empty for one of its own.
        classifier: whether its teacher is the fine-tuned one.
    """

    sets: tuple[str, ...] = field(default=())
    recipe: str = "tinyimagenet40-cache"
    after: str = ""
    classifier: bool = False


def _topk(tail: str, kept: int = 2, rows: int = 65) -> Cache:
    return Cache((f"codec={{name: sketch, rows: {rows}, head_k: {kept}, tail: {tail}}}",))


def _hidden(block: int) -> Cache:
    return Cache(("codec={name: hidden, bits: 8}", f"teacher.block={block}"))


# Layers of one pass: relations as in all other experiments, and three kinds read from the end of the teacher.
_KINDS = (
    "{relations: {block: 5}, ff: {codec: {kind: ff}}, features: {codec: {kind: features, at: final}}, "
    "cls: {codec: {kind: cls}}}"
)
FEW_SHARDS = "train-00000[0-1].tar"  # 2,000 images, so that 400 steps are 12.8 passes
CACHES: dict[str, Cache] = {
    "64x8": Cache(),
    "16x8": Cache(("codec.rows=16",)),
    "8x4": Cache(("codec.rows=8", "codec.tail_k=4")),
    "top-2 renormalise": _topk("renormalise"),
    "top-2 uniform": _topk("uniform"),
    "top-2 ghost": _topk("ghost"),
    "top-1": _topk("renormalise", kept=1),
    "top-1 of 10 rows": _topk("renormalise", kept=1, rows=10),
    "16 views": Cache((f"source.pattern={FEW_SHARDS}", "num_views=16")),
    "hidden 3": _hidden(3),
    "hidden 4": _hidden(4),
    "hidden 5": _hidden(5),
    "hidden 6": _hidden(6),
    "kinds": Cache(("codec=null", "teacher.block=6", f"targets={_KINDS}")),
    "kinds, logits": Cache(
        ("codec={kind: logits, name: topk, classes: 40}", "teacher.block=6", "layer=logits"),
        after="kinds",
        classifier=True,
    ),
    "strong": Cache(recipe="tinyimagenet40-logits-cache", classifier=True),
}

_MORE = (0, 1, 2, 3, 4)
ONLINE = Arm("online dense", "online", finetuned=_MORE, seeds=_MORE)
SKETCH = Arm("sketch 64x8 (default)", finetuned=_MORE, seeds=_MORE)
SMALL = Arm("sketch 8x4", cache="8x4", finetuned=SEEDS, seeds=_MORE)
_FEW = f"source.pattern={FEW_SHARDS}"


def _views(count: int) -> Arm:
    return Arm(f"V = {count}", cache="16 views", sets=(_FEW, f"num_views={count}"))


def _relations(name: str, block: int, judged: bool = False) -> Arm:
    relations = name.replace("+", ", ")
    return Arm(
        f"block {block}, {name}", cache=f"hidden {block}", sets=(f"targets.relations=[{relations}]",), judged=judged
    )


_WIDTHS = "{wide: {model: %s}, narrow: {model: %s}}"
_MODEL = "{name: vit_tiny_patch16_224, img_size: 64, patch_size: 8, embed_dim: %d, depth: 4, num_heads: 4}"
TWO = Arm("two students", sets=("student=null", "students=" + _WIDTHS % (_MODEL % 96, _MODEL % 32)))

_LONG: tuple[tuple[str, Kind, str], ...] = (
    ("online dense", "online", "64x8"),
    ("sketch 64x8", "cached", "64x8"),
    ("sketch 8x4", "cached", "8x4"),
    ("top-2 renormalised", "cached", "top-2 renormalise"),
    ("top-2 ghost", "cached", "top-2 ghost"),
    ("features", "features", "64x8"),
    ("masked autoencoder", "mae", "64x8"),
)

_MLP = "targets.projector=mlp"
# What is learnt from, by the name of its learning rate: settings beyond the cache. Relations at 400 steps are `SKETCH`.
TARGETS: dict[str, tuple[str, ...]] = {
    "relations": ("layer=relations",),
    "ff": ("layer=ff",),
    "features, linear head": ("layer=features",),
    "features, MLP head": ("layer=features", _MLP),
    "cls": ("layer=cls",),
    "logits": ("layer=logits",),
    "ff + cls": ("layers={ff: {}, cls: {}}",),
    "relations + features": ("layers={relations: {}, features: {}}",),
}


def of_target(target: str, steps: int = STEPS, sets: tuple[str, ...] = (), name: str = "") -> Arm:
    """The arm that learns from some layers of the cache "kinds"."""
    name = name or f"{target}, {steps:,} steps"
    own = TARGETS[target] + sets
    return Arm(name, cache="kinds", sets=own, judged=False, finetuned=SEEDS, steps=steps, target=target)


_STRONG: dict[str, Any] = {
    "cache": "strong",
    "sets": ("jitter={brightness: 0, contrast: 0, saturation: 0}",),
    "judged": False,
    "finetuned": SEEDS,
    "steps": 2 * STEPS,
    "target": "logits",
}

EXPERIMENTS: dict[str, Experiment] = {
    "1": Experiment(
        "Cached sketches against the teacher online",
        "Is a student from the cache as good as one that had the dense teacher at every step?",
        (
            ONLINE,
            SKETCH,
            Arm("sketch 16x8", cache="16x8", finetuned=SEEDS, seeds=_MORE),
            SMALL,
        ),
    ),
    "2": Experiment(
        "Top-k at the bytes of the sketch",
        "What do the published ways to shorten a row cost, at as many bytes?",
        (
            SKETCH,
            Arm("top-2, renormalised", cache="top-2 renormalise", finetuned=SEEDS),
            Arm("top-2, uniform tail", cache="top-2 uniform"),
            Arm("top-2, ghost bucket", cache="top-2 ghost"),
            Arm("top-1, renormalised", cache="top-1"),
            SMALL,
            Arm("top-1 of 10 rows, renormalised", cache="top-1 of 10 rows"),
        ),
    ),
    "3": Experiment(
        "How many cached views",
        "How many views per image does a cache need, where training passes the images 12.8 times?",
        tuple(_views(count) for count in (16, 8, 4, 2, 1)),
    ),
    "4": Experiment(
        "Relations against other ways to train the same network",
        "Is it the relations that do it?",
        (
            SKETCH,
            Arm("features, online", "features", judged=False, finetuned=SEEDS),
            Arm("relations of another image, online", "strange"),
            Arm("masked autoencoder", "mae", judged=False, finetuned=SEEDS),
            Arm("supervised, with labels", "supervised", judged=False),
            Arm("not trained", "random", judged=False, finetuned=SEEDS),
        ),
    ),
    "5": Experiment(
        "Tap block and relations",
        "Does the paper's order show: the block before the last ones, and qk + vv?",
        (
            _relations("qk+vv", 5, judged=True),
            _relations("qk", 5),
            _relations("vv", 5),
            _relations("qq+kk+vv", 5),
            _relations("qk+vv", 3),
            _relations("qk+vv", 4),
            _relations("qk+vv", 6),
        ),
    ),
    "6": Experiment(
        "Two students of other widths from one cache",
        "Do wider and narrower students, trained together, learn from the same records?",
        (TWO,),
    ),
    "7": Experiment(
        "Four times the steps",
        "Is the order of these arms one of short trainings only? (5.1 passes: every cached view is seen 2.6 times)",
        tuple(
            Arm(f"{name}, {4 * STEPS:,} steps", kind, cache, judged=kind in ("cached", "online"), steps=4 * STEPS)
            for name, kind, cache in _LONG
        ),
    ),
    "8": Experiment(
        "What each kind of target teaches",
        "Relations, patch cosines (ff), features with a narrow and a wide head, class token, logits of the fine-tuned "
        "teacher, and two mixes, at a tuned rate each: which teaches most in as many steps?",
        (SKETCH, *(of_target(target) for target in TARGETS if target != "relations")),
    ),
    "9": Experiment(
        "What each kind of target teaches, four times the steps",
        "Is the order of the kinds one of short trainings only?",
        tuple(of_target(target, 4 * STEPS) for target in TARGETS),
    ),
    "10": Experiment(
        "Logits of strong views, cached, online, and labels",
        "TinyViT's pre-training on a small scale: a student of a fine-tuned teacher's top-10 logits on 16 cached views "
        "with RandAugment and erasing, of the same teacher online, and of labels on the same views.",
        (
            Arm("strong logits, cached", **_STRONG),
            Arm("strong logits, online", "online", **_STRONG),
            Arm(
                "labels of strong views",
                "supervised",
                sets=("augment={rand_augment: rand-m9-mstd0.5-inc1, erasing: 0.25, mixup: 0, cutmix: 0}",),
                judged=False,
                finetuned=SEEDS,
                steps=2 * STEPS,
            ),
        ),
    ),
}


def all_runs() -> list[tuple[str, Arm, int]]:
    """(experiment, arm, seed) of every run, each arm once, by seed, then in the order of the experiments."""
    found: dict[tuple[str, int], tuple[str, Arm, int]] = {}
    for number, experiment in EXPERIMENTS.items():
        for arm in experiment.arms:
            for seed in arm.seeds:
                found.setdefault((arm.name, seed), (number, arm, seed))
    return sorted(found.values(), key=lambda run: (run[2], run[0]))
