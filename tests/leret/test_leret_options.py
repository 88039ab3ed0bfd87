"""Options of LeReT: presets fill in what was not said, and what cannot work is refused in a line before anything is done."""

import pytest

from llmrl.config import parse_config
from llmrl.errors import ConfigError, Interrupted, LlmrlError, UsageError
from llmrl.leret.options import LERET, MERGES, PAIRS, PAPER, PRESETS, REWARDS, STATE_RULES, LeretConfig, given
from llmrl.leret.rounds import stage_settings

NEEDED = {"questions": ["q.jsonl"], "passages": ["p.jsonl"], "output_dir": "out"}
MODEL = {**NEEDED, "model": "m"}


def config(**options):
    return LeretConfig(**{**MODEL, **options})


@pytest.mark.parametrize("preset", [LERET, PAPER])
def test_a_preset_fills_in_what_was_not_given_and_only_that(preset):
    plain = config(preset=preset)
    # the order of passages waits for the policy's own
    assert {name: getattr(plain, name) for name in PRESETS[preset]} == {**PRESETS[preset], "merge": None}
    said = config(preset=preset, beta=0.7, keep_solved=True, temperature=[0.3], max_pairs=0, sft_epochs=0)
    assert (said.beta, said.keep_solved, said.temperature, said.max_pairs, said.sft_epochs) == (0.7, True, [0.3], 0, 0)
    told = ("merge", "beta", "keep_solved", "temperature", "max_pairs", "sft_epochs")
    assert {n: getattr(said, n) for n in PRESETS[preset] if n not in told} == {
        n: value for n, value in PRESETS[preset].items() if n not in told
    }


def test_presets_say_the_same_options():
    assert PRESETS[LERET].keys() == PRESETS[PAPER].keys()
    assert all(getattr(LeretConfig, name) is None for name in PRESETS[PAPER])


def test_the_papers_preset_is_the_papers_table():
    paper = config(preset=PAPER)
    assert paper.few_shot_prompts + 1 == 4  # P, with the bare prompt
    assert (paper.few_shot_demos, paper.few_shot_questions) == (3, 100)  # 50 make, 50 judge
    assert (paper.samples, paper.temperature) == (1, [0.0])
    assert (PRESETS[PAPER]["merge"], paper.reward, paper.returns) == ("score", "ap", "greedy")
    assert paper.merge is None  # a policy's own order of passages comes first
    assert (paper.state_rule, paper.keep_solved) == ("bucket", False)
    assert (paper.pairs, paper.margin, paper.max_pairs, paper.near_duplicate) == ("adjacent", 0, 0, 1)
    assert (paper.loss, paper.ipo_reduction, paper.beta, paper.reference) == ("ipo", "sum", 0.05, "sft")
    assert (paper.tuning, paper.optimizer, paper.warmup_steps, paper.max_grad_norm) == ("full", "rmsprop", 150, 10)
    assert (paper.sft_epochs, paper.sft_lr, paper.sft_batch_size) == (1, 1e-7, 8)
    assert (paper.epochs, paper.lr, paper.train_batch_size) == (2, 1e-7, 4)
    assert (paper.rounds, paper.partition) == (1, "disjoint")


@pytest.mark.parametrize(("stage", "batch_size", "epochs"), [("sft", 8, 1), ("preference", 4, 2)])
def test_the_papers_preset_is_what_the_trainers_are_given(stage, batch_size, epochs):
    settings = stage_settings(config(preset=PAPER), stage, 1000, 0)
    assert (settings.batch_size, settings.epochs, settings.learning_rate) == (batch_size, epochs, 1e-7)
    assert (settings.optimizer, settings.warmup_steps, settings.max_grad_norm) == ("rmsprop", 150, 10)
    assert (settings.tuning, settings.schedule) == ("full", "constant")


def test_where_the_presets_differ():
    """docs/leret.md explains each of these."""
    differing = {name for name in PRESETS[LERET] if PRESETS[LERET][name] != PRESETS[PAPER][name]}
    exploring = {"samples", "temperature", "merge", "max_pairs", "near_duplicate", "partition"}
    training = {
        "tuning", "optimizer", "sft_lr", "sft_epochs", "sft_batch_size", "lr", "train_batch_size", "warmup_steps",
        "max_grad_norm",
    }  # fmt: skip
    assert differing - {"beta", "ipo_reduction", "epochs", "keep_solved"} <= exploring | training
    assert {"merge", "tuning", "samples"} <= differing


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"questions": []}, "missing --questions"),
        ({"passages": []}, "missing --passages"),
        ({"output_dir": None}, "missing --output_dir"),
        ({"model": None}, "missing --model.*or --policy rules"),
        ({"retriever": "http"}, "--retriever http needs --retriever_url"),
        ({"retriever_name": "wiki"}, "--retriever_name is the name of an index of --retriever http"),
        ({"retriever": "http", "retriever_url": "http://a", "retriever_name": " "}, "--retriever_name is the name"),
        ({"server_url": ["http://a"], "rollout_backend": "vllm"}, "--server_url goes with --rollout_backend server"),
        ({"hops": 0}, "--hops must be at least 1"),
        ({"k": 0}, "--k must be at least 1"),
        ({"samples": 0}, "--samples must be at least 1"),
        ({"rounds": 0}, "--rounds must be at least 1"),
        ({"beta": 0}, "--beta must be above 0"),
        ({"sft_lr": -1}, "--sft_lr must be above 0"),
        ({"near_duplicate": 1.5}, "--near_duplicate must be above 0 and at most 1"),
        ({"discount": 0}, "--discount must be above 0"),
        ({"margin": -0.1}, "--margin must be at least 0"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"temperature": [0.5, -1.0]}, "temperature"),
        ({"temperature": [0.5, 0.5]}, "--temperature must be one or several different numbers"),
        ({"temperature": []}, "--temperature must be one or several different numbers"),
        ({"question_first": True, "hops": 1}, "--question_first leaves nothing to write with --hops 1"),
        ({"reference": "base", "tuning": "full"}, "--reference base needs --tuning lora"),
        ({"adapter": "a", "tuning": "full"}, "--tuning full trains a whole model: merge --adapter"),
        ({"reward": "ap_gain", "returns": "mean"}, "--reward ap_gain is of one hop.*--returns greedy, or --reward ap"),
        ({"reward": "recall_gain", "returns": "best"}, "or --reward recall"),
        ({"policy": "rules"}, "--policy rules asks no model: leave out --model"),
        ({"policy": "rules", "model": None, "prompts": "p.json"}, "leave out --prompts"),
        ({"policy": "rules", "model": None, "samples": 4}, "--policy rules takes no --samples 4"),
        ({"policy": "rules", "model": None, "returns": "mean"}, "takes no --returns mean"),
        ({"resume_from_checkpoint": "round-1"}, "write it without a value"),
    ],
)
def test_what_cannot_work_is_refused_in_a_line(options, complaint):
    with pytest.raises(LlmrlError, match=complaint) as refused:
        config(**options)
    assert "\n" not in str(refused.value)


