"""`tinymim pretrain`: a run is resumed to the bit, its encoder is a plain timm model that other stages read."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file

from tinymim.configs.errors import CheckpointError, RecipeError
from tinymim.configs.schema.pretrain import PretrainRecipe
from tinymim.models.checkpoints import read_metadata
from tinymim.models.vit import IMAGENET_MEAN, IMAGENET_STD
from tinymim.stages import pretrain
from tinymim.stages.run.folder import read_metrics
from tinymim.stages.run.interrupt import Interrupted

SWIN: dict[str, Any] = {
    "name": "swin_tiny_patch4_window7_224",
    "img_size": 64,
    "args": {"window_size": 2, "embed_dim": 8, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 2, 2]},
}
VIT: dict[str, Any] = {
    "name": "vit_tiny_patch16_224",
    "img_size": 64,
    "embed_dim": 16,
    "depth": 2,
    "num_heads": 2,
}


def recipe(shards: Path, folder: Path, **changes: Any) -> PretrainRecipe:
    fields: dict[str, Any] = {
        "stage": "pretrain",
        "source": {"shards": shards},
        "views": {"size": 64},
        "model": SWIN,
        "decoder": {"dim": 16, "heads": 2},
        "optim": {"batch_size": 16, "steps": 4, "base_lr": 0.05, "warmup": 0.2},
        "loader": {"workers": 0},
        "run": {"folder": folder, "device": "cpu", "threads": 1, "log_every": 1},
    }
    return PretrainRecipe.model_validate(fields | changes)


def test_a_stopped_run_ends_with_the_same_encoder_which_timm_loads(
    drawn_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretrain.run(recipe(drawn_shards, tmp_path / "whole"))
    stopped = recipe(drawn_shards, tmp_path / "stopped")
    real, steps = torch.optim.AdamW.step, [0]

    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        steps[0] += 1
        if steps[0] == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return real(self, *args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(torch.optim.AdamW, "step", step)
        with pytest.raises(Interrupted):
            pretrain.run(stopped)
    pretrain.run(stopped)
    ours, theirs = (load_file(tmp_path / name / "encoder.safetensors") for name in ("whole", "stopped"))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours) and ours.keys() == theirs.keys()
    lines = read_metrics(tmp_path / "whole")
    variances = [line["loss"] / (1 - line["r2"]) for line in lines]  # of HOG, whose mean square is 1 / 9
    assert len(lines) == 4 and all(0 < variance < 1 / 9 for variance in variances)
    model = timm.create_model(f"local-dir:{tmp_path / 'whole' / 'encoder'}", pretrained=True)
    assert all(torch.equal(value, ours[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("model", "larger", "table"),
    [(VIT, {}, "pos_embed"), (SWIN, {"args": SWIN["args"] | {"window_size": 3}}, "relative_position_bias_table")],
    ids=["vit", "swin"],
)
def test_a_run_at_a_higher_resolution_starts_where_one_at_a_lower_ended(
    drawn_shards: Path, tmp_path: Path, model: dict[str, Any], larger: dict[str, Any], table: str
) -> None:
    """FastMIM's progressive resolution, as a chain of runs; the tables of positions are resampled."""
    one = {"batch_size": 16, "steps": 1, "base_lr": 0.05}
    pretrain.run(recipe(drawn_shards, tmp_path / "low", model=model, optim=one))
    high = recipe(
        drawn_shards,
        tmp_path / "high",
        model=model | {"img_size": 96} | larger,
        views={"size": 96},
        weights=str(tmp_path / "low" / "encoder.safetensors"),
        optim={"batch_size": 16, "steps": 1, "base_lr": 1e-12, "weight_decay": 0.0},
    )
    pretrain.run(high)
    low, found = (load_file(tmp_path / name / "encoder.safetensors") for name in ("low", "high"))
    tables = {name for name in found if name.endswith(table)}
    for name in set(found) - tables:
        torch.testing.assert_close(found[name], low[name], rtol=0, atol=1e-6)
    assert tables and all(found[name].numel() > low[name].numel() for name in tables)


def test_a_run_from_other_weights_does_not_resume(drawn_shards: Path, tmp_path: Path) -> None:
    pretrain.run(recipe(drawn_shards, tmp_path / "first", model=VIT))
    weights = str(tmp_path / "first" / "encoder.safetensors")
    pretrain.run(recipe(drawn_shards, tmp_path / "second", model=VIT, weights=weights))
    with pytest.raises(CheckpointError, match="another recipe or other data"):
        pretrain.run(recipe(drawn_shards, tmp_path / "second", model=VIT))


def test_pixels_are_normalised_as_the_weights_were(drawn_shards: Path, tmp_path: Path) -> None:
    half = [0.5, 0.5, 0.5]
    pretrain.run(recipe(drawn_shards, tmp_path / "first", model=VIT, mean=half, std=half))
    own = tmp_path / "first" / "encoder.safetensors"
    save_file(load_file(own), tmp_path / "foreign.safetensors")  # states nothing
    foreign: dict[str, Any] = {"model": VIT, "weights": str(tmp_path / "foreign.safetensors")}
    for name, changes in {
        "stated": {"model": VIT, "weights": str(own)},
        "given": foreign | {"mean": half, "std": half},
        "others": foreign | {"mean": IMAGENET_MEAN, "std": IMAGENET_STD},
    }.items():
        pretrain.run(recipe(drawn_shards, tmp_path / name, **changes))
    stated, given, others = (
        load_file(tmp_path / name / "encoder.safetensors")["patch_embed.proj.weight"]
        for name in ("stated", "given", "others")
    )
    assert torch.equal(stated, given) and not torch.equal(stated, others)
    assert json.loads((tmp_path / "stated" / "encoder" / "config.json").read_text())["pretrained_cfg"]["mean"] == half
    start = json.loads(read_metadata(tmp_path / "given" / "encoder.safetensors")["start"])
    assert start["weights"] == foreign["weights"] and start["license"] == "unknown (local file)"
    assert json.loads(read_metadata(own)["start"]) == {"weights": "random"}
    with pytest.raises(CheckpointError, match="mean and std of the pixels are not known"):
        pretrain.run(recipe(drawn_shards, tmp_path / "refused", **foreign))


def test_xavier_is_the_start_of_any_model(drawn_shards: Path, tmp_path: Path) -> None:
    still = {"optim": {"batch_size": 16, "steps": 1, "base_lr": 1e-12, "weight_decay": 0.0}}
    spread = {}
    for xavier in (False, True):
        pretrain.run(recipe(drawn_shards, tmp_path / str(xavier), xavier=xavier, **still))
        weights = load_file(tmp_path / str(xavier) / "encoder.safetensors")["layers.0.blocks.0.mlp.fc1.weight"]
        spread[xavier] = float(weights.std())  # [32, 8]
    assert spread == pytest.approx({False: 0.02, True: (2 / 40) ** 0.5}, rel=0.15)


def test_two_sizes_are_refused(drawn_shards: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"views\.size is not model\.img_size"):
        pretrain.run(recipe(drawn_shards, tmp_path, views={"size": 128}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target": {"name": "tokens"}}, r"`tinymim train-student`; start from the recipe tinyimagenet40-masked"),
        ({"xavier": True, "weights": "some.safetensors"}, r"xavier: true would replace the given weights"),
        ({"mask": {"hide": "drop"}}, r"mask\.hide: drop needs decoder\.position: true"),
    ],
)
def test_what_needs_another_command_or_field_is_said(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        recipe(tmp_path, tmp_path, **changes)
