"""vLLM for tests: one process for everything in process, and servers that are stopped whatever happens."""

import contextlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
from http_server import Server
from serving_folders import (
    ENSEMBLES,
    ENVIRONMENT,
    FITTED,
    NEW_TOKENS,
    PAGING,
    PARITY,
    ROOT,
    STEERED,
    STORIES,
    bfloat16_prompts,
    ensemble_folder,
    fitted_folder,
    heads_folder,
    paging_prompts,
    prompt_ids,
    random_model,
)
from small_ensembles import ANSWERS
from small_ensembles import PROMPTS as DIALOGUES
from switch_folders import SWITCH_BFLOAT16, SWITCH_PAGING, SWITCHED, switch_folder

from llmrl.vllm_compat import vllm_build, why_no_vllm


def pytest_runtest_setup(item):
    if item.get_closest_marker("vllm") and vllm_build() is None:
        pytest.skip(f"no vLLM: {why_no_vllm()}")


@pytest.fixture(scope="session")
def prompts():
    return prompt_ids()


@pytest.fixture(scope="session")
def served(tmp_path_factory):
    """A head-only folder on the real pretrained model, with a head that changes every probability."""
    return heads_folder(STORIES, tmp_path_factory.mktemp("served") / "stories", seed=1)


@pytest.fixture(scope="session")
def other_head(tmp_path_factory):
    """The same base under another head."""
    return heads_folder(STORIES, tmp_path_factory.mktemp("served") / "other", seed=2)


@pytest.fixture(scope="session")
def reward_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("served") / "reward"
    return heads_folder(STORIES, folder, kind="reward", outputs=5, seed=3)


@pytest.fixture(scope="session")
def transformer_head(tmp_path_factory):
    """A transformer temperature head on the real pretrained model."""
    return heads_folder(STORIES, tmp_path_factory.mktemp("served") / "block", architecture="transformer", seed=5)


@pytest.fixture(scope="session")
def parity_folders(tmp_path_factory):
    """Name -> (folder, its base)."""
    folders = {}
    for name, (architecture, shards, options) in PARITY.items():
        base = random_model(architecture, tmp_path_factory.mktemp("bases") / name, shards=shards)
        folders[name] = (heads_folder(base, tmp_path_factory.mktemp("heads") / name, seed=5, **options), base)
    for name, (architecture, options) in FITTED.items():
        base = random_model(architecture, tmp_path_factory.mktemp("bases") / name)
        folders[name] = (fitted_folder(base, tmp_path_factory.mktemp("heads") / name, *options), base)
    return folders


@pytest.fixture(scope="session")
def switch_folders(tmp_path_factory):
    """Name -> folder of a switch model."""
    return {name: switch_folder(tmp_path_factory.mktemp(name), *made) for name, made in SWITCHED.items()}


@pytest.fixture(scope="session")
def ensembles(tmp_path_factory):
    """Name -> (exported folder, its base, the heads as they are in training)."""
    made = {}
    for name, (architecture, kind) in ENSEMBLES.items():
        base = random_model(architecture, tmp_path_factory.mktemp("bases") / name) if architecture else STORIES
        made[name] = ensemble_folder(base, tmp_path_factory.mktemp("ensembles") / name, kind)
    return made


@pytest.fixture(scope="session", autouse=True)
def in_process_started(request, tmp_path_factory):
    """Start in_process.py before the first test that runs beside it; two cores do the work of two processes."""
    wanted = any("in_process" in getattr(item, "fixturenames", ()) for item in request.session.items)
    if not wanted or vllm_build() is None:
        yield None
        return
    get = request.getfixturevalue
    common = {"prompts": get("prompts"), "new_tokens": NEW_TOKENS}
    tasks = {name: {"kind": "parity", "folder": str(f), **common} for name, (f, _) in get("parity_folders").items()}
    tasks |= {name: {"kind": "parity", "folder": str(f), **common} for name, f in get("switch_folders").items()}
    for name, blocks in SWITCH_PAGING.items():
        task = {"kind": "paging", "folder": str(get("switch_folders")[name]), "blocks": blocks}
        tasks[f"paging-{name}"] = task | {"prompts": paging_prompts(), "new_tokens": NEW_TOKENS}
    for name in SWITCH_BFLOAT16:
        folder = str(get("switch_folders")[name])
        tasks[f"routes-{name}"] = {"kind": "routes", "folder": folder, "experts": 4, "prompts": get("prompts")}
    task = {"kind": "steered", "folder": str(get("parity_folders")["llama-value"][0]), "choices": STEERED}
    tasks["steered"] = task | {"prompts": get("prompts")}
    tasks["classes"] = {"kind": "classes", "architectures": sorted({a for a, _, _ in PARITY.values()})}
    tasks["reward"] = {"kind": "reward", "folder": str(get("reward_folder")), "prompts": get("prompts")}
    for name, (folder, _, _) in get("ensembles").items():
        task = {"kind": "ensemble", "folder": str(folder), "prompts": DIALOGUES, "answers": ANSWERS}
        tasks[f"ensemble-{name}"] = task
    for name, blocks in PAGING.items():
        task = {"kind": "paging", "folder": str(get("parity_folders")[name][0]), "blocks": blocks}
        tasks[f"paging-{name}"] = task | {"prompts": paging_prompts(), "new_tokens": NEW_TOKENS}
    task = {"kind": "bfloat16", "folder": str(get("transformer_head"))}
    tasks["bfloat16"] = task | {"prompts": bfloat16_prompts(), "new_tokens": NEW_TOKENS}
    tasks["reload"] = {
        "kind": "reload",
        "folder": str(get("served")),
        "base": str(STORIES),
        "new_head": str(get("other_head") / "llmrl_heads.safetensors"),
        **common,
    }
    # last: what vLLM imports for it makes the start of a further engine in the same process fail
    tasks["speculative"] = {"kind": "speculative", "folder": str(get("served"))}
    scratch = tmp_path_factory.mktemp("in_process")
    (scratch / "tasks.json").write_text(json.dumps(tasks))
    script = Path(__file__).with_name("in_process.py")
    with (scratch / "log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, str(script), str(scratch / "tasks.json"), str(scratch / "answers.json")],
            env=ENVIRONMENT | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"},
            cwd=ROOT,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    yield process, scratch, list(tasks)
    if process.poll() is None:
        process.kill()
        process.wait()


@pytest.fixture(scope="session")
def in_process(in_process_started):
    """Answers of in_process.py by task: {"answer": ...} or {"error": ..., "traceback": ...}."""
    process, scratch, tasks = in_process_started
    code = process.wait(timeout=400)
    log = (scratch / "log").read_text(errors="replace")[-4000:]
    answers = scratch / "answers.json"
    lost = {name: {"error": f"the process ended with {code}", "traceback": log} for name in tasks}
    return lost | (json.loads(answers.read_text()) if answers.exists() else {})


@pytest.fixture(scope="session")
def servers(tmp_path_factory, served):
    """Two servers that start side by side: a start is mostly imports, on one core. Stopped whatever happens."""
    logs = tmp_path_factory.mktemp("servers")
    llmrl_serve = [sys.executable, "-m", "llmrl.cli", "serve"]
    vllm_serve = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve"]  # what the script `vllm` runs
    commands = {
        "llmrl": [*llmrl_serve, str(served)],
        "vllm": [*vllm_serve, str(served), "--dtype=float32", "--host=127.0.0.1"],
    }
    with contextlib.ExitStack() as stack:
        yield {name: stack.enter_context(Server(c, logs / name, ENVIRONMENT)) for name, c in commands.items()}
