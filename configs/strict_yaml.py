"""YAML 1.1 as PyYAML reads it, with two differences: `1e-3` is a number, and a repeated key is an error."""

import re
from typing import Any

import yaml
from yaml.composer import ComposerError
from yaml.constructor import ConstructorError
from yaml.reader import ReaderError

from tinymim.configs.errors import RecipeError

_MOST_VALUES = 10_000  # with aliases written out
_MOST_DIGITS = 100  # of a number or date


class _Loader(yaml.SafeLoader):
    """SafeLoader that refuses repeated keys and bombs, and gives every malformed value its line."""

    def get_single_node(self) -> yaml.Node | None:
        node: yaml.Node | None = super().get_single_node()
        if node is not None:
            _expanded(node, {}, set())
        return node

    def construct_scalar(self, node: yaml.ScalarNode | yaml.MappingNode) -> Any:
        value: str = super().construct_scalar(node)
        if "\0" in value or any("\ud800" <= char <= "\udfff" for char in value):
            raise ConstructorError(None, None, "text that no file name can hold: null or surrogate", node.start_mark)
        if not node.tag.endswith(":str") and len(value) > _MOST_DIGITS:
            kind = node.tag.rpartition(":")[2]
            raise ConstructorError(None, None, f"not a valid {kind}: {len(value):,} characters", node.start_mark)
        return value

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        first_line: dict[tuple[str, str], int] = {}
        for key, _ in node.value:
            identity, line = (key.tag, str(key.value)), key.start_mark.line + 1
            if identity in first_line:
                problem = f"key `{key.value}` is repeated; it first appears in line {first_line[identity]}"
                raise ComposerError(None, None, problem, key.start_mark)
            first_line[identity] = line
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (
            ValueError,
            LookupError,
            AttributeError,
            TypeError,
            OverflowError,
        ) as error:  # `!!int x`, `!!bool x`, `2024-13-01`
            kind = node.tag.rpartition(":")[2]
            raise ConstructorError(None, None, f"not a valid {kind}: {error}", node.start_mark) from error


def _expanded(node: yaml.Node, sizes: dict[int, int], above: set[int]) -> int:
    """The number of values below a node once its aliases are written out. Raises ComposerError where it is too large.

    Args:
        node: the node.
        sizes: the numbers that are known, by node.
        above: the nodes that it is in.
    """
    if isinstance(node, yaml.ScalarNode):
        return 1
    if id(node) in above:
        raise ComposerError(None, None, "an alias to a section that it is in", node.start_mark)
    if id(node) not in sizes:
        pairs = isinstance(node, yaml.MappingNode)
        below = [each for pair in node.value for each in pair] if pairs else node.value
        sizes[id(node)] = 1 + sum(_expanded(each, sizes, above | {id(node)}) for each in below)
        if sizes[id(node)] > _MOST_VALUES:
            raise ComposerError(None, None, f"aliases that stand for over {_MOST_VALUES:,} values", node.start_mark)
    return sizes[id(node)]


class _Dumper(yaml.SafeDumper):
    """SafeDumper that writes what _Loader reads back: sections as blocks, lists inline."""


def _represent_list(dumper: yaml.SafeDumper, values: list[Any]) -> yaml.Node:
    return dumper.represent_sequence("tag:yaml.org,2002:seq", values, flow_style=True)


# YAML 1.1 requires a dot and a signed exponent, so PyYAML reads 1e-3 as a string. The dumper needs the same rule,
# because it quotes a string only if it would be read as something else.
_EXPONENT_FLOAT = re.compile(r"^[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)[eE][-+]?[0-9]+$")
for _side in (_Loader, _Dumper):
    _side.add_implicit_resolver("tag:yaml.org,2002:float", _EXPONENT_FLOAT, list("-+.0123456789"))
_Dumper.add_representer(list, _represent_list)


def parse_yaml(text: str, origin: str) -> Any:
    """YAML text -> plain Python values. Raises RecipeError that names origin and line."""
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        problem = "; ".join(part for part in (error.context, error.problem) if part)
        raise RecipeError(f"{origin}{where}: not valid YAML", got=problem) from error
    except ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise RecipeError(f"{origin}, line {line}: not valid YAML", got=error.reason) from error
    except RecursionError:
        raise RecipeError(f"{origin}: nested too deeply") from None  # its traceback has a thousand frames


def dump_yaml(data: dict[str, Any]) -> str:
    """Plain Python values -> YAML text that `parse_yaml` reads back equal."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, default_flow_style=False)
