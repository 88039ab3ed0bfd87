"""GRPO through trl's rollout hook on the real engines: what reaches the trainer is what was sampled, with its own weights."""

import contextlib
import io
import json

import pytest
import torch
from grpo_processes import load_recipe

from llmrl.errors import ConfigError, run_command

STEPS, ROWS = 12, 32
SMALL = (
    "--num_generations",
    "8",
    "--prompts_per_step",
    "4",
    "--max_completion_length",
    "24",
    "--learning_rate",
    "1e-3",
)


@pytest.fixture(scope="module")
def recipe():
    return load_recipe()


class Watch:
    """Compares, at each call of the hook, the engine's logprobs with those of the trainer's weights at that moment."""

    def __init__(self, monkeypatch):
        from llmrl.rollout import grpo
        from llmrl.rollout.transformers_engine import prompt_logprobs

        self.rollouts, self.differences, self.versions, self.moved, self.first = None, [], [], [], None
        self.temperatures, self.answers = set(), []
        watch = self

        class Watched(grpo.EngineRollouts):
            def __call__(self, prompts, trainer):
                watch.rollouts = self
                generate = self.engine.generate
                self.engine.generate = lambda ids, configs: watch.see(configs) or generate(ids, configs)
                output = super().__call__(prompts, trainer)
                self.engine.generate = generate
                model = trainer.accelerator.unwrap_model(trainer.model)
                was = model.training
                pairs = list(zip(output["prompt_ids"], output["completion_ids"], strict=True))
                scored = prompt_logprobs(model.eval(), [p + c for p, c in pairs])
                model.train(was)
                for (prompt, _), all_logprobs, mine in zip(pairs, scored, output["logprobs"], strict=True):
                    expected = torch.tensor(all_logprobs[len(prompt) - 1 :])
                    watch.differences.append((expected - torch.tensor(mine)).abs().max().item())
                watch.versions.append(set(output["policy_version"]))
                watch.answers += output["completion_ids"]
                return output

        monkeypatch.setattr(grpo, "EngineRollouts", Watched)

    def see(self, configs):
        if not isinstance(configs, list):
            return  # the canary's own
        self.temperatures |= {config.temperature for config in configs}
        assert len({config.seed for config in configs}) == len(configs)


@pytest.fixture(scope="module")
def train(recipe, chat_model, tmp_path_factory):
    """`train(*options)` -> (exit code, stdout, stderr, output folder, what the hook saw)."""

    def run(*options, patch=None):
        out = tmp_path_factory.mktemp("grpo") / "out"
        said, complained = io.StringIO(), io.StringIO()
        with pytest.MonkeyPatch.context() as monkeypatch:
            watch = Watch(monkeypatch)
            if patch:
                patch(monkeypatch)
            words = ["--model", str(chat_model), "--output_dir", str(out), *SMALL, *map(str, options)]
            with contextlib.redirect_stdout(said), contextlib.redirect_stderr(complained):
                code = run_command(lambda: recipe.main(words))
        return code, said.getvalue(), complained.getvalue(), out, watch

    return run


def metrics(out):
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "reward" in line]


@pytest.fixture(scope="module")
def on_vllm(train):
    return train("--rollout_backend", "vllm", "--max_steps", STEPS)


@pytest.mark.vllm
def test_grpo_on_vllm_learns_and_engine_and_trainer_agree(on_vllm):
    code, said, complained, out, watch = on_vllm
    assert code == 0, complained
    rows = metrics(out)
    rewards = [row["reward"] for row in rows]
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert sum(rewards[-3:]) / 3 > sum(rewards[:3]) / 3 + 0.2, rewards
    # every sampled token, at every step
    assert len(watch.differences) == STEPS * ROWS
    assert max(watch.differences) < 1e-3
    # an update before each step but the first
    assert watch.versions == [{i} for i in range(STEPS)]
    reports = watch.rollouts.sync.reports
    assert [report.version.number for report in reports] == list(range(1, STEPS))
    assert all(max(r.difference, r.difference_after_cached_prefix) < 1e-3 for r in reports)
    assert all(r.trainer_change > 1e-3 for r in reports)  # there was something to carry over
    assert [r.difference for r in reports] == [row["sync/difference"] for row in rows if "sync/difference" in row]
    assert f"{STEPS - 1} weight updates" in said
    assert f"reward {rewards[0]:.3f} -> {rewards[-1]:.3f} over {STEPS} steps" in said


@pytest.mark.vllm
def test_grpo_shows_a_bar_and_leaves_a_model_a_plot_and_run_files(on_vllm, chat_model):
    from transformers import AutoModelForCausalLM

    _, said, complained, out, _ = on_vllm
    rewards = [row["reward"] for row in metrics(out)]
    assert f"reward {rewards[-1]:.3f}" in complained  # the bar
    assert "{'" not in said + complained  # no raw dicts
    assert "Warning" not in said + complained
    assert (out / "plots" / "reward.png").read_bytes().startswith(b"\x89PNG")
    assert {"README.md", "config.resolved.yaml", "env.json", "model.safetensors"} <= {p.name for p in out.iterdir()}
    saved = AutoModelForCausalLM.from_pretrained(out).state_dict()
    start = AutoModelForCausalLM.from_pretrained(chat_model).state_dict()
    assert any(not torch.equal(saved[name], start[name]) for name in start)


