"""What `llmrl serve` refuses before vLLM starts, and what it says when the plugin was not loaded."""

import json
import shutil
import signal
import subprocess
import sys
import time
from importlib import metadata

import pytest
from folder_edits import change_tokenizer
from http_server import Server, descendants
from serving_folders import ENVIRONMENT, LINEAR, ROOT, STORIES, heads_folder

from llmrl.cli import main
from llmrl.serving import launch, plugin
from llmrl.serving.options import ServeOptions

pytestmark = pytest.mark.vllm


@pytest.fixture
def no_vllm_start(monkeypatch):
    """A refusal that comes too late ends here."""
    monkeypatch.setattr(launch.subprocess, "Popen", lambda *a, **k: pytest.fail("vLLM was started"))
    monkeypatch.setenv("VLLM_PLUGINS", "llmrl")


def refusal(argv, capsys):
    code = main(["serve", *map(str, argv)])
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("llmrl: ")
    assert len(captured.err.splitlines()) <= 3
    assert "Traceback" not in captured.err
    return code, captured.err


@pytest.fixture
def base(tmp_path):
    return shutil.copytree(STORIES, tmp_path / "base")


@pytest.fixture
def folder(base, tmp_path):
    return heads_folder(base, tmp_path / "calibrated", **LINEAR)


def test_serve_refuses_missing_folder(no_vllm_start, tmp_path, capsys):
    code, text = refusal([tmp_path / "nowhere"], capsys)
    assert code == 2
    assert f"not found: {tmp_path / 'nowhere'}" in text


def test_serve_refuses_option_in_place_of_folder(no_vllm_start, capsys):
    code, text = refusal(["--port", "1"], capsys)
    assert code == 2
    assert "expected the model first, got '--port'" in text


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (
            ["--tokenizer", "other"],
            "--tokenizer cannot be used here: the head was fitted with the folder's own tokenizer",
        ),
        (["--port", "1", "--tokenizer=other"], "--tokenizer cannot be used here"),
        (["--chat-template", "x.jinja"], "the head was fitted with the folder's own chat template"),
        (["--chat_template=x.jinja"], "--chat-template cannot be used here"),
        (["--hf-overrides", "{}"], "the head was fitted on the base's own configuration"),
        (["--hf-overrides.rope_theta", "5"], "--hf-overrides cannot be used here"),
        (["--speculative-config", "{}"], "a drafter would propose from logits without the head"),
        (["--speculative_config.method=ngram"], "--speculative-config cannot be used here"),
        (["-sc", "{}"], "-sc cannot be used here"),
        (["--spec-method", "ngram"], "--spec-method cannot be used here"),
        (["--hf-over", "{}"], "--hf-overrides cannot be used here"),  # argparse takes it for --hf-overrides
    ],
)
def test_serve_refuses_options_that_leave_the_head_behind(options, why, no_vllm_start, served, capsys):
    code, text = refusal([served, *options], capsys)
    assert code == 2
    assert why in text
    assert "leave it out, or serve the base" in text


@pytest.mark.parametrize(
    "options", [["--tokenizer-mode", "auto"], ["--port=1", "--dtype", "float32"], ["--seed", "1.5"]]
)
def test_options_for_heads_let_others_pass(options):
    ServeOptions(options).check_for_heads()


@pytest.fixture
def config(tmp_path):
    """Write the file of `--config`; return the options that name it."""

    def write(text):
        (tmp_path / "serve.yaml").write_text(text)
        return ["--config", str(tmp_path / "serve.yaml")]

    return write


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("port: 1\ntokenizer: other\n", "--tokenizer cannot be used here"),
        ("chat_template: x.jinja\n", "--chat-template cannot be used here"),
        ("hf-overrides:\n  rope_theta: 5\n", "--hf-overrides cannot be used here"),
        ("model: other\n", "the model stands first"),
        ("- port\n", "expected a line `option: value` an option, got list"),
        ("port: [\n", "cannot be read"),
    ],
)
def test_serve_refuses_what_a_config_file_says(text, why, config, no_vllm_start, served, capsys):
    code, message = refusal([served, *config(text)], capsys)
    assert code == 2
    assert why in message


