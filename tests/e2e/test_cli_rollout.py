"""`llmrl rollout`: what it writes, which rows fail alone, and what is refused before a model is loaded."""

import gzip
import json
from concurrent.futures import Future

import pytest
import torch

KEYS = {"token_ids", "logprobs", "text", "finish_reason", "policy_version", "stop_reason"}
TWO = [{"prompt": "Once upon a time", "id": "first"}, {"prompt": "The little dog"}]


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def samples(path):
    return [row["samples"] for row in read(path)]


@pytest.fixture
def two(tmp_path, jsonl):
    return jsonl(tmp_path / "two.jsonl", TWO)


@pytest.fixture(scope="module")
def greedy(stories_dir):
    """transformers' own greedy continuation and its logprobs, end token included."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(stories_dir)
    model = AutoModelForCausalLM.from_pretrained(stories_dir).eval()

    def run(text, length):
        ids = tokenizer(text)["input_ids"]
        start = len(ids)
        while len(ids) < start + length and (len(ids) == start or ids[-1] not in (1, 2)):
            with torch.no_grad():
                ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        with torch.no_grad():
            logprobs = model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
        return ids[:start], ids[start:], [logprobs[t - 1, ids[t]].item() for t in range(start, len(ids))], tokenizer

    return run


def test_rollout_greedy_rows_are_those_of_the_model(rollout, greedy, two, tmp_path):
    ended = rollout(two, tmp_path / "out.jsonl", "--temperature", "0", "--max_tokens", "400")
    assert ended.code == 0, ended.err
    rows = read(tmp_path / "out.jsonl")
    assert [row["id"] for row in rows] == ["first", "1"]
    for row, asked in zip(rows, TWO, strict=True):
        prompt, ids, logprobs, tokenizer = greedy(asked["prompt"], 400)
        (sample,) = row["samples"]
        assert set(sample) == KEYS
        assert (row["prompt_token_ids"], sample["token_ids"]) == (prompt, ids)
        assert ids[-1] in (1, 2)  # the end token is part of the answer
        assert sample["finish_reason"] == "stop"
        assert sample["logprobs"] == pytest.approx(logprobs, abs=1e-4)
        assert sample["text"] == tokenizer.decode(ids, skip_special_tokens=True)
        assert sample["policy_version"]["number"] == 0
    assert "tokens/s" in ended.err  # the bar
    last = ended.out.splitlines()
    assert last[-1] == f"wrote {tmp_path / 'out.jsonl'}"
    total = sum(len(sample["token_ids"]) for row in rows for sample in row["samples"])
    assert last[-2].startswith(f"2 rows: 2 samples, {total} tokens in ")
    assert last[-2].endswith("tokens/s (stop 2)")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.jsonl", "two.jsonl"]


def test_rollout_quiet_says_nothing_and_samples_do_not_depend_on_n(rollout, two, tmp_path):
    ended = rollout(two, tmp_path / "3.jsonl", "--n", "3", "--quiet")
    assert (ended.code, ended.out, ended.err) == (0, "", "")
    assert rollout(two, tmp_path / "1.jsonl", "--quiet").code == 0
    assert rollout(two, tmp_path / "again.jsonl", "--n", "3").code == 0
    assert rollout(two, tmp_path / "other.jsonl", "--n", "3", "--seed", "1").code == 0
    three = samples(tmp_path / "3.jsonl")
    assert [row[:1] for row in three] == samples(tmp_path / "1.jsonl")
    assert all(len({tuple(one["token_ids"]) for one in row}) == 3 for row in three)
    assert three == samples(tmp_path / "again.jsonl") != samples(tmp_path / "other.jsonl")


def test_rollout_order_and_bytes_do_not_depend_on_the_order_of_completion(rollout, jsonl, tmp_path, monkeypatch):
    from llmrl.rollout import run

    prompts = jsonl(tmp_path / "p.jsonl", [{"prompt": f"Number {i}", "id": str(9 - i)} for i in range(10)])
    assert rollout(prompts, tmp_path / "a.jsonl").code == 0
    real = run.open_engine
    held = []

    def last_first(*args, **options):
        engine = real(*args, **options)
        start = engine._start

        def hold(request):
            future = Future()
            held.append((request, future))
            if len(held) == 10:
                for one, answer in reversed(held):
                    answer.set_result(start(one).result())
            return future

        engine._start = hold
        return engine

    monkeypatch.setattr(run, "open_engine", last_first)
    assert rollout(prompts, tmp_path / "b.jsonl").code == 0
    assert len(held) == 10
    assert [row["id"] for row in read(tmp_path / "b.jsonl")] == [str(9 - i) for i in range(10)]
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "b.jsonl").read_bytes()


def test_rollout_stop_texts_may_be_commas_and_line_ends(rollout, two, tmp_path):
    base = ("--temperature", "0", "--max_tokens", "60", "--quiet")
    assert rollout(two, tmp_path / "free.jsonl", *base).code == 0
    assert rollout(two, tmp_path / "cut.jsonl", *base, "--stop", ",", "--stop", "\n", ".").code == 0
    (tmp_path / "c.yaml").write_text('stop: [",", "\\n", "."]\n')
    assert rollout(two, tmp_path / "file.jsonl", *base, "--config", tmp_path / "c.yaml").code == 0
    for free, cut in zip(samples(tmp_path / "free.jsonl"), samples(tmp_path / "cut.jsonl"), strict=True):
        whole = free[0]["text"]
        at = min(whole.find(stop) for stop in (",", "\n", ".") if stop in whole)
        assert cut[0]["text"] == whole[:at]
        assert cut[0]["stop_reason"] == whole[at]
    assert samples(tmp_path / "cut.jsonl") == samples(tmp_path / "file.jsonl")


BAD_ROWS = [
    ({"prompt": ""}, "the prompt is empty"),
    ({"prompt": "word " * 600}, "the context holds 512"),
    (
        {"prompt": "<|im_start|>user\nhi"},
        "holds <|im_start|>, a control token that this model's tokenizer does not know",
    ),
    ({"prompt": "<start_of_turn>user\nhi"}, "holds <start_of_turn>"),
    ({"prompt": "<｜User｜>hi"}, "holds <｜User｜>"),
    ({"prompt": "[INST] hi [/INST]"}, "holds [INST]"),
    ({"messages": [{"role": "user", "content": "say <|eot_id|>"}]}, "holds <|eot_id|>"),
    ({"text": "hi"}, "expected 'prompt' or 'messages', got the keys text"),
    ({"prompt": "a", "messages": [{"role": "user", "content": "b"}]}, "expected 'prompt' or 'messages', got both"),
    ({"prompt": 5}, "prompt: expected text, got int"),
    ({"prompt": ["a"]}, "prompt: expected text, got list"),
    ({"messages": "hi"}, "messages: expected a list of messages, got 'hi'"),
    ({"messages": []}, "messages: expected a list of messages"),
    ({"messages": ["hi"]}, "expected a JSON object, got str"),
    ({"messages": [{"role": "robot", "content": "b"}]}, "Message.role: expected one of"),
    ({"messages": [{"role": "user", "content": None}]}, "Message.content: expected text"),
    ({"messages": [{"role": "user", "content": "b", "colour": 1}]}, "unknown key 'colour'"),
    ({"messages": [{"role": "system", "content": "b"}]}, "System role not supported"),
]


def test_rollout_bad_rows_fail_alone_and_only_they_are_tried_again(rollout, chat_model, jsonl, tmp_path):
    rows = [{"id": "good", "prompt": "Once upon a time"}]
    rows += [{"id": f"bad{i}", **row} for i, (row, _) in enumerate(BAD_ROWS)]
    rows += [
        {"id": "surrogate", "prompt": "a \ud800 b"},
        {"id": "chat", "messages": [{"role": "user", "content": "Hi"}]},
    ]
    prompts, out = jsonl(tmp_path / "p.jsonl", rows), tmp_path / "out.jsonl"
    ended = rollout(prompts, out, model=chat_model)
    assert ended.code == 3
    failed = len(BAD_ROWS) + 1
    assert f"{failed} of {len(rows)} rows failed, each with its 'error' in {out}" in ended.refusal()
    found = {row["id"]: row for row in read(out)}
    assert list(found) == [row["id"] for row in rows]
    for i, (_, words) in enumerate(BAD_ROWS):
        row = found[f"bad{i}"]
        assert row["error"].startswith(f"row bad{i}: ")
        assert words in row["error"], row["error"]
        assert row["samples"] == []
    assert found["surrogate"]["error"].startswith("row surrogate: ")
    assert "error" not in found["good"]
    assert len(found["chat"]["samples"][0]["token_ids"]) == 8
    before = out.read_bytes()
    again = rollout(prompts, out, model=chat_model)
    assert again.code == 3
    assert f"2 of {len(rows)} rows were done before" in again.out
    assert f"{failed} rows, {failed} of them failed and 2 done before: 0 samples" in again.out
    assert out.read_bytes() == before


def test_rollout_messages_of_a_model_without_a_template(rollout, jsonl, tmp_path):
    rows = [{"messages": [{"role": "user", "content": "Hi"}]}, {"prompt": "Hi"}]
    ended = rollout(jsonl(tmp_path / "p.jsonl", rows), tmp_path / "out.jsonl")
    assert ended.code == 3
    one, other = read(tmp_path / "out.jsonl")
    assert one["error"] == "row 0: messages need a chat template, and this model has none; write the row as 'prompt'"
    assert "error" not in other


def test_rollout_prompt_takes_the_control_tokens_of_its_own_template(tmp_path, chat_model):
    from transformers import AutoTokenizer

    from llmrl.errors import RequestError
    from llmrl.rollout.prompts import encode_row

    tokenizer = AutoTokenizer.from_pretrained(chat_model)
    row = {"prompt": "[INST] hi [/INST]"}
    with pytest.raises(RequestError, match="INST"):
        encode_row(row, tokenizer)
    tokenizer.chat_template = (
        "[INST] {{ messages[0]['content'] }} [/INST]"  # as Llama 2's, which spells them in letters
    )
    assert encode_row(row, tokenizer) == tuple(tokenizer(row["prompt"])["input_ids"])


FILES = {
    "broken.jsonl": (b'{"prompt": "a"}\n{"prompt": \n', 1, "broken.jsonl:2: not JSON"),
    "list.jsonl": (b'["a"]\n', 1, "list.jsonl:1: expected an object"),
    "twice.jsonl": (
        b'{"prompt":"a","id":"x"}\n\n{"prompt":"b","id":"x"}\n',
        1,
        "twice.jsonl:3: the id 'x' is that of line 1",
    ),
    "number.jsonl": (
        b'{"prompt":"a","id":7}\n',
        1,
        "number.jsonl:1: expected an id that is text, got 7; write it in quotes",
    ),
    "no-id.jsonl": (b'{"prompt":"a","id":""}\n', 1, "no-id.jsonl:1: expected an id that is text"),
    "latin.jsonl": (b'{"prompt":"a"}\n{"prompt":"\xe9t\xe9"}\n', 1, "latin.jsonl:2: not UTF-8"),
    "empty.jsonl": (b"\n \n", 1, "empty.jsonl has no rows"),
    "cut.jsonl.gz": (gzip.compress(b'{"prompt":"a"}\n' * 9)[:-9], 1, "cannot read"),
    "plain.jsonl.gz": (b'{"prompt":"a"}\n', 1, "cannot read"),
    "flipped.jsonl.gz": (b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\xff" + b"\xff" * 30, 1, "cannot read"),
}


@pytest.fixture
def no_model(monkeypatch):
    """Fail when an engine is opened or a run's folder is made: what is wrong could be known before."""
    from llmrl.rollout import run

    def fail(*args, **options):
        raise AssertionError("too late")

    monkeypatch.setattr(run, "open_engine", fail)
    monkeypatch.setattr(run, "claim_run", fail)


