"""The options of `vllm serve`, as its command line and its `--config` file give them, and those that are refused."""

from __future__ import annotations

import ipaddress
import json
from pathlib import Path

import yaml

from llmrl.errors import UsageError

# options under which the folder would no longer be what its heads were fitted on, or its heads would not be asked
_REFUSED = {
    "--tokenizer": "the head was fitted with the folder's own tokenizer",
    "--chat-template": "the head was fitted with the folder's own chat template",
    "--hf-overrides": "the head was fitted on the base's own configuration",
    **dict.fromkeys(
        ("--speculative-config", "-sc", "--spec-method", "--spec-model", "--spec-tokens"),
        "a drafter would propose from logits without the head",
    ),
}


class ServeOptions:
    """What a user gave `vllm serve` behind the model.

    `given` is the command line, untouched. What is asked here is asked of the `--config` file too, over which the command
    line wins, as in vLLM.

    Raises:
        UsageError: The file cannot be read, or the model is named a second time.
    """

    def __init__(self, given: list[str]) -> None:
        self.given = list(given)
        file = _value(self.given, "--config")
        self._all = ([] if file is None else _of_file(Path(file))) + self.given
        if "--model" in self:
            raise UsageError(
                "the model stands first: llmrl serve MODEL; leave --model out of options and --config file"
            )

    def __contains__(self, name: str) -> bool:
        return name in {_name(option) for option in self._all if option.startswith("-")}

    def get(self, name: str, default: str) -> str:
        """Return the value of an option, `--name value` or `--name=value`; the last one counts."""
        found = _value(self._all, name)
        return default if found is None else found

    def replaced(self, name: str, value: str) -> ServeOptions:
        """Return these options with another value on the command line."""
        kept, skip = [], False
        for option in self.given:
            if skip or _name(option) == name:
                skip = not skip and "=" not in option
            else:
                kept.append(option)
        return ServeOptions([*kept, name, value])

    def check_for_heads(self) -> None:
        """Refuse options that do not go together with a fitted head.

        Raises:
            UsageError: One of them, spelt out or shortened as argparse allows.
        """
        for option in self._all:
            name = _name(option).split(".")[0]  # vLLM takes `--hf-overrides.key value` too
            meant = name if name in _REFUSED else next((full for full in _REFUSED if _is_short_for(name, full)), None)
            if meant is not None:
                raise UsageError(f"{meant} cannot be used here: {_REFUSED[meant]}; leave it out, or serve the base")

    def check_loopback(self) -> None:
        """Refuse to listen on other addresses than this machine's own.

        Raises:
            UsageError: `--host` is, or may lead to, another one.
        """
        host = self.get("--host", "127.0.0.1")
        try:
            local = host == "localhost" or ipaddress.ip_address(host).is_loopback
        except ValueError:  # a name may lead anywhere
            local = False
        if not local:
            raise UsageError(
                f"--sync with --host {host}: whoever reaches the port could replace the weights\n"
                "leave --host out, or add --allow_remote_updates on a closed network"
            )


def _name(option: str) -> str:
    name = option.split("=")[0]
    return name if not name.startswith("--") else "--" + name[2:].replace("_", "-")


def _is_short_for(name: str, full: str) -> bool:
    return len(name) > 3 and name.startswith("--") and full.startswith(name)


def _value(options: list[str], name: str) -> str | None:
    found = None
    for i, option in enumerate(options):
        _, equals, value = option.partition("=")
        if _name(option) == name and (equals or i + 1 < len(options)):
            found = value if equals else options[i + 1]
    return found


def _of_file(path: Path) -> list[str]:
    """Return the options of a flat YAML file, each as `--name=value`."""
    try:
        read = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(f"--config: not found: {path}") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UsageError(f"--config {path}: cannot be read: {' '.join(str(error).split())}") from None
    if not isinstance(read, dict):
        raise UsageError(f"--config {path}: expected a line `option: value` an option, got {type(read).__name__}")
    return [_as_option(str(key), value) for key, value in read.items() if value is not False]


def _as_option(key: str, value: object) -> str:
    if value is True:
        return f"--{key}"
    return f"--{key}={json.dumps(value) if isinstance(value, list | dict) else value}"
