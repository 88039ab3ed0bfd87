"""recipes/tiny_lm.py: its data, a run that is killed and goes on, and the model it made, examples/tiny_lm."""

import collections
import gzip
import importlib
import itertools
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
RECIPES = ROOT / "recipes"
TINY = {
    **{"threads": 1, "max_steps": 40, "log_steps": 4, "eval_steps": 20, "save_steps": 6, "warmup_steps": 4},
    **{"batch_tokens": 128, "pack_length": 32, "max_length": 64, "vocab_size": 400, "synthetic_rows": 400},
    **{"hidden_size": 32, "num_layers": 2, "num_heads": 2, "num_kv_heads": 1, "head_dim": 16, "intermediate_size": 48},
}


@pytest.fixture(scope="module")
def modules():
    """The recipe's modules by name; a script finds those beside it without being told where they are."""
    names = ("tiny_lm", "tiny_lm_data", "tiny_lm_tokens", "tiny_lm_publish")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(RECIPES))
        yield {name: importlib.import_module(name) for name in names}
    for name in names:
        sys.modules.pop(name)


@pytest.fixture(scope="module")
def data(modules):
    return modules["tiny_lm_data"]


@pytest.fixture(scope="module")
def tokens(modules):
    return modules["tiny_lm_tokens"]


def write(folder, name, content):
    folder.mkdir(parents=True, exist_ok=True)
    text = content if isinstance(content, str) else "".join(json.dumps(row) + "\n" for row in content)
    (folder / name).write_bytes(gzip.compress(text.encode()))


def passage(number, title):
    return {"id": f"hp{number}", "title": title, "text": f"{title} is a village. It has {number} houses."}


def agent(high, medium, low):
    wants = {"High": high, "Medium": medium, "Low": low}
    return {"value2issue": wants, "value2reason": {k: f"I like {v.lower()}." for k, v in wants.items()}}


@pytest.fixture
def data_dir(tmp_path):
    """Every set, in a few made-up rows, with the files that must not be read beside them."""
    folder = tmp_path / "data"
    titles = ["Aldham &amp; Elm", "Bures"]
    question = {"question": "Which has more houses?", "answer": "Bures", "gold_ids": ["hp0", "hp1"]}
    for name in ("hotpotqa", "twowiki", "musique"):
        write(folder / name, "passages.jsonl.gz", [passage(i, title) for i, title in enumerate(titles)])
        write(folder / name, "questions_dev.jsonl.gz", [{**question, "id": "d", "answer": "FORBIDDEN"}])
    for name in ("hotpotqa", "twowiki"):
        write(folder / name, "questions_train.jsonl.gz", [{**question, "id": "t"}])
    for name in ("tinyshakespeare", "wizard_of_oz", "wiki_demo"):
        write(folder / "text", f"{name}.txt.gz", "".join(f"{name} line {i}\n" for i in range(900)))
    write(folder / "text", "c4_demo.jsonl.gz", [{"text": "A page.\nMore of it."}])
    turns = [("persuader", "Hi."), ("persuader", "Do you give?"), ("persuadee", "No."), ("persuader", "Bye.")]
    row = {"id": "p0", "turns": [{"role": role, "text": text} for role, text in turns]}
    write(folder / "persuasionforgood", "dialogues.jsonl.gz", [row])
    deal = {"issue2youget": {"Food": "1", "Water": "2", "Firewood": "3"},
            "issue2theyget": {"Food": "2", "Water": "1", "Firewood": "0"}}  # fmt: skip
    row = {
        "id": "c0",
        "participants": {"a": agent("Food", "Water", "Firewood"), "b": agent("Water", "Food", "Firewood")},
        "turns": [
            {"role": "a", "text": "Hello"},
            {"role": "b", "text": "Submit-Deal", "task_data": deal},
            {"role": "a", "text": "Accept-Deal", "task_data": {"data": "accept_deal"}},
        ],
    }
    write(folder / "casino", "train.jsonl.gz", [row])
    write(folder / "casino", "test.jsonl.gz", [{**row, "id": "FORBIDDEN"}])
    row = {"id": "b0", "seller_price": 20, "buyer_price": 15, "turns": [{"role": "seller", "text": "A hat?"}]}
    row |= {"seller_item_description": "A red hat, new", "buyer_item_description": "A red hat"}
    write(folder / "craigslistbargain", "dialogues.jsonl.gz", [row])
    games = [{"id": f"g{i}", "word": "rome,italy", "turns": ["Is it big? Yes.", "no mark"]} for i in range(8)]
    write(folder / "guess_my_city", "dialogues.jsonl.gz", games)
    write(folder / "gsm8k", "train.jsonl.gz", [{"question": "1 + 2?", "solution": "<<1+2=3>>It is 3.\n#### 3"}])
    write(folder / "gsm8k", "test.jsonl.gz", [{"question": "FORBIDDEN", "solution": "4"}])
    write(folder / "triviaqa", "questions.jsonl.gz", [{"id": "q0", "question": "Who?", "answers": ["Me", "I"]}])
    write(folder / "esconv", "dialogues.jsonl.gz", [{"id": "FORBIDDEN"}])
    return folder