@pytest.mark.parametrize("name", FILES)
def test_rollout_refuses_a_file_that_is_not_jsonl(name, rollout, no_model, tmp_path):
    content, code, words = FILES[name]
    (tmp_path / name).write_bytes(content)
    ended = rollout(tmp_path / name, tmp_path / "out.jsonl")
    assert ended.code == code
    assert words in ended.refusal()
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_rollout_reads_bom_crlf_gz_and_null_ids(rollout, tmp_path):
    plain = b'{"prompt":"Once","id":null}\n{"prompt":"Twice","messages":null}\n'
    (tmp_path / "p.jsonl").write_bytes(plain)
    (tmp_path / "q.jsonl").write_bytes(b"\xef\xbb\xbf" + plain.replace(b"\n", b"\r\n"))
    (tmp_path / "r.jsonl.gz").write_bytes(gzip.compress(plain.rstrip()))
    for name in ("p.jsonl", "q.jsonl", "r.jsonl.gz"):
        assert rollout(tmp_path / name, tmp_path / f"{name}.out").code == 0
    assert [row["id"] for row in read(tmp_path / "p.jsonl.out")] == ["0", "1"]
    for name in ("q.jsonl", "r.jsonl.gz"):
        assert (tmp_path / f"{name}.out").read_bytes() == (tmp_path / "p.jsonl.out").read_bytes()


