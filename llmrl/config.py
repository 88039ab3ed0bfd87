"""Strict flat configuration: YAML file and command line into one dataclass, with one error for each kind of mistake.

Keys are flat and prefixed (`lora_r`, `sampling_temperature`), lists are comma-separated values, null is null. The command
line wins over the file. `--help` comes from the dataclass: each field's `help` metadata is its documentation.
"""

from __future__ import annotations

import argparse
import dataclasses
import types
import typing
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from llmrl.errors import ConfigError, UsageError, did_you_mean, nearest

T = TypeVar("T")


def option(
    default: Any = dataclasses.MISSING,
    *,
    help: str,
    choices: tuple[str, ...] | None = None,
    const: str | None = None,
    verbatim: bool = False,
) -> Any:
    """Return a dataclass field with its documentation.

    Args:
        default: without one the option is required; a list is copied.
        help: one line for `--help`.
        choices: the valid values.
        const: the value of the bare option, which then may stand without one.
        verbatim: of a list of texts: each word is one of them as it stands, commas and white space included, and the option
            may be given several times.
    """
    metadata = {"help": help, "choices": choices, "const": const, "verbatim": verbatim}
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def parse_config(
    config_class: type[T], argv: list[str], *, prog: str, description: str, positional: str | None = None
) -> T:
    """Build `config_class` from a command line that may name a YAML file with `--config`.

    Args:
        config_class: a dataclass whose fields were made with `option`.
        argv: arguments without the program's name.
        prog: shown in usage messages.
        description: shown by `--help`.
        positional: name of a field that may also be given as the first positional argument.

    Raises:
        ConfigError: unknown key (with the nearest valid one), wrong type, nested mapping, missing or broken file.
        UsageError: an option the command does not have.
    """
    fields = _fields(config_class)
    parser = _parser(config_class, fields, prog, description, positional)
    namespace = vars(parser.parse_args(_spell_out_switches(argv, fields)))
    file = namespace.pop("config", None)
    values = load_config_file(file, config_class) if file else {}
    for name, text in namespace.items():
        if text is not None:
            as_is = fields[name][0].metadata.get("verbatim")
            values[name] = text if as_is else _convert_text(text, fields[name][1], f"--{name}")
    return _build(config_class, fields, values)


def load_config_file(path: str | Path, config_class: type) -> dict[str, Any]:
    """Read a flat YAML file and check every key and type against `config_class`."""
    import yaml

    path = Path(path).expanduser()
    if not path.is_file():
        raise ConfigError(f"not found: {path} (--config)")
    try:
        text = path.read_text(encoding="utf-8")
        loaded = yaml.safe_load(text)
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        raise ConfigError(f"{where}: not YAML: {getattr(error, 'problem', None) or error}") from error
    if loaded is None:
        return {}
    if not isinstance(loaded, dict):
        raise ConfigError(f"{path}: expected 'key: value' lines, got a {type(loaded).__name__}")
    keys = [key.value for key, _ in node.value]
    twice = next((key for key in keys if keys.count(key) > 1), None)
    if twice is not None:
        raise ConfigError(f"{path}: key '{twice}' stands there twice; remove one")
    fields = _fields(config_class)
    values = {}
    for key, value in loaded.items():
        if key not in fields:
            raise ConfigError(f"{path}: unknown key '{key}'{did_you_mean(str(key), fields)}")
        if isinstance(value, dict):
            flat = nearest(f"{key}_{next(iter(value), '')}", fields) or key
            raise ConfigError(f"{path}: '{key}' is a nested mapping; keys are flat, for example '{flat}: ...'")
        where = f"{path}: '{key}'"
        if fields[str(key)][0].metadata.get("verbatim"):
            values[str(key)] = _texts(value, where)
        else:
            values[str(key)] = _convert_yaml(value, fields[str(key)][1], where)
    return values


def to_flat(config: Any) -> dict[str, Any]:
    """Return a config as the flat mapping that its YAML file would hold; lists as comma-separated values."""
    flat = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        joined = isinstance(value, list) and not field.metadata.get("verbatim")
        flat[field.name] = ",".join(map(str, value)) if joined else value
    return flat


def _fields(config_class: type) -> dict[str, tuple[dataclasses.Field[Any], Any]]:
    hints = typing.get_type_hints(config_class)
    return {f.name: (f, hints[f.name]) for f in dataclasses.fields(config_class)}


def _build(config_class: type[T], fields: dict[str, tuple[dataclasses.Field[Any], Any]], values: dict[str, Any]) -> T:
    for name, (field, _) in fields.items():
        choices = field.metadata.get("choices")
        if choices and name in values and values[name] is not None and values[name] not in choices:
            raise ConfigError(f"--{name} {values[name]}: not a choice{did_you_mean(str(values[name]), choices)}")
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and name not in values:
            raise UsageError(f"missing --{name}: {field.metadata['help']}")
    return config_class(**values)