def test_serve_refuses_missing_config_file(no_vllm_start, served, tmp_path, capsys):
    code, text = refusal([served, "--config", tmp_path / "none.yaml"], capsys)
    assert code == 2
    assert f"--config: not found: {tmp_path / 'none.yaml'}" in text


def test_serve_refuses_a_second_model(no_vllm_start, served, capsys):
    code, text = refusal([served, "--model", "other"], capsys)
    assert code == 2
    assert "the model stands first" in text


def test_serve_refuses_updates_over_the_network_from_a_config_file(config, no_vllm_start, served, capsys):
    code, text = refusal([served, "--sync", *config("host: 0.0.0.0\n")], capsys)
    assert code == 2
    assert "--sync with --host 0.0.0.0" in text


def test_command_leaves_to_the_config_file_what_it_says(config, served):
    options = ServeOptions([*config("host: 127.0.0.2\ndtype: bfloat16\nport: 7\n"), "--port=9"])
    command = launch.server_command(served, options)
    assert "--host" not in command
    assert "--dtype" not in command
    assert options.get("--port", "8000") == "9"
    assert options.replaced("--port", "5").given == [*options.given[:2], "--port", "5"]


def test_serve_refuses_empty_folder(no_vllm_start, tmp_path, capsys):
    code, text = refusal([tmp_path], capsys)
    assert code == 1
    assert "has no config.json" in text


def test_serve_refuses_base_moved_away(no_vllm_start, base, folder, capsys):
    base.rename(base.with_name("elsewhere"))
    code, text = refusal([folder], capsys)
    assert code == 1
    assert f"is not at {base}" in text
    assert "--merge" in text


def test_serve_refuses_changed_base_weights(no_vllm_start, base, folder, capsys):
    change_weights(base)
    code, text = refusal([folder], capsys)
    assert code == 1
    assert "fitted on another base: the base model's weights or configuration of" in text


@pytest.mark.parametrize("what", ["the tokenizer", "the chat template"])
def test_serve_refuses_changed_tokenizer(no_vllm_start, what, folder, capsys):
    if what == "the tokenizer":
        change_tokenizer(folder)
    else:
        (folder / "chat_template.jinja").write_text("{{ messages }}")
    code, text = refusal([folder], capsys)
    assert code == 1
    assert f"fitted on another base: {what} of" in text


def test_serve_refuses_plugin_left_out(no_vllm_start, monkeypatch, served, capsys):
    monkeypatch.setenv("VLLM_PLUGINS", "other")
    code, text = refusal([served], capsys)
    assert code == 1
    assert "VLLM_PLUGINS=other leaves out llmrl's plugin" in text
    assert "VLLM_PLUGINS=other,llmrl" in text


def test_serve_refuses_without_entry_point(no_vllm_start, monkeypatch, served, capsys):
    real = metadata.entry_points

    def without_ours(**params):
        return [entry for entry in real(**params) if not entry.value.startswith("llmrl")]

    monkeypatch.setattr(launch.metadata, "entry_points", without_ours)
    code, text = refusal([served], capsys)
    assert code == 1
    assert "plugin is not installed" in text
    assert "pip install llmrl" in text


