"""The command `tinymim compare`: flags and help, no logic."""

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from tinymim.commands.shared import print_data


def compare(
    run: Annotated[Path, Parameter(name="RUN", help="Run folder.")],
    /,
    *more: Annotated[Path, Parameter(name="RUN", help="More run folders.")],
    out: Path = Path("compare.html"),
    as_json: Annotated[bool, Parameter(name="--json", negative="")] = False,
) -> None:
    """Compare runs on one page: losses, accuracies, cost, recipe differences.

    Reads run folders of train-student, pretrain-mae, finetune, evaluate and
    cache-teacher. Missing values are shown as missing. An evaluation also counts
    for the run that wrote its weights. If the run folder of cache-teacher is
    given, each student carries its share of the teacher's cost.
    Writes one self-contained HTML page and prints the table.

    Example: tinymim compare runs/cache runs/tiny runs/small --out compare.html

    Parameters
    ----------
    out
        Path of the HTML page.
    as_json
        Print JSON with all points of the curves instead of the table.
    """
    from tinymim.stages import compare as stage

    runs = stage.run([run, *more], out)
    print_data(stage.as_json(runs), stage.as_text(runs), as_json)
