"""A policy that `llmrl leret train` made, in a real vLLM server: the prompt is the trained one, the queries are transformers'.

One server holds a trained model and, as an adapter, what was trained on top of it.
"""

import json
import subprocess
import sys

import pytest
import search_world
from http_server import Server
from serving_folders import ENVIRONMENT, ROOT

from llmrl.leret.corpus import load_corpus
from llmrl.leret.questions import load_questions
from llmrl.leret.retriever import open_retriever

pytestmark = pytest.mark.vllm

ADAPTER = "search"  # what the server calls it
OPTIONS = (
    "--samples=4", "--temperature=1.0", "--max_tokens=10", "--max_pairs=4", "--few_shot_prompts=0", "--bootstrap_draws=50",
    "--sft_batch_size=2", "--sft_epochs=2", "--sft_lr=3e-3", "--train_batch_size=4", "--lr=1e-3", "--warmup_steps=1", "--quiet",
)  # fmt: skip
ENV = ENVIRONMENT | {"OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return search_world.write_files(tmp_path_factory.mktemp("search"))


def leret(files, action, folder, *options, asked="train.jsonl.gz"):
    """Return the command's words."""
    words = ["--questions", files / asked, "--passages", files / "passages.jsonl.gz", "--output_dir", folder]
    return [str(word) for word in ("leret", action, *words, *OPTIONS, *options)]


@pytest.fixture(scope="module")
def runs(files, tmp_path_factory):
    """Folders of two runs: of a whole model, and of an adapter on what the first ended with."""
    from llmrl.cli import main

    root = tmp_path_factory.mktemp("runs")
    start = search_world.write_model(root / "start")
    common = ("--rollout_backend", "transformers")
    assert main(leret(files, "train", root / "full", "--model", start, "--tuning", "full", *common)) == 0
    full = root / "full" / "policy"
    # weights of an adapter that was trained for a few steps would change no query
    tuned = ("--tuning", "lora", "--lora_r", "8", "--sft_lr", "2e-2", "--lr", "2e-2")
    assert main(leret(files, "train", root / "lora", "--model", full, *tuned, *common)) == 0
    return {"full": root / "full", ADAPTER: root / "lora"}


@pytest.fixture(scope="module")
def vllm_eval(runs, files, tmp_path_factory):
    """`llmrl leret eval` with vLLM in its own process, which starts beside the server."""
    out = tmp_path_factory.mktemp("eval") / "vllm"
    argv = leret(files, "eval", out, *policy(runs), "--rollout_backend", "vllm", "--max_model_len", "512")
    process = subprocess.Popen(
        [sys.executable, "-m", "llmrl.cli", *argv],
        env=ENV,
        cwd=ROOT,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    yield process, out
    if process.poll() is None:
        process.kill()
    process.communicate()


@pytest.fixture(scope="module")
def server(runs, vllm_eval, tmp_path_factory):
    command = [sys.executable, "-m", "llmrl.cli", "serve", str(runs["full"] / "policy"), "--sync"]
    options = ["--enable-lora", "--max-lora-rank=8", "--max-loras=2", "--max-model-len=512", "--served-model-name=full"]
    options += [f"--lora-modules={ADAPTER}={runs[ADAPTER] / 'policy'}"]
    with Server(command, tmp_path_factory.mktemp("server") / "log", ENV, options=options) as started:
        started.wait_until_healthy(timeout=450)
        yield started


def policy(runs):
    return ("--model", runs["full"] / "policy", "--adapter", runs[ADAPTER] / "policy")


def trained_rows(run):
    """Return every different prompt of a run with its ids: of both stages and all hops."""
    lines = [line for name in ("sft", "pairs") for line in (run / "round-0" / f"{name}.jsonl").read_text().splitlines()]
    rows = {json.dumps(row["prompt"]): row for row in map(json.loads, lines)}
    assert {row["hop"] for row in rows.values()} == {1, 2}
    return list(rows.values())


def greedy(run, prompts):
    """Return what transformers answers, token by token without a cache."""
    import torch
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoModelForCausalLM

    folder = run / "policy"
    kind = AutoPeftModelForCausalLM if (folder / "adapter_config.json").exists() else AutoModelForCausalLM
    model = kind.from_pretrained(folder).eval()
    answers = []
    for prompt in prompts:
        ids = list(prompt)
        with torch.inference_mode():
            while len(ids) < len(prompt) + 10 and ids[-1] != model.config.eos_token_id:
                ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        answers.append(ids[len(prompt) :])
    return answers


@pytest.mark.parametrize("name", ["full", ADAPTER])
def test_the_served_prompt_is_the_trained_one_and_the_answer_is_that_of_transformers(name, runs, server):
    rows = trained_rows(runs[name])
    served = []
    for row in rows:
        body = {"model": name, "messages": row["prompt"], "temperature": 0, "max_tokens": 10, "return_token_ids": True}
        answer = server.post("/v1/chat/completions", body)
        assert answer["prompt_token_ids"] == row["prompt_ids"]
        served.append(answer["choices"][0]["token_ids"])
    assert served == greedy(runs[name], [row["prompt_ids"] for row in rows])


def test_the_two_policies_answer_differently(runs):
    """Otherwise a server that ignores the adapter would pass."""
    prompts = [row["prompt_ids"] for row in trained_rows(runs[ADAPTER])]
    full, adapted = greedy(runs["full"], prompts), greedy(runs[ADAPTER], prompts)
    assert sum(a != b for a, b in zip(full, adapted, strict=True)) > len(prompts) / 4


@pytest.fixture(scope="module")
def transformers_eval(runs, files, tmp_path_factory):
    from llmrl.cli import main

    out = tmp_path_factory.mktemp("eval") / "transformers"
    assert main(leret(files, "eval", out, *policy(runs), "--rollout_backend", "transformers")) == 0
    return out


def outcomes(folder):
    """Return every system's queries and context, by question."""
    rows = map(json.loads, (folder / "outcomes.jsonl").read_text().splitlines())
    return {(row["system"], row["question_id"]): (row["queries"], row["context"]) for row in rows}


def test_eval_on_a_server_and_on_vllm_gives_the_report_of_transformers(
    runs, files, server, vllm_eval, transformers_eval, tmp_path
):
    from llmrl.cli import main

    options = ("--rollout_backend", "server", "--server_url", server.url)
    assert main(leret(files, "eval", tmp_path / "server", *policy(runs), *options)) == 0
    process, by_vllm = vllm_eval
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    report = json.loads((transformers_eval / "report.json").read_text())
    assert list(report["systems"]) == ["question", "question-top", "policy", "base"]
    for folder in (tmp_path / "server", by_vllm):
        assert outcomes(folder) == outcomes(transformers_eval)
        assert json.loads((folder / "report.json").read_text()) == report
        # the ids that the engine was prompted with are those that the template gives
        assert engine_prompts(folder) == engine_prompts(transformers_eval)


def engine_prompts(folder):
    """Return the token ids that were sent for every question and hop, as the engine's records have them."""
    from llmrl.rollout.shards import read_shards

    found = {}
    for hop in sorted(folder.glob("answers/*/hop-*")):
        for key, record in read_shards(hop).items():
            turns = record["turns"]
            sent = [token for turn in turns if not turn["policy_version"] for token in turn["token_ids"]]
            found[str(hop.relative_to(folder)), key[0]] = sent
    assert len(found) == 2 * 2 * 10  # systems, hops, questions
    return found


@pytest.mark.parametrize(("name", "system"), [(ADAPTER, "policy"), ("full", "base")])
def test_the_client_searches_as_eval_does(name, system, runs, files, server, transformers_eval):
    from llmrl.leret.client import SearchClient

    corpus = load_corpus(files / "passages.jsonl.gz")
    questions = load_questions(files / "train.jsonl.gz", corpus).questions
    retriever = open_retriever("bm25", corpus)
    wanted = outcomes(transformers_eval)
    with SearchClient(server.url, runs[name] / "policy", model=name) as client:
        assert client.setup.notes["corpus"] == corpus.fingerprint
        for question in questions:
            found = client.search(question.text, retriever)
            queries, context = wanted[system, question.id]
            assert list(found.queries) == queries
            assert [passage.id for passage in found.passages] == context
            assert found.passages == tuple(corpus.by_id[name] for name in context)
            assert client.query(question.text) == queries[0]
