"""`llmrl serve MODEL`: vLLM's server, once or several times, on a folder llmrl wrote or any model.

A folder with llmrl's heads is checked first, so that its heads will be used. Every option that is not named here goes to
`vllm serve` as it stands.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path
from types import FrameType

from llmrl.errors import EXIT_ERROR, ModelError, UsageError, VersionError
from llmrl.files import resolve_reference
from llmrl.fingerprints import check_same_base
from llmrl.rollout.weight_files import VLLM_BACKEND
from llmrl.serving.options import ServeOptions
from llmrl.serving.plugin import MARKER_VARIABLE
from llmrl.serving.workers import PluginError, run_workers, shown_command, worker_devices
from llmrl.vllm_compat import check_versions, vllm_build, why_no_vllm

_HELP = """usage: llmrl serve MODEL [--workers N] [--sync] [option of `vllm serve` ...]

Serve a folder that llmrl wrote, any model folder, or a hub name, with vLLM. Listens on 127.0.0.1:8000 unless --host or
--port say otherwise; keeps a float32 checkpoint in float32 unless --dtype says otherwise (vLLM alone would round it to
16 bits). A folder with llmrl's heads is checked first. All options of `vllm serve` work; `vllm serve --help=all` lists
them.

  --workers N            start N servers, on --port and the N - 1 ports after it; prints their URLs when all answer
  --log_dir DIR          one log file a worker (without: lines on stderr, each with its worker's number)
  --sync                 let a trainer change the weights while the server runs; with --enable-lora, adapters too
  --allow_remote_updates with --sync: listen on other addresses than loopback. Whoever reaches the port can then
                         replace the weights and read the server's configuration: for a closed network only

vLLM's --api-key guards its /v1 endpoints only. /pause, /update_weights and the others that --sync opens answer without it,
so it is no protection for them. The key can be given in the environment variable VLLM_API_KEY, too."""


def main(argv: list[str]) -> int:
    """Run the server until it ends; return its exit code."""
    if not argv or argv[0] in ("-h", "--help"):
        print(_HELP)
        return 0
    if argv[0].startswith("-"):
        raise UsageError(f"expected the model first, got '{argv[0]}'; see llmrl serve --help")
    own, rest = own_options(argv[1:])
    options = ServeOptions(rest)
    model, is_local = resolve_reference(argv[0], "a folder that llmrl calibrate wrote, another model, or a hub name")
    with_heads = is_local and has_heads(Path(model))
    if with_heads:
        options.check_for_heads()
    if own.sync and not own.allow_remote_updates:
        options.check_loopback()
    check_vllm()
    check_plugin()
    if with_heads:
        check_folder(Path(model))
    environment = server_environment(sync=own.sync)
    if own.sync and "--weight-transfer-config" not in options:
        options = options.replaced("--weight-transfer-config", json.dumps({"backend": VLLM_BACKEND}))
    if own.workers == 1 and own.log_dir is None:
        return _run(server_command(model, options), environment)
    return _run_several(model, options, own.workers, own.log_dir, environment)


def own_options(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Return llmrl's own options and, untouched, those of `vllm serve`."""
    parser = argparse.ArgumentParser(prog="llmrl serve", add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--log_dir", "--log-dir", type=Path)
    parser.add_argument("--sync", action="store_true")
    parser.add_argument("--allow_remote_updates", "--allow-remote-updates", action="store_true")
    try:
        own, rest = parser.parse_known_args(argv)
    except argparse.ArgumentError as error:
        raise UsageError(f"{error}; see llmrl serve --help") from None
    if own.workers < 1:
        raise UsageError(f"--workers {own.workers}: expected at least 1")
    return own, rest


def has_heads(folder: Path) -> bool:
    """Tell a folder with llmrl's heads, or with routed experts, from a plain model; refuse a folder that is none of these.

    Raises:
        ModelError: no configuration, no weights, or values that vLLM cannot run.
    """
    from llmrl.base_model import check_model_folder
    from llmrl.heads import CONFIG_KEY, has_value_trunk
    from llmrl.lora_switch.folder import CONFIG_KEY as SWITCH_KEY

    try:
        found = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        found = {}
    if CONFIG_KEY in found or SWITCH_KEY in found:
        return True
    check_model_folder(folder)
    if has_value_trunk(folder):
        raise ModelError(
            f"{folder} is a policy whose values have a trunk of their own, which vLLM does not run beside the policy's: served "
            "like this it would be the behaviour policy alone; train with --trunk shared, or play it with llmrl hindsight eval"
        )
    return False


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
    """Refuse a folder whose base, tokenizer or chat template is not the one its heads or experts were fitted on."""
    from llmrl.base_model import check_model_folder, load_tokenizer, reference_for
    from llmrl.lora_switch.folder import CONFIG_KEY as SWITCH_KEY
    from llmrl.lora_switch.folder import check_served
    from llmrl.modeling import local_folder, read_heads_config

    config = folder / "config.json"
    if config.is_file() and SWITCH_KEY in json.loads(config.read_text(encoding="utf-8")):
        check_served(folder)
        return
    spec = read_heads_config(folder)
    base = folder if spec.merged else Path(spec.base.model)
    if base.is_absolute() or spec.merged:
        if not base.exists():
            raise ModelError(f"the base model of {folder} is not at {base}: put it there, or calibrate with --merge")
        check_model_folder(base)
    found = reference_for(str(base), local_folder(base, revision=spec.base.revision), load_tokenizer(folder))
    check_same_base(found, spec.base, folder)


def server_command(model: Path | str, options: ServeOptions) -> list[str]:
    """Return the command line of the server."""
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(model), *options.given]
    if "--host" not in options:
        command += ["--host", "127.0.0.1"]
    config = Path(model) / "config.json"
    if "--dtype" not in options and config.is_file():
        found = json.loads(config.read_text(encoding="utf-8"))
        if found.get("dtype", found.get("torch_dtype")) == "float32":
            command += ["--dtype", "float32"]
    return command


def server_environment(*, sync: bool) -> dict[str, str]:
    """Return the environment of a server."""
    environment = dict(os.environ)
    if vllm_build() == "cpu":
        environment.setdefault("VLLM_CPU_KVCACHE_SPACE", "4")  # GiB; vLLM alone takes nearly all memory
    if sync:
        environment |= {"VLLM_SERVER_DEV_MODE": "1", "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"}
    return environment


def _run_several(
    model: str, options: ServeOptions, count: int, log_dir: Path | None, environment: dict[str, str]
) -> int:
    port = options.get("--port", "8000")
    if not port.isdigit() or not 0 < int(port) <= 65536 - count:
        raise UsageError(f"--port {port}: expected a number with room for {count} ports")
    host = options.get("--host", "127.0.0.1")
    if vllm_build() == "cpu" and count > 1:
        environment.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # else all pin themselves to the same cores
    size = options.get("--tensor-parallel-size", options.get("-tp", "1"))
    if not size.isdigit() or int(size) < 1:
        raise UsageError(f"--tensor-parallel-size {size}: expected a number of GPUs, at least 1")
    per_worker = int(size)
    devices = worker_devices(count, per_worker) if vllm_build() == "cuda" else [None] * count
    commands = [server_command(model, options.replaced("--port", str(int(port) + i))) for i in range(count)]
    environments = [environment | ({"CUDA_VISIBLE_DEVICES": seen} if seen else {}) for seen in devices]
    reached = "127.0.0.1" if host in ("0.0.0.0", "::") else f"[{host}]" if ":" in host else host
    urls = [f"http://{reached}:{int(port) + i}" for i in range(count)]
    return run_workers(commands, environments, urls, log_dir)


def _run(command: list[str], environment: dict[str, str]) -> int:
    with tempfile.TemporaryDirectory(prefix="llmrl-serve-") as scratch:
        marker = Path(scratch) / "plugin-ran"
        environment = {**environment, MARKER_VARIABLE: str(marker)}
        print(f"llmrl: {shown_command(command)}", file=sys.stderr, flush=True)
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
