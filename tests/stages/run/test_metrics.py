"""The table of metrics: what each name means, and what becomes of a name that is not in it."""

import pytest

from tinymim.stages.run.folder import AUDIT_NAME, METRICS_NAME
from tinymim.stages.run.metrics import METRICS, audit_metrics, formatted, in_order, members, metric

# What the commands write, each in a line of `metrics.jsonl` or in a report.
# fmt: off
WRITTEN = [
    "step", "loss", "r2", "kl_qk", "kl_vv", "lr", "views_per_s", "epoch", "audit_kl_qk", "audit_ema_kl_qk",
    "audit_gap_qk", "audit_knn_top1", "audit_knn_top5", "audit_ema_knn_top1", "audit_ema_knn_top5",
    "images_per_s", "val_model_top1", "val_model_top5", "val_model_loss", "val_ema_top1", "val_ema_top5",
    "val_ema_loss", "knn_top1", "knn_top5", "linear_top1", "linear_top5", "ema_knn_top1", "ema_linear_top5",
    "records", "gib_written", "units_left", "units_failed", "eta_s", "decode_share", "teacher_share",
    "finetuned_best_top1", "finetuned_last_top1", "finetuned_last-ema_top5", "steps", "epochs", "alarms",
    "elapsed_s", "device_h", "teacher_h", "weight_clip-logits", "label_top1", "label_top1_clip-logits",
    "computed_share", "computed_views", "real_top1", "throughput_images_per_s", "params_m", "gmacs",
]
# fmt: on


def test_every_entry_is_one_and_everything_that_is_written_has_one() -> None:
    names = [each.name for each in METRICS]
    assert len(set(names)) == len(names)
    assert [name for name in WRITTEN if metric(name).format == ".4g"] == []  # the format of names without an entry
    assert all(any(members(each.name, [name]) for name in WRITTEN) for each in METRICS)


@pytest.mark.parametrize(
    ("name", "header", "value", "text", "better"),
    [
        ("loss", "loss", 1.23456, "1.2346", "lower"),
        ("r2", "R²", -0.0123, "-0.012", "higher"),
        ("kl_qk", "KL qk", 1.0, "1.0000", "lower"),
        ("audit_kl_vv", "audit KL vv", 0.25, "0.2500", "lower"),
        ("audit_ema_kl_vv", "audit KL vv, average", 0.25, "0.2500", "lower"),
        ("audit_knn_top1", "audit k-NN", 0.2, "20.0%", "higher"),
        ("knn_top1", "k-NN", 0.12345, "12.3%", "higher"),
        ("robustness_top1", "robustness", 0.5, "50.0%", "higher"),  # an evaluator to come
        ("val_ema_top1", "validation top-1, ema", 0.5, "50.0%", "higher"),
        ("finetuned_best_top1", "best top-1", 0.5, "50.0%", "higher"),
        ("steps", "steps", 1234, "1,234", None),
        ("alarms", "alarms", 1, "1", "lower"),
        ("epochs", "epochs", 12.34, "12.3", None),
        ("device_h", "device-h", 1234.5, "1,234.500", "lower"),
        ("teacher_share", "teacher share", 0.666, "67%", "lower"),
        ("write_share", "write, share of time", 0.666, "67%", None),
        ("cosine_cls", "cosine cls", 0.123456, "0.1235", None),  # a target's own loss
    ],
)
def test_the_longest_matching_entry_counts(name: str, header: str, value: float, text: str, better: str | None) -> None:
    found = metric(name)
    assert (found.name, found.header, found.better) == (name, header, better)
    assert formatted(name, value) == text and formatted(name, None) == "-"


def test_curves_are_losses_and_validations_and_audits_have_theirs_in_a_file_of_their_own() -> None:
    curves = {file: [name for name in WRITTEN if metric(name).curve == file] for file in (METRICS_NAME, AUDIT_NAME)}
    assert {name for name in curves[METRICS_NAME] if not name.startswith("val_")} == {
        "loss",
        "r2",
        "kl_qk",
        "kl_vv",
        "computed_share",
    }
    assert len(curves[METRICS_NAME]) == 11
    assert all(name.startswith("audit_") for name in curves[AUDIT_NAME]) and "audit_gap_qk" not in curves[AUDIT_NAME]
    assert metric("cosine_cls").curve == METRICS_NAME and metric("cosine_cls").column


def test_columns_are_in_the_order_of_the_table_and_a_family_stays_as_it_came() -> None:
    names = ["linear_top1", "knn_top1", "cosine", "kl_vv", "loss", "audit_kl_qk", "kl_qk", "kl_vv", "steps"]
    assert in_order(names) == ["steps", "loss", "kl_vv", "kl_qk", "cosine", "audit_kl_qk", "knn_top1", "linear_top1"]


def test_a_family_s_members_keep_their_order_and_give_their_word() -> None:
    assert members("kl_*", ["loss", "kl_vv", "audit_kl_qk", "kl_qk"]) == {"kl_vv": "vv", "kl_qk": "qk"}
    assert members("loss", ["loss", "val_model_loss"]) == {"loss": ""}


def test_the_metrics_of_an_audit_are_of_student_and_average() -> None:
    judged = {"kl": 0.5, "gap": 0.1, "gap_se": 0.01, "per_head": [0.5], "yardstick": {"even": 1.0, "common": 0.5}}
    line = {"step": 5, "epoch": 0.5, "qk": judged, "ema_qk": judged | {"kl": 0.25}, "knn_top1": 0.5, "knn_top5": 1.0}
    line |= {"ema_knn_top1": 0.75, "train_kl": {"qk": 0.4}, "alarms": [], "seconds": 1.0}
    found = audit_metrics(line)
    assert found == {
        "audit_kl_qk": 0.5,
        "audit_ema_kl_qk": 0.25,
        "audit_gap_qk": 0.1,
        "audit_knn_top1": 0.5,
        "audit_knn_top5": 1.0,
        "audit_ema_knn_top1": 0.75,
    }
    assert all(metric(name).header.startswith("audit ") for name in found)
    assert metric("audit_cosine_cls").curve == ""  # of a target's own loss: no curve of the training
    measured = {"measure": "cosine"}
    assert audit_metrics({"cls": {"kl": 1.0} | measured, "ema_cls": {"kl": 2.0} | measured}) == {
        "audit_cosine_cls": 1.0,
        "audit_ema_cosine_cls": 2.0,
    }
    assert set(audit_metrics({"a/qk": judged | {"measure": "kl"}})) == {"audit_kl_a/qk", "audit_gap_a/qk"}
    assert audit_metrics({"step": 0, "qk": {"kl": 1.0}}) == {"audit_kl_qk": 1.0}  # of before there were gaps
