"""`llmrl hindsight regenerate`: by scripts, by models behind an endpoint, killed, out of budget, and refused."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
from chat_endpoint import ChatServer
from hindsight_cli import run
from talking_model import role_of, say

from llmrl.hindsight.dialogues import read_dialogues

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1"}


@pytest.fixture(scope="module")
def logs(tmp_path_factory):
    path = tmp_path_factory.mktemp("regenerate") / "logs.jsonl"
    assert run("logs", "--env", "charity", "--output", path, "--count", "60", "--quiet") == 0
    return path


def by_models(server, logs, output, *options):
    """Return the options of a run whose models are all behind one endpoint."""
    who = ["--controller", server.url, "--forward", server.url, "--reward", f"judge=m@{server.url}"]
    sizes = ["--rounds", "2", "--limit", "20", "--calibration", "12", "--concurrency", "4"]
    return ["--data", logs, "--output", output, *who, *sizes, "--seed", "3", *options]


def digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def report(path):
    return json.loads(path.with_name(f"{path.stem}.report.json").read_text())


def refused(path):
    rows = path.with_name(f"{path.stem}.refused.jsonl").read_text().splitlines()
    return [json.loads(row) for row in rows]


def test_scripts_regenerate_the_charity_talk_and_ilql_learns_from_both_files(logs, tmp_path, llmrl):
    ended = llmrl("hindsight", "regenerate", "--data", logs, "--output", tmp_path / "new.jsonl", "--seed", "1")
    assert ended.code == 0, ended.err
    assert "round 3" in ended.out
    assert "ALARM" not in ended.out
    new, old = read_dialogues([tmp_path / "new.jsonl"]).dialogues, read_dialogues([logs]).dialogues
    assert {d.provenance["regenerated"]["source"] for d in new} <= {d.id for d in old}
    best = [max(d.total for d in new if d.provenance["regenerated"]["round"] == n) for n in (1, 2, 3)]
    assert best[2] > 1.7 > max(d.total for d in old)
    # the same again, and alone
    for name, options in (("again", []), ("alone", ["--concurrency", "1"])):
        told = ["--data", logs, "--output", tmp_path / f"{name}.jsonl", "--seed", "1", "--quiet", *options]
        assert run("regenerate", *told) == 0
        assert digest(tmp_path / f"{name}.jsonl") == digest(tmp_path / "new.jsonl")
    assert (
        run("logs", "--env", "charity", "--output", tmp_path / "x.jsonl", "--model_dir", tmp_path / "small", "--quiet")
        == 0
    )
    data = ["--data", logs, "--data", tmp_path / "new.jsonl", "--model", tmp_path / "small"]
    ended = llmrl("hindsight", "train", *data, "--output_dir", tmp_path / "p", "--max_steps", "3", "--batch_size", "8")
    assert ended.code == 0, ended.err
    copies = sum(sum(i < d.provenance["regenerated"]["turn"] for i in d.agent_turns) for d in new)
    assert f"{copies} turns are copies" in ended.out
    assert json.loads((tmp_path / "p/report.json").read_text())["dialogues"]["copied_turns"] == copies


def test_the_random_control_is_of_equal_size(logs, tmp_path):
    assert run("regenerate", "--data", logs, "--output", tmp_path / "new.jsonl", "--quiet") == 0
    for control in ("random", "no_hindsight"):
        told = ["--control", control, "--match", tmp_path / "new.jsonl", "--quiet"]
        assert run("regenerate", "--data", logs, "--output", tmp_path / f"{control}.jsonl", *told) == 0
        counts = [
            Counter(d.provenance["regenerated"]["round"] for d in read_dialogues([path]).dialogues)
            for path in (tmp_path / "new.jsonl", tmp_path / f"{control}.jsonl")
        ]
        assert counts[0] == counts[1]
        assert report(tmp_path / f"{control}.jsonl")["controller"] != "scripted"


def test_models_behind_an_endpoint_regenerate_and_every_refusal_is_kept(logs, tmp_path, llmrl):
    with ChatServer() as server:
        server.answers = [say]
        ended = llmrl("hindsight", "regenerate", *by_models(server, logs, tmp_path / "new.jsonl"))
        asked = Counter(role_of(body) for body in server.requests)
    assert ended.code == 0, ended.err
    found, rows = report(tmp_path / "new.jsonl"), refused(tmp_path / "new.jsonl")
    assert found["cost"]["requests"] == sum(asked.values()) == len(server.requests)
    assert {role: one["requests"] for role, one in found["cost"]["roles"].items()} == dict(asked)
    assert Counter(row["reason"] for row in rows) == Counter(found["refused"])
    assert {"prose"} <= set(found["refused"])
    assert all(row["answer"] or row["utterance"] is not None for row in rows)
    made = read_dialogues([tmp_path / "new.jsonl"]).dialogues
    assert made
    assert found["made"] == len(made)
    for dialogue in made:
        told = dialogue.provenance["regenerated"]
        assert [one["turn"] for one in told["turns"]] == list(range(told["turns"][0]["turn"], len(dialogue.messages)))
        assert all(one["model"] == f"m@{server.url}" and one["prompt"] and one["seed"] >= 0 for one in told["turns"])
    assert all("[END]" not in m.content for d in made for m in d.messages)
    assert any(
        row["response_format"]["type"] == "json_schema" for row in server.requests if role_of(row) == "controller"
    )
    assert 0 <= found["cost"]["idle_share"] < 1


def test_kill_9_and_the_same_command_give_the_same_bytes(logs, tmp_path):
    with ChatServer() as server:
        server.answers = [say]
        assert run("regenerate", *by_models(server, logs, tmp_path / "whole.jsonl", "--quiet")) == 0
        whole, asked = len(server.requests), threading.Event()

        def slowly(body):
            if len(server.requests) > whole + whole // 2:
                asked.set()
                time.sleep(0.2)
            return say(body)

        server.answers = [slowly]
        words = list(map(str, by_models(server, logs, tmp_path / "killed.jsonl", "--quiet")))
        command = [sys.executable, "-m", "llmrl.cli", "hindsight", "regenerate", *words]
        child = subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT, start_new_session=True)
        assert asked.wait(120)
        os.killpg(child.pid, signal.SIGKILL)
        assert child.wait() == -signal.SIGKILL
        assert not (tmp_path / "killed.jsonl").exists()
        shard = next((tmp_path / "killed.answers/shards").glob("*.jsonl"))
        with shard.open("ab") as torn:
            torn.write(b'{"crc32":"00000000","row_id":"half')
        server.answers, before = [say], len(server.requests)
        assert run("regenerate", *words) == 0
        assert len(server.requests) - before < 0.75 * whole  # what was answered is not asked again
    for name in ("{}.jsonl", "{}.refused.jsonl"):
        assert digest(tmp_path / name.format("killed")) == digest(tmp_path / name.format("whole"))


def test_ctrl_c_ends_after_the_requests_under_way_and_keeps_their_answers(logs, tmp_path):
    with ChatServer() as server:
        asked = threading.Event()

        def slowly(body):
            if len(server.requests) > 30:
                asked.set()
                time.sleep(0.3)
            return say(body)

        server.answers = [slowly]
        words = list(map(str, by_models(server, logs, tmp_path / "new.jsonl", "--quiet")))
        command = [sys.executable, "-m", "llmrl.cli", "hindsight", "regenerate", *words]
        child = subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)
        assert asked.wait(120)
        child.send_signal(signal.SIGINT)
        _, told = child.communicate(timeout=60)
        assert child.returncode == 130
        assert "answers are kept; the same command goes on" in told
        assert "Traceback" not in told
        kept = int(told.split("interrupted: ")[1].split()[0])
        assert 20 < kept <= len(server.requests) < 60
        assert not (tmp_path / "new.jsonl").exists()


def test_a_budget_is_never_exceeded_and_a_larger_one_goes_on(logs, tmp_path, llmrl):
    with ChatServer() as server:
        server.answers = [say]
        assert run("regenerate", *by_models(server, logs, tmp_path / "whole.jsonl", "--quiet")) == 0
        most = report(tmp_path / "whole.jsonl")["cost"]["tokens"] * 2 // 3
        told = by_models(server, logs, tmp_path / "new.jsonl", "--budget_tokens", most)
        small = llmrl("hindsight", "regenerate", *told)
        assert small.code == 3, small.err
        assert "budget" in small.out
        found = report(tmp_path / "new.jsonl")
        assert 0 < found["cost"]["tokens"] <= most
        assert found["unfinished"]["budget"] > 0
        assert (
            llmrl("hindsight", "regenerate", *by_models(server, logs, tmp_path / "new.jsonl")).code == 1
        )  # it is there
        assert run("regenerate", *by_models(server, logs, tmp_path / "new.jsonl", "--overwrite", "--quiet")) == 0
        assert digest(tmp_path / "new.jsonl") == digest(tmp_path / "whole.jsonl")
        few = llmrl(
            "hindsight", "regenerate", *by_models(server, logs, tmp_path / "few.jsonl", "--budget_requests", "5")
        )
    assert few.code == 3  # nothing could be made, and the report says why
    assert not (tmp_path / "few.jsonl").exists()
    assert report(tmp_path / "few.jsonl")["unfinished"]["budget"] == 20


def test_a_dry_run_asks_nobody(logs, tmp_path, llmrl):
    with ChatServer() as server:
        ended = llmrl("hindsight", "regenerate", *by_models(server, logs, tmp_path / "new.jsonl", "--dry_run"))
        assert server.requests == []
    assert ended.code == 0, ended.err
    assert "at most 40 new dialogues of 20" in ended.out
    assert "controller" in ended.out
    assert "tokens" in ended.out
    assert list(tmp_path.iterdir()) == []


def test_an_endpoint_that_dies_stops_the_run_and_the_same_command_goes_on(logs, tmp_path, llmrl, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    with ChatServer() as server:
        server.answers = [say]
        assert run("regenerate", *by_models(server, logs, tmp_path / "whole.jsonl", "--quiet")) == 0
        alive = len(server.requests) + 60
        server.answers = [lambda body: say(body) if len(server.requests) < alive else (500, "gone")]
        ended = llmrl("hindsight", "regenerate", *by_models(server, logs, tmp_path / "new.jsonl"))
        assert ended.code == 1
        assert "HTTP 500" in ended.err
        assert "kept" in ended.err
        assert "Traceback" not in ended.err
        assert not (tmp_path / "new.jsonl").exists()
        server.answers = [say]
        assert run("regenerate", *by_models(server, logs, tmp_path / "new.jsonl", "--quiet")) == 0
    assert digest(tmp_path / "new.jsonl") == digest(tmp_path / "whole.jsonl")


def test_rate_limits_are_waited_for(logs, tmp_path, monkeypatch):
    waits = []
    monkeypatch.setattr("time.sleep", waits.append)
    with ChatServer() as server:
        server.answers = [say]
        assert run("regenerate", *by_models(server, logs, tmp_path / "whole.jsonl", "--quiet")) == 0
        server.answers = [
            lambda body: say(body) if len(server.requests) % 3 else (429, "slow down", ("retry-after", "7"))
        ]
        assert run("regenerate", *by_models(server, logs, tmp_path / "new.jsonl", "--quiet")) == 0
    assert 7.0 in waits
    assert digest(tmp_path / "new.jsonl") == digest(tmp_path / "whole.jsonl")


def test_a_request_that_is_refused_costs_its_dialogue_alone(logs, tmp_path):
    with ChatServer() as server:
        server.answers = [
            lambda body: (400, "too long") if role_of(body) == "controller" and body["seed"] % 2 else say(body)
        ]
        assert run("regenerate", *by_models(server, logs, tmp_path / "new.jsonl", "--quiet")) == 0
    found = report(tmp_path / "new.jsonl")
    assert found["refused"]["request refused"] > 0
    assert found["made"] > 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--reward", "judge"], "judge=WHO"),
        (["--reward", "rule=m"], "rule, judge=WHO"),
        (["--rounds", "0"], "--rounds"),
        (["--output", "new.txt"], ".jsonl"),
        (["--agent", "some/model"], "script plays both sides"),
        (["--match", "x.jsonl"], "--control"),
        (["--rubric", "r.txt"], "judge=WHO"),
        (["--controler", "x"], "--controller"),
        (["--controller", "./nowhere"], "not found"),
        (["--controller", "m@http://127.0.0.1:9/v1", "--key_env", "NO_SUCH_KEY"], "NO_SUCH_KEY is not set"),
        (["--controller", "http://127.0.0.1:9/v1"], "is it running"),
        (["--data", "./nowhere.jsonl"], "not found"),
    ],
)
def test_refusals(logs, tmp_path, llmrl, monkeypatch, options, words):
    monkeypatch.chdir(tmp_path)
    ended = llmrl("hindsight", "regenerate", "--data", logs, "--output", "new.jsonl", *options)
    assert words in ended.refusal()
    assert not (tmp_path / "new.jsonl").exists()


def test_a_script_knows_no_other_dialogues(tmp_path, llmrl):
    row = {
        "id": "a",
        "task": "support",
        "reward": 1.0,
        "messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes?"}],
    }
    (tmp_path / "logs.jsonl").write_text(json.dumps(row) + "\n")
    ended = llmrl("hindsight", "regenerate", "--data", tmp_path / "logs.jsonl", "--output", tmp_path / "new.jsonl")
    assert "task 'support'" in ended.refusal()
    assert "NAME@URL" in ended.err


def test_several_models_at_one_endpoint_have_to_be_named(logs, tmp_path, llmrl):
    with ChatServer() as server:
        server.models = ["a", "b"]
        ended = llmrl("hindsight", "regenerate", *by_models(server, logs, tmp_path / "new.jsonl"))
    assert "serves a, b" in ended.refusal()
