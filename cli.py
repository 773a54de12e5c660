"""The entry point: all commands, exit codes, and the printing of errors."""

import contextlib
import os
import sys
import traceback
from collections.abc import Sequence
from typing import Annotated, Literal

from cyclopts import App, CycloptsError, Parameter

from tinymim import __version__
from tinymim.commands.cache import cache_app
from tinymim.commands.compare import compare
from tinymim.commands.hub import hub_app
from tinymim.commands.plan import plan
from tinymim.commands.shared import StdoutClosed, print_text
from tinymim.commands.stages import stages_app
from tinymim.commands.tools import tools_app
from tinymim.configs.errors import TinymimError, is_refusal, printable, refusal_text
from tinymim.stages.run.interrupt import Interrupted

EXIT_USAGE = 2
EXIT_INTERRUPTED = 130  # 128 + SIGINT
EXIT_REQUEUE = 75  # EX_TEMPFAIL: stopped by SIGTERM, state saved, the same command resumes
EXIT_BROKEN_PIPE = 141  # 128 + SIGPIPE

app = App(
    name="tinymim",
    version=f"tinymim {__version__}",
    help="""Distil one large vision transformer into many small ones. The large one runs
only once.

The usual order:
  tinymim make-shards photos shards    1. pack images into tar shards
  tinymim cache-teacher RECIPE         2. run the teacher, store its targets
  tinymim train-student RECIPE         3. train students from the cache
  tinymim evaluate RECIPE              4. measure their accuracy

Start here, offline: tinymim demo

RECIPE is a YAML file or the name of a shipped recipe.""",
    help_format="plaintext",
    help_epilogue="Add --debug anywhere to print the traceback of an error.",
    suppress_keyboard_interrupt=False,
    result_action="return_value",
)
app.command(cache_app)
app.command(hub_app)
app.command(stages_app, name="*")
app.command(tools_app, name="*")
app.command(plan, name="plan", sort_key=7)
app.command(compare, name="compare", sort_key=7)


@app.command(name="completion", sort_key=10)
def completion(shell: Annotated[Literal["bash", "zsh", "fish"], Parameter(name="SHELL")], /) -> None:
    """Print a script that completes commands, options and recipes in your shell.

    Reads nothing. Writes nothing; the script goes to stdout.
    bash: add `eval "$(tinymim completion bash)"` to ~/.bashrc.
    zsh: write it to a file `_tinymim` in a folder of your $fpath.
    fish: write it to ~/.config/fish/completions/tinymim.fish.

    Example: tinymim completion bash >> ~/.bash_completion

    Parameters
    ----------
    shell
        The shell to print the script for.
    """
    print_text(app.generate_completion(prog_name="tinymim", shell=shell))


# ---------------------------------------------------------------- output and errors


def _say(text: str) -> None:
    """Print a message to stderr."""
    with contextlib.suppress(BrokenPipeError):
        print(text, file=sys.stderr, flush=True)


def run_command(arguments: Sequence[str]) -> int:
    """Run one command line. Errors become a message on stderr and an exit code."""
    debug = "--debug" in arguments
    try:
        app([argument for argument in arguments if argument != "--debug"], print_error=False, exit_on_error=False)
        return 0
    except StdoutClosed:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python flushes into the pipe at exit
        return EXIT_BROKEN_PIPE
    except Interrupted as interrupted:
        _say(printable(f"interrupted: {interrupted}"))
        return EXIT_REQUEUE if interrupted.requeue else EXIT_INTERRUPTED
    except KeyboardInterrupt:
        _say("interrupted: stopped at once; the last saved state is intact")
        return EXIT_INTERRUPTED
    except CycloptsError as error:
        _say(
            printable(f"error: {error}", "")
            + "\n  hint: tinymim --help lists the commands, tinymim COMMAND --help its options"
        )
        return EXIT_USAGE
    except Exception as error:
        if debug:
            _say(printable(traceback.format_exc().rstrip(), ""))
        message, code = _explained(error)
        _say(printable(message))
        return code


def _explained(error: Exception) -> tuple[str, int]:
    """Message and exit code of an error."""
    if isinstance(error, TinymimError):
        return f"error: {error}", error.exit_code
    if isinstance(error, OSError) and is_refusal(error):
        return f"error: {refusal_text(error)}", EXIT_USAGE
    hint = "run the same command with --debug and report the traceback"
    return f"internal error: {type(error).__name__}: {error}\n  hint: {hint}", 1


def main() -> None:
    """The entry point of the `tinymim` command."""
    # OpenMP threads sleep while they wait instead of spinning. On cores shared with loader workers, spinning cost 3.5x
    # the CPU time (docs/log.md). This must be set before torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")  # looking for some reads the metadata of every package
    sys.exit(run_command(sys.argv[1:]))
