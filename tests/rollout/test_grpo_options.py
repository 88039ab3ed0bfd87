"""What of a GRPOConfig the engine honours, and what it refuses because it would be left out without a word."""

import copy
from types import SimpleNamespace

import pytest

from llmrl.errors import ConfigError, DistributedError
from llmrl.rollout.grpo import EngineRollouts, _encode, sampling_of
from llmrl.rollout.scripted import ScriptedEngine

TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% if not thinking %} no thought{% endif %}{% endif %}"
)


def arguments(**options):
    plain = {
        "temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": None, "max_completion_length": 8, "repetition_penalty": 1.0,
        "generation_kwargs": None, "use_vllm": False, "mask_truncated_completions": False, "chat_template_kwargs": {},
        "seed": 0,
    }  # fmt: skip
    return SimpleNamespace(**(plain | options))


def test_sampling_of_takes_what_the_engine_has():
    sampling = sampling_of(arguments(temperature=0.7), ["\n"])
    assert (sampling.temperature, sampling.max_tokens, sampling.stop, sampling.is_truncated) == (0.7, 8, ("\n",), False)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"top_p": 0.9}, "set top_p=1"),
        ({"top_k": 20}, "set top_k=0"),
        ({"min_p": 0.1}, "set min_p=0"),
        ({"temperature": 0.0}, "set temperature=1"),
        ({"repetition_penalty": 1.2}, "repetition_penalty"),
        ({"generation_kwargs": {"top_p": 0.3}}, "generation_kwargs"),
        ({"use_vllm": True}, "use_vllm"),
    ],
)
def test_sampling_of_refuses_what_would_be_left_out(options, words):
    with pytest.raises(ConfigError, match=words):
        sampling_of(arguments(**options))


def test_prompts_are_encoded_with_the_trainers_template_options(stories_tokenizer):
    tokenizer = copy.deepcopy(stories_tokenizer)  # it is shared with other tests
    tokenizer.chat_template = TEMPLATE
    trainer = SimpleNamespace(processing_class=tokenizer, args=arguments())
    prompt = [{"role": "user", "content": "hi"}]
    assert tokenizer.decode(_encode(prompt, trainer)).endswith("assistant: no thought")
    trainer.args = arguments(chat_template_kwargs={"thinking": True})
    assert tokenizer.decode(_encode(prompt, trainer)).endswith("assistant:")
    assert list(_encode("Once upon", trainer)) == stories_tokenizer("Once upon")["input_ids"]


def test_masking_of_truncated_answers_is_refused_where_trl_knows_not_all_ends(stories_tokenizer):
    engine = ScriptedEngine(stories_tokenizer, lambda request: "yes")
    trainer = SimpleNamespace(processing_class=stories_tokenizer, args=arguments(mask_truncated_completions=True))
    EngineRollouts(engine)._check_ends(trainer)
    with pytest.raises(ConfigError, match="a stop string"):
        EngineRollouts(engine, stop=["."])._check_ends(trainer)
    engine.end_ids = frozenset({2, 7})
    with pytest.raises(ConfigError, match=r"the tokens \[7\]"):
        EngineRollouts(engine)._check_ends(trainer)


def test_several_processes_on_shared_servers_are_refused(stories_tokenizer):
    engine = ScriptedEngine(stories_tokenizer, lambda request: "yes")
    engine.is_shared = True
    trainer = SimpleNamespace(accelerator=SimpleNamespace(num_processes=2), args=arguments())
    with pytest.raises(DistributedError, match="each update the same servers"):
        EngineRollouts(engine)._update(trainer)