@pytest.mark.vllm
def test_grpo_trains_a_lora_adapter_on_vllm_and_is_quiet(train):
    code, said, complained, out, watch = train(
        *("--rollout_backend", "vllm", "--lora_r", 4, "--max_steps", 4, "--learning_rate", "1e-2", "--quiet")
    )
    assert (code, said, complained) == (0, "", "")
    assert max(watch.differences) < 1e-3
    assert watch.versions == [{0}, {1}, {2}, {3}]
    reports = watch.rollouts.sync.reports
    assert len(reports) == 3
    assert all(report.trainer_change > 1e-3 for report in reports)
    assert json.loads((out / "adapter_config.json").read_text())["r"] == 4


def test_grpo_samples_at_the_temperature_it_trains_at(train, monkeypatch):
    from trl import GRPOTrainer

    divided, real = [], GRPOTrainer._get_per_token_logps_and_entropies

    def see(self, *args, **options):
        divided.append(self.temperature)
        return real(self, *args, **options)

    monkeypatch.setattr(GRPOTrainer, "_get_per_token_logps_and_entropies", see)
    arguments = ("--rollout_backend", "transformers", "--temperature", 0.7, "--max_steps", 2)
    code, _, complained, _, watch = train(*arguments)
    assert code == 0, complained
    assert watch.temperatures == {0.7} == set(divided)
    assert max(watch.differences) < 1e-3  # the record is of temperature 1, whatever was drawn at
    again = train(*arguments)[-1]
    assert again.answers == watch.answers  # the same seed
    assert train(*arguments, "--seed", 1)[-1].answers != watch.answers


def test_grpo_stops_when_an_update_does_not_reach_the_engine(train):
    from llmrl.rollout.transformers_engine import TransformersEngine
    from llmrl.types import PolicyVersion

    def stale(monkeypatch):
        def nothing(self, tensors):
            return PolicyVersion(self._version.number + 1, "claimed")

        monkeypatch.setattr(TransformersEngine, "_load_weights", nothing)

    code, _, complained, out, watch = train("--rollout_backend", "transformers", "--max_steps", 3, patch=stale)
    assert code == 1
    assert "did not reach the engine: " in complained
    assert "it still samples with its old weights" in complained
    assert "Traceback" not in complained
    assert len(watch.versions) == 1
    assert not (out / "model.safetensors").exists()


@pytest.fixture
def arguments(tmp_path):
    from trl import GRPOConfig

    return lambda **options: GRPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, **options)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"top_p": 0.9}, r"drawn with top_p=0\.9; set top_p=1"),
        ({"top_k": 5, "min_p": 0.1}, r"top_k=5, min_p=0\.1; set top_k=0, min_p=0"),
        ({"repetition_penalty": 1.2}, r"repetition_penalty=1\.2 changes what is sampled from; set it to 1\.0"),
        ({"temperature": 0.7, "off_policy_mask_threshold": 0.5}, r"set temperature=1\.0"),
    ],
)
def test_sampling_of_refuses_what_makes_ratios_wrong(options, words, arguments):
    from llmrl.rollout.grpo import sampling_of

    with pytest.raises(ConfigError, match=words):
        sampling_of(arguments(**options))


def test_sampling_of_takes_what_the_trainer_trains_at(arguments):
    from llmrl.rollout.grpo import sampling_of

    sampling = sampling_of(arguments(temperature=0.7, max_completion_length=33), (",",))
    assert (sampling.temperature, sampling.max_tokens, sampling.stop) == (0.7, 33, (",",))
    assert not sampling.is_truncated


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ((), "missing --output_dir"),
        (("--max_steps", "0"), "--max_steps must be at least 1"),
        (("--num_generations", "1"), "--num_generations must be at least 2"),
        (("--temperature", "0"), "--temperature must be a number above 0"),
        (("--learning_rate", "nan"), "--learning_rate must be a number above 0"),
        (("--lora_r", "-1"), "--lora_r must be at least 0"),
        (("--rollout_backend", "server"), "not a choice"),
    ],
)
def test_grpo_refuses_options(options, words, recipe, capsys, tmp_path):
    argv = ["--output_dir", str(tmp_path / "out"), *options] if options else []
    assert run_command(lambda: recipe.main(argv)) == 2
    assert words in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_grpo_two_processes_hold_the_same_weights(process, chat_model, tmp_path):
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    words = ["--model", chat_model, "--output_dir", tmp_path / "out", "--max_steps", "3", *SMALL, "--quiet"]
    script = [__file__.replace("test_recipe_grpo", "grpo_processes"), tmp_path]
    ended = process(*launch, *script, *words, "--rollout_backend", "transformers")
    assert ended.code == 0, ended.out + ended.err
    one, other = (tmp_path / "rank0").read_text(), (tmp_path / "rank1").read_text()
    assert one == other
    assert len(metrics(tmp_path / "out")) == 3
