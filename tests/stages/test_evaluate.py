"""`evaluate` end to end on drawn shards, and what it refuses."""

import io
import json
import tarfile
from pathlib import Path
from typing import Any, get_args

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from tinymim.configs.errors import CheckpointError, RecipeError, SourceError
from tinymim.configs.load import recipe_digest
from tinymim.configs.schema.evaluate import EvaluateRecipe
from tinymim.configs.sections.evaluation import Evaluator
from tinymim.configs.sections.loader import LoaderConfig
from tinymim.configs.sections.models import ModelConfig
from tinymim.configs.sections.source import SourceConfig
from tinymim.models.checkpoints import tensors_sha256
from tinymim.models.vit import IMAGENET_MEAN, Normalise, build_vit
from tinymim.pipeline.shards import open_shards
from tinymim.pipeline.views import CentreView
from tinymim.stages import evaluate, make_shards
from tinymim.stages.evaluation.encode import EncodedSet, Encoder, load_encoder
from tinymim.stages.run.interrupt import Interrupted, StopFlag
from tinymim.tests.stages.tiny import STATED

MODEL = {"name": "vit_tiny_patch16_224", "img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}


def recipe(shards: Path, folder: Path, **changes: Any) -> EvaluateRecipe:
    fields: dict[str, Any] = {
        "stage": "evaluate",
        "train": {"shards": shards, "pattern": "shard-00000[01].tar"},
        "val": {"shards": shards, "pattern": "shard-000002.tar"},
        "model": MODEL,
        "weights": "random",
        "batch_size": 16,
        "evaluators": [{"name": "knn", "k": 5}, {"name": "linear"}],
        "loader": {"workers": 0},
        "run": {"folder": folder, "device": "cpu", "threads": 1},
    }
    return EvaluateRecipe.model_validate(fields | changes)


def write_tar(path: Path, images: dict[str, bytes], labels: dict[str, int]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for key, data in images.items():
            members = [(f"{key}.jpg", data)] + ([(f"{key}.cls", str(labels[key]).encode())] if key in labels else [])
            for name, payload in members:
                info = tarfile.TarInfo(name)
                info.size = len(payload)
                tar.addfile(info, io.BytesIO(payload))


def some_images(shards: Path, count: int) -> dict[str, bytes]:
    shard = open_shards(SourceConfig(shards=shards)).shards[0]
    return {shard.members().keys[i]: shard.read(i) for i in range(count)}


def test_random_weights_end_to_end(drawn_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wanted = recipe(drawn_shards, tmp_path / "run")
    result = evaluate.run(wanted)
    assert json.loads((tmp_path / "run" / "evaluation.json").read_text()) == result
    assert {path.name for path in (tmp_path / "run").iterdir()} >= {"recipe.yaml", "versions.json", "metrics.jsonl"}
    for name in ("knn", "linear"):
        assert 0.0 <= result[f"{name}_top1"] <= result[f"{name}_top5"] <= 1.0
    assert (result["num_train_images"], result["num_val_images"], result["num_classes"]) == (50, 10, 10)
    assert result["unreadable"] == [] and result["num_features"] == 24
    assert result["recipe_digest"] == recipe_digest(wanted)
    assert result["weights_sha256"] == tensors_sha256(load_encoder(wanted)[0].state_dict())
    assert capsys.readouterr().out == ""  # stdout is the command line's
    assert evaluate.run(recipe(drawn_shards, tmp_path / "again")) == result | {
        "recipe_digest": recipe_digest(recipe(drawn_shards, tmp_path / "again"))
    }


def test_random_weights_are_those_of_the_run_seed(drawn_shards: Path, tmp_path: Path) -> None:
    digests = {
        tensors_sha256(
            load_encoder(recipe(drawn_shards, tmp_path, run={"folder": tmp_path, "seed": seed}))[0].state_dict()
        )
        for seed in (0, 0, 1)
    }
    assert len(digests) == 2


def test_training_images_find_themselves(drawn_shards: Path, tmp_path: Path) -> None:
    """With the same images on both sides and k = 1 the nearest neighbour is the image itself."""
    both, nearest = {"shards": drawn_shards}, [{"name": "knn", "k": 1}]
    result = evaluate.run(recipe(drawn_shards, tmp_path, val=both, train=both, evaluators=nearest))
    assert result["knn_top1"] == 1.0 and "linear_top1" not in result


def test_sets_are_encoded_once_for_all_evaluators(
    drawn_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded: list[str] = []
    encode = Encoder.encode

    def spy(self: Encoder, shards: Any, stop: StopFlag, label: str) -> EncodedSet:
        encoded.append(label)
        return encode(self, shards, stop, label)

    monkeypatch.setattr(Encoder, "encode", spy)
    both = evaluate.run(recipe(drawn_shards, tmp_path / "both"))
    assert encoded == ["evaluate train", "evaluate val"]
    linear = [{"name": "linear"}]
    alone = evaluate.run(recipe(drawn_shards, tmp_path / "alone", evaluators=linear))
    assert alone | {"recipe_digest": ""} == {
        name: value for name, value in (both | {"recipe_digest": ""}).items() if not name.startswith("knn")
    }


def test_without_evaluators_in_the_recipe_there_are_both_and_every_section_has_its_function() -> None:
    field = EvaluateRecipe.model_fields["evaluators"]
    assert [(each.name, each.model_dump()) for each in field.default] == [
        ("knn", {"name": "knn", "k": 20, "temperature": 0.07}),
        ("linear", {"name": "linear", "l2": 1e-3, "max_iter": 200}),
    ]
    sections = get_args(get_args(Evaluator)[0])
    assert [get_args(each.model_fields["name"].annotation)[0] for each in sections] == [
        *evaluate.PROBES,
        *evaluate.MEASURES,
    ]


def test_features_do_not_depend_on_batches_or_workers(drawn_shards: Path) -> None:
    shards = open_shards(SourceConfig(shards=drawn_shards)).shards
    torch.manual_seed(0)
    model = build_vit(ModelConfig.model_validate(MODEL))
    found = []
    for batch_size, workers in ((7, 0), (60, 0), (16, 1)):
        with StopFlag() as stop:
            found.append(
                Encoder(
                    model,
                    Normalise(),
                    CentreView(32, 1.143),
                    block=1,
                    pool="cls",
                    batch_size=batch_size,
                    loader=LoaderConfig(workers=workers),
                    device=torch.device("cpu"),
                ).encode(shards, stop)
            )
    for other in found[1:]:
        torch.testing.assert_close(other.features, found[0].features, atol=1e-5, rtol=1e-5)
        assert torch.equal(other.labels, found[0].labels)
    assert found[0].labels.tolist() == [i % 10 for i in range(60)] and found[0].features.dtype == torch.float32
    assert not found[0].features.requires_grad and not model.training


def test_stop(drawn_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def requested(stop: StopFlag) -> StopFlag:
        stop.requested = True
        return stop

    monkeypatch.setattr(StopFlag, "__enter__", requested)
    with pytest.raises(Interrupted):
        evaluate.run(recipe(drawn_shards, tmp_path))
    assert not (tmp_path / "evaluation.json").exists()


# ---- weights


def test_a_checkpoint_gives_the_features_of_its_model(drawn_shards: Path, tmp_path: Path) -> None:
    random = recipe(drawn_shards, tmp_path / "random")
    state = {name: tensor.contiguous() for name, tensor in load_encoder(random)[0].state_dict().items()}
    save_file(state, tmp_path / "encoder.safetensors", STATED)
    result = evaluate.run(recipe(drawn_shards, tmp_path / "file", weights=str(tmp_path / "encoder.safetensors")))
    expected = evaluate.run(random)
    same = ("knn_top1", "knn_top5", "linear_top1", "linear_top5", "weights_sha256", "mean")
    assert {name: result[name] for name in same} == {name: expected[name] for name in same}


def test_missing_checkpoint(drawn_shards: Path, tmp_path: Path) -> None:
    for weights in (str(tmp_path / "absent.safetensors"), "package:absent"):
        with pytest.raises(CheckpointError, match="does not exist"):
            evaluate.run(recipe(drawn_shards, tmp_path / "run", weights=weights))
    assert not (tmp_path / "run").exists()


def test_a_checkpoint_that_does_not_fit_lists_the_keys(drawn_shards: Path, tmp_path: Path) -> None:
    path = tmp_path / "encoder.safetensors"
    state = {name: t.contiguous() for name, t in load_encoder(recipe(drawn_shards, tmp_path))[0].state_dict().items()}
    del state["norm.weight"]
    save_file(state | {"blocks.0.mlp.fc1.bias": torch.zeros(7), "extra.weight": torch.zeros(1)}, path)
    assert "norm.weight" not in load_file(path)
    with pytest.raises(CheckpointError) as caught:
        evaluate.run(recipe(drawn_shards, tmp_path / "run", weights=str(path)))
    for name in ("norm.weight", "extra.weight", "blocks.0.mlp.fc1.bias (7,) for (96,)"):
        assert name in str(caught.value.got)


def test_hub_without_network_is_a_checkpoint_error(
    drawn_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def offline(*_args: object, **_options: object) -> None:
        raise OSError("We couldn't connect to the hub")

    monkeypatch.setattr("tinymim.models.hub.unreachable", lambda: None)
    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(CheckpointError) as caught:
        evaluate.run(recipe(drawn_shards, tmp_path / "run", weights="hub", model={"name": "vit_tiny_patch16_224"}))
    assert caught.value.hint and "couldn't connect" in str(caught.value.got)


def test_hub_pixels_are_normalised_as_timm_states(
    drawn_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda *args, pretrained=False, **options: real(*args, **options))
    hub = recipe(drawn_shards, tmp_path, weights="hub")
    assert load_encoder(hub)[1:] == ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    given = recipe(drawn_shards, tmp_path, weights="hub", mean=[0.1, 0.2, 0.3])
    assert load_encoder(given)[1:] == ((0.1, 0.2, 0.3), (0.5, 0.5, 0.5))
    assert load_encoder(recipe(drawn_shards, tmp_path))[1] == IMAGENET_MEAN


def test_a_block_that_is_not_there(drawn_shards: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="block is outside the model"):
        evaluate.run(recipe(drawn_shards, tmp_path, block=3))


# ---- sources


def test_unlabelled_shards(drawn_shards: Path, tmp_path: Path) -> None:
    images = some_images(drawn_shards, 3)
    missing = list(images)[1]
    write_tar(tmp_path / "val" / "x.tar", images, {key: 0 for key in images if key != missing})
    with pytest.raises(SourceError, match=f"sample '{missing}' of shard x.tar has no label"):
        evaluate.run(recipe(drawn_shards, tmp_path / "run", val={"shards": tmp_path / "val"}))
    assert not (tmp_path / "run").exists()


def test_classes_of_val_that_train_lacks_are_named(drawn_shards: Path, tmp_path: Path) -> None:
    images = some_images(drawn_shards, 3)
    write_tar(tmp_path / "val" / "x.tar", images, dict(zip(images, (2, 11, 77), strict=True)))
    with pytest.raises(SourceError) as caught:
        evaluate.run(recipe(drawn_shards, tmp_path / "run", val={"shards": tmp_path / "val"}))
    assert caught.value.got == "11, 77"
    write_tar(tmp_path / "train" / "x.tar", images, dict(zip(images, (0, 1, 3), strict=True)))
    make_shards.run(str(tmp_path / "train"), tmp_path / "named", make_shards.Options())
    index = json.loads((drawn_shards / "index.json").read_text())
    named = json.loads((tmp_path / "named" / "index.json").read_text()) | {"classes": index["classes"]}
    (tmp_path / "named" / "index.json").write_text(json.dumps(named))
    with pytest.raises(SourceError, match=r"got: 2 \(dots\), 4 \(zigzag\), 5"):
        evaluate.run(recipe(drawn_shards, tmp_path / "run", train={"shards": tmp_path / "named"}))


def test_sets_that_number_their_classes_differently(drawn_shards: Path, tmp_path: Path) -> None:
    images = list(some_images(drawn_shards, 2).values())
    for name, data in zip(("checks", "dots"), images, strict=True):
        (tmp_path / "src" / name).mkdir(parents=True)
        (tmp_path / "src" / name / "1.jpg").write_bytes(data)
    make_shards.run(str(tmp_path / "src"), tmp_path / "val", make_shards.Options())
    with pytest.raises(SourceError, match="class 0 is not the same") as caught:
        evaluate.run(recipe(drawn_shards, tmp_path / "run", val={"shards": tmp_path / "val"}))
    assert (caught.value.got, caught.value.expected) == ("val: checks", "train: stripes")


def test_unreadable_images_are_counted_and_listed(drawn_shards: Path, tmp_path: Path) -> None:
    images = some_images(drawn_shards, 4)
    keys = list(images)
    images[keys[2]] = b"broken"
    write_tar(tmp_path / "val" / "x.tar", images, {key: i for i, key in enumerate(images)})
    result = evaluate.run(recipe(drawn_shards, tmp_path / "run", val={"shards": tmp_path / "val"}, batch_size=1))
    assert result["num_val_images"] == 3
    assert [(row["set"], row["key"]) for row in result["unreadable"]] == [("val", keys[2])]
    write_tar(tmp_path / "none" / "x.tar", {"a": b"broken"}, {"a": 0})
    with pytest.raises(SourceError, match="no image can be read"):
        evaluate.run(recipe(drawn_shards, tmp_path / "run", val={"shards": tmp_path / "none"}))
