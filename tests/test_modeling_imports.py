"""Programs that import llmrl and transformers in either order, or llmrl not at all."""

import json
import os
import pickle
import subprocess
import sys

import pytest
import torch
from modeling_support import load, logits_of, multiplier
from safetensors.torch import load_file

FRESH = """
import sys, json, pickle
order, out, head, merged, sharded, pickled = sys.argv[1:]
if order == "llmrl first":
    import llmrl
    import importlib.util
    assert "torch" not in sys.modules and "transformers" not in sys.modules
    importlib.util.find_spec("transformers.models.auto.configuration_auto")  # looking is not importing
    from transformers import AutoConfig
    assert type(AutoConfig.from_pretrained(head)).__name__ == "LlmrlLlamaConfig"
from transformers import AutoModelForCausalLM
if order == "transformers first":
    AutoModelForCausalLM
    import llmrl
if order == "never":
    try:
        AutoModelForCausalLM.from_pretrained(head)
    except ValueError as error:
        message = str(error)
    config = pickle.load(open(pickled, "rb"))
    from llmrl.modeling import read_heads_config
    json.dump({"message": message, "config": config.to_dict(), "class": type(config).__name__}, open(out, "w"))
else:
    import torch
    from safetensors.torch import save_file
    ids = torch.randint(3, 500, (2, 14), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        save_file({f: AutoModelForCausalLM.from_pretrained(f).eval()(ids).logits for f in (head, merged, sharded)}, out)
"""


@pytest.fixture(scope="module", autouse=True)
def fresh_processes(head_folders, tmp_path_factory):
    """Programs that import the two libraries in each order, or llmrl not at all; started first, waited for last."""
    root = tmp_path_factory.mktemp("fresh")
    pickled = root / "config.pickle"
    pickled.write_bytes(pickle.dumps(load(head_folders["merged"]).config))
    started = {}
    for order in ("llmrl first", "transformers first", "never"):
        out = root / f"{order.split()[0]}.out"
        arguments = [order, out, head_folders["head"], head_folders["merged"], head_folders["sharded"], pickled]
        process = subprocess.Popen(
            [sys.executable, "-c", FRESH, *map(str, arguments)],
            env=dict(os.environ),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        started[order] = (process, out)
    yield started
    for process, _ in started.values():
        process.kill()
        process.wait()


def finish(started):
    process, out = started
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    return out


@pytest.mark.parametrize("order", ["llmrl first", "transformers first"])
def test_import_llmrl_in_either_order_teaches_the_auto_classes(order, fresh_processes, llama, head_folders):
    found = load_file(finish(fresh_processes[order]))
    base = load(llama)
    expected = logits_of(base).double() * multiplier(base, head_folders["heads"]["temperature"])
    for kind in ("head", "merged", "sharded"):
        torch.testing.assert_close(found[str(head_folders[kind])].double(), expected, rtol=1e-4, atol=1e-5)


def test_transformers_without_llmrl_refuses_and_a_pickled_config_brings_llmrl(fresh_processes, head_folders):
    found = json.loads(finish(fresh_processes["never"]).read_text())
    assert "model type `llmrl`" in found["message"]
    assert found["class"] == "LlmrlLlamaConfig"
    assert found["config"]["llmrl"] == load(head_folders["merged"]).config.llmrl
