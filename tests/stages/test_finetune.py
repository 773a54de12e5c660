"""Fine-tuning learns, resumes to the bit, is the same on two ranks, and writes what it says."""

import json
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from tinymim.configs.errors import CheckpointError, RecipeError, SourceError, ViewMismatch
from tinymim.configs.load import dump_recipe, recipe_digest
from tinymim.models.checkpoints import tensors_sha256, to_safetensors
from tinymim.models.classifier import build_classifier
from tinymim.models.vit import Normalise, build_vit
from tinymim.pipeline.dataset import ImageViews, ViewBatch
from tinymim.pipeline.operations import registry
from tinymim.pipeline.order import Items
from tinymim.pipeline.shards import open_shards
from tinymim.pipeline.views import CentreView
from tinymim.stages import finetune, make_shards
from tinymim.stages.run.interrupt import Interrupted
from tinymim.stages.training.optim import make_optimiser, make_scaler, optimiser_step, state_identity
from tinymim.stages.training.validation import Validation
from tinymim.tests.stages.conftest import Run
from tinymim.tests.stages.finetunes import losses, recipe, validations
from tinymim.tests.stages.tiny import STATED, signal_in_step

Report = dict[str, Any]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five tars of sixteen images, of ten classes; the last one is held out."""
    folder = tmp_path_factory.mktemp("shards")
    make_shards.run("drawn", folder, make_shards.Options(count=80, images_per_shard=16, seed=5))
    return folder


@pytest.fixture(scope="module")
def whole(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Report]:
    """The folder and the report of a run without a stop."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    report = finetune.run(recipe(shards, folder))
    assert report is not None
    return folder, report


def same_files(a: Path, b: Path) -> None:
    for name in ("last.safetensors", "best.safetensors", "last-ema.safetensors"):
        ours, theirs = load_file(a / name), load_file(b / name)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(tensor, theirs[key]) for key, tensor in ours.items()), name


# ---------------------------------------------------------------- what comes out


def test_the_files_load_into_timm_and_are_what_the_report_says(whole: tuple[Path, Report], shards: Path) -> None:
    folder, report = whole
    assert json.loads((folder / "finetuned.json").read_text()) == report
    for name, about in report["weights"].items():
        state = load_file(folder / name)
        assert tensors_sha256(state) == about["weights_sha256"]
        with safe_open(folder / name, framework="pt") as file:
            metadata = file.metadata()
        assert metadata["made_by"] == "tinymim finetune" and len(json.loads(metadata["classes"])) == 10
        assert json.loads(metadata["constants"]) == report["constants"]
        assert json.loads(metadata["validation"])["step"] == about["step"]
        model = timm.create_model(**json.loads(metadata["timm"]))
        model.load_state_dict(state, strict=True)
        assert timm.create_model(**report["model"]).load_state_dict(state) and model.num_classes == 10
    assert set(report["weights"]) == {"last.safetensors", "best.safetensors", "last-ema.safetensors"}
    assert report["recipe_digest"] == recipe_digest(recipe(shards, folder))
    assert report["constants"]["fill"] == [124, 116, 104]
    assert report["constants"]["deviation"] == pytest.approx([58.395, 57.12, 57.375])


def test_a_machine_that_makes_other_pixels_is_refused(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "CANARIES", {**registry.CANARIES, "rotate": "0" * 16})
    with pytest.raises(ViewMismatch, match="other pixels here: rotate"):
        finetune.run(recipe(shards, tmp_path))


def test_every_epoch_is_validated_and_the_best_is_the_averages(whole: tuple[Path, Report]) -> None:
    folder, report = whole
    history = report["history"]
    assert [(entry["epoch"], entry["step"]) for entry in history] == [(1.0, 8), (2.0, 16), (2.5, 20)]
    top1 = [entry["ema"]["top1"] for entry in history]
    best = report["weights"]["best.safetensors"]
    assert (best["of"], best["top1"]) == ("ema", max(top1))
    assert best["step"] == history[top1.index(max(top1))]["step"]  # of equally good ones the first
    assert report["weights"]["last.safetensors"]["top1"] == history[-1]["model"]["top1"]
    assert [line["val_ema_top1"] for line in validations(folder)] == top1
    classes = report["classes_of_best"]
    assert [entry["class"] for entry in classes] == list(range(10)) and classes[0]["name"]
    assert sum(entry["images"] for entry in classes) == report["num_val_images"] == 16
    right = sum(entry["taken_for"].get(str(entry["class"]), 0) for entry in classes)
    assert right / 16 == best["top1"] and sum(sum(entry["taken_for"].values()) for entry in classes) == 16