OPTIONS = [
    (("--n", "0"), "--n must be at least 1, got 0"),
    (("--n", "-1"), "--n must be at least 1, got -1"),
    (("--max_tokens", "0"), "--max_tokens: expected an integer >= 1, got 0"),
    (("--temperature", "nan"), "--temperature: expected a finite number, got nan"),
    (("--temperature", "-1"), "--temperature: expected"),
    (("--top_p", "0"), "--top_p: expected a number in (0, 1]"),
    (("--top_k", "-1"), "--top_k: expected an integer >= 0"),
    (("--min_p", "inf"), "--min_p: expected a finite number"),
    (("--stop", ""), "--stop: expected a list of texts"),
    (("--batch_size", "0"), "--batch_size must be at least 1"),
    (("--max_model_len", "1"), "--max_model_len must be at least 2"),
    (("--seed", "-1"), "--seed must not be negative"),
    (("--seed", "x"), "--seed must be a whole number"),
    (("--dtype", "float8"), "--dtype float8: not a choice"),
    (("--temprature", "1"), "unknown option --temprature; did you mean --temperature?"),
    (("--server_url", "http://127.0.0.1:1"), "--server_url goes with --rollout_backend server"),
    (
        ("--server_url", "http://127.0.0.1:1", "--rollout_backend", "server", "--dtype", "float16"),
        "--dtype float16 with --server_url: a server has its own dtype; leave --dtype out",
    ),
    (("--adapter", "/nowhere/adapter"), "not found: /nowhere/adapter"),
    (("--json_schema", "/nowhere/s.json"), "not found: /nowhere/s.json (--json_schema)"),
    (("--model", "/nowhere/model"), "not found: /nowhere/model"),
    (("--prompts", "/nowhere/p.jsonl"), "not found: /nowhere/p.jsonl (--prompts)"),
    (("--output", "/nowhere/out.jsonl"), "not found: /nowhere (the folder of --output)"),
]