def _spell_out_switches(argv: list[str], fields: dict[str, tuple[dataclasses.Field[Any], Any]]) -> list[str]:
    """Turn a bare `--merge` into `--merge=true`, so that it does not swallow a positional argument behind it."""
    switches = {f"--{name}" for name, (_, hint) in fields.items() if _kind(hint)[0] is bool}
    # of these two are accepted, but all are meant as the switch's value
    values = {"true", "false", "yes", "no", "on", "off", "0", "1"}
    followed = zip(argv, [*argv[1:], ""] if argv else [], strict=True)
    return [f"{word}=true" if word in switches and after.lower() not in values else word for word, after in followed]


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        unknown = message.removeprefix("unrecognized arguments: ")
        if unknown != message:
            word = next((part for part in unknown.split() if part.startswith("-")), unknown.split()[0])
            known = [name for action in self._actions for name in action.option_strings]
            match = nearest(word.split("=")[0], known) if word.startswith("-") else None
            message = f"unknown option {word}" if word.startswith("-") else f"unexpected argument '{word}'"
            message += f"; did you mean {match}?" if match else f"; see {self.prog} --help"
        raise UsageError(message)


def _parser(
    config_class: type,
    fields: dict[str, tuple[dataclasses.Field[Any], Any]],
    prog: str,
    description: str,
    first: str | None,
) -> argparse.ArgumentParser:
    # allow_abbrev would turn a misspelt option into another one
    parser = _Parser(prog=prog, description=description, allow_abbrev=False)
    for name, (field, hint) in fields.items():
        default = field.default if field.default is not dataclasses.MISSING else None
        text = field.metadata["help"] + (f" (default: {default})" if default not in (None, False) else "")
        text = text.replace("%", "%%")
        kind, is_list, _ = _kind(hint)
        metavar = name.rsplit("_", 1)[-1].upper()
        if name == first:
            parser.add_argument(name, nargs="?", metavar=name.upper(), help=text)
        elif kind is bool:
            parser.add_argument(f"--{name}", nargs="?", const="true", metavar="BOOL", help=text)
        elif is_list:
            # given twice, the second does not take the place of the first without a word
            parser.add_argument(f"--{name}", nargs="+", action="extend", metavar=metavar, help=text)
        elif field.metadata.get("const"):
            parser.add_argument(f"--{name}", nargs="?", const=field.metadata["const"], metavar=metavar, help=text)
        else:
            parser.add_argument(f"--{name}", metavar=metavar, help=text)
    parser.add_argument("--config", metavar="FILE", help="flat YAML file with the options above; the command line wins")
    return parser


def _kind(hint: Any) -> tuple[type, bool, bool]:
    """Return (element type, is a list, may be null) of an annotation."""
    optional = False
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        members = [arg for arg in typing.get_args(hint) if arg is not type(None)]
        optional, hint = len(members) < len(typing.get_args(hint)), members[0]
    if typing.get_origin(hint) is list:
        return typing.get_args(hint)[0], True, optional
    return hint, False, optional


_NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}


def _convert_text(text: str | list[str], hint: Any, where: str) -> Any:
    kind, is_list, optional = _kind(hint)
    if is_list:
        parts = [text] if isinstance(text, str) else text
        # a file whose name has a comma is one value
        words = [[word] if kind is str and Path(word).exists() else word.split(",") for word in parts]
        return [_scalar(part, kind, where) for word in words for part in word if part]
    assert isinstance(text, str)
    if optional and text == "null":
        return None
    return _scalar(text, kind, where)


def _convert_yaml(value: Any, hint: Any, where: str) -> Any:
    kind, is_list, optional = _kind(hint)
    if value is None:
        if optional:
            return None
        raise ConfigError(f"{where} must be {_NAMES[kind]}, got null")
    if is_list:
        parts = value if isinstance(value, list) else str(value).split(",")
        return [_scalar(str(part).strip(), kind, where) for part in parts if str(part).strip()]
    if isinstance(value, list):
        raise ConfigError(f"{where} must be {_NAMES[kind]}, got a list")
    right = isinstance(value, kind) and not (kind is int and isinstance(value, bool))
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if kind is float and isinstance(value, str):  # YAML 1.1 reads 1e-4 as text
        return _scalar(value, float, where)
    if not right:
        raise ConfigError(f"{where} must be {_NAMES[kind]}, got {value!r}")
    return value


def _texts(value: Any, where: str) -> list[str]:
    texts = value if isinstance(value, list) else [value]
    if not all(isinstance(text, str) for text in texts):
        raise ConfigError(f"{where} must be a text or a list of texts, got {value!r:.60}; write each in quotes")
    return texts


def _scalar(text: str, kind: type, where: str) -> Any:
    if kind is bool:
        lowered = text.lower()
        if lowered in ("true", "false"):
            return lowered == "true"
        raise ConfigError(f"{where} must be true or false, got '{text}'")
    try:
        return kind(text)
    except ValueError:
        raise ConfigError(f"{where} must be {_NAMES[kind]}, got '{text}'") from None


def check_least(config: object, least: dict[str, float]) -> None:
    """Refuse options below what they can be.

    Raises:
        UsageError: names the first.
    """
    for name, number in least.items():
        value = getattr(config, name)
        if value is not None and not value >= number:
            raise UsageError(f"--{name} must be at least {number}, got {value}")
