"""One YAML text, read by the core schema of YAML 1.2, with the line of every key.

PyYAML's own schema is that of YAML 1.1, where ``010`` is 8, ``1:30`` is 90, ``yes`` is true and ``1e-5`` is a text. So
only its parser is used: what a plain word means, and what is refused, is said here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import yaml
from yaml.composer import Composer
from yaml.parser import Parser
from yaml.reader import Reader
from yaml.resolver import BaseResolver
from yaml.scanner import Scanner

from megatron_copsd.errors import UserError, describe

KeyPath = tuple[str | int, ...]

_DEEPEST = 20
_MOST_VALUES = 10_000
_LARGEST = 2**63 - 1
_SHOWN = 80
_UNWRITABLE = re.compile("[\0\ud800-\udfff]")
_TAG = "tag:yaml.org,2002:"
# YAML 1.2.2, section 10.3.2, with the characters that each kind can begin with.
_CORE: dict[str, tuple[re.Pattern[str], str]] = {
    "null": (re.compile(r"null|Null|NULL|~|"), "nN~"),
    "bool": (re.compile(r"true|True|TRUE|false|False|FALSE"), "tTfF"),
    "int": (re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+"), "-+0123456789"),
    "float": (
        re.compile(
            r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?(?:\.inf|\.Inf|\.INF)|\.nan|\.NaN|\.NAN"
        ),
        "-+.0123456789",
    ),
}


def dotted(key: KeyPath) -> str:
    """Return the name of a setting, as overrides and messages spell it."""
    return ".".join(map(str, key))


@dataclass(frozen=True)
class Document:
    """What a YAML text says.

    Attributes:
        value: mappings, lists, texts, numbers, truth values and None.
        lines: line of every key and list item, from 1.
    """

    value: Any
    lines: Mapping[KeyPath, int]


def read_document(text: str, place: Callable[[int], str]) -> Document:
    """Read one YAML document; an empty text is None.

    Args:
        text: the YAML.
        place: what a complaint about a line begins with.

    Raises:
        UserError: the text is no YAML, or says something that a setting can't be.
    """
    control = Reader.NON_PRINTABLE.search(text)
    if control:
        line, rule = text.count("\n", 0, control.start()) + 1, "not YAML: a control character"
        raise UserError(describe(place(line), control.group(), rule, "Remove it."))
    try:
        loader = _Loader(text)
        root = loader.get_single_node()
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        shown = text.splitlines()[line - 1] if line <= len(text.splitlines()) else ""
        rule = f"not YAML: {error.problem or error.context}"
        raise UserError(describe(place(line), _short(shown), rule, "Check indentation and quotes.")) from None
    if root is None:
        return Document(None, {})
    builder = _Builder(place)
    return Document(builder.value(root, ()), builder.lines)


class _Loader(Reader, Scanner, Parser, Composer, BaseResolver):
    """PyYAML's parser with the core schema, and a limit to how deep values lie in each other."""

    def __init__(self, text: str) -> None:
        Reader.__init__(self, text)
        Scanner.__init__(self)
        Parser.__init__(self)
        Composer.__init__(self)
        BaseResolver.__init__(self)
        self._depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self._depth > _DEEPEST:
            mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
            raise yaml.MarkedYAMLError(problem=f"values lie more than {_DEEPEST} deep in each other", problem_mark=mark)
        self._depth += 1
        node: yaml.Node | None = super().compose_node(parent, index)
        self._depth -= 1
        return node


for _name, (_pattern, _begins) in _CORE.items():
    _whole = re.compile(rf"(?:{_pattern.pattern})\Z")
    _Loader.add_implicit_resolver(_TAG + _name, _whole, ["", *_begins] if _name == "null" else list(_begins))


