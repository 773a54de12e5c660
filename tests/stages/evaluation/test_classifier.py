"""The evaluator `classifier`: labels, a class map, ImageNet ReaL."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from timm.data.real_labels import RealLabelsImagenet

from tinymim.configs.errors import CheckpointError, RecipeError, SourceError
from tinymim.configs.sections.models import ModelConfig
from tinymim.configs.sections.source import SourceConfig
from tinymim.models.checkpoints import tensors_sha256
from tinymim.models.vit import Normalise, build_model
from tinymim.pipeline.dataset import ImageViews
from tinymim.pipeline.order import view_batches
from tinymim.pipeline.shards import open_shards
from tinymim.pipeline.views import CentreView
from tinymim.stages import evaluate
from tinymim.stages.evaluation.classifier import mapped
from tinymim.stages.evaluation.real import RealLabels, real_file
from tinymim.stages.pages.summary import read_runs
from tinymim.tests.stages.test_evaluate import MODEL, recipe, some_images, write_tar
from tinymim.tests.stages.tiny import STATED

CLASSES = 12  # two more than the labels


@pytest.fixture
def weights(tmp_path: Path) -> str:
    """A classifier whose head is far from zero, with timm's names."""
    torch.manual_seed(3)
    model = build_model(ModelConfig.model_validate(MODEL), num_classes=CLASSES)
    torch.nn.init.normal_(model.head.weight)  # type: ignore[union-attr,arg-type]
    path = tmp_path / "classifier.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, path, STATED)
    return str(path)


def measured(shards: Path, folder: Path, weights: str, **fields: Any) -> dict[str, Any]:
    evaluators = [{"name": "classifier", **fields}]
    val = {"shards": shards}
    return evaluate.run(recipe(shards, folder, train=None, val=val, weights=weights, evaluators=evaluators))