def test_rules_say_one_thing_and_read_no_prompt():
    for preset in (LERET, PAPER):
        rules = LeretConfig(**NEEDED, policy="rules", preset=preset)
        assert (rules.samples, rules.temperature, rules.few_shot_prompts) == (1, [0.0], 0)


def parsed(*words):
    return parse_config(LeretConfig, [*words], prog="llmrl leret", description="")


def test_the_command_line_and_a_file_take_the_same_keys(tmp_path):
    words = ("--model", "m", "--questions", "a.jsonl", "b.jsonl", "--passages", "p.jsonl", "--output_dir", "o")
    line = parsed(*words, "--temperature", "0", "0.5", "--keep_solved", "--hops", "3", "--resume_from_checkpoint")
    file = tmp_path / "leret.yaml"
    file.write_text(
        "model: m\nquestions: a.jsonl,b.jsonl\npassages: p.jsonl\noutput_dir: o\ntemperature: 0, 0.5\nkeep_solved: true\n"
        "hops: 3\nresume_from_checkpoint: latest\n"
    )
    assert parsed("--config", str(file)) == line
    assert (line.questions, line.temperature, line.keep_solved, line.hops) == (
        ["a.jsonl", "b.jsonl"],
        [0.0, 0.5],
        True,
        3,
    )


@pytest.mark.parametrize(
    ("name", "value", "complaint"),
    [
        ("preset", "paper", "--preset paper: not a choice"),
        ("retriever", "bm52", "did you mean 'bm25'"),
        ("merge", "hops", "--merge hops: not a choice"),
        ("reward", "app", "did you mean"),
    ],
)
def test_a_word_that_is_no_choice_is_named(name, value, complaint):
    with pytest.raises((UsageError, ConfigError), match=complaint):
        parsed("--model", "m", f"--{name}", value)


def test_choices_are_those_of_the_parts():
    from llmrl.leret import context, pairs, retriever, returns, rewards, states

    assert MERGES == context.MERGE_RULES
    assert set(REWARDS) == set(rewards.REWARDS)
    assert (STATE_RULES, PAIRS) == (states.STATE_RULES, pairs.PAIR_POLICIES)
    choices = {name: LeretConfig.__dataclass_fields__[name].metadata["choices"] for name in ("retriever", "returns")}
    assert set(choices["retriever"]) == set(retriever.KINDS)
    assert set(choices["returns"]) == set(returns.RETURNS)


def test_what_a_run_is_does_not_depend_on_where_files_lie_or_how_it_is_run():
    same = given(config(output_dir="a", batch_size=3, quiet=True, questions=["x/q.jsonl"], rollout_backend="vllm"))
    assert same == given(config())
    for change in ({"seed": 1}, {"beta": 0.1}, {"samples": 5}, {"k": 4}, {"reward": "recall"}, {"model": "n"}):
        assert given(config(**change)) != same


def test_a_run_may_get_more_rounds_unless_they_share_out_the_questions():
    assert given(config(partition="full", rounds=3)) == given(config(partition="full"))
    assert given(config(partition="disjoint", rounds=3)) != given(config(partition="disjoint"))


@pytest.mark.parametrize(
    ("raised", "said"),
    [
        ("4 of 10 episodes are finished and kept in out; the same command makes the rest", None),
        ("", "interrupted: the same command goes on with what is finished"),
    ],
)
def test_an_interrupt_says_what_is_kept_and_how_to_go_on(monkeypatch, raised, said):
    from llmrl import commands
    from llmrl.leret import run

    def interrupted(config):
        raise KeyboardInterrupt(raised)

    monkeypatch.setattr(run, "explore", interrupted)
    with pytest.raises(Interrupted) as stopped:
        commands.run_leret(["explore", "--policy", "rules", "--questions", "q", "--passages", "p", "--output_dir", "o"])
    assert str(stopped.value) == (said or f"interrupted: {raised}")
