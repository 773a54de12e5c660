"""Run the tests of each row of "nothing in silence" and print the table of its result page.

    python benchmarks/silence_rows.py [--slow] [ROW ...]

A row is a promise and the tests that try it. `tried` counts the cases that passed; `--slow` also runs the long
variants. Exits with 1 if a case fails or a row has none.
"""

import argparse
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections import Counter
from pathlib import Path

from provenance import command, commit, cores, processor

ROOT = Path(__file__).resolve().parents[1]
# Row: what must hold, and the tests as FILE or FILE::PART_OF_NAME; a part matches every test that begins with it.
ROWS: dict[str, tuple[str, list[str]]] = {
    "A1": (
        "a shard with zeros, joined tars, a count that differs: refused",
        [
            "pipeline/test_tar.py::test_bytes_after_the_end",
            "pipeline/test_tar.py::test_a_shard_whose_rest",
            "pipeline/test_index.py::test_another_count",
            "pipeline/test_index.py::test_a_count_of_zero",
            "pipeline/test_index.py::test_a_shard_that_was_cut",
            "stages/test_make_shards_sources.py::test_half_a_shard",
            "stages/test_make_shards_sources.py::test_an_index_that",
            "stages/test_make_shards_sources.py::test_stage_one_commits_nothing",
        ],
    ),
    "A2": (
        "a linked class folder is followed, a loop ends",
        ["stages/test_make_shards_sources.py::test_links_to_class"],
    ),
    "A3": (
        "every ending that Pillow decodes is taken, the rest counted",
        ["stages/test_make_shards_sources.py::test_every_format"],
    ),
    "A4": (
        "names with several dots are taken or refused",
        [
            "pipeline/test_tar.py::test_a_name_with_dots",
            "pipeline/test_tar.py::test_names_with_dots",
            "stages/test_make_shards_sources.py::test_screenshots",
        ],
    ),
    "A5": ("folders of systems are no classes", ["stages/test_make_shards_sources.py::test_folders_of_systems"]),
    "A6": (
        "one picture beside class folders is a choice",
        ["stages/test_make_shards_sources.py::test_a_picture_beside"],
    ),
    "A7": (
        "an ImageNet root or a nested split is recognised",
        [
            "stages/test_make_shards_sources.py::test_a_root_of_several",
            "stages/test_make_shards_sources.py::test_sets_inside",
            "stages/test_make_shards_sources.py::test_a_train_among",
            "stages/test_make_shards_sources.py::test_one_folder",
        ],
    ),
    "A8": (
        "labels in tars of a class, in folders, json and txt are read or said",
        [
            "stages/test_make_shards_sources.py::test_a_tar_for_each_class",
            "stages/test_make_shards_sources.py::test_class_folders_in",
            "stages/test_make_shards_sources.py::test_labels_of_json",
            "stages/test_make_shards_sources.py::test_labels_that",
        ],
    ),
    "A9": (
        "linked, sparse, compressed and double members are handled or named",
        [
            "stages/test_make_shards_sources.py::test_links_and_odd",
            "stages/test_make_shards_sources.py::test_samples_of_two",
            "stages/test_make_shards_sources.py::test_tars_of_any_case",
            "pipeline/test_tar.py::test_a_sparse",
            "pipeline/test_tar.py::test_a_link_to_a_sparse",
            "pipeline/test_tar.py::test_compression",
            "pipeline/test_shards.py::test_links_in",
            "pipeline/test_shards.py::test_a_link_out",
        ],
    ),
    "A10": (
        "a tar without an image is refused by both stages",
        ["pipeline/test_tar.py::test_a_tar_without", "stages/test_make_shards_sources.py::test_a_tar_without"],
    ),
    "A11": (
        "EXIF orientations are counted",
        ["stages/pages/test_shards.py::test_turned", "pipeline/test_decode.py::test_facts"],
    ),
    "A12": (
        "the report names all of it, and the next commands run",
        ["stages/pages/test_shards.py", "stages/test_make_shards_sources.py::test_the_next"],
    ),
    "B1": (
        "a job that /proc hides lives",
        [
            "storage/test_leases.py::test_a_job_of_another_user",
            "storage/test_leases.py::test_a_lease_of_a_hidden",
            "storage/test_leases.py::test_a_process_is_dead",
        ],
    ),
    "B2": (
        "containers of one host name, and clocks a day apart",
        [
            "storage/test_leases.py::test_containers",
            "storage/test_leases.py::test_living_compares",
            "storage/test_leases.py::test_unfinished",
            "storage/test_leases.py::test_opening",
        ],
    ),
    "B3": (
        "a mistyped num_views harms nobody; exit 75 continues",
        ["stages/units/test_layers.py::test_a_recipe_that_names", "stages/test_grown_cache.py"],
    ),
    "B4": (
        "a stale index of equal size is found by stage one",
        ["pipeline/test_index.py::test_a_stale", "stages/test_make_shards_sources.py::test_stage_one_commits_nothing"],
    ),
    "B5": (
        "foreign json beside commits is named and harmless",
        ["storage/test_reader.py::test_foreign", "storage/test_check.py::test_foreign"],
    ),
    "B6": (
        "a cache renamed under a job ends the job",
        ["storage/test_writer.py::test_a_renamed", "storage/test_writer.py::test_beats"],
    ),
    "B7": ("a run folder has one owner", ["stages/run/test_owner.py"]),
    "B8": (
        "an unreadable cache does not stop the list; lease_s counts for others",
        [
            "storage/test_catalog.py::test_a_cache_that",
            "storage/test_catalog.py::test_a_damaged",
            "stages/cache/test_list.py",
            "storage/test_leases.py::test_the_time",
        ],
    ),
    "C1": (
        "YAML bombs",
        [
            "configs/test_load.py::test_aliases",
            "configs/test_load.py::test_endless",
            "configs/test_load.py::test_a_section",
            "configs/test_load.py::test_an_endless",
        ],
    ),
    "C2": (
        "malformed index.json",
        ["pipeline/test_index.py::test_a_malformed", "pipeline/test_index.py::test_mutations"],
    ),
    "C3": (
        "labels beyond int64, hostile sizes in tar headers",
        [
            "pipeline/test_tar.py::test_class_numbers",
            "pipeline/test_tar.py::test_hostile",
            "pipeline/test_tar.py::test_a_chain",
            "pipeline/test_tar.py::test_mutations",
        ],
    ),
    "C4": ("FIFO or dangling link among shards", ["pipeline/test_tar.py::test_a_fifo"]),
    "C5": ("a shard that is shortened after it was opened", ["pipeline/test_shards.py::test_a_shard_shortened"]),
    "C6": (
        "killed loader workers, a small /dev/shm",
        [
            "pipeline/test_records.py::test_a_killed_worker",
            "pipeline/test_loader.py::test_a_small_shared",
            "pipeline/test_loader.py::test_the_signal",
            "pipeline/test_loader.py::test_a_connection",
            "stages/training/test_launch.py::test_a_killing",
            "stages/units/test_crew.py::test_a_killed_loader",
        ],
    ),
    "C7": (
        "any value in any recipe field",
        ["fuzz/test_recipes.py", "fuzz/test_runs.py", "configs/test_load.py::test_values_that"],
    ),
    "C8": (
        "forged arrays and codec parameters whose digests fit",
        ["storage/test_parsing.py", "fuzz/test_cache_files.py"],
    ),
    "C9": (
        "position tables without a class row, keys that are no strings",
        ["models/test_checkpoints.py::test_a_table", "models/test_checkpoints.py::test_keys_that"],
    ),
    "C10": (
        "PosixPath in an MAE checkpoint is read as data, no code runs",
        ["models/test_checkpoints.py::test_paths", "models/test_checkpoints.py::test_a_pickle"],
    ),
    "C11": (
        "int8, bool and complex weights are refused",
        ["models/test_checkpoints.py::test_weights_that_are_no_real"],
    ),
    "C12": (
        "damaged weights, states, run folders and spools",
        ["fuzz/test_checkpoint_files.py", "fuzz/test_run_folders.py"],
    ),
    "C13": (
        "foreign text cannot command the terminal",
        ["configs/test_errors.py", "test_cli.py::test_an_unknown", "stages/pages/test_shards.py::test_foreign"],
    ),
    "C14": (
        "shards, cache or run folder that vanish under a training",
        ["stages/training/test_vanishing.py"],
    ),
    "D1": (
        "a full disk is named with file and file system",
        [
            "configs/test_errors.py::test_a_full_disk",
            "configs/test_errors.py::test_a_write_to_a_full",
            "stages/test_make_shards.py::test_a_file_that",
            "storage/test_writer.py::test_a_draft_that",
            "stages/run/test_folder.py::test_a_full",
        ],
    ),
    "D2": ("after growth a resumed run continues, or num_views is named", ["stages/test_grown_cache.py"]),
    "D3": ("units of other images are named by layer and views", ["pipeline/test_replay.py::test_units_of_other"]),
    "D4": (
        "a cache in part is described alike by info and train-student",
        ["stages/cache/test_info.py::test_coverage", "pipeline/test_replay.py::test_shards_without_any"],
    ),
    "D5": ("less than one batch: both numbers and a size that fits", ["stages/training/test_optim.py::test_less_than"]),
    "D6": ("errors of az and gs name their own variables", ["storage/test_stores.py::test_a_refusal_names"]),
    "D7": ("`--set train.pattern=*.tar` is taken as text", ["configs/test_load.py::test_an_override_of_a_text"]),
    "D8": ("a file of several models names them", ["models/test_checkpoints.py::test_a_file_of_several"]),
    "D9": ("no network is said at once", ["models/test_hub.py"]),
    "D10": ("a safetensors file named .pth loads", ["models/test_checkpoints.py::test_the_content_decides"]),
    "D11": ("a file without read permission is named as one", ["models/test_checkpoints.py::test_a_file_that_must"]),
    "D12": (
        "`cache=s3:/bucket/x` makes no local folder",
        ["pipeline/test_remote.py::test_urls_that_are", "configs/test_load.py::test_values_that"],
    ),
    "D13": (
        "unreadable images are refused with the limit that was passed",
        ["stages/units/test_layers.py::test_unreadable_images_are_refused"],
    ),
    "E1": (
        "a student is a folder that timm loads with its mean, std, sizes and heads",
        [
            "stages/test_export.py::test_timm_loads",
            "models/test_timm_folder.py",
            "test_readme.py::test_a_student_loads",
        ],
    ),
    "E2": (
        "a teacher from a file takes the normalisation of its name, or it must be given",
        [
            "models/test_weights.py::test_a_file_is",
            "models/test_weights.py::test_where_it",
            "models/test_weights.py::test_our_own",
            "models/test_weights.py::test_a_statement",
        ],
    ),
    "F1": ("README's lines on a folder of photos, offline", ["test_readme_photos.py"]),
    "F2": ("compare's page", ["stages/test_compare.py"]),
}


