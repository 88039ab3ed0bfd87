"""`llmrl serve DIR`: vLLM's server on a folder llmrl wrote, after making sure that its heads will be used.

Every option that is not named here goes to `vllm serve` as it stands.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path
from types import FrameType

from llmrl.errors import EXIT_ERROR, LlmrlError, ModelError, UsageError, VersionError
from llmrl.heads import check_same_base
from llmrl.serving.plugin import MARKER_VARIABLE
from llmrl.vllm_compat import check_versions, vllm_build, why_no_vllm

_HELP = """usage: llmrl serve DIR [option of `vllm serve` ...]

Serve a folder that llmrl wrote. Listens on 127.0.0.1:8000 unless --host or --port say otherwise; keeps a float32
checkpoint in float32 unless --dtype says otherwise (vLLM alone would round it to 16 bits). All options of `vllm serve`
work; `vllm serve --help=all` lists them."""


class PluginError(LlmrlError):
    """vLLM would start without llmrl's plugin, hence without the heads."""


def main(argv: list[str]) -> int:
    """Run the server until it ends; return its exit code."""
    if not argv or argv[0] in ("-h", "--help"):
        print(_HELP)
        return 0
    if argv[0].startswith("-"):
        raise UsageError(f"expected the folder first, got '{argv[0]}'; see llmrl serve --help")
    folder = Path(argv[0]).expanduser()
    if not folder.is_dir():
        raise UsageError(f"not found: {folder} (a folder that llmrl calibrate wrote)")
    check_options(argv[1:])
    check_vllm()
    check_plugin()
    check_folder(folder)
    return _run(server_command(folder, argv[1:]))


def check_vllm() -> None:
    """Refuse when vLLM is absent, outside the window, or cannot start its command line."""
    build = vllm_build()
    if build is None:
        raise VersionError(f"vLLM cannot be used here: {why_no_vllm()}")
    check_versions(("vllm",))
    if build == "cpu":
        try:
            metadata.version("vllm")
        except metadata.PackageNotFoundError:
            raise VersionError(
                "vllm-cpu's command line looks for a package called vllm and there is none\n"
                "install the metadata-only package of llmrl's repository: pip install --no-deps ./tools/vllm-cpu-alias"
            ) from None


def check_plugin() -> None:
    """Refuse when vLLM would not load llmrl's plugin.

    Raises:
        PluginError: no entry point (llmrl is not installed as a package), or VLLM_PLUGINS leaves it out.
    """
    found = metadata.entry_points(group="vllm.general_plugins", name="llmrl")
    if not list(found):
        raise PluginError(
            "llmrl's vLLM plugin is not installed, so the heads would not be used\n"
            "install llmrl as a package: pip install llmrl (or pip install -e . in a checkout)"
        )
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None and "llmrl" not in [name.strip() for name in allowed.split(",")]:
        raise PluginError(
            f"VLLM_PLUGINS={allowed} leaves out llmrl's plugin, so the heads would not be used\n"
            f"unset it, or set VLLM_PLUGINS={','.join(filter(None, [allowed, 'llmrl']))}"
        )


def check_folder(folder: Path) -> None:
    """Refuse a folder whose base, tokenizer or chat template is not the one its heads were fitted on."""
    from llmrl.base_model import check_model_folder, load_tokenizer, reference_for
    from llmrl.modeling import local_folder, read_heads_config

    spec = read_heads_config(folder)
    base = folder if spec.merged else Path(spec.base.model)
    if base.is_absolute() or spec.merged:
        if not base.exists():
            raise ModelError(f"the base model of {folder} is not at {base}: put it there, or calibrate with --merge")
        check_model_folder(base)
    found = reference_for(str(base), local_folder(base, revision=spec.base.revision), load_tokenizer(folder))
    check_same_base(found, spec.base, folder)


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


def check_options(options: list[str]) -> None:
    """Refuse options of `vllm serve` that do not go together with a fitted head."""
    for option in options:
        name = option.split("=")[0].split(".")[0].replace("_", "-")  # vLLM takes `--hf-overrides.key value` too
        if name in _REFUSED:
            raise UsageError(f"{name} cannot be used here: {_REFUSED[name]}; leave it out, or serve the base")


def server_command(folder: Path, options: list[str]) -> list[str]:
    """Return the command line of the server."""
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(folder), *options]
    given = {option.split("=")[0] for option in options}
    if "--host" not in given:
        command += ["--host", "127.0.0.1"]
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if "--dtype" not in given and config.get("dtype", config.get("torch_dtype")) == "float32":
        command += ["--dtype", "float32"]
    return command


def _run(command: list[str]) -> int:
    with tempfile.TemporaryDirectory(prefix="llmrl-serve-") as scratch:
        marker = Path(scratch) / "plugin-ran"
        environment = {**os.environ, MARKER_VARIABLE: str(marker)}
        if vllm_build() == "cpu":
            environment.setdefault("VLLM_CPU_KVCACHE_SPACE", "4")  # GiB; vLLM alone takes nearly all memory
        print("llmrl: " + " ".join(command[1:]), file=sys.stderr, flush=True)
        server = subprocess.Popen(command, env=environment)

        stopped_by: list[int] = []

        def forward(number: int, frame: FrameType | None) -> None:
            stopped_by.append(number)
            server.send_signal(number)

        previous = {number: signal.signal(number, forward) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            code = server.wait()
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
        if stopped_by:  # a stop during the start is no failure of the plugin
            return 128 + stopped_by[0] if code else code
        if code != 0 and not marker.exists():
            raise PluginError(
                f"vLLM ended (exit code {code}) without having loaded llmrl's plugin; its log above says why\n"
                "check with: llmrl doctor"
            )
    return code if code >= 0 else 128 - code if code in (-signal.SIGTERM, -signal.SIGINT) else EXIT_ERROR