def logits64(shards: Path, weights: str) -> tuple[list[str], np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Keys, float64 logits and labels of the whole set, computed apart from the evaluator."""
    model = build_model(ModelConfig.model_validate(MODEL), num_classes=CLASSES).eval().double()
    model.load_state_dict(load_file(weights))
    opened = open_shards(SourceConfig(shards=shards)).shards
    keys, found, labels = [], [], []
    for unit, shard in enumerate(opened):
        for items in view_batches(unit, shard.num_samples, (0,), 7):
            batch = ImageViews(opened, CentreView(32, 1.143)).batch(items)
            with torch.no_grad():
                found.append(model(Normalise().double()(batch.pixels)).numpy())
            keys += batch.keys
            labels += batch.labels.tolist()
    return keys, np.concatenate(found), np.array(labels)


def share(right: np.ndarray[Any, Any]) -> float:
    return float(right.mean())


def test_accuracy_is_that_of_a_float64_pass(drawn_shards: Path, tmp_path: Path, weights: str) -> None:
    result = measured(drawn_shards, tmp_path / "run", weights)
    _, logits, labels = logits64(drawn_shards, weights)
    order = np.argsort(-logits, axis=1)
    assert result["classifier_top1"] == share(order[:, 0] == labels)
    assert result["classifier_top5"] == share((order[:, :5] == labels[:, None]).any(axis=1))
    assert 0 < result["classifier_top1"] < result["classifier_top5"] < 1
    assert result["num_val_images"] == 60 and "real_top1" not in result


def test_a_class_map_gives_each_label_its_class_and_minus_one_a_score_of_zero(
    drawn_shards: Path, tmp_path: Path, weights: str
) -> None:
    numbers = [11, 3, 0, -1, 7, 1, 2, 5, 4, 10]
    (tmp_path / "map.txt").write_text("".join(f"{number}\n" for number in numbers))
    result = measured(drawn_shards, tmp_path / "run", weights, class_map=tmp_path / "map.txt")
    _, logits, labels = logits64(drawn_shards, weights)
    scores = np.stack([logits[:, n] if n >= 0 else 0 * logits[:, 0] for n in numbers], axis=1)
    assert result["classifier_top1"] == share(scores.argmax(axis=1) == labels)
    assert result["classifier_top1"] != measured(drawn_shards, tmp_path / "plain", weights)["classifier_top1"]
    found = mapped(torch.tensor([[-3.0, -1.0, -2.0]]), torch.tensor([2, -1]))
    assert found.tolist() == [[-2.0, 0.0]]


def test_real_labels_judge_as_timm_judges_them(drawn_shards: Path, tmp_path: Path, weights: str) -> None:
    keys, logits, labels = logits64(drawn_shards, weights)
    best = logits.argmax(axis=1).tolist()
    real = [
        [] if i % 4 == 0 else [int(labels[i]), best[i]] if i % 4 == 1 else [int(labels[i]), (best[i] + 1) % CLASSES]
        for i in range(len(keys))
    ]
    images = {
        f"x{i:03d}_ILSVRC2012_val_{i + 1:08d}": data for i, data in enumerate(some_images(drawn_shards, 10).values())
    }
    write_tar(tmp_path / "val" / "a.tar", images, dict(zip(images, labels.tolist(), strict=False)))
    (tmp_path / "real.json").write_text(json.dumps(real[:10]))
    result = measured(tmp_path / "val", tmp_path / "run", weights, real_labels=tmp_path / "real.json")
    peer = RealLabelsImagenet([f"ILSVRC2012_val_{i + 1:08d}.JPEG" for i in range(10)], tmp_path / "real.json")
    peer.add_result(torch.from_numpy(logits[:10]))
    assert {top: 100 * result[f"real_top{top}"] for top in (1, 5)} == pytest.approx(peer.get_accuracy())
    assert (result["real_judged"], result["real_unjudged"]) == (7, 3)
    by_name = {f"{name}.JPEG": real[i] for i, name in enumerate(images) if i < 9}  # one image is not in the file
    (tmp_path / "named.json").write_text(json.dumps(by_name))
    named = measured(tmp_path / "val", tmp_path / "named", weights, real_labels=tmp_path / "named.json")
    assert (named["real_judged"], named["real_unjudged"]) == (6, 4)
    [run] = read_runs([tmp_path / "run"])
    assert run.results["real_top1"] == result["real_top1"] and "real_judged" not in run.results


def test_timm_s_copy_of_the_real_labels_is_the_published_one() -> None:
    labels = RealLabels(real_file("timm"), 1000)
    assert labels.of("val/ILSVRC2012_val_00000001") is not None and labels.of("ILSVRC2012_val_00050001") is None
    empty = sum(labels.of(f"ILSVRC2012_val_{i:08d}") == frozenset() for i in range(1, 50001))
    assert empty == 3163  # 46,837 of 50,000 have labels (Beyer et al., 2020)


def test_what_does_not_fit_is_refused(drawn_shards: Path, tmp_path: Path, weights: str) -> None:
    def file(name: str, text: str) -> Path:
        (tmp_path / name).write_text(text)
        return tmp_path / name

    with pytest.raises(SourceError, match="class that the classifier lacks"):
        measured(drawn_shards, tmp_path / "run", weights, class_map=file("far.txt", "0\n12\n"))
    with pytest.raises(SourceError, match="beyond the class map"):
        measured(drawn_shards, tmp_path / "run", weights, class_map=file("short.txt", "0\n1\n"))
    with pytest.raises(RecipeError, match="line 2 of the class map"):
        measured(drawn_shards, tmp_path / "run", weights, class_map=file("words.txt", "0\ncat\n"))
    for text, message in (
        ("[[0]", "is not JSON"),
        ("3", "has no ReaL labels"),
        ('{"a": [12]}', "no ReaL labels for a"),
        ('{"a": "cat"}', "no ReaL labels for a"),
        ('{"other": [1]}', "name no image of val"),
    ):
        with pytest.raises(SourceError, match=message):
            measured(drawn_shards, tmp_path / "run", weights, real_labels=file("real.json", text))
    with pytest.raises(SourceError, match="cannot be read"):
        measured(drawn_shards, tmp_path / "run", weights, real_labels=tmp_path / "absent.json")
    encoder = build_model(ModelConfig.model_validate(MODEL))
    save_file(encoder.state_dict(), tmp_path / "encoder.safetensors", STATED)
    with pytest.raises(CheckpointError, match="no classifier"):
        measured(drawn_shards, tmp_path / "run", str(tmp_path / "encoder.safetensors"))
    save_file(
        build_model(ModelConfig.model_validate(MODEL), num_classes=4).state_dict(), tmp_path / "4.safetensors", STATED
    )
    with pytest.raises(SourceError, match="beyond the classifier"):
        measured(drawn_shards, tmp_path / "run", str(tmp_path / "4.safetensors"))
    names = {"classes": json.dumps([f"class {i}" for i in range(CLASSES)])}
    state = build_model(ModelConfig.model_validate(MODEL), num_classes=CLASSES).state_dict()
    save_file(state, tmp_path / "named.safetensors", STATED | names)
    with pytest.raises(CheckpointError, match="number their classes differently"):
        measured(drawn_shards, tmp_path / "run", str(tmp_path / "named.safetensors"))
    assert not (tmp_path / "run" / "evaluation.json").exists()


def test_evaluators_name_the_sets_that_they_need(drawn_shards: Path, tmp_path: Path) -> None:
    for evaluators, lacking in ((["knn"], "train"), (["linear"], "train"), (["classifier"], "val")):
        with pytest.raises(ValueError, match=f"evaluator {evaluators[0]} needs {lacking}"):
            recipe(drawn_shards, tmp_path, train=None, val=None, weights="x.pth", evaluators=[{"name": evaluators[0]}])
    with pytest.raises(ValueError, match="weights with a classifier"):
        recipe(drawn_shards, tmp_path, evaluators=[{"name": "classifier"}])


def test_probes_and_the_classifier_in_one_evaluation(drawn_shards: Path, tmp_path: Path, weights: str) -> None:
    evaluators = [{"name": "knn", "k": 1}, {"name": "classifier"}]
    result = evaluate.run(recipe(drawn_shards, tmp_path / "run", weights=weights, evaluators=evaluators))
    assert {"knn_top1", "classifier_top1"} <= result.keys()
    assert result["weights_sha256"] == tensors_sha256(load_file(weights))  # as `compare` looks for it


def test_unreadable_images_are_listed_and_not_judged(drawn_shards: Path, tmp_path: Path, weights: str) -> None:
    images = some_images(drawn_shards, 4)
    broken = list(images)[2]
    images[broken] = b"broken"
    write_tar(tmp_path / "val" / "x.tar", images, dict.fromkeys(images, 0))
    result = measured(tmp_path / "val", tmp_path / "run", weights)
    assert result["num_val_images"] == 3 and [(row["set"], row["key"]) for row in result["unreadable"]] == [
        ("val", broken)
    ]
    write_tar(tmp_path / "none" / "x.tar", {"a": b"broken"}, {"a": 0})
    with pytest.raises(SourceError, match="no image of val can be read"):
        measured(tmp_path / "none", tmp_path / "run", weights)
