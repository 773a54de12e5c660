"""`tinymim compare`: what run folders say, side by side, and what they do not."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from matplotlib.figure import Figure
from safetensors.torch import save_file

from tinymim.configs.errors import RecipeError, UserError
from tinymim.models.checkpoints import tensors_sha256
from tinymim.stages import compare
from tinymim.stages.compare import as_json, as_text, table_cells
from tinymim.stages.pages.compare import PICTURES
from tinymim.stages.pages.look import keep_flat
from tinymim.stages.pages.summary import RunSummary, differences, read_runs
from tinymim.stages.run.metrics import metric
from tinymim.tests.stages.conftest import Run

STUDENT: dict[str, Any] = {"stage": "train-student", "cache": "caches/mine", "optim": {"base_lr": 0.1, "steps": 20}}


def write_lines(path: Path, lines: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def make_run(folder: Path, recipe: dict[str, Any], device_s: float | None = None, **versions: Any) -> Path:
    folder.mkdir(parents=True)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe | {"run": {"folder": str(folder)}}))
    (folder / "versions.json").write_text(json.dumps({"libraries": {"torch": "2.0"}, **versions}))
    if device_s is not None:
        line = {"session": "a", "device": "H200", "elapsed_s": device_s / 2, "device_s": device_s}
        write_lines(folder / "sessions.jsonl", [line | {"elapsed_s": 1.0}, line, line | {"session": "b"}])
    return folder


def make_student(root: Path, name: str, device_s: float | None = None, **changes: Any) -> Path:
    folder = make_run(root / name, STUDENT | changes, device_s)
    lines = [{"step": step, "epoch": (step + 1) / 10, "loss": 2.0 - step / 10, "kl_qk": 1.0} for step in range(20)]
    audits = [{"step": step - 1, "audit_kl_qk": 0.5, "audit_knn_top1": 0.2} for step in (10, 20)]
    write_lines(folder / "metrics.jsonl", [*lines, *audits])
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3')  # cut short by a kill
    entries = [
        {"step": step, "epoch": step / 10, "qk": {"kl": 1.0 - step / 40}, "ema_qk": {"kl": 2.0}, "knn_top1": step / 100}
        for step in (0, 10, 20)
    ]
    write_lines(folder / "audit.jsonl", [entry | {"alarms": ["x"] if entry["step"] == 20 else []} for entry in entries])
    return folder


@pytest.fixture
def runs(tmp_path: Path) -> dict[str, Path]:
    """Stage one, two students of its cache, an evaluation of one of them, a fine-tuning, an old run without much."""
    place = tmp_path / "caches" / "mine"
    made = {
        "cache": make_run(tmp_path / "cache", {"stage": "cache-teacher", "cache": str(place)}, 3600.0),
        "fast": make_student(tmp_path, "fast", 1800.0, cache=str(place)),
        "slow": make_student(tmp_path, "slow", 5400.0, cache=str(place), optim={"base_lr": 0.2}, ema=None),
    }
    weights = {"weight": torch.arange(3.0)}
    save_file(weights, made["fast"] / "student.safetensors")
    recipe = {"stage": "evaluate", "weights": str(made["fast"] / "student.safetensors")}
    made["eval"] = make_run(tmp_path / "eval", recipe, 36.0)
    result = {"knn_top1": 0.31, "linear_top1": 0.42, "weights_sha256": tensors_sha256(weights), "num_classes": 10}
    (made["eval"] / "evaluation.json").write_text(json.dumps(result))
    made["tuned"] = make_run(tmp_path / "tuned", {"stage": "finetune", "weights": "random"})
    write_lines(
        made["tuned"] / "metrics.jsonl",
        [{"step": 9, "epoch": 1.0, "loss": 3.0}, {"step": 10, "val_model_top1": 0.5, "val_model_loss": 1.5}],
    )
    report = {"weights": {"last.safetensors": {"top1": 0.5, "top5": 0.8}, "best.safetensors": {"top1": 0.6}}}
    (made["tuned"] / "finetuned.json").write_text(json.dumps(report))
    made["old"] = make_run(tmp_path / "old", {"stage": "pretrain-mae"})
    write_lines(made["old"] / "metrics.jsonl", [{"step": 0, "loss": 1.0}, {"step": 7, "loss": 0.5}])
    return made


def by_name(runs: dict[str, Path], *names: str) -> dict[str, RunSummary]:
    return {run.name: run for run in read_runs([runs[name] for name in names or runs])}


def test_curves_are_by_steps_done_and_by_epoch(runs: dict[str, Path]) -> None:
    found = by_name(runs)
    curves = found["fast"].curves
    assert [point.step for point in curves["loss"]] == list(range(1, 21))
    assert [point.epoch for point in curves["loss"]] == pytest.approx([step / 10 for step in range(1, 21)])
    assert [(point.step, point.value) for point in curves["audit_knn_top1"]] == [(0, 0.0), (10, 0.1), (20, 0.2)]
    assert [point.value for point in curves["audit_ema_kl_qk"]] == [2.0] * 3
    assert [point.step for point in found["tuned"].curves["val_model_top1"]] == [10]
    assert found["tuned"].curves["val_model_top1"][0].epoch == pytest.approx(1.0)
    assert [point.epoch for point in found["old"].curves["loss"]] == [None, None]  # nobody wrote it down
    assert found["fast"].results | {"alarms": 1, "steps": 20, "audit_kl_qk": 0.5} == found["fast"].results
    assert found["tuned"].results["finetuned_best_top1"] == 0.6 and "epochs" not in found["old"].results


def test_cost_is_of_all_sessions_and_the_teachers_part_is_shared(runs: dict[str, Path]) -> None:
    found = by_name(runs)
    assert (found["fast"].elapsed_s, found["fast"].device_s, found["fast"].sessions) == (1800.0, 3600.0, 2)
    assert found["fast"].teacher_device_s == found["slow"].teacher_device_s == 3600.0  # half of 7200
    assert found["fast"].teacher_share == 0.5 and found["slow"].teacher_share == 0.25
    assert found["eval"].teacher_share is None and found["old"].device_s is None
    alone = by_name(runs, "fast", "old")
    assert alone["fast"].teacher_device_s is None is alone["fast"].teacher_share


def test_a_cache_root_is_found_too_and_another_cache_is_not(runs: dict[str, Path], tmp_path: Path) -> None:
    make_run(tmp_path / "rooted", {"stage": "cache-teacher", "cache_root": str(tmp_path / "root")}, 10.0)
    make_student(tmp_path, "below", 10.0, cache=str(tmp_path / "root" / "0123"))
    make_student(tmp_path, "other", 10.0, cache="s3://bucket/root/0123")
    found = {run.name: run for run in read_runs([tmp_path / name for name in ("rooted", "below", "other", "cache")])}
    assert found["below"].teacher_device_s == 20.0 and found["other"].teacher_device_s is None


def test_an_evaluation_counts_for_the_run_that_wrote_these_very_weights(runs: dict[str, Path]) -> None:
    found = by_name(runs)
    assert (found["fast"].results["knn_top1"], found["fast"].results["linear_top1"]) == (0.31, 0.42)
    assert "knn_top1" not in found["slow"].results
    save_file({"weight": torch.arange(4.0)}, runs["fast"] / "student.safetensors")  # trained again since
    assert "knn_top1" not in by_name(runs)["fast"].results


def test_recipes_differ_in_what_is_not_the_same_and_absent_is_not_null(runs: dict[str, Path]) -> None:
    found = differences(read_runs([runs["fast"], runs["slow"]]))
    assert found == {
        "optim.base_lr": {"fast": 0.1, "slow": 0.2},
        "optim.steps": {"fast": 20},
        "ema": {"slow": None},
    }
    rows = {
        row[0]: row[1:] for row in compare.difference_cells(read_runs([runs["fast"], runs["slow"]]))["train-student"]
    }
    assert rows["optim.steps"] == ["20", "-"] and rows["ema"] == ["-", "null"]


def test_the_table_has_a_dash_where_nothing_is_known_and_no_column_that_nobody_fills(runs: dict[str, Path]) -> None:
    cells = table_cells(read_runs([runs[name] for name in ("cache", "fast", "old", "eval")]))
    table = {row[0]: dict(zip(cells[0], row, strict=True)) for row in cells[1:]}
    assert table["fast"]["teacher share"] == "67%" and table["fast"]["alarms"] == "1"
    assert table["old"]["device-h"] == table["old"]["audit k-NN"] == table["eval"]["loss"] == "-"
    assert table["fast"]["audit k-NN"] == "20.0%" and table["eval"]["linear"] == "42.0%"
    assert "best top-1" not in cells[0] and "KL vv" not in cells[0]
    text = as_text(read_runs([runs["fast"], runs["slow"]]))
    assert "what differs in train-student" in text and text.isascii()


def test_results_of_a_target_or_an_evaluator_that_nobody_has_listed_are_columns_and_curves(tmp_path: Path) -> None:
    folder = make_student(tmp_path, "new")
    write_lines(folder / "metrics.jsonl", [{"step": 0, "loss": 2.0, "cosine_cls": 0.123456, "lr": 0.1}])
    weights = {"weight": torch.arange(3.0)}
    save_file(weights, folder / "student-ema.safetensors")
    recipe = {"stage": "evaluate", "weights": str(folder / "student-ema.safetensors")}
    judged = make_run(tmp_path / "judged", recipe)
    result = {"robust_top1": 0.5, "cka": 0.25, "num_classes": 10, "block": 3, "weights_sha256": tensors_sha256(weights)}
    (judged / "evaluation.json").write_text(json.dumps(result))
    runs = read_runs([folder, judged])
    assert runs[0].results["ema_robust_top1"] == 0.5 and runs[1].results == {"robust_top1": 0.5, "cka": 0.25}
    assert "lr" not in runs[0].curves and len(runs[0].curves["cosine_cls"]) == 1
    header, row, other = table_cells(runs)
    assert header[3:6] == ["epochs", "loss", "cosine cls"] and row[header.index("cosine cls")] == "0.1235"
    assert (other[header.index("robust")], other[header.index("cka")], other[header.index("loss")]) == (
        "50.0%",
        "0.25",
        "-",
    )


def test_pictures_say_which_direction_is_better(runs: dict[str, Path]) -> None:
    labels = {picture.title: picture.label for picture in PICTURES}
    assert labels["Fine-tuning: loss"] == "cross entropy, lower is better"
    assert labels["k-NN top-1 of audits"] == "% of images, higher is better"
    assert all(len({metric(family).better for family in picture.families}) == 1 for picture in PICTURES)


def test_the_page_needs_nothing_else_and_shows_what_there_is(runs: dict[str, Path], tmp_path: Path) -> None:
    make_student(tmp_path, "<b>", 10.0)
    compare.run([*runs.values(), tmp_path / "<b>"], tmp_path / "out" / "page.html")
    page = (tmp_path / "out" / "page.html").read_text()
    assert "<b>" not in page and "&lt;b&gt;" in page
    assert not re.search(r'(?:src|href)="(?!data:)', page) and "http" not in page and "<script" not in page
    headings = re.findall("<h2>(.*?)</h2>", page)
    assert len(headings) == page.count("<img") + 2  # recipes of students, and the folders
    # Every curve is visible once: by step or by epoch, whichever the switch says.
    for axis in ("step", "epoch"):
        shown = re.findall(f'<div class="by-{axis}"><h2>(.*?)</h2>', page)
        assert len(shown) == len(set(shown)) > 0
    assert page.count('type="radio"') == 2
    assert "k-NN top-1 of audits" in headings and "Fine-tuning: top-1" in headings and "Device-hours" in headings
    compare.run([runs["old"]], tmp_path / "page.html")
    assert (tmp_path / "page.html").read_text().count("<img") == 1


def test_no_table_has_more_columns_than_fit_a_telephone(runs: dict[str, Path], tmp_path: Path) -> None:
    compare.run(list(runs.values()), tmp_path / "page.html")
    heads = re.findall("<thead><tr>(.*?)</tr>", (tmp_path / "page.html").read_text())
    assert max(head.count("<th") for head in heads) <= 5
    named = re.findall(r"<th[^>]*>(\w+)</th>", "".join(heads[:2]))
    assert [name for name in named if name != "run"] == [*runs]


@pytest.mark.parametrize(
    ("values", "share", "least"), [([0.8, 0.801], False, 0.15), ([0.51, 0.512], True, 0.049), ([0.1, 0.9], True, 0.8)]
)
def test_a_flat_line_looks_flat(values: list[float], share: bool, least: float) -> None:
    axes = Figure().subplots()
    axes.plot(values)
    keep_flat(axes, values, share)
    low, high = axes.get_ylim()
    assert high - low >= least and low <= min(values) and high >= max(values)
    if share:
        assert axes.yaxis.get_major_formatter()(0.25).startswith("25")


@pytest.mark.parametrize("values", [[], [0.0, 0.0], [1.0], [0.0], [-1.0, -1.0]])
def test_lines_without_a_size_keep_their_axis(values: list[float]) -> None:
    axes = Figure().subplots()
    axes.plot(values)
    keep_flat(axes, values)
    assert axes.get_ylim()[0] < axes.get_ylim()[1]


def test_several_students_of_one_run_are_several(tmp_path: Path) -> None:
    root = make_run(tmp_path / "both", STUDENT | {"students": {"a": {}, "b": {}}})
    make_student(root, "a")
    make_student(root, "b")
    make_student(tmp_path / "again", "a")
    assert [run.name for run in read_runs([root, tmp_path / "again" / "a"])] == ["both/a", "b", "again/a"]


def test_what_is_no_run_is_refused(runs: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is no run folder") as caught:
        read_runs([tmp_path / "nowhere"])
    assert caught.value.got == "no such folder" and caught.value.hint
    with pytest.raises(UserError, match="is no run folder") as caught:
        read_runs([tmp_path])
    assert "but runs in it: cache, eval, fast" in str(caught.value.got)
    make_run(tmp_path / "judged", {"stage": "fidelity"})
    with pytest.raises(UserError, match="no run that can be compared") as caught:
        read_runs([tmp_path / "judged"])
    (tmp_path / "judged" / "recipe.yaml").write_text("stage: [")
    with pytest.raises(UserError, match=r"unreadable recipe\.yaml"):
        read_runs([tmp_path / "judged"])
    with pytest.raises(RecipeError, match="named twice"):
        read_runs([runs["fast"], runs["fast"] / ".." / "fast"])
    with pytest.raises(UserError, match="cannot be written"):
        compare.run([runs["fast"]], runs["fast"])


def test_the_command_prints_a_table_or_json_and_says_where_the_page_is(
    runs: dict[str, Path], tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(compare, "page", lambda *_: "the page")
    code, out, err = run("compare", runs["cache"], runs["fast"])
    assert code == 0 and out.splitlines()[0].split()[:3] == ["run", "stage", "steps"]
    assert err == "compare: wrote compare.html\n" and (tmp_path / "compare.html").read_text() == "the page"
    code, out, _ = run("compare", runs["fast"], runs["slow"], "--json", "--out", tmp_path / "page.html")
    data = json.loads(out)
    assert data == json.loads(json.dumps(as_json(read_runs([runs["fast"], runs["slow"]]))))
    assert data["runs"][0]["curves"]["loss"][0] == {"step": 1, "epoch": 0.1, "value": 2.0}
    assert data["differences"]["train-student"]["optim.base_lr"] == {"fast": 0.1, "slow": 0.2}
    assert data["metrics"]["kl_qk"] == {"header": "KL qk", "better": "lower"}
    code, out, err = run("compare", tmp_path / "nowhere")
    assert code == 2 and out == "" and "hint:" in err
