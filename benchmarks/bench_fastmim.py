"""FastMIM against MAE at equal time: the same ViT, as long a training each, then probes and fine-tuning.

    python benchmarks/bench_fastmim.py [--steps 500] [--seeds 0 1 2] [--rounds 5] > page.md    # 45 minutes

First `--rounds` short trainings of each arm, in turn, give the CPU time of a step on one thread, without loader
processes, which is its wall time on a free core; loading and decoding count. MAE trains for `--steps`, and any other
arm for as many as take that time by the medians; `--fixed` gives these numbers instead. With several `--rates`, an arm
takes the one whose encoder, trained for as many steps with a seed of its own, has the best linear probe on the training
images of `--tune-pattern`, which no result uses. Every encoder is probed and fine-tuned at 64 px by the settings of
tinyimagenet40-eval and -finetune.
Without images at --data nothing is measured. Keep the page under benchmarks/results/.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from typing import Any, cast
from unittest import mock

import provenance
import torch

from tinymim.configs.load import load_recipe
from tinymim.configs.schema.evaluate import EvaluateRecipe
from tinymim.configs.schema.finetune import FinetuneRecipe
from tinymim.configs.schema.pretrain import PretrainMaeRecipe, PretrainRecipe
from tinymim.stages import evaluate, finetune, pretrain
from tinymim.stages.run.folder import ENCODER_NAME, LAST_NAME
from tinymim.stages.run.progress import logger
from tinymim.stages.training.bookkeeping import Bookkeeping

DATA = Path(os.environ.get("TINYMIM_DATA", Path(__file__).resolve().parents[2] / "shared" / "data")) / "tinyimagenet40"
VIT: dict[str, Any] = {"name": "vit_tiny_patch16_224", "patch_size": 8, "embed_dim": 128, "depth": 6, "num_heads": 4}
SIZE = 64  # pixels of probes and fine-tuning
UNTRAINED = "none, random weights"
PATHS = str.maketrans(" ", "-", ",")  # from an arm's name to its folder's
# Side of the views and of a painted square; None is MAE, which drops patches. 32 of 64 px is as 128 of 224 px, about.
MAE = "MAE, 64 px"
ARMS: dict[str, tuple[int, int | None]] = {
    MAE: (64, None),
    "FastMIM, 64 px": (64, 16),
    "FastMIM, 32 px": (32, 8),
}
TUNE_SEED = 9
WARM = 2  # steps of a measurement that do not count
MEASURED = 6  # those that do
COLUMNS = ("knn_top1", "linear_top1", "finetune_top1")


def main() -> int:
    parser = argparse.ArgumentParser(description="FastMIM and MAE, equal seconds")
    parser.add_argument("--data", type=Path, default=DATA, help="folder of tinyimagenet40")
    parser.add_argument("--steps", type=int, default=500, help="of MAE's pre-training")
    parser.add_argument("--fixed", nargs="+", default=[], metavar="ARM=STEPS", help="only these, of so many steps")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--rounds", type=int, default=5, help="of the measurement of a step's time")
    parser.add_argument("--rates", type=float, nargs="+", default=[4e-3], help="optim.base_lr to try")
    parser.add_argument("--finetune-steps", type=int, default=120)
    parser.add_argument("--train-pattern", default="train-00000?.tar", help="images of the probes' features")
    parser.add_argument("--tune-pattern", default="train-00001[89].tar", help="images that choose a rate")
    args = parser.parse_args()
    fixed = {arm: int(steps) for arm, _, steps in (each.partition("=") for each in args.fixed) if steps.isdigit()}
    if len(fixed) < len(args.fixed) or not set(fixed) <= set(ARMS):
        parser.error(f"--fixed takes ARM=STEPS with an arm of {', '.join(ARMS)}")
    if not args.data.is_dir():
        print(f"no images in {args.data} (--data or TINYMIM_DATA names another folder)", file=sys.stderr)
        return 0
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        step_s: dict[str, list[float]] = {arm: [] for arm in ARMS}
        for number in range(0 if fixed else args.rounds):
            for arm in ARMS:
                speed = root / f"speed-{number}" / arm.translate(PATHS)
                step_s[arm].append(trained(speed, args, arm, WARM + MEASURED, 0, args.rates[0])[0])
        middle = {arm: statistics.median(each or [0.0]) for arm, each in step_s.items()}
        steps = fixed or {arm: max(1, round(args.steps * middle[MAE] / middle[arm])) for arm in ARMS}
        logger.info(f"bench_fastmim: seconds of a step {middle}, steps {steps}")
        tuning = {
            (arm, rate): tuned(root / f"rate-{rate:g}" / arm.translate(PATHS), args, arm, steps[arm], rate)
            for arm in steps
            for rate in args.rates
            if len(args.rates) > 1
        }
        rates = {arm: max((tuning.get((arm, rate), 0.0), rate) for rate in args.rates)[1] for arm in steps}
        found = {
            (arm, seed): result(root / f"seed-{seed}" / arm.translate(PATHS), args, arm, steps, seed, rates)
            for seed in args.seeds
            for arm in (*steps, *([] if fixed else [UNTRAINED]))
        }
    page(args, step_s, steps, tuning, rates, found)
    return 0


def tuned(root: Path, args: argparse.Namespace, arm: str, steps: int, rate: float) -> float:
    """Linear top-1 of an arm at a learning rate, on images that no result uses."""
    weights = trained(root, args, arm, steps, TUNE_SEED, rate)[1]
    share = probed(root, args, str(weights), TUNE_SEED, f"val.pattern={args.tune_pattern}")["linear_top1"]
    logger.info(f"bench_fastmim: {arm}, base_lr {rate:g}: linear {share:.1%}")
    return share


def result(
    root: Path, args: argparse.Namespace, arm: str, steps: dict[str, int], seed: int, rates: dict[str, float]
) -> dict[str, float]:
    """Shares of an arm by column, and the seconds that its training took: on the wall, and of the CPU."""
    weights, found = "random", {"wall_s": 0.0, "cpu_s": 0.0}
    if arm in ARMS:
        began, began_cpu = time.perf_counter(), time.process_time()
        weights = str(trained(root, args, arm, steps[arm], seed, rates[arm])[1])
        found = {"wall_s": time.perf_counter() - began, "cpu_s": time.process_time() - began_cpu}
    shares = probed(root, args, weights, seed)
    sets = [f"train.shards={args.data}", f"val.shards={args.data}", f"weights={weights}", *_run(root / "tuned", seed)]
    sets += [f"model={json.dumps(VIT | {'img_size': SIZE})}", "optim.epochs=null", f"order.seed={seed}"]
    sets += [f"optim.steps={args.finetune_steps}", "validation.every_epochs=100"]
    report = finetune.run(cast(FinetuneRecipe, load_recipe(Path("tinyimagenet40-finetune"), "finetune", sets)))
    assert report is not None
    found |= shares | {"finetune_top1": report["weights"][LAST_NAME]["top1"]}
    logger.info(f"bench_fastmim: {arm}, seed {seed}: {', '.join(f'{found[each]:.1%}' for each in COLUMNS)}")
    return found


def probed(root: Path, args: argparse.Namespace, weights: str, seed: int, *more: str) -> dict[str, float]:
    """k-NN and linear top-1 of an encoder at 64 px."""
    sets = [f"train.shards={args.data}", f"val.shards={args.data}", f"weights={weights}", *_run(root / "probes", seed)]
    sets += [f"train.pattern={args.train_pattern}", f"model={json.dumps(VIT | {'img_size': SIZE})}", *more]
    return evaluate.run(cast(EvaluateRecipe, load_recipe(Path("tinyimagenet40-eval"), "evaluate", sets)))


def trained(root: Path, args: argparse.Namespace, arm: str, steps: int, seed: int, rate: float) -> tuple[float, Path]:
    """Seconds of a step of an arm's pre-training, the median, and the weights."""
    size, block = ARMS[arm]
    sets = [f"source.shards={args.data}", f"views={{size: {size}, scale: [0.2, 1.0]}}", f"order.seed={seed}"]
    sets += [f"model={json.dumps(VIT | {'img_size': size})}", f"optim.base_lr={rate}", "optim.warmup=0.1"]
    sets += [f"optim.steps={steps}", "optim.batch_size=64", f"checkpoint.every_steps={steps}"]
    sets += _run(root / "training", seed)
    with timed() as ends:
        if block is None:
            recipe = cast(PretrainMaeRecipe, load_recipe(Path("tinyimagenet40-mae"), "pretrain-mae", sets))
            pretrain.run(recipe)
        else:
            sets += [f"mask.block={block}", "mask.ratio=0.75", "weights=random"]
            pretrain.run(cast(PretrainRecipe, load_recipe(Path("tinyimagenet40-fastmim"), "pretrain", sets)))
    took = [after - before for before, after in zip(ends[WARM:], ends[WARM + 1 :], strict=False)]
    return statistics.median(took) if took else 0.0, root / "training" / ENCODER_NAME


