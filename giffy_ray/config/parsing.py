"""Parses experiment files and overrides into plain trees. The type of a field decides how its text is converted.

YAML 1.1 guesses types from the spelling: `on` is a boolean, `2024-01-02` a date, `010` is 8, `1e-4` a string and `~`
null. This parser uses only the syntax of YAML. A text field takes its text literally; other fields convert numbers,
`true` and `false` as YAML 1.2 does, and pydantic validates them afterwards. Only `null` means none.
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

_SEARCH_SPACE = "search.space"
_NULLS = ("null", "Null", "NULL")
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
# More than any experiment needs. Nested aliases could otherwise expand a file of 1 kB to gigabytes.
_MAX_BYTES = 2**20
_MAX_VALUES = 20_000
_MAX_DEPTH = 30
MAX_SHOWN_CHARS = 300  # of a value in a message


def parse_file(path: str | Path, root: type) -> dict[str, Any]:
    """Parses an experiment file.

    Args:
        path: The file.
        root: The dataclass whose fields are the sections of the file.

    Raises:
        ConfigError: The file cannot be read or is not a valid experiment file.
    """
    try:
        with open(path, "rb") as file:  # not Path.read_bytes: a pipe or a device may have no end
            content = file.read(_MAX_BYTES + 1)
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such experiment file") from None
    except IsADirectoryError:
        raise ConfigError(f"{path}: is a folder; expected an experiment file") from None
    except (OSError, ValueError) as error:  # ValueError: a null character in the path
        raise ConfigError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if len(content) > _MAX_BYTES:
        raise ConfigError(f"{path}: is larger than {_MAX_BYTES} bytes, the limit of an experiment file")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"{path}: line {line}: is not valid UTF-8 (byte 0x{content[error.start]:02x})") from None
    return parse_text(text, root, str(path))


def parse_text(text: str, root: type, source: str) -> dict[str, Any]:
    """Parses the text of an experiment file; `source` names it in messages.

    Raises:
        ConfigError: The text is not a valid experiment file.
    """
    parser = _Parser(source, root)
    node = parser.compose(text)
    if node is None or (isinstance(node, ScalarNode) and node.value == "" and node.style is None):  # a lone ---
        return {}
    if not isinstance(node, MappingNode):
        kind = "a list" if isinstance(node, SequenceNode) else repr(node.value)
        raise ConfigError(f"{source}: expected sections such as 'optim:', found {kind}")
    return parser.parse_node(node, root, "")


def parse_override(dotted: str, text: str, root: type, kind: str) -> Any:
    """Parses the value of an override.

    A text field takes `text` literally. Lists and sections are YAML (`[a, b]`); a list may omit its brackets (`a,b`).

    Args:
        dotted: The dotted field.
        text: The value, as the user typed it.
        root: The dataclass that the field belongs to.
        kind: The `model.kind` of the experiment.

    Raises:
        ConfigError: The text is not a value of this field's type.
    """
    hint = type_of_field(root, dotted, kind)
    parser = _Parser("", root)
    members = _members(hint)
    if not text.strip():
        raise ConfigError(f"{dotted}: is empty; set {dotted}=VALUE{_or_null(members)}")
    if _is_text(members):
        return parser.parse_scalar(text, hint, dotted)
    text = text.strip()
    lists = [member for member in members if get_origin(member) is tuple]
    if lists and text[0] not in "[{" and ("," in text or not _has_scalars(members)):
        parts = [part.strip() for part in text.split(",")]
        hints = _element_hints(lists[0], len(parts))
        return [parser.parse_scalar(part, part_hint, dotted) for part, part_hint in zip(parts, hints, strict=True)]
    if lists or any(_is_mapping(member) for member in members) or text[0] in "[{":
        node = parser.compose(text, dotted)
        assert node is not None
        return parser.parse_node(node, hint, dotted)
    return parser.parse_scalar(text, hint, dotted)


def type_of_field(root: type, dotted: str, kind: str | None = None) -> Any:
    """Returns the type of a dotted field, or Any if there is no such field.

    Args:
        root: The dataclass that the field belongs to.
        dotted: The dotted field.
        kind: Selects the class of the `model` section. None uses the first class that has the field.
    """
    hint: Any = root
    for name in dotted.split("."):
        sections = [member for member in _members(hint) if dataclasses.is_dataclass(member)]
        if len(sections) > 1 and kind:
            sections = [section for section in sections if _kind_of(section) == kind]
        candidates = [hints[name] for hints in map(_hints, sections) if name in hints]
        candidates += [get_args(member)[1] for member in _members(hint) if get_origin(member) is dict]
        if not candidates:
            return Any
        hint = candidates[0]
    return hint


def is_section(hint: Any) -> bool:
    """Returns whether a field of this type is a section."""
    return any(dataclasses.is_dataclass(member) for member in _members(hint))


class _Parser:
    """Converts the nodes of a YAML document to values. `source` is the name of the file, or empty for an override."""

    def __init__(self, source: str, root: type):
        self._source = source
        self._root = root
        self._parsed_values = 0

    def compose(self, text: str, dotted: str = "") -> Node | None:
        """Parses the YAML syntax only: BaseLoader resolves no types. Returns None for an empty document."""
        location = self._source or dotted
        try:
            loader = yaml.BaseLoader(text)
            try:
                node = loader.get_single_node()
            finally:
                loader.dispose()
        except yaml.YAMLError as error:
            raise ConfigError(f"{location}: {_format_yaml_error(error, text, bool(self._source))}") from None
        except RecursionError:
            raise ConfigError(f"{location}: is nested too deeply") from None
        # YAML would silently drop text after ` #`.
        if node and not self._source and text[node.end_mark.index :].strip():
            raise ConfigError(f"{location}: unexpected {text[node.end_mark.index :].strip()!r} after the value")
        return node

    def parse_node(self, node: Node, hint: Any, dotted: str, depth: int = 0) -> Any:
        self._parsed_values += 1
        if self._parsed_values > _MAX_VALUES or depth > _MAX_DEPTH:
            problem = "is nested too deeply" if depth > _MAX_DEPTH else f"has more than {_MAX_VALUES} values"
            raise self._error(node, dotted, f"{problem}; check its aliases")
        if node.tag not in _TAGS:
            raise self._error(node, dotted, f"YAML tags are not supported (found {node.tag!r})")
        if isinstance(node, MappingNode):
            return self._parse_mapping(node, hint, dotted, depth)
        if isinstance(node, SequenceNode):
            lists = [member for member in _members(hint) if get_origin(member) is tuple]
            hints = _element_hints(lists[0], len(node.value)) if lists else [Any] * len(node.value)
            pairs = zip(node.value, hints, strict=True)
            return [self.parse_node(element, element_hint, dotted, depth + 1) for element, element_hint in pairs]
        return self.parse_scalar(node.value, hint, dotted, node)

    def parse_scalar(self, text: str, hint: Any, dotted: str, node: Node | None = None) -> Any:
        """Converts a single text. `node` is its YAML node, or None if the user typed it as an override."""
        members = _members(hint)
        if "\0" in text or not _is_unicode(text):
            raise self._error(node, dotted, f"is not valid UTF-8 text (value {text!r})")
        lists = [member for member in members if get_origin(member) is tuple and get_args(member)[-1] is ...]
        if lists and not _has_scalars(members):
            return [self.parse_scalar(text, get_args(lists[0])[0], dotted, node)]
        if not text.strip():
            raise self._error(node, dotted, f"is empty; set a value{_or_null(members)}")
        if isinstance(node, ScalarNode) and node.style is not None:
            return text  # quoted: never null, a number or a boolean
        if text in _NULLS:
            if types.NoneType in members or hint is Any:
                return None
            raise self._error(node, dotted, "must not be null (value null)")
        if node is not None and text == "~":
            raise self._error(node, dotted, "~ is ambiguous (null or the home folder); write null, or quote the path")
        if _is_text(members):
            return text
        return _parse_plain(text, bool in members)

    def _parse_mapping(self, node: MappingNode, hint: Any, dotted: str, depth: int) -> dict[str, Any]:
        pairs = self._pairs(node, dotted, depth)
        kind = pairs.get("kind")
        members = [member for member in _members(hint) if _is_mapping(member)]
        if len(members) > 1 and isinstance(kind, ScalarNode):
            members = [member for member in members if _kind_of(member) == kind.value] or members
        hints: dict[str, Any] = {}
        if dotted == _SEARCH_SPACE:  # searched values have the type of their field
            # Or null: whether a kind of model accepts it is validated when each value is applied.
            hints = {name: dict[str, tuple[type_of_field(self._root, name) | None, ...]] for name in pairs}
        elif members:
            member = members[0]
            is_dict = get_origin(member) is dict
            hints = dict.fromkeys(pairs, get_args(member)[1]) if is_dict else _hints(member)
        prefix = f"{dotted}." if dotted else ""
        return {
            name: self.parse_node(value, hints.get(name, Any), prefix + name, depth + 1)
            for name, value in pairs.items()
        }

    def _pairs(self, node: MappingNode, dotted: str, depth: int) -> dict[str, Node]:
        """Returns the unique keys of a mapping. They take precedence over keys merged with `<<: *alias`."""
        if depth > _MAX_DEPTH:
            raise self._error(node, dotted, "is nested too deeply; check its aliases")
        direct: dict[str, tuple[Node, Node]] = {}
        merged: dict[str, Node] = {}
        for key, value in node.value:
            if not isinstance(key, ScalarNode) or not key.value.strip() or key.tag not in _TAGS:
                raise self._error(key, dotted, "a key must be a name")
            name = key.value
            if name in direct:
                field = f"{dotted}.{name}" if dotted else name
                lines = f" (also on line {direct[name][0].start_mark.line + 1})" if self._source else ""
                raise self._error(key, field, f"is given twice{lines}")
            direct[name] = (key, value)
            if name == "<<" and key.style is None:
                for source in value.value if isinstance(value, SequenceNode) else [value]:
                    if not isinstance(source, MappingNode):
                        raise self._error(value, dotted, "<<: expected an alias of a section")
                    merged = {**self._pairs(source, dotted, depth + 1), **merged}
        direct.pop("<<", None)
        return {**merged, **{name: value for name, (_, value) in direct.items()}}

    def _error(self, node: Node | None, dotted: str, problem: str) -> ConfigError:
        location = f"{self._source}: line {node.start_mark.line + 1}" if self._source and node else ""
        return ConfigError(": ".join(part for part in (location, dotted, problem) if part))


def _parse_plain(text: str, accepts_boolean: bool) -> Any:
    """Converts unquoted text to a number or a boolean, or returns it unchanged.

    A boolean field also accepts `on`, `off`, `yes` and `no`. In a number field `true` stays text, which pydantic then
    rejects; it would accept True as 1.
    """
    if accepts_boolean and text.lower() in _BOOLEANS:
        return _BOOLEANS[text.lower()]
    if text in _CONSTANTS and (accepts_boolean or not isinstance(_CONSTANTS[text], bool)):
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
    """Returns the members of a union, without their annotations."""
    if get_origin(hint) is Annotated:
        return _members(get_args(hint)[0])
    if get_origin(hint) in (Union, types.UnionType):
        return tuple(member for part in get_args(hint) for member in _members(part))
    return (hint,)


def _kind_of(section: Any) -> str | None:
    """Returns the `model.kind` that selects a class of the `model` section."""
    return getattr(section, "kind", None)


def _is_mapping(member: Any) -> bool:
    return get_origin(member) is dict or dataclasses.is_dataclass(member)


def _is_text(members: tuple[Any, ...]) -> bool:
    """Returns whether a scalar of the field can only be text or null."""
    scalars = [member for member in members if member is not types.NoneType]
    return all(
        member is str or (get_origin(member) is Literal and all(isinstance(value, str) for value in get_args(member)))
        for member in scalars
    )


def _has_scalars(members: tuple[Any, ...]) -> bool:
    return any(member in (str, int, float, bool) or get_origin(member) is Literal for member in members)


def _element_hints(tuple_hint: Any, count: int) -> list[Any]:
    arguments = get_args(tuple_hint)
    if arguments[-1] is ...:
        return [arguments[0]] * count
    return [arguments[index] if index < len(arguments) else Any for index in range(count)]


def _or_null(members: tuple[Any, ...]) -> str:
    return ", or null" if types.NoneType in members else ""


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:  # the command line had bytes that are not UTF-8
        return False
    return True


def _format_yaml_error(error: yaml.YAMLError, text: str, with_line: bool) -> str:
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None) or getattr(error, "reason", None) or str(error).partition("\n")[0]
    if mark is None or not with_line:
        return f"invalid YAML: {problem}" + ("" if with_line else f" (value {text[:MAX_SHOWN_CHARS]!r})")
    return f"line {mark.line + 1}, column {mark.column + 1}: invalid YAML: {problem}"