def read(data, folder, rows=0):
    return data.read_documents(folder, seed=0, synthetic_rows=rows)


def test_read_documents_takes_every_listed_set_and_nothing_else(data, data_dir):
    documents = read(data, data_dir, 20)
    # equal text counts once: the passages of the other two pools are those of the first
    assert {d.source for d in documents} == {s.name for s in data.SETS} - {"twowiki", "musique"} | {"synthetic"}
    assert "FORBIDDEN" not in repr(documents)
    assert not {"esconv", "dealornodeal", "alpacaeval_prefs", "instruct"} & {s.folder for s in data.SETS}
    assert not [s.license for s in data.SETS if re.search(r"\bNC\b", s.license) or not s.license]


def test_read_documents_gives_roles_in_turn(data, data_dir):
    chats = [d for d in read(data, data_dir, 200) if not isinstance(d.content, str)]
    assert {m["role"] for d in chats for m in d.content} == {"system", "user", "assistant", "tool"}
    for chat in chats:
        roles = [m["role"] for m in chat.content]
        assert "assistant" in roles
        assert all(a != b for a, b in itertools.pairwise(roles)), chat
        assert all(m["content"] == m["content"].strip() != "" for m in chat.content)


def test_dialogues_stand_there_once_for_each_speaker(data, data_dir):
    by_source = collections.defaultdict(list)
    for document in read(data, data_dir):
        by_source[document.source].append(document)
    persuader, persuadee = (d.content for d in by_source["persuasionforgood"])
    assert [(m["role"], m["content"]) for m in persuader[1:]] == [
        ("assistant", "Hi.\nDo you give?"), ("user", "No."), ("assistant", "Bye."),
    ]  # fmt: skip
    assert [m["role"] for m in persuadee] == ["system", "user", "assistant", "user"]
    first, second = (d.content for d in by_source["casino"])
    assert first[0]["content"].endswith("High priority: Food (I like food.) Medium priority: Water (I like water.) "
                                        "Low priority: Firewood (I like firewood.)")  # fmt: skip
    deal = "Submit-Deal: I get 1 Food, 2 Water, 3 Firewood; you get 2 Food, 1 Water, 0 Firewood"
    assert (first[2], second[2]) == ({"role": "user", "content": deal}, {"role": "assistant", "content": deal})
    seller = by_source["craigslistbargain"][0].content
    assert seller[0]["content"] == "You sell this for $20: A red hat, new"
    games = [d.content for d in by_source["guess_my_city"]]
    assert {g[0]["content"].split()[0] for g in games} == {"You", "Guess"}
    assert all([m["content"] for m in g[1:]] == ["Is it big?", "Yes."] for g in games)
    assert by_source["gsm8k"][0].content[1]["content"] == "It is 3.\n#### 3"
    assert by_source["triviaqa"][0].content[1]["content"] == "Me"
    reading = next(d for d in by_source["hotpotqa"] if "Question:" in data.plain_text(d))
    assert reading.content[0]["content"].startswith("Aldham & Elm\nAldham &amp; Elm is a village.")
    assert len(by_source["wiki_demo"]) == 3  # 8,000 characters each


def test_synthetic_chats_follow_the_seed_and_hold_right_answers(data):
    chats = list(data.synthetic_chats(3, 2000))
    assert chats == list(data.synthetic_chats(3, 2000))
    assert chats[:50] != list(data.synthetic_chats(4, 50))
    pairs = [
        (m["content"], answer["content"])
        for chat in chats
        for m, answer in zip(chat.content, chat.content[1:], strict=False)
        if m["role"] == "user"
    ]
    sums = [(re.fullmatch(r"What is (\d+) plus (\d+)\?", q), a) for q, a in pairs]
    assert sum(match is not None for match, _ in sums) > 100
    assert all(int(m[1]) + int(m[2]) == int(a) for m, a in sums if m)
    assert all(q == f"Repeat: {a}" for q, a in pairs if q.startswith("Repeat"))
    assert all(a.replace("-", "") == q[6:-1] for q, a in pairs if q.startswith("Spell"))
    calls = [m["content"] for chat in chats for m in chat.content if m["content"].startswith("<tool_call>")]
    assert all(json.loads(c[11:-12])["name"] == "calculator" for c in calls)