def _run(folder: Path, seed: int) -> list[str]:
    return [f"run.folder={folder}", f"run.seed={seed}", "run.threads=1", "run.log_every=1000000", "loader.workers=0"]


@contextmanager
def timed() -> Iterator[list[float]]:
    """The CPU time of this process at the end of every step."""
    ends: list[float] = []
    end_step = Bookkeeping.end_step

    def noted(*args: Any, **kwargs: Any) -> None:
        ends.append(time.process_time())
        end_step(*args, **kwargs)

    with mock.patch.object(Bookkeeping, "end_step", noted):
        yield ends


def page(
    args: argparse.Namespace,
    step_s: dict[str, list[float]],
    steps: dict[str, int],
    tuning: dict[tuple[str, float], float],
    rates: dict[str, float],
    found: dict[tuple[str, int], dict[str, float]],
) -> None:
    print(f"# FastMIM and MAE at equal time, {date.today()}\n")
    print(f"- commit {provenance.commit()}, command `{provenance.command()}`")
    print(f"- {provenance.processor()}, {provenance.cores()} cores, one thread; torch {torch.__version__}, fp32")
    print(f"- Python {platform.python_version()}; ViT 128 wide, 6 blocks, patches of 8 px, decoder 64 wide, 1 block")
    print(f"- batch 64; {args.finetune_steps} steps of fine-tuning at {SIZE} px")
    print(f"- seeds {', '.join(map(str, args.seeds))}; top-1 in percent; means (least to most)\n")
    print("| pre-training | base_lr | ms a step | steps | wall s | CPU s | k-NN | linear | fine-tuned |")
    print("|---|---|---|---|---|---|---|---|---|")
    for arm in dict.fromkeys(arm for arm, _seed in found):
        of_seeds = [found[arm, seed] for seed in args.seeds]
        cells = [f"{rates[arm]:g}" if arm in rates else "", spread([1e3 * each for each in step_s.get(arm, [])], 0)]
        cells += [str(steps.get(arm, 0))]
        cells += [spread([each[name] for each in of_seeds], 0) for name in ("wall_s", "cpu_s")]
        cells += [spread([100 * each[name] for each in of_seeds], 1) for name in COLUMNS]
        print(f"| {arm} | {' | '.join(cells)} |")
    if not tuning:
        return
    print(f"\nLinear top-1 by `base_lr`, seed {TUNE_SEED}, images of `{args.tune_pattern}`:\n")
    print(f"| pre-training | {' | '.join(f'{rate:g}' for rate in args.rates)} |")
    print(f"|---|{'---|' * len(args.rates)}")
    for arm in steps:
        print(f"| {arm} | {' | '.join(f'{100 * tuning[arm, rate]:.1f}' for rate in args.rates)} |")


def spread(values: list[float], digits: int) -> str:
    if not values:
        return ""
    mean = f"{statistics.mean(values):.{digits}f}"
    return mean if len(values) < 2 else f"{mean} ({min(values):.{digits}f} to {max(values):.{digits}f})"


if __name__ == "__main__":
    sys.exit(main())