Case = tuple[str, str, str, float]  # file below tests, name, outcome, seconds


def run(tests: list[str], slow: bool) -> list[Case]:
    """Run the tests once, in one process, and return every case."""
    files = list(dict.fromkeys(f"tests/{file}" for file, _, _ in (test.partition("::") for test in tests)))
    # A whole file is matched by its name, a test by the beginning of its name.
    parts = {name or Path(file).name for file, _, name in (test.partition("::") for test in tests)}
    options = ["-k", " or ".join(sorted(parts)), "-m", "slow or not slow" if slow else "not slow"]
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        pytest = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", f"--junit-xml={report}", *files, *options]
        subprocess.run(pytest, cwd=ROOT, stdout=sys.stderr, check=False)
        return [_case(element) for element in ElementTree.parse(report).getroot().iter("testcase")]


def _case(element: ElementTree.Element) -> Case:
    """A case of pytest's report; a class of tests counts as a part of its file."""
    file = f"{element.get('classname', '').removeprefix('tests.').replace('.', '/')}.py"
    kinds = [child.tag for child in element]
    outcome = "failed" if {"failure", "error"} & set(kinds) else "skipped" if "skipped" in kinds else "passed"
    return file, element.get("name", ""), outcome, float(element.get("time", "0"))


def of_row(cases: list[Case], tests: list[str]) -> list[Case]:
    """The cases of a row's tests."""
    wanted = [test.partition("::") for test in tests]
    return [case for case in cases if any(case[0] == file and case[1].startswith(name) for file, _, name in wanted)]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("rows", nargs="*", metavar="ROW", help="rows to run; default: all")
    parser.add_argument("--slow", action="store_true", help="also run the long variants")
    given = parser.parse_args()
    chosen = {row: ROWS[row] for row in given.rows or ROWS}
    cases = run([test for _, tests in chosen.values() for test in tests], given.slow)
    print(f"Commit {commit()}; {processor()}, {cores()} cores.\n\n    {command()}\n")
    print("| row | what holds | tried | outcome | s | tests |\n|---|---|---|---|---|---|")
    sound = True
    for row, (what, tests) in chosen.items():
        own = of_row(cases, tests)
        count = Counter(outcome for _, _, outcome, _ in own)
        sound = sound and count["passed"] > 0 and not count["failed"]
        outcome = f"{count['failed']} failed" if count["failed"] else "holds" if count["passed"] else "not tried"
        skipped = f" ({count['skipped']} skipped)" if count["skipped"] else ""
        named = ", ".join(f"`{test}`" for test in tests)
        print(f"| {row} | {what} | {count['passed']}{skipped} | {outcome} | {sum(c[3] for c in own):.0f} | {named} |")
    return 0 if sound else 1


if __name__ == "__main__":
    sys.exit(main())
