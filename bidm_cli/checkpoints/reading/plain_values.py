"""Text of configuration files as plain values: YAML with any tags, JSON with comments, absl's flag files.

A tag says what class a mapping, list or scalar was dumped from (``!!python/object:argparse.Namespace``); it
is read as that mapping, list or scalar, and nothing is constructed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

import yaml

_LARGEST_SECOND_READING = 1 << 17
"""YAML is read by Python, some hundred kB a second."""
_PYTHON = "tag:yaml.org,2002:python/"
_PICKLED = {"args", "kwds", "state", "listitems", "dictitems"}
_HOLDERS = ("_fields", "_content", "_val")
"""Attributes under which ml_collections and omegaconf keep what their objects hold."""
_COMMENT = re.compile(r'"(?:\\.|[^"\\])*"|//[^\n]*|/\*.*?(?:\*/|\Z)', re.S)
_FLAG = re.compile(r"--([A-Za-z]\w*)(?:(?:\s*=\s*|\s+)(.*))?")
_WORDS: dict[str, Any] = {"True": True, "False": False, "None": None}


def decoded(data: bytes) -> str:
    """Text in UTF-8, UTF-16 or UTF-32, with or without a byte order mark; anything else as Latin-1.

    Raises:
        ValueError: UTF-16 or UTF-32 that is cut short.
    """
    encoding = json.detect_encoding(data)
    try:
        return data.decode(encoding)
    except UnicodeDecodeError:
        if not encoding.startswith("utf-8"):
            raise
        return data.decode("latin-1")


def plain_values(text: str, is_json: bool) -> Any:
    """Dicts, lists, numbers and strings of a configuration.

    Raises:
        ValueError, yaml.YAMLError, RecursionError: it is none.
    """
    if is_flag_file(text):
        return _flags(text)
    if not is_json:
        return _yaml(text)
    try:
        return json.loads(text)
    except ValueError as error:
        if len(text) > _LARGEST_SECOND_READING:
            raise
        try:
            # YAML's flow style is JSON with comments after # and commas at the end.
            return _yaml(_COMMENT.sub(lambda match: match[0] if match[0][0] == '"' else " ", text))
        except yaml.YAMLError:
            raise error from None


def is_flag_file(text: str) -> bool:
    """True if the first line is a flag (two dashes, name, = and value), as all of absl's flag files are."""
    lines = (line.strip() for line in text.splitlines())
    start = next((line for line in lines if line and not line.startswith(("#", "//"))), "")
    return _FLAG.fullmatch(start) is not None


def _flags(text: str) -> dict[str, Any]:
    """absl's flag file: a flag on several lines is a list, one without value true, or false after "no"."""
    found: dict[str, Any] = {}
    for line in map(str.strip, text.splitlines()):
        if not line or line.startswith(("#", "//")):
            continue
        match = _FLAG.fullmatch(line)
        if match is None:
            raise ValueError(f"{line[:60]!r} is no flag among flags")
        name, value = match[1], match[2]
        if value is not None:
            value = _scalar(value.strip())
        elif name.startswith("no"):
            name, value = name[2:], False
        else:
            value = True
        if name in found:
            before = found[name] if isinstance(found[name], list) else [found[name]]
            value = [*before, value]
        found[name] = value
    return found


def _scalar(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return _WORDS.get(text, text.strip("'\""))


def _yaml(text: str) -> Any:
    try:
        return yaml.load(text, _PlainLoader)
    except yaml.YAMLError:
        if "\t" not in text or len(text) > _LARGEST_SECOND_READING:
            raise
        return yaml.load(text.expandtabs(), _PlainLoader)


class _PlainLoader(yaml.SafeLoader):
    """Loader of plain values, whatever the tags."""


def _plain(loader: _PlainLoader, node: yaml.Node) -> Any:
    kind, _, name = node.tag.removeprefix(_PYTHON).partition(":")
    if isinstance(node, yaml.MappingNode):
        values = loader.construct_mapping(node, deep=True)
        if kind in ("object/new", "object/apply") and values.keys() <= _PICKLED:
            return _pickled(values, name)
        return _held(values)
    if isinstance(node, yaml.SequenceNode):
        items = loader.construct_sequence(node, deep=True)
        return _pickled({"args": items}, name) if kind in ("object/new", "object/apply") else items
    if kind in ("name", "module"):
        return name
    if kind in ("str", "unicode", "bytes", "complex"):
        return node.value
    tag = loader.resolve(yaml.ScalarNode, node.value, (True, False))
    return loader.construct_object(yaml.ScalarNode(tag, node.value, node.start_mark, node.end_mark))


_PlainLoader.add_constructor(None, _plain)


def _pickled(parts: Mapping[Any, Any], name: str) -> Any:
    """Contents of an object that was dumped in parts, as pickle takes them: items, state, arguments."""
    arguments, state = parts.get("args") or [], parts.get("state")
    only = arguments[0] if isinstance(arguments, list) and len(arguments) == 1 else arguments
    if "listitems" in parts and "dictitems" not in parts:
        return parts["listitems"]
    if name.endswith("Dict") and isinstance(only, list):
        only = {pair[0]: pair[1] for pair in only if isinstance(pair, list) and len(pair) == 2}
    mappings = [part for part in (only, parts.get("kwds"), state) if isinstance(part, dict)]
    if not mappings and "dictitems" not in parts:
        return only
    merged = {key: value for part in mappings for key, value in part.items() if not str(key).startswith("__")}
    items = parts.get("dictitems")
    return _held(merged | (items if isinstance(items, dict) else {}))


def _held(values: dict[Any, Any]) -> Any:
    """Contents of an object of ml_collections or omegaconf; other mappings as they are."""
    return next((values[name] for name in _HOLDERS if name in values), values)
