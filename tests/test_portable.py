"""A merged folder with its modelling file, opened by a process in which llmrl cannot be imported."""

import ast
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from llmrl.errors import ModelError
from llmrl.heads import BaseReference, HeadsConfig, HeadSpec
from llmrl.portable import modeling_source, write_modeling_file

IDS = torch.randint(3, 500, (2, 14), generator=torch.Generator().manual_seed(1))
WITHOUT_LLMRL = """
import json, sys
class Refuse:
    def find_spec(self, name, *rest):
        if name.split(".")[0] in ("llmrl", "llmrl_kernels"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Refuse())
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
ids = torch.randint(3, 500, (2, 14), generator=torch.Generator().manual_seed(1))
out, *folders = sys.argv[1:]
found = {}
for i, folder in enumerate(folders):
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    with torch.inference_mode():
        found[f"logits.{i}"] = model(input_ids=ids).logits
        settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
        found[f"ids.{i}"] = model.generate(ids, attention_mask=torch.ones_like(ids), **settings)
assert not any(name.split(".")[0] == "llmrl" for name in sys.modules)
save_file(found, out)
"""


def merged(base, folder, save_head, architecture):
    save_head(base, folder, architecture=architecture, merged=True)
    write_modeling_file(folder)
    return folder


def test_folder_opens_without_llmrl_and_gives_the_same_numbers(tiny_model, save_head, tmp_path):
    folders = [
        merged(tiny_model(name), tmp_path / f"{name}-{architecture}", save_head, architecture)
        for name, architecture in (("llama", "linear"), ("gemma2", "transformer"), ("gpt2", "mlp"))
    ]
    out = tmp_path / "out.safetensors"
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")}
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_LLMRL, str(out), *map(str, folders)],
        env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=180,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found = load_file(out)
    for i, folder in enumerate(folders):
        model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False).eval()
        assert type(model).__name__.startswith("Llmrl")  # here llmrl's own class, not the file
        with torch.inference_mode():
            torch.testing.assert_close(found[f"logits.{i}"], model(input_ids=IDS).logits, rtol=1e-5, atol=1e-6)
            settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
            assert found[f"ids.{i}"].equal(model.generate(IDS, attention_mask=torch.ones_like(IDS), **settings))


def test_without_the_file_and_without_llmrl_the_folder_is_refused(tiny_model, save_head, tmp_path):
    save_head(tiny_model("llama"), tmp_path / "plain", merged=True)
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_LLMRL, str(tmp_path / "out"), str(tmp_path / "plain")],
        env=dict(os.environ), cwd=tmp_path, capture_output=True, text=True, timeout=180,
    )  # fmt: skip
    assert done.returncode != 0
    assert "llmrl" in done.stderr.splitlines()[-1] or "llmrl" in done.stderr


def test_modelling_file_imports_torch_safetensors_and_transformers_only():
    config = HeadsConfig(
        {"temperature": HeadSpec("temperature", "linear", 8)},
        BaseReference("b", "w", "t", "c"),
        "llama",
        "LlamaForCausalLM",
    )
    tree = ast.parse(modeling_source(config))
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            found.add(node.module.split(".")[0])
    standard = {"__future__", "collections", "functools", "inspect", "math", "types", "typing"}
    assert found - standard == {"torch", "transformers", "safetensors"}


def test_modelling_file_names_nothing_that_it_does_not_have():
    config = HeadsConfig(
        {"temperature": HeadSpec("temperature", "linear", 8)},
        BaseReference("b", "w", "t", "c"),
        "llama",
        "LlamaForCausalLM",
    )
    checked = subprocess.run(
        [sys.executable, "-m", "ruff", "check", "--isolated", "--select", "F821,E9", "-"],
        input=modeling_source(config), capture_output=True, text=True,
    )  # fmt: skip
    assert checked.returncode == 0, checked.stdout


def test_folder_without_weights_is_refused(tiny_model, save_head, tmp_path):
    save_head(tiny_model("llama"), tmp_path)
    with pytest.raises(ModelError, match="--merge"):
        write_modeling_file(tmp_path)


def test_reward_head_is_refused():
    config = HeadsConfig(
        {"reward": HeadSpec("reward", "linear", 8, 3)}, BaseReference("b", "w", "t", "c"), "llama", "LlamaForCausalLM"
    )
    with pytest.raises(ModelError, match="reward head"):
        modeling_source(config)


def test_config_names_the_file(tiny_model, save_head, tmp_path):
    folder = merged(tiny_model("llama"), tmp_path / "a", save_head, "linear")
    fields = json.loads((folder / "config.json").read_text())
    for name in fields["auto_map"].values():
        module, _, symbol = name.partition(".")
        assert f"class {symbol}(" in Path(folder, f"{module}.py").read_text()
    moved = shutil.copytree(folder, tmp_path / "moved")
    shutil.rmtree(folder)
    assert AutoModelForCausalLM.from_pretrained(moved)  # nothing in it points to where it was made
