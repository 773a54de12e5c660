"""Extreme values that a recipe may hold: each run ends well or with an error of ours, exit code 2."""

import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tinymim import cli
from tinymim.configs.load import dump_recipe
from tinymim.configs.schema.evaluate import EvaluateRecipe
from tinymim.configs.schema.pretrain import PretrainMaeRecipe
from tinymim.stages import cache_teacher, make_shards
from tinymim.tests.stages import finetunes, tiny

MOST, MANY, SEEDS = 2**31 - 1, 2**20, [-(2**63), 2**63 - 1]
LONG = "x" * 300
VALUES: dict[str, dict[str, list[Any]]] = {
    "pretrain-mae": {
        "views.size": [1, 31, 8192], "views.scale": ["[1e-300, 1e-300]", "[1e-9, 1]", "[1, 1]"], "views.seed": SEEDS,
        "views.ratio": ["[0.001, 0.001]", "[1000, 1000]"], "run.seed": SEEDS, "order.seed": SEEDS,
        "mae.mask_ratio": [1e-320, 0.999999, 0.5], "mae.decoder_dim": [4], "optim.base_lr": [1e308, 1e-320],
        "optim.min_lr": [1e308], "optim.weight_decay": [1e308], "optim.warmup": [1, 0],
        "optim.betas": ["[0, 0]", "[0.99999999999, 0.99999999999]"], "optim.clip_norm": [1e-320, 1e308],
        "optim.accumulate": [3, 8, MOST], "optim.batch_size": [MANY, 1], "order.shuffle_units": [MOST],
        "order.lanes": [3, 8, MOST], "order.views_per_decode": [MOST, 2], "order.views_per_epoch": [MOST, "all"],
        "loader.prefetch": [1024], "run.log_every": [MOST], "checkpoint.every_steps": [MOST, 1],
        "ema": ["{decay: 0}"], "precision": ["bf16", "fp16"],
        "model.name": ["resnet18", "swin_tiny_patch4_window7_224", "local-dir:", "local-dir:/nope", "hf-hub:", "a:b",
                       "vit_tiny_patch16_224.bogus", "", "vit_small_patch14_dinov2", "deit3_small_patch16_224"],
        "model.img_size": [31, 8], "model.num_heads": [3], "model.embed_dim": [6], "run.device": ["cuda:5", "cuda"],
        "run.folder": [LONG, "/proc/nope", "/dev/null"], "source.pattern": ["[", "???", "*.tar/*"],
        "source.shards": ["/dev/null", "/proc", LONG],
    },
    "train-student": {
        "num_views": [1, 2, 3, MOST], "targets.rows": [1, 7, 65536], "targets.relation_heads": [1, 3, 16],
        "targets.relations": ["[kk]", "[qk]"], "drop_path": [0.9999999, 0],
        "verify": ["{first: 0, every: 0}", f"{{first: {MOST}, every: {MOST}}}"], "student.patch_size": [4, 16, 32],
        "student.img_size": [64], "student.name": ["vit_small_patch14_dinov2", "deit3_small_patch16_224"],
        "order.views_per_epoch": ["all", 2, 4], "order.views_per_decode": [2], "cache": ["/dev/null", "/nope", "."],
        "audit": ["{cache: /nope, source: {shards: a}}"],
    },
    "finetune": {
        "weights": ["hub", "/dev/null", "package:demo-teacher", LONG], "pool": ["cls"], "smoothing": [0.999999],
        "augment.rand_augment": ["rand", "rand-m10-n3", "rand-p0", "rand-m99", "rand-mstd999-inc1", "null", "x"],
        "augment.erasing": [1], "augment.mixup": [0, 1000, 1e-320], "augment.cutmix": [0, 1000, 1e-320],
        "optim.layer_decay": [1e-320, 1], "validation.every_epochs": [MOST], "validation.batch_size": [MANY, 1],
        "validation.resize_ratio": [10], "mean": ["[0, 0, 0]"], "std": ["[1e-320, 1, 1]"], "drop_path": [0.999999],
        "model.name": ["resnet18", "convnext_tiny"],
    },
    "evaluate": {
        "block": [1, 3, MOST], "pool": ["cls"], "batch_size": [MANY, 1], "resize_ratio": [10], "run.device": ["cuda:1"],
        "evaluators": [f"[{{name: knn, k: {MOST}, temperature: 0.001}}]", "[{name: linear, l2: 0, max_iter: 1}]",
                       "[{name: linear, l2: 1e6}]", "[{name: linear, l2: 1e-320, max_iter: 5}]"],
        "std": ["[1e-320, 1e-320, 1e-320]"],
    },
    "cache-teacher": {
        "batch_size": [MANY, 1, "auto"], "audit_views": [MOST, 1], "retries": [MOST], "lease_s": [1e-320, 86400],
        "max_unreadable": [0, 1], "teacher.block": [1, 3, 1000], "teacher.precision": ["bf16", "fp16"],
        "teacher.num_heads": [4, 16], "teacher.mean": ["[0, 0, 0]"], "teacher.std": ["[1e-320, 1, 1]"],
        "codec.rows": [1, 17, 18, 65536], "codec.head_k": [0, 17, 65536], "codec.tail_k": [1, 17, 65536],
        "codec.relation_heads": [1, 3, 16, 65536], "views.size": [31, 64], "views.scale": ["[1e-300, 1e-300]"],
        "codec": ["{name: hidden, bits: 4}", "{name: hidden, basis: pca, bits: 1e-320}", "{name: dense}",
                  "{tail: ghost, head_k: 17}", "{tail: uniform, head_k: 16}"],
    },
}  # fmt: skip