def test_serve_says_when_the_plugin_did_not_load(served, tmp_path, monkeypatch, capfd):
    """A plugin that raises is only logged by vLLM; the real vLLM then ends on an unknown architecture."""
    # breaks the plugin in the processes that vLLM starts, not in this one
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['llmrl.serving.plugin'] = None\n")
    for name, value in {**ENVIRONMENT, "PYTHONPATH": str(tmp_path)}.items():
        monkeypatch.setenv(name, value)
    assert main(["serve", str(served), "--port=1", "--enforce-eager"]) == 1
    text = capfd.readouterr().err
    last = text.strip().splitlines()[-2:]
    assert "without having loaded llmrl's plugin" in last[0], text[-3000:]
    assert "llmrl doctor" in last[1]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_serve_stopped_while_starting_leaves_nothing(number, served, tmp_path):
    command = [sys.executable, "-m", "llmrl.cli", "serve", str(served)]
    with Server(command, tmp_path / "log", ENVIRONMENT) as server:
        end = time.monotonic() + 120
        while not descendants(server.process.pid):
            assert server.process.poll() is None, server.text()
            assert time.monotonic() < end, server.text()
            time.sleep(0.05)
        code, left = server.stop(number, group=number == signal.SIGINT)
        assert left == []
        assert code == 128 + number, server.text()
        assert "llmrl's plugin" not in server.text()  # that vLLM had not loaded it yet is no failure


def test_register_is_idempotent_and_light(tmp_path):
    code = (
        "import sys\n"
        "import llmrl.serving.plugin as plugin\n"
        "print(sorted({'torch', 'vllm', 'transformers'} & set(sys.modules)))\n"
        "from vllm import ModelRegistry\n"
        "before = set(sys.modules)\n"
        "for _ in range(3):\n"
        "    plugin.register()\n"
        "loaded = set(sys.modules) - before\n"
        "print([m for m in loaded if m.startswith('vllm.model_executor.models.')])\n"
        "print('llmrl.serving.models' in sys.modules)\n"
        "names = [n for n in ModelRegistry.get_supported_archs() if n.startswith('Llmrl')]\n"
        "print(len(names) == len(set(names)), [n for n in names if n.startswith('LlmrlLlmrl')])\n"
        "print({'LlmrlLlamaForCausalLM', 'LlmrlLlamaForSequenceClassification', 'LlmrlGPT2LMHeadModel'} <= set(names))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=ENVIRONMENT | {plugin.MARKER_VARIABLE: str(tmp_path / "marker")},
        capture_output=True,
        text=True,
        timeout=240,
        cwd=ROOT,
    )
    assert done.stdout.splitlines()[-5:] == ["[]", "[]", "False", "True []", "True"], done.stdout + done.stderr[-2000:]
    assert (tmp_path / "marker").exists()


def change_weights(folder):
    from safetensors.torch import load_file, save_file

    path = folder / "model.safetensors"
    tensors = load_file(path)
    name = next(name for name, tensor in tensors.items() if tensor.ndim == 2)
    tensors[name][0, 0] += 0.01
    save_file(tensors, path, metadata={"format": "pt"})


def switch_config(folder, **change):
    """Edit the description of a switch model."""
    path = folder / "config.json"
    fields = json.loads(path.read_text())
    for key, value in change.items():
        fields["llmrl_switch"][key] |= value
    path.write_text(json.dumps(fields))
    return folder


def test_serve_refuses_switch_models_before_vllm_is_started(tmp_path):
    from switch_folders import switch_folder

    from llmrl.errors import HeadMismatchError, ModelError
    from llmrl.serving.launch import check_folder, has_heads

    folder = switch_folder(tmp_path, "LlamaForCausalLM", {})
    assert has_heads(folder)
    check_folder(folder)
    switch_config(folder, switch={"router_input": "prompt_pooled"})
    with pytest.raises(ModelError, match="'prompt_pooled' needs the whole prompt"):
        check_folder(folder)
    switch_config(folder, switch={"router_input": "embedding"}, base={"weights": "sha256:0"})
    with pytest.raises(HeadMismatchError, match="were trained on another base"):
        check_folder(folder)
    switch_config(folder, base={"model": "/nowhere/at-all"})
    with pytest.raises(ModelError, match=r"the base model of .* is not at /nowhere/at-all"):
        check_folder(folder)
