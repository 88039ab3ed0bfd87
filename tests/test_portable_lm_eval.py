"""lm-evaluation-harness, in a process without llmrl, on a merged folder that carries its modelling file."""

import json
import os
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from llmrl.portable import write_modeling_file

ROWS = [
    {"question": "Once upon a", "choices": [" time there was a dog", " big red ball"], "answer": 0},
    {"question": "The little girl was very", "choices": [" happy", " sad", " tree"], "answer": 0},
    {"question": "He ran to the", "choices": [" park", " happy"], "answer": 1},
]
TASK = """
task: local_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{rows}"}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
target_delimiter: ""
metric_list: [{{metric: acc}}]
"""
PROGRAM = """
import json, sys
class Refuse:
    def find_spec(self, name, *rest):
        if name.split(".")[0] in ("llmrl", "llmrl_kernels"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Refuse())
import lm_eval
from lm_eval.tasks import TaskManager
folder, tasks, out = sys.argv[1:]
found = lm_eval.simple_evaluate(
    model="hf", model_args={"pretrained": folder, "trust_remote_code": True, "dtype": "float32"}, device="cpu",
    tasks=["local_choice"], task_manager=TaskManager(include_path=tasks, include_defaults=False), log_samples=True,
)
samples = sorted(found["samples"]["local_choice"], key=lambda sample: sample["doc_id"])
json.dump({"accuracy": found["results"]["local_choice"]["acc,none"],
           "loglikelihoods": [[answer[0] for answer in sample["filtered_resps"]] for sample in samples]}, open(out, "w"))
"""


def loglikelihoods(model, tokenizer):
    """Of each choice, from one forward pass over question and choice."""
    found = []
    for row in ROWS:
        found.append([])
        for choice in row["choices"]:
            prefix = tokenizer(row["question"])["input_ids"]
            ids = tokenizer(row["question"] + choice)["input_ids"]
            assert ids[: len(prefix)] == prefix
            with torch.inference_mode():
                logprobs = model(input_ids=torch.tensor([ids])).logits[0].float().log_softmax(-1)
            found[-1].append(sum(logprobs[i - 1, ids[i]].item() for i in range(len(prefix), len(ids))))
    return found


def test_lm_eval_scores_the_calibrated_model(stories_dir, save_head, tmp_path):
    folder = tmp_path / "calibrated"
    save_head(stories_dir, folder, architecture="transformer", merged=True)
    write_modeling_file(folder)
    (tmp_path / "rows.json").write_text(json.dumps(ROWS))
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "local_choice.yaml").write_text(TASK.format(rows=tmp_path / "rows.json"))
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(folder), str(tmp_path / "tasks"), str(tmp_path / "out.json")],
        env={**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"},
        cwd=tmp_path, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "out.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(folder)
    wanted = loglikelihoods(AutoModelForCausalLM.from_pretrained(folder).eval(), tokenizer)
    plain = loglikelihoods(AutoModelForCausalLM.from_pretrained(stories_dir).eval(), tokenizer)
    for ours, theirs, base in zip(found["loglikelihoods"], wanted, plain, strict=True):
        assert ours == pytest.approx(theirs, abs=1e-3)
        assert max(abs(a - b) for a, b in zip(ours, base, strict=True)) > 0.3
    right = [max(range(len(row)), key=row.__getitem__) == r["answer"] for row, r in zip(wanted, ROWS, strict=True)]
    assert found["accuracy"] == pytest.approx(sum(right) / len(right))