def test_the_scores_are_those_of_the_weights_in_the_file(whole: tuple[Path, Report], shards: Path) -> None:
    """Recomputed by hand: timm's model, the centre view, arg-max."""
    folder, report = whole
    held_out = open_shards(recipe(shards, folder).val).shards
    items = np.stack([np.zeros(16), np.arange(16), np.zeros(16)], axis=1).astype(np.int64)
    batch = ImageViews(held_out, CentreView(32, 1.0)).batch(items)
    for name, about in report["weights"].items():
        model = timm.create_model(**report["model"]).eval()
        model.load_state_dict(load_file(folder / name))
        with torch.no_grad():
            logits = model(Normalise()(batch.pixels))
        assert float((logits.argmax(dim=1) == batch.labels).double().mean()) == about["top1"]
        in_top5 = (logits.topk(5, dim=1).indices == batch.labels[:, None]).any(dim=1)
        assert float(in_top5.double().mean()) == about["top5"]
        assert float(torch.nn.functional.cross_entropy(logits, batch.labels)) == pytest.approx(about["loss"], rel=1e-4)


def test_it_learns(shards: Path, tmp_path: Path) -> None:
    """Its own images with little augmentation, 10 % by chance."""
    mild = {"rand_augment": None, "erasing": 0.0, "mixup": 0.0, "cutmix": 0.0}
    wanted = recipe(
        shards,
        tmp_path,
        val={"shards": shards, "pattern": "shard-00000[0-3].tar"},
        views={"size": 32, "scale": [0.8, 1.0]},
        augment=mild,
        drop_path=0.0,
        smoothing=0.0,
        ema=None,
        optim={"batch_size": 16, "epochs": 24, "base_lr": 0.3, "layer_decay": 1.0, "warmup": 0.1},
        validation={"every_epochs": 8},
    )
    report = finetune.run(wanted)
    assert report is not None
    assert set(report["weights"]) == {"last.safetensors", "best.safetensors"}
    assert report["weights"]["best.safetensors"]["of"] == "model" and len(report["history"]) == 3
    assert report["weights"]["best.safetensors"]["top1"] > 0.3
    assert np.mean(losses(tmp_path)[-4:]) < 0.9 * losses(tmp_path)[0]
    assert report["weights"]["best.safetensors"]["top5"] > 0.7


