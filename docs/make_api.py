"""Print docs/api.md, made of the docstrings of `tinymim.api`: python docs/make_api.py > docs/api.md"""

import inspect
import re
import textwrap
from collections.abc import Callable, Iterator

from tinymim import api

HEAD = """\
# The library

After this page you can use the targets of a cache in your own training loop. The worked examples in
[examples/](../examples) are a plain loop, supervised training, Lightning, Hugging Face's Trainer and a `timm.task`:

    python examples/plain_loop.py caches/mine shards/mine

`import tinymim` loads neither torch nor timm; the names below are loaded at first use. `tinymim.__version__` is the
version. No code is loaded from a cache. `TeacherCache.write` takes a teacher of your own
([custom models](custom-models.md)).

Loaders, and the commands that load images, start processes which import your script. Keep what it does inside
`if __name__ == "__main__":`, as in the example below, or use `workers=0`.

Every command of the command line has a name here, and returns as data what the command prints:

| command | name |
|---|---|
| of a recipe: `cache-teacher`, `train-student`, `evaluate`, ... | `run_recipe` |
| `hub push`, `hub pull` | `push`, `pull` |
| any other, such as `cache info`, `make-shards` or `plan` | its words: `cache_info`, `make_shards`, `plan` |
| `cache copy --format 2`, `recipes --fields` | `cache_upgrade`, `recipe_fields` |

This page is generated: `python docs/make_api.py > docs/api.md`.
"""


def page() -> str:
    """The whole page."""
    parts = [HEAD, "## An example\n", _text(api)]
    for name in api.__all__:
        value = getattr(api, name)
        parts += [f"## {name}\n", *_described(name, value)]
        if inspect.isclass(value) and value.__module__.startswith(f"{api.__name__}."):
            for method, member in _members(value):
                parts += [f"### {name}.{method}\n", *_described(method, member)]
    return "\n".join(parts).rstrip() + "\n"


def _members(owner: type) -> Iterator[tuple[str, object]]:
    """Public members of a class that have a docstring, in the order of the source."""
    for name, member in vars(owner).items():
        public = not name.startswith("_") or name in {"__iter__", "__len__"}
        if public and getattr(member, "__doc__", None) and (callable(member) or hasattr(member, "__get__")):
            yield name, member


def _described(name: str, value: object) -> Iterator[str]:
    """Signature, if it is a function, and docstring."""
    value = getattr(value, "__func__", value)  # of a class method
    if inspect.isfunction(value):
        yield f"```python\n{name.rpartition('.')[2]}({_signature(value).partition('(')[2]}\n```\n"
    yield _text(value)


def _signature(function: Callable[..., object]) -> str:
    """The signature as it stands in the source."""
    head, _, _ = inspect.getsource(function).partition(
        ':\n        """' if "." in function.__qualname__ else ':\n    """'
    )
    head = textwrap.dedent(head).removeprefix("@classmethod\n").removeprefix("def ")
    return re.sub(r"(?:self|cls)(, |,\n    )?", "", head.replace("(\n    self,", "(").replace("(\n    cls,", "("))


def _text(value: object) -> str:
    """A docstring as Markdown; its sections become bold words and lists."""
    lines: list[str] = []
    section = False
    for line in inspect.cleandoc(getattr(value, "__doc__", None) or "").splitlines():
        if re.fullmatch(r"(Args|Attributes|Raises|Returns):", line):
            lines += [f"**{line[:-1]}**", ""]
            section = True
        elif section and (entry := re.match(r"    (\w+(?:, \w+)*): (.*)", line)):
            lines.append(f"- `{entry[1]}`: {entry[2]}")
        elif section and line:
            lines.append(f"  {line.strip()}")
        else:
            section = section and not line
            lines.append(line)
    return textwrap.dedent("\n".join(lines)) + "\n"


if __name__ == "__main__":
    print(page(), end="")