def test_held_out_side_shares_no_key_with_the_other(data, data_dir):
    aside = next(f"Town {i}" for i in range(10_000) if data.held_out([f"passage:town {i}"]))
    rows = [passage(i, title) for i, title in enumerate(["Aldham", aside])]
    question = {"id": "t", "question": "Which?", "answer": "Bures", "gold_ids": ["hp0", "hp1"]}
    write(data_dir / "twowiki", "passages.jsonl.gz", rows)
    write(data_dir / "twowiki", "questions_train.jsonl.gz", [question])
    documents = read(data, data_dir, 3000)
    held = {k for d in documents if data.held_out(d.keys) for k in d.keys}
    train = {k for d in documents if not data.held_out(d.keys) for k in d.keys}
    assert f"passage:{aside.lower()}" in held
    assert f"passage:{aside.lower()}" not in train
    # a question that quotes a passage of the held-out side is there too; its other passage may be on both
    assert "twowiki question:t" in held
    assert held & train <= {"passage:aldham"}
    assert not any(aside in data.plain_text(d) for d in documents if not data.held_out(d.keys))
    shares = [data.held_out([f"id {i}"]) for i in range(20_000)]
    assert 150 < sum(shares) < 250


@pytest.mark.parametrize("width", [7, 64, 513])
def test_pack_puts_every_token_in_exactly_one_window(tokens, width):
    rng = random.Random(1)
    lengths = [rng.choice((0, 1, 3, 20, 200, 1000)) for _ in range(300)]
    windows = tokens.pack(lengths, width, random.Random(0))
    found = collections.Counter((d, t) for window in windows for d, a, b in window for t in range(a, b))
    assert found == collections.Counter((d, t) for d, length in enumerate(lengths) for t in range(length))
    sizes = [sum(b - a for _, a, b in window) for window in windows]
    assert max(sizes) <= width
    assert sum(sizes) > 0.94 * width * len(sizes)
    assert windows == tokens.pack(lengths, width, random.Random(0))


def test_windows_are_a_function_of_seed_and_position(tokens):
    import torch

    lengths = [3, 10, 25, 4, 4, 9]
    documents = tokens.Documents(torch.arange(1, sum(lengths) + 1), lengths)
    whole = tokens.Windows(documents, 16, 5, 0).get(0, 12)
    assert torch.equal(whole[7:], tokens.Windows(documents, 16, 5, 0).get(7, 5))
    assert not torch.equal(whole, tokens.Windows(documents, 16, 6, 0).get(0, 12))
    epoch = whole[: len(tokens.pack(lengths, 16, random.Random(0)))]
    assert sorted(epoch[epoch != 0].tolist()) == list(range(1, sum(lengths) + 1))


def test_read_documents_names_file_and_line_of_a_broken_row(data, data_dir, tmp_path):
    from llmrl.errors import DataError

    write(data_dir / "gsm8k", "train.jsonl.gz", '{"question": "q", "solution": "s"}\n{"question"\n')
    with pytest.raises(DataError, match=r"gsm8k/train.jsonl.gz line 2: expected a JSON object"):
        read(data, data_dir)
    write(data_dir / "gsm8k", "train.jsonl.gz", [{"question": "q"}])
    with pytest.raises(DataError, match=r"cannot be read as gsm8k: KeyError\('solution'\)"):
        read(data, data_dir)
    with pytest.raises(DataError, match=r"has none of hotpotqa, twowiki"):
        read(data, tmp_path)
    with pytest.raises(DataError, match=r"not found: .*nowhere \(--data_dir\)"):
        read(data, tmp_path / "nowhere")


# --- the run ---


def arguments(data, output, **changed):
    options = {**TINY, "data_dir": data, "output_dir": output, **changed}
    return [word for name, value in options.items() for word in (f"--{name}", str(value))]


def run(modules, capsys, *argv):
    from llmrl.errors import run_command

    code = run_command(lambda: modules["tiny_lm"].main([str(word) for word in argv]))
    return code, capsys.readouterr()


def test_training_loss_is_that_of_transformers(modules, data_dir, tmp_path):
    """Attention in float32, the loss in parts, and its gradients, against the model's own in float32."""
    import torch
    from transformers import LlamaForCausalLM

    recipe = modules["tiny_lm"]
    config = recipe.parse_config(recipe.TinyLMConfig, arguments(data_dir, tmp_path), prog="", description="")
    options = {name: TINY[name] for name in ("synthetic_rows", "vocab_size", "max_length")}
    corpus = modules["tiny_lm_tokens"].load_corpus(data_dir, tmp_path / "tokens", quiet=True, seed=0, **options)
    run = recipe.Run(config, tmp_path, corpus)
    batch = modules["tiny_lm_tokens"].Windows(corpus.train, 65, 0, 0).get(0, 20)
    assert (batch == 0).any()
    plain = LlamaForCausalLM(run.model.config)
    plain.set_attn_implementation("eager")
    plain.load_state_dict(run.model.state_dict())
    labels = torch.where(batch == 0, -100, batch)
    expected = plain(input_ids=batch, attention_mask=(batch != 0).long(), labels=labels).loss
    expected.backward()
    loss = run.loss(batch)
    loss.backward()
    assert abs(loss.item() - expected.item()) < 2e-3
    for name, parameter in plain.named_parameters():
        error = (run.parameters[name].grad - parameter.grad).norm() / parameter.grad.norm()
        assert error < 0.03, name


