"""Reads experiment files and overrides into plain trees. The type of a field decides how its text is read.

YAML 1.1 guesses types from spelling: `on` is a boolean, `2024-01-02` a date, `010` is 8, `1e-4` a string, `~` nothing.
Here only the syntax of YAML is used, and a text field gets the text as it is written. Other fields read numbers,
`true` and `false` as YAML 1.2 does; pydantic checks them afterwards. Only `null` is none.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
import types
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from giffy_ray.core.errors import ConfigError

_SPACE = "search.space"
_NULL = ("null", "Null", "NULL")
_TAGS = tuple(f"tag:yaml.org,2002:{name}" for name in ("str", "seq", "map"))
# The core schema of YAML 1.2, chapter 10.3.2.
_INT = re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_CONSTANTS: dict[str, bool | float] = {
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
    **dict.fromkeys((".inf", ".Inf", ".INF", "+.inf"), math.inf),
    **dict.fromkeys(("-.inf", "-.Inf", "-.INF"), -math.inf),
    **dict.fromkeys((".nan", ".NaN", ".NAN"), math.nan),
}
_BOOLEANS = {"on": True, "yes": True, "true": True, "off": False, "no": False, "false": False}
# More than any experiment needs. Aliases of aliases would otherwise grow a file of a kilobyte to gigabytes.
_MOST_BYTES = 2**20
_MOST_VALUES = 20_000
_MOST_LEVELS = 30
LONGEST_SHOWN = 300  # characters of a value in a message


def read_file(path: str | Path, root: type) -> dict[str, Any]:
    """The tree of an experiment file whose sections are the fields of the dataclass `root`. Raises ConfigError."""
    try:
        with open(path, "rb") as file:  # not Path.read_bytes: a pipe or a device may have no end
            content = file.read(_MOST_BYTES + 1)
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such experiment file") from None
    except IsADirectoryError:
        raise ConfigError(f"{path}: is a folder; give an experiment file in it") from None
    except (OSError, ValueError) as error:  # ValueError: a null character in the path
        raise ConfigError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if len(content) > _MOST_BYTES:
        raise ConfigError(f"{path}: is larger than {_MOST_BYTES} bytes, so it is no experiment file")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"{path}: line {line}: is not UTF-8 (byte 0x{content[error.start]:02x})") from None
    return read_text(text, root, str(path))


def read_text(text: str, root: type, source: str) -> dict[str, Any]:
    """The same of the text of a file; `source` names it in messages. Raises ConfigError."""
    reader = _Reader(source, root)
    node = reader.compose(text)
    if node is None or (isinstance(node, ScalarNode) and node.value == "" and node.style is None):  # --- by itself
        return {}
    if not isinstance(node, MappingNode):
        kind = "a list" if isinstance(node, SequenceNode) else repr(node.value)
        raise ConfigError(f"{source}: expected sections such as 'optim:', found {kind}")
    return reader.value(node, root, "")


def read_override(dotted: str, text: str, root: type, kind: str) -> Any:
    """The value of the override `dotted`=`text` of a field of `root`, whose `model.kind` is `kind`. Raises ConfigError.

    A text field takes `text` as it is typed. Lists and sections are YAML (`[a, b]`); a list may leave out its brackets
    (`a,b`).
    """
    hint, reader = hint_of(root, dotted, kind), _Reader("", root)
    members = _members(hint)
    if not text.strip():
        raise ConfigError(f"{dotted}: is empty; give {dotted}=VALUE{_or_null(members)}")
    if _is_text(members):
        return reader.scalar(text, hint, dotted)
    text = text.strip()
    lists = [member for member in members if get_origin(member) is tuple]
    if lists and text[0] not in "[{" and ("," in text or not _has_scalars(members)):
        parts = [part.strip() for part in text.split(",")]
        elements = _element_hints(lists[0], len(parts))
        return [reader.scalar(part, one, dotted) for part, one in zip(parts, elements, strict=True)]
    if lists or any(_is_mapping(member) for member in members) or text[0] in "[{":
        node = reader.compose(text, dotted)
        assert node is not None
        return reader.value(node, hint, dotted)
    return reader.scalar(text, hint, dotted)


def hint_of(root: type, dotted: str, kind: str | None = None) -> Any:
    """The type of the field `dotted` below the dataclass `root`; Any where there is no such field.

    `kind` chooses among the classes of the section `model`; none: the first that has the field.
    """
    hint: Any = root
    for name in dotted.split("."):
        classes = [member for member in _members(hint) if dataclasses.is_dataclass(member)]
        if len(classes) > 1 and kind:
            classes = [one for one in classes if _kind_of(one) == kind]
        found = [hints[name] for hints in map(_hints, classes) if name in hints]
        found += [get_args(member)[1] for member in _members(hint) if get_origin(member) is dict]
        if not found:
            return Any
        hint = found[0]
    return hint


def is_section(hint: Any) -> bool:
    return any(dataclasses.is_dataclass(member) for member in _members(hint))


class _Reader:
    """Turns the nodes of one YAML document into values. `source` is its file, empty for an override."""

    def __init__(self, source: str, root: type):
        self._source, self._root, self._values = source, root, 0

    def compose(self, text: str, dotted: str = "") -> Node | None:
        """The document as nodes, none for an empty one. BaseLoader resolves no types."""
        where = self._source or dotted
        try:
            loader = yaml.BaseLoader(text)
            try:
                node = loader.get_single_node()
            finally:
                loader.dispose()
        except yaml.YAMLError as error:
            raise ConfigError(f"{where}: {_one_line(error, text, bool(self._source))}") from None
        except RecursionError:
            raise ConfigError(f"{where}: is nested too deeply") from None
        # YAML would drop what follows ` #` without a word.
        if node and not self._source and text[node.end_mark.index :].strip():
            raise ConfigError(f"{where}: unexpected {text[node.end_mark.index :].strip()!r} after the value")
        return node

    def value(self, node: Node, hint: Any, dotted: str, level: int = 0) -> Any:
        self._values += 1
        if self._values > _MOST_VALUES or level > _MOST_LEVELS:
            problem = "nested too deeply" if level > _MOST_LEVELS else f"more than {_MOST_VALUES} values"
            raise self._error(node, dotted, f"{problem}; do its aliases repeat each other?")
        if node.tag not in _TAGS:
            raise self._error(node, dotted, f"YAML tags are not supported (found {node.tag!r})")
        if isinstance(node, MappingNode):
            return self._mapping(node, hint, dotted, level)
        if isinstance(node, SequenceNode):
            lists = [member for member in _members(hint) if get_origin(member) is tuple]
            elements = _element_hints(lists[0], len(node.value)) if lists else [Any] * len(node.value)
            pairs = zip(node.value, elements, strict=True)
            return [self.value(element, one, dotted, level + 1) for element, one in pairs]
        return self.scalar(node.value, hint, dotted, node)

    def scalar(self, text: str, hint: Any, dotted: str, node: Node | None = None) -> Any:
        """The value of a single text. `node`: where it stands in YAML; None: the text is as it was typed."""
        members = _members(hint)
        if "\0" in text or not _is_unicode(text):
            raise self._error(node, dotted, f"is not text that can be stored in UTF-8 (value {text!r})")
        lists = [member for member in members if get_origin(member) is tuple and get_args(member)[-1] is ...]
        if lists and not _has_scalars(members):
            return [self.scalar(text, get_args(lists[0])[0], dotted, node)]
        if not text.strip():
            raise self._error(node, dotted, f"is empty; give a value{_or_null(members)}")
        if isinstance(node, ScalarNode) and node.style is not None:
            return text  # quoted: never null, a number or a boolean
        if text in _NULL:
            if types.NoneType in members or hint is Any:
                return None
            raise self._error(node, dotted, "must have a value (value null)")
        if node is not None and text == "~":
            raise self._error(node, dotted, "~ may mean null or the home folder; write null, or a path in quotes")
        if _is_text(members):
            return text
        return _plain(text, bool in members)

    def _mapping(self, node: MappingNode, hint: Any, dotted: str, level: int) -> dict[str, Any]:
        pairs = self._pairs(node, dotted, level)
        kind = pairs.get("kind")
        members = [member for member in _members(hint) if _is_mapping(member)]
        if len(members) > 1 and isinstance(kind, ScalarNode):
            members = [member for member in members if _kind_of(member) == kind.value] or members
        hints: dict[str, Any] = {}
        if dotted == _SPACE:  # the values of a searched field are read as those of the field
            # null too: which kinds of model take it is found out when each value is tried.
            hints = {name: dict[str, tuple[hint_of(self._root, name) | None, ...]] for name in pairs}
        elif members:
            member = members[0]
            of_dict = get_origin(member) is dict
            hints = dict.fromkeys(pairs, get_args(member)[1]) if of_dict else _hints(member)
        prefix = f"{dotted}." if dotted else ""
        return {
            name: self.value(value, hints.get(name, Any), prefix + name, level + 1) for name, value in pairs.items()
        }

    def _pairs(self, node: MappingNode, dotted: str, level: int) -> dict[str, Node]:
        """The keys of a mapping, each given once. Those merged by `<<: *alias` give way to its own."""
        if level > _MOST_LEVELS:
            raise self._error(node, dotted, "nested too deeply; do its aliases repeat each other?")
        own: dict[str, tuple[Node, Node]] = {}
        merged: dict[str, Node] = {}
        for key, value in node.value:
            if not isinstance(key, ScalarNode) or not key.value.strip() or key.tag not in _TAGS:
                raise self._error(key, dotted, "a key must be a name")
            name = key.value
            if name in own:
                field = f"{dotted}.{name}" if dotted else name
                lines = f" (also on line {own[name][0].start_mark.line + 1})" if self._source else ""
                raise self._error(key, field, f"is given twice{lines}")
            own[name] = (key, value)
            if name == "<<" and key.style is None:
                for source in value.value if isinstance(value, SequenceNode) else [value]:
                    if not isinstance(source, MappingNode):
                        raise self._error(value, dotted, "<<: needs an alias of a section")
                    merged = {**self._pairs(source, dotted, level + 1), **merged}
        own.pop("<<", None)
        return {**merged, **{name: value for name, (_, value) in own.items()}}

    def _error(self, node: Node | None, dotted: str, problem: str) -> ConfigError:
        where = f"{self._source}: line {node.start_mark.line + 1}" if self._source and node else ""
        return ConfigError(": ".join(part for part in (where, dotted, problem) if part))


def _plain(text: str, boolean: bool) -> Any:
    """A number, `true`, `false`, or the text itself. `boolean`: the field is one, so `on` and `no` are too.

    In the field of a number `true` stays text, which is then refused: pydantic would take it for 1.
    """
    if boolean and text.lower() in _BOOLEANS:
        return _BOOLEANS[text.lower()]
    if text in _CONSTANTS and (boolean or not isinstance(_CONSTANTS[text], bool)):
        return _CONSTANTS[text]
    try:
        if _INT.fullmatch(text):
            return int(text, 0 if text[:2] in ("0x", "0o") else 10)
        if _FLOAT.fullmatch(text):
            return float(text)
    except ValueError:  # more digits than Python converts
        pass
    return text


@functools.cache
def _hints(section: type) -> dict[str, Any]:
    return get_type_hints(section, include_extras=True)


def _members(hint: Any) -> tuple[Any, ...]:
    """The types that a union is of, without what Annotated adds to them."""
    if get_origin(hint) is Annotated:
        return _members(get_args(hint)[0])
    if get_origin(hint) in (Union, types.UnionType):
        return tuple(member for part in get_args(hint) for member in _members(part))
    return (hint,)


def _kind_of(section: Any) -> str | None:
    """Of a class of the section `model`, which of them it is."""
    return getattr(section, "kind", None)


def _is_mapping(member: Any) -> bool:
    return get_origin(member) is dict or dataclasses.is_dataclass(member)


def _is_text(members: tuple[Any, ...]) -> bool:
    """Whether a scalar of the field can only be text (or none)."""
    scalars = [member for member in members if member is not types.NoneType]
    return all(
        member is str or (get_origin(member) is Literal and all(isinstance(one, str) for one in get_args(member)))
        for member in scalars
    )


def _has_scalars(members: tuple[Any, ...]) -> bool:
    return any(member in (str, int, float, bool) or get_origin(member) is Literal for member in members)


def _element_hints(of_tuple: Any, count: int) -> list[Any]:
    arguments = get_args(of_tuple)
    if arguments[-1] is ...:
        return [arguments[0]] * count
    return [arguments[place] if place < len(arguments) else Any for place in range(count)]


def _or_null(members: tuple[Any, ...]) -> str:
    return ", or null for none" if types.NoneType in members else ""


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:  # bytes of the command line that are not UTF-8
        return False
    return True


def _one_line(error: yaml.YAMLError, text: str, with_line: bool) -> str:
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None) or getattr(error, "reason", None) or str(error).partition("\n")[0]
    if mark is None or not with_line:
        return f"not YAML: {problem}" + ("" if with_line else f" (value {text[:LONGEST_SHOWN]!r})")
    return f"line {mark.line + 1}, column {mark.column + 1}: not YAML: {problem}"