def test_the_best_weights_stay_where_later_ones_are_worse(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first validation finds everything right, the others do not."""
    optim = {"batch_size": 16, "steps": 12, "base_lr": 0.03, "warmup": 0.0}
    count, seen = Validation.count, list[str]()

    def worse(self: Validation, models: Any, *rest: Any) -> Any:
        found = count(self, models, *rest)
        if seen:
            for each in found.values():
                each.confusion = each.confusion.roll(1, dims=1)
        else:
            for each in found.values():
                each.confusion = torch.diag(each.confusion.sum(dim=1))
        seen.append(tensors_sha256(models["model"].state_dict()))
        return found

    monkeypatch.setattr(Validation, "count", worse)
    report = finetune.run(recipe(shards, tmp_path, optim=optim, ema=None))
    assert report is not None and len(seen) == 3
    best, last = (report["weights"][f"{name}.safetensors"] for name in ("best", "last"))
    assert (best["step"], best["top1"], last["step"]) == (4, 1.0, 12) and last["top1"] < 1.0
    assert (best["weights_sha256"], last["weights_sha256"]) == (seen[0], seen[2])
    assert tensors_sha256(load_file(tmp_path / "best.safetensors")) == seen[0]


# ---------------------------------------------------------------- stop, resume, ranks


@pytest.mark.parametrize("stop_at", [4, 8, 19])
def test_a_run_stopped_anywhere_resumes_to_the_bit(
    shards: Path, whole: tuple[Path, Report], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop_at: int
) -> None:
    """After 8 steps a validation is due, which the stop leaves to the next start."""
    same = recipe(shards, tmp_path)
    signal_in_step(finetune, stop_at - 1, signal.SIGTERM, monkeypatch)
    with pytest.raises(Interrupted, match=f"step {stop_at} saved") as caught:
        finetune.run(same)
    assert caught.value.requeue and not (tmp_path / "last.safetensors").exists()
    report = finetune.run(same)
    assert report is not None
    assert losses(tmp_path) == losses(whole[0]) and validations(tmp_path) == validations(whole[0])
    assert report["history"] == whole[1]["history"] and report["weights"] == whole[1]["weights"]
    same_files(tmp_path, whole[0])


def test_a_stop_in_the_middle_of_a_validation_loses_nothing(
    shards: Path, whole: tuple[Path, Report], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    same, count = recipe(shards, tmp_path), Validation.count

    def stopped(self: Validation, models: Any, device: Any, stop: Any, meter: Any) -> Any:
        stop.requested = stop.requeue = True
        return count(self, models, device, stop, meter)

    with monkeypatch.context() as patch:
        patch.setattr(Validation, "count", stopped)
        with pytest.raises(Interrupted, match="state of step 8 saved, without its validation"):
            finetune.run(same)
    report = finetune.run(same)
    assert report is not None and report["history"] == whole[1]["history"]
    same_files(tmp_path, whole[0])


def test_two_ranks_train_and_count_like_one(shards: Path, whole: tuple[Path, Report], tmp_path: Path) -> None:
    """In parts, too; and one process goes on with their state."""
    optim = {"batch_size": 8, "steps": 20, "base_lr": 0.05, "warmup": 0.2, "accumulate": 2}
    report = finetune.run(recipe(shards, tmp_path, workers=2, optim=optim))
    assert report is not None
    np.testing.assert_allclose(losses(tmp_path), losses(whole[0]), rtol=1e-4, atol=2e-5)
    assert report["num_val_images"] == 16
    for ours, theirs in zip(report["history"], whole[1]["history"], strict=True):
        for name in ("model", "ema"):
            assert ours[name]["loss"] == pytest.approx(theirs[name]["loss"], rel=1e-3)
    (tmp_path / "state-00000020.pt").unlink()
    assert finetune.run(recipe(shards, tmp_path)) is not None
    np.testing.assert_allclose(losses(tmp_path), losses(whole[0]), rtol=1e-4, atol=2e-5)


# ---------------------------------------------------------------- what it starts from


def test_it_starts_from_an_encoder_and_says_so(
    shards: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the command line: JSON to stdout, log to stderr."""
    wanted = recipe(shards, tmp_path / "run", weights=str(tmp_path / "encoder.safetensors"))
    (tmp_path / "recipe.yaml").write_text(dump_recipe(wanted))
    code, out, err = run("finetune", tmp_path / "recipe.yaml")
    assert (code, out) == (2, "") and "weights file does not exist" in err and "hint:" in err
    assert not (tmp_path / "run").exists()
    (tmp_path / "encoder.safetensors").write_bytes(to_safetensors(build_vit(wanted.model).state_dict(), STATED))
    code, out, err = run("finetune", tmp_path / "recipe.yaml", "--set", "optim.steps=3")
    assert code == 0
    report = json.loads(out)
    assert report["started_from"]["new"] == ["fc_norm.bias", "fc_norm.weight", "head.bias", "head.weight"]
    assert "history" not in report and 0 <= report["weights"]["best.safetensors"]["top1"] <= 1
    assert "new: fc_norm.bias, fc_norm.weight, head.bias, head.weight; not used: norm.bias, norm.weight" in err
    code, out, err = run("finetune", tmp_path / "recipe.yaml", "--set", "model.depth=3")
    assert (code, out) == (2, "") and "missing: blocks.2.attn.proj.bias" in err and "unexpected: none" in err


def test_a_state_of_other_weights_is_refused(shards: Path, tmp_path: Path) -> None:
    optim = {"batch_size": 8, "steps": 1}
    for seed in (0, 1):
        wanted = recipe(shards, tmp_path / str(seed))
        torch.manual_seed(seed)
        (tmp_path / f"{seed}.safetensors").write_bytes(to_safetensors(build_vit(wanted.model).state_dict(), STATED))
    finetune.run(recipe(shards, tmp_path / "run", weights=str(tmp_path / "0.safetensors"), optim=optim))
    with pytest.raises(CheckpointError, match=r"another recipe(.|\n)*1 field\(s\) differ: data\.1"):
        finetune.run(recipe(shards, tmp_path / "run", weights=str(tmp_path / "1.safetensors"), optim=optim))


def test_a_run_may_go_on_with_moved_files_but_not_with_other_numbers(tmp_path: Path) -> None:
    wanted = state_identity(recipe(tmp_path, tmp_path), ["content"])
    moved = recipe(tmp_path / "moved", tmp_path / "run", weights="moved.safetensors", workers=2, loader={"workers": 3})
    assert state_identity(moved, ["content"]) == wanted
    changes: list[dict[str, Any]] = [{"augment": {"erasing": 0.1}}, {"smoothing": 0.2}, {"pool": "cls"}]
    for change in changes:
        assert state_identity(recipe(tmp_path, tmp_path, **change), ["content"]) != wanted


# ---------------------------------------------------------------- layers, refusals, holes


@pytest.mark.parametrize(
    ("pool", "scales"),
    [("mean", {"fc_norm.": 1.0, "head.": 1.0}), ("cls", {"norm.": 0.5, "head.": 1.0})],
)
def test_rates_fall_from_the_head_to_the_patches(tmp_path: Path, pool: str, scales: dict[str, float]) -> None:
    wanted = recipe(tmp_path, tmp_path, optim={"steps": 1, "layer_decay": 0.5, "weight_decay": 0.3})
    model = build_classifier(wanted.model, 10, pool)
    table = {"blocks.1.": 0.5, "blocks.0.": 0.25, "patch_embed.": 0.125, "cls_token": 0.125, "pos_embed": 0.125}
    table |= scales
    names = {parameter: name for name, parameter in model.named_parameters()}
    seen = set()
    for group in make_optimiser(model, wanted.optim).param_groups:
        for parameter in group["params"]:
            name = names[parameter]
            (scale,) = (value for prefix, value in table.items() if name.startswith(prefix))
            assert group["lr_scale"] == pytest.approx(scale), name
            plain = parameter.ndim == 1 or name in ("cls_token", "pos_embed")
            assert group["weight_decay"] == (0.0 if plain else 0.3), name
            seen.add(name)
    assert seen == set(names.values())


def test_a_step_moves_a_layer_by_its_share_of_the_rate(shards: Path, tmp_path: Path) -> None:
    """AdamW's first step is the rate times the gradient's sign, whatever the gradient is."""
    optim = {"batch_size": 8, "steps": 1, "base_lr": 0.32, "warmup": 0.0, "weight_decay": 0.0, "layer_decay": 0.5}
    report = finetune.run(recipe(shards, tmp_path, optim=optim, ema=None))
    assert report is not None
    torch.manual_seed(0)
    before = build_classifier(recipe(shards, tmp_path).model, 10, "mean", 0.1).state_dict()
    after = load_file(tmp_path / "last.safetensors")
    for name, scale in (("head.bias", 1.0), ("blocks.1.mlp.fc2.bias", 0.5), ("patch_embed.proj.bias", 0.125)):
        moved = (after[name] - before[name]).abs().max()
        assert float(moved) == pytest.approx(0.01 * scale, rel=1e-3), name


def test_sgd_steps_are_nesterovs_with_the_rates_of_the_layers(shards: Path, tmp_path: Path) -> None:
    """Three steps against Sutskever's formula in float64, on gradients of 1, 2 and 3."""
    own = {"name": "sgd", "momentum": 0.9, "layer_decay": 0.5, "weight_decay": 0.0, "batch_size": 8, "steps": 9}
    wanted = recipe(shards, tmp_path, optim=own)
    model = build_classifier(wanted.model, 10, "mean")
    optimiser = make_optimiser(model, wanted.optim)
    names = {parameter: name for name, parameter in model.named_parameters()}
    held = {"head.bias": 1.0, "blocks.1.mlp.fc2.bias": 0.5, "patch_embed.proj.bias": 0.125}
    expected = {name: dict(model.named_parameters())[name].detach().double().clone() for name in held}
    scaler, velocity = make_scaler(torch.device("cpu"), "fp32"), 0.0
    for step, lr in enumerate((0.1, 0.2, 0.05), start=1):
        for parameter in names:
            parameter.grad = torch.full_like(parameter, float(step))
        optimiser_step(model, optimiser, scaler, lr, None)
        velocity = 0.9 * velocity + step
        for name, scale in held.items():
            expected[name] -= lr * scale * (step + 0.9 * velocity)
    for parameter, name in names.items():
        if name in held:
            torch.testing.assert_close(parameter.detach().double(), expected[name], rtol=1e-6, atol=1e-6)
    plain = make_optimiser(model, recipe(shards, tmp_path, optim=own | {"momentum": 0.0}).optim)
    assert not plain.defaults["nesterov"]


def test_sgd_resumes_with_its_momentum_and_refuses_the_states_of_adamw(shards: Path, tmp_path: Path) -> None:
    own = {"name": "sgd", "base_lr": 0.05, "warmup": 0.2, "batch_size": 8, "clip_norm": 1.0}
    finetune.run(recipe(shards, tmp_path / "whole", optim=own | {"steps": 8}))
    with pytest.MonkeyPatch.context() as patch:
        signal_in_step(finetune, 4, signal.SIGTERM, patch)
        with pytest.raises(Interrupted):
            finetune.run(recipe(shards, tmp_path / "stopped", optim=own | {"steps": 8}))
    with pytest.raises(CheckpointError, match="another recipe"):
        finetune.run(recipe(shards, tmp_path / "stopped", optim=own | {"steps": 8, "name": "adamw"}))
    finetune.run(recipe(shards, tmp_path / "stopped", optim=own | {"steps": 8}))
    assert losses(tmp_path / "stopped")[-3:] == losses(tmp_path / "whole")[-3:]
    whole, stopped = (load_file(tmp_path / name / "last.safetensors") for name in ("whole", "stopped"))
    assert all(torch.equal(whole[name], stopped[name]) for name in whole)


def test_relative_positions_are_trained_and_exported_as_timms_beit(shards: Path, tmp_path: Path) -> None:
    start = to_safetensors(build_vit(recipe(shards, tmp_path).model).state_dict(), STATED)
    (tmp_path / "mae.safetensors").write_bytes(start)
    args = {"use_abs_pos_emb": True, "init_values": 0}
    model = recipe(shards, tmp_path).model.model_dump() | {"name": "beit_base_patch16_224", "args": args}
    weights = str(tmp_path / "mae.safetensors")
    optim = {"batch_size": 8, "steps": 3, "base_lr": 0.05}
    report = finetune.run(recipe(shards, tmp_path / "run", model=model, weights=weights, optim=optim))
    assert report is not None
    table = "blocks.0.attn.relative_position_bias_table"
    assert table in report["started_from"]["new"]
    with safe_open(tmp_path / "run" / "last.safetensors", "pt") as file:
        plain = timm.create_model(**json.loads(file.metadata()["timm"]))
        state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # no dictionary
    plain.load_state_dict(state, strict=True)
    assert state[table].any() and type(plain).__name__ == "Beit"


def test_what_does_not_fit_is_refused(shards: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"views\.size is not model\.img_size"):
        finetune.run(recipe(shards, tmp_path, views={"size": 64}))
    with pytest.raises(ValueError, match=r"augment\.rand_augment\n.*got 'much'"):
        recipe(shards, tmp_path, augment={"rand_augment": "much"})
    with pytest.raises(SourceError, match="no shards match"):
        finetune.run(recipe(shards, tmp_path, val={"shards": shards, "pattern": "val-*.tar"}))
    with pytest.raises(ValueError, match=r"multiple of 2 x order\.lanes; got 6 and 2 lanes"):
        recipe(shards, tmp_path, optim={"batch_size": 6, "steps": 1})
    recipe(shards, tmp_path, optim={"batch_size": 6, "steps": 1}, augment={"mixup": 0, "cutmix": 0})


def test_images_that_cannot_be_read_are_listed_and_left_out(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sample 3 of every shard: four of the training set, one of the validation set."""
    batch = ImageViews.batch

    def holes(self: ImageViews, items: Items) -> ViewBatch:
        found = batch(self, items)
        broken = found.items[:, 1] == 3
        lost = [(key, "broken") for key, gone in zip(found.keys, broken, strict=True) if gone]
        kept = found.pick(np.flatnonzero(~broken))
        kept.unreadable.extend(lost)
        return kept

    monkeypatch.setattr(ImageViews, "batch", holes)
    order = {"views_per_decode": 2, "views_per_epoch": 2}
    report = finetune.run(recipe(shards, tmp_path, optim={"batch_size": 8, "epochs": 1}, order=order))
    assert report is not None and len(losses(tmp_path)) == 16
    assert [entry["set"] for entry in report["unreadable"]] == ["train"] * 4 + ["val"]
    assert report["num_val_images"] == 15 and all(np.isfinite(losses(tmp_path)))