class _Builder:
    """Makes values of nodes, aliases followed, and notes their lines."""

    def __init__(self, place: Callable[[int], str]) -> None:
        self.lines: dict[KeyPath, int] = {}
        self._place = place
        self._count = 0
        self._around: list[int] = []

    def value(self, node: yaml.Node, key: KeyPath) -> Any:
        self._count += 1
        if self._count > _MOST_VALUES:
            rule = f"more than {_MOST_VALUES:,} values, each alias (*name) followed"
            raise self._error(node, dotted(key), rule, "Write fewer, and no aliases to aliases.")
        if id(node) in self._around:
            raise self._error(node, dotted(key), "an alias (*name) to what it stands in", "Remove the alias.")
        if len(self._around) > _DEEPEST:
            rule = f"values lie more than {_DEEPEST} deep in each other, each alias (*name) followed"
            raise self._error(node, dotted(key), rule, "No setting lies that deep.")
        self._around.append(id(node))
        if isinstance(node, yaml.ScalarNode):
            value = self._scalar(node, key)
        elif isinstance(node, yaml.SequenceNode) and node.tag == f"{_TAG}seq":
            value = [self._item(item, (*key, index)) for index, item in enumerate(node.value)]
        elif isinstance(node, yaml.MappingNode) and node.tag == f"{_TAG}map":
            value = dict(self._entry(name, item, key) for name, item in node.value)
        else:
            raise self._unknown_tag(node, key)
        self._around.pop()
        return value

    def _item(self, node: yaml.Node, key: KeyPath) -> Any:
        self.lines[key] = node.start_mark.line + 1
        return self.value(node, key)

    def _entry(self, name: yaml.Node, node: yaml.Node, key: KeyPath) -> tuple[str, Any]:
        if not isinstance(name, yaml.ScalarNode) or name.tag != f"{_TAG}str" or not name.value:
            shown = name.value if isinstance(name, yaml.ScalarNode) else "a list or mapping"
            rule = f"is no name of a setting{f' in {dotted(key)}' if key else ''}"
            raise self._error(name, shown, rule, "A key is a word, such as steps.")
        child = (*key, name.value)
        line = name.start_mark.line + 1
        if child in self.lines:
            rule = f"the key stands at line {self.lines[child]} already"
            raise self._error(name, dotted(child), rule, "Keep one of the two.")
        self.lines[child] = line
        return name.value, self.value(node, child)

    def _scalar(self, node: yaml.ScalarNode, key: KeyPath) -> Any:
        text, kind = node.value, node.tag.removeprefix(_TAG)
        if kind == "str":
            if _UNWRITABLE.search(text):
                rule = "has a zero byte, or half a surrogate pair, which is no character"
                raise self._error(node, text, rule, "Remove the escape.")
            return text
        if kind not in _CORE or not node.tag.startswith(_TAG):
            raise self._unknown_tag(node, key)
        if not _CORE[kind][0].fullmatch(text):
            raise self._error(node, text, f"is no {kind}, as its tag says", "Remove the tag (!!...).")
        if kind == "null":
            return None
        if kind == "bool":
            return text.lower() == "true"
        if kind == "float":
            return float(re.sub(r"(?i)\.(inf|nan)", r"\1", text))
        # The limit on the length keeps Python from refusing a text of thousands of digits in words of its own.
        number = int(text, {"0o": 8, "0x": 16}.get(text[:2], 10)) if len(text) <= _SHOWN else _LARGEST + 1
        if abs(number) > _LARGEST:
            raise self._error(node, text, "a whole number of more than 64 bits", "No setting is that large.")
        return number

    def _unknown_tag(self, node: yaml.Node, key: KeyPath) -> UserError:
        rule = f"an unknown tag{f' at {dotted(key)}' if key else ''}"
        return self._error(node, node.tag.replace(_TAG, "!!"), rule, "Remove it: the value says what it is.")

    def _error(self, node: yaml.Node, value: str, rule: str, remedy: str) -> UserError:
        return UserError(describe(self._place(node.start_mark.line + 1), _short(value), rule, remedy))


def _short(text: str) -> str:
    return text if len(text) <= _SHOWN else text[:_SHOWN] + "..."