def test_killed_run_goes_on_to_the_same_weights(modules, data_dir, tmp_path, capsys):
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    assert run(modules, capsys, *arguments(data_dir, straight))[0] == 0
    command = [sys.executable, str(RECIPES / "tiny_lm.py"), *arguments(data_dir, killed), "--resume_from_checkpoint"]
    work = tmp_path / ".killed.work"
    process = subprocess.Popen(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 120
        while not list(work.glob("checkpoint-*")):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.002)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert process.returncode == -signal.SIGKILL
    assert not killed.exists()
    assert max(int(p.name.split("-")[1]) for p in work.glob("checkpoint-*")) < TINY["max_steps"]
    code, said = run(modules, capsys, *arguments(data_dir, killed), "--resume_from_checkpoint")
    assert code == 0, said.err
    assert "reading the data" not in said.out
    assert (killed / "model.safetensors").read_bytes() == (straight / "model.safetensors").read_bytes()
    last = f"checkpoint-{TINY['max_steps']}"
    for name in ("model.safetensors", "optimizer.safetensors"):
        assert (work / last / name).read_bytes() == (tmp_path / ".straight.work" / last / name).read_bytes()
    records = [json.loads((folder / "training.json").read_text()) for folder in (straight, killed)]
    assert records[0]["curve"] == records[1]["curve"]
    assert [row["step"] for row in records[0]["curve"] if "validation_loss" in row] == [20, 40]
    # the output says nothing about where it was made, and only the newest two checkpoints are kept
    written = {p.name: p.read_bytes() for p in killed.iterdir()}
    assert not [name for name, content in written.items() if str(tmp_path).encode() in content]
    assert {"README.md", "training.json", "loss_curve.png", "model.safetensors"} <= set(written)
    assert len(list(work.glob("checkpoint-*"))) == 2
    assert not [p for p in work.rglob("*") if p.suffix in (".pt", ".bin", ".pkl")]


def test_run_may_end_earlier_when_it_goes_on(modules, data_dir, tmp_path, capsys):
    output = tmp_path / "out"
    short = {**TINY, "max_steps": 12, "synthetic_rows": 100, "eval_steps": 100}
    assert run(modules, capsys, *arguments(data_dir, output, **short))[0] == 0
    longer = {**short, "max_steps": 16}
    again = (*arguments(data_dir, output, **longer), "--overwrite", "--resume_from_checkpoint", "--quiet")
    code, said = run(modules, capsys, *again)
    assert (code, said.out, said.err) == (0, "", "")
    record = json.loads((output / "training.json").read_text())
    assert record["figures"]["steps"] == 16
    assert [(s["from_step"], s["max_steps"]) for s in record["schedules"]] == [(0, 12), (12, 16)]
    assert record["curve"][-1]["step"] == 16
    for wrong, message in (
        ({"max_steps": 11}, "the checkpoint is at step 16 already"),
        ({"learning_rate": 0.5}, "learning_rate was 0.002 and is 0.5 now"),
    ):
        code, said = run(modules, capsys, *arguments(data_dir, output, **{**longer, **wrong}), *again[-3:])
        assert code != 0
        assert message in said.err


def test_run_refuses_what_it_cannot_use(modules, data_dir, tmp_path, capsys):
    output = tmp_path / "out"
    for changed, message in (
        ({"batch_tokens": 100}, "--batch_tokens 100: expected a multiple of --pack_length 32"),
        ({"max_steps": 0}, "--max_steps 0: expected at least 1"),
        ({"long_share": 12}, "--long_share 12.0: expected a share from 0 to 1"),
        ({"learning_rate": 1e38, "quiet": True}, "the loss is nan at step 3: lower --learning_rate"),
        ({"data_dir": tmp_path / "nowhere"}, "nowhere (--data_dir)"),
        ({"lr": 1}, "unknown option --lr"),
    ):
        code, said = run(modules, capsys, *arguments(data_dir, output, **changed))
        assert code in (1, 2)
        assert said.err.startswith("llmrl: ")
        assert message in said.err
        assert len(said.err.splitlines()) == 1
    output.mkdir()
    (output / "mine.txt").write_text("kept")
    code, said = run(modules, capsys, *arguments(data_dir, output))
    assert (code, (output / "mine.txt").read_text()) == (1, "kept")
    assert "is not empty; --overwrite" in said.err