@pytest.mark.parametrize(("options", "words"), OPTIONS, ids=lambda value: value if isinstance(value, str) else None)
def test_rollout_refuses_options(options, words, rollout, no_model, two, tmp_path):
    ended = rollout(two, tmp_path / "out.jsonl", *options)
    assert ended.code == 2
    assert words in ended.refusal()
    assert [path.name for path in tmp_path.iterdir()] == ["two.jsonl"]


def test_rollout_refuses_a_config_file_with_an_unknown_key(rollout, llmrl, no_model, two, tmp_path):
    for text, words in (
        ("max_token: 5\n", "did you mean 'max_tokens'?"),
        ("stop: [1]\n", "'stop' must be a text or a list"),
    ):
        (tmp_path / "c.yaml").write_text(text)
        ended = rollout(two, tmp_path / "out.jsonl", "--config", tmp_path / "c.yaml")
        assert ended.code == 2
        assert words in ended.refusal()
    ended = llmrl("rollout", "--prompts", two, "--output", tmp_path / "out.jsonl")
    assert ended.code == 2
    assert ended.refusal() == "llmrl: missing --model: a folder, or a hub name"


def test_rollout_refuses_outputs_it_would_destroy(rollout, no_model, two, tmp_path):
    out = tmp_path / "out.jsonl"
    out.write_text("precious")
    cases = (
        ((two, out), 1, f"--output {out} exists; --overwrite replaces it"),
        ((two, tmp_path, "--overwrite"), 1, "is a folder; name a file"),
        ((two, "/dev/null", "--overwrite"), 1, "is no regular file"),
        ((two, two, "--overwrite"), 2, "is the file of --prompts"),
        ((tmp_path, out, "--overwrite"), 2, "is no file: --prompts wants a JSONL file"),
        ((two, out, "--overwrite", "--model", "/nowhere/model"), 2, "not found: /nowhere/model"),
    )
    for arguments, code, words in cases:
        ended = rollout(*arguments)
        assert ended.code == code
        assert words in ended.refusal()
    assert out.read_text() == "precious"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.jsonl", "two.jsonl"]


