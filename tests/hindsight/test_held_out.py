"""What a policy says of dialogues that it was not trained on, against sums that are made by hand."""

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from llmrl.hindsight.encode import encode_dialogue
from llmrl.hindsight.envs import charity
from llmrl.hindsight.held_out import against_returns
from llmrl.hindsight.policy import load_policy


@pytest.fixture(scope="module")
def policies(tmp_path_factory):
    from llmrl.cli import main

    folder = tmp_path_factory.mktemp("held_out")
    logs = ["--count", "300", "--model_dir", folder / "small", "--width", "32", "--quiet"]
    assert main(["hindsight", "logs", "--env", "charity", "--output", str(folder / "logs.jsonl"), *map(str, logs)]) == 0
    for name, options in (("ilql", []), ("two", ["--trunk", "separate"]), ("bc", ["--method", "bc"])):
        train = ["--data", folder / "logs.jsonl", "--model", folder / "small", "--output_dir", folder / name, "--quiet"]
        assert main(["hindsight", "train", *map(str, train), "--max_steps", "6", "--batch_size", "8", *options]) == 0
    return folder


def rows_of(policies):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(policies / "bc")
    return [encode_dialogue(tokenizer, dialogue) for dialogue in charity.logs(12, 5)]


@pytest.mark.parametrize("name", ["ilql", "two"])
def test_values_are_read_where_turns_begin_and_end(policies, name):
    rows, model = rows_of(policies), load_policy(policies / name, beta=0.0, support=0.0)
    found = against_returns(model, rows)
    trunk = getattr(model, "values", model)
    head = next(iter(model.llmrl_heads.values()))
    q, v, to_go, first = [], [], [], []
    with torch.no_grad():
        for row in rows:
            ids = torch.tensor([row.input_ids])
            states = trunk(ids, output_hidden_states=True).hidden_states[-1][0]
            rewards = [span.reward for span in row.spans]
            for k, span in enumerate(row.spans):
                q.append(float(head.q(states[span.stop - 2]).amin(0)[row.input_ids[span.stop - 1]]))
                v.append(float(head.v(states[span.start - 1])))
                to_go.append(sum(rewards[k:]))
                first.append(k == 0)
    assert found["turns"] == len(q)
    for key, values in (("q", q), ("v", v)):
        assert found[key]["spearman"]["value"] == pytest.approx(
            spearmanr(np.round(values, 5), to_go).statistic, abs=0.05
        )  # near ties
        assert found[key]["mean"] == pytest.approx(np.mean(values), abs=1e-6)
        assert found[key]["error"] == pytest.approx(np.sqrt(np.mean(np.square(np.subtract(values, to_go)))), abs=1e-6)
        assert found[key]["to_go"]["sd"] == pytest.approx(np.std(to_go))
    at_first = [value for value, is_first in zip(v, first, strict=True) if is_first]
    assert found["first_v"]["mean"] == pytest.approx(np.mean(at_first), abs=1e-6)


def test_the_likelihood_is_that_of_the_agents_tokens(policies):
    rows, model = rows_of(policies), load_policy(policies / "bc")
    found = against_returns(model, rows)
    total, count = 0.0, 0
    with torch.no_grad():
        for row in rows:
            logprobs = model(torch.tensor([row.input_ids])).logits[0].log_softmax(-1)
            for span in row.spans:
                for at in range(span.start, span.stop):
                    total, count = total - float(logprobs[at - 1, row.input_ids[at]]), count + 1
    assert found == {"dialogues": 12, "tokens": count, "nll": pytest.approx(total / count, rel=1e-5)}