def recipes(root: Path) -> dict[str, Any]:
    """A valid recipe of each command, each a second long; what they read is in `root`."""
    tiny.write_set(root, 24, 8)
    cache_teacher.run(tiny.cache_recipe(root))
    make_shards.run("drawn", root / "classes", make_shards.Options(count=30, images_per_shard=6))
    steps = {"batch_size": 8, "steps": 2, "base_lr": 0.1}
    common = {"loader": {"workers": 0}, "run": tiny.run_in(root / "run")}
    mae = {"stage": "pretrain-mae", "source": {"shards": root / "shards"}, "views": {"size": 32}, "optim": steps}
    mae |= {"model": tiny.STUDENT, "mae": {"decoder_dim": 8, "decoder_heads": 2}}
    labelled = {name: {"shards": root / "classes"} for name in ("train", "val")}
    judge = {"stage": "evaluate", "model": finetunes.MODEL, "weights": "random", "resize_ratio": 1.0}
    judge |= {"evaluators": [{"name": "knn"}]}
    return {
        "pretrain-mae": PretrainMaeRecipe.model_validate(mae | common),
        "train-student": tiny.student_recipe(root, optim=steps, run=common["run"]),
        "finetune": finetunes.recipe(root / "classes", root / "run", optim=steps),
        "evaluate": EvaluateRecipe.model_validate(judge | labelled | common),
        "cache-teacher": tiny.cache_recipe(root, cache=root / "new", run=common["run"]),
    }


@pytest.mark.slow  # two minutes for 190 runs; every stage has quicker tests of its own
@pytest.mark.filterwarnings("ignore")
def test_every_run_ends_well_or_with_an_error_of_ours(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found: Counter[int] = Counter()
    for stage, recipe in recipes(tmp_path).items():
        (tmp_path / "recipe.yaml").write_text(dump_recipe(recipe))
        for field, value in ((field, value) for field, values in VALUES[stage].items() for value in values):
            for made in ("run", "new"):
                shutil.rmtree(tmp_path / made, ignore_errors=True)
            code = cli.run_command([stage, str(tmp_path / "recipe.yaml"), "--set", f"{field}={value}"])
            assert code in (0, 2), f"{stage} {field}={value}: {capsys.readouterr().err}"
            found[code] += 1
    with capsys.disabled():
        print(f"runs: {sum(found.values())}, {found[0]} end well, {found[2]} are refused")
    assert min(found[0], found[2]) > 50