def test_rollout_overwrite_keeps_the_old_file_until_the_new_one_is_whole(rollout, two, tmp_path, monkeypatch):
    from llmrl.rollout import run

    out = tmp_path / "out.jsonl"
    out.write_text("precious")
    with monkeypatch.context() as patch:
        patch.setattr(run, "export_records", lambda *paths: (_ for _ in ()).throw(KeyboardInterrupt))
        ended = rollout(two, out, "--overwrite")
    assert ended.code == 130
    assert "2 of 2 rows are finished and kept; the same command without --overwrite goes on" in ended.refusal()
    assert out.read_text() == "precious"
    assert rollout(two, out).code == 0
    assert [row["id"] for row in read(out)] == ["first", "1"]


def test_rollout_json_schema_needs_another_backend(rollout, no_model, two, tmp_path):
    (tmp_path / "s.json").write_text('{"type": "object"}')
    ended = rollout(two, tmp_path / "out.jsonl", "--json_schema", tmp_path / "s.json")
    assert ended.code == 2
    assert "--json_schema goes with --rollout_backend vllm or server" in ended.refusal()
    (tmp_path / "s.json").write_text("{")
    assert "s.json is not JSON" in rollout(two, tmp_path / "out.jsonl", "--json_schema", tmp_path / "s.json").refusal()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"r": 4, "modules_to_save": ["lm_head"]}, "modules_to_save=lm_head"),
        ({"r": 600}, "has rank 600, vLLM serves at most 512"),
    ],
)
def test_rollout_refuses_an_adapter_vllm_does_not_serve(options, words, rollout, no_model, two, tmp_path, stories_dir):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(stories_dir)
    get_peft_model(model, LoraConfig(target_modules=["q_proj"], **options)).save_pretrained(tmp_path / "adapter")
    ended = rollout(two, tmp_path / "out.jsonl", "--adapter", tmp_path / "adapter", backend="auto")
    assert ended.code == 1
    assert words in ended.refusal()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "two.jsonl"]
