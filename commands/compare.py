"""The command `tinymim compare`; no logic. As in cli.py, stages are imported when it runs."""

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from tinymim.commands.shared import print_json, print_text


def compare(
    run: Annotated[Path, Parameter(name="RUN", help="A run folder.")],
    /,
    *more: Annotated[Path, Parameter(name="RUN", help="Further ones.")],
    out: Path = Path("compare.html"),
    as_json: Annotated[bool, Parameter(name="--json", negative="")] = False,
) -> None:
    """Runs side by side: losses, audits, accuracies, cost, what differs in recipes.

    Reads the run folders of train-student (of several students each), pretrain-mae,
    finetune, evaluate and cache-teacher: recipe.yaml, versions.json, metrics.jsonl,
    audit.jsonl, sessions.jsonl, evaluation.json, finetuned.json. What is not there
    is shown as missing. An evaluation also counts for the run that wrote its
    weights; with the run folder of cache-teacher students carry their part of it.
    Writes the page, one HTML file that needs nothing else; prints the table.

    Example: tinymim compare runs/cache runs/tiny runs/small --out compare.html

    Parameters
    ----------
    out
        The page.
    as_json
        Print JSON, with every point of the curves, instead of the table.
    """
    from tinymim.stages import compare as stage

    runs = stage.run([run, *more], out)
    if as_json:
        print_json(stage.as_json(runs))
    else:
        print_text(stage.as_text(runs))
