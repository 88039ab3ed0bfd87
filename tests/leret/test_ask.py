"""Asking a model through episodes: what it is prompted with, what of its answer is a query, what is trained on as it stands."""

import copy
import importlib.resources
import threading

import pytest
from explore_world import QUESTIONS, engine, prompt_text, style, tokenizer

from llmrl.errors import DataError, EngineError, OutputError, RequestError
from llmrl.leret.ask import Ask, EngineAsker, RuleAsker, prompt_ids, written_ids
from llmrl.leret.corpus import Passage
from llmrl.leret.prompts import PromptFormat
from llmrl.types import Message

FORMAT = PromptFormat(instruction="name", system="You search.", max_tokens=16)
PASSAGES = (Passage("d5", "", "foxglove dam was built by freda"),)
ASKS = [Ask(q.id, q.text, PASSAGES if i % 2 else (), style("bare", "name")) for i, q in enumerate(QUESTIONS)]
END = "<|end|>"


def ask(scripted, folder, asks=ASKS, *, samples=1, temperature=0.0, seed=0):
    asker = EngineAsker(scripted, FORMAT, "model", quiet=True)
    return asker.ask(asks, samples=samples, temperature=temperature, seed=seed, folder=folder), asker


def test_the_model_is_prompted_with_the_ids_that_training_rows_begin_with(tmp_path):
    seen = []
    ask(engine(lambda request: seen.append(request.token_ids) or "a"), tmp_path)
    expected = {prompt_ids(tokenizer(), FORMAT.messages(a.style, a.question, a.passages)) for a in ASKS}
    assert len(seen) == len(ASKS) == len(expected)
    assert set(seen) == expected
    assert tokenizer().decode(seen[0]).startswith("<|bos|><|system|>You search.<|end|><|user|>Question: ")


@pytest.mark.parametrize(
    ("said", "query", "exact"),
    [
        ("foxglove dam", "foxglove dam", True),
        (" foxglove dam\n", "foxglove dam", True),
        ("Query: foxglove dam", "foxglove dam", False),
        ("foxglove dam\nIt helps.", "foxglove dam", False),
        ("foxglove  dam", "foxglove dam", False),
        ("", "", True),
        (" ".join("abcdefghijklmnopqrstuvwxyz"), " ".join("abcdefghijklmnop"), False),  # cut after 16 tokens
    ],
)
def test_sampled_ids_are_kept_for_training_where_they_are_the_query_alone(tmp_path, said, query, exact):
    answers, _ = ask(engine(lambda request: said), tmp_path, ASKS[:1])
    answer = answers["q0", 0]
    assert (answer.query, answer.exact) == (query, exact)
    assert answer.finish == ("length" if said.endswith("z") else "stop")
    ids = (*tokenizer().encode(said, add_special_tokens=False), tokenizer().eos_token_id)
    assert answer.token_ids == ids[:16]


def test_a_control_token_inside_an_answer_is_not_trained_on(tmp_path):
    """Its text does not show it."""
    inside = [*tokenizer().encode("foxglove"), tokenizer().convert_tokens_to_ids("<|user|>"), tokenizer().eos_token_id]
    answers, _ = ask(engine(lambda request: inside), tmp_path, ASKS[:1])
    assert answers["q0", 0].query == "foxglove"
    assert not answers["q0", 0].exact


def test_greedy_decoding_draws_one_sample_and_each_other_has_a_seed_of_its_own(tmp_path):
    scripted = engine(lambda request: f"{request.sampling.seed}")
    assert len(ask(scripted, tmp_path / "greedy", samples=4)[0]) == len(ASKS)
    drawn, asker = ask(scripted, tmp_path / "drawn", samples=4, temperature=1.0)
    assert set(drawn) == {(a.key, sample) for a in ASKS for sample in range(4)}
    assert len({answer.query for answer in drawn.values()}) == 4 * len(ASKS)
    assert asker.tally.answers == 40
    assert asker.tally.tokens == sum(len(answer.token_ids) for answer in drawn.values())
    assert ask(scripted, tmp_path / "again", ASKS[::-1], samples=4, temperature=1.0)[0] == drawn
    assert ask(scripted, tmp_path / "other", samples=4, temperature=1.0, seed=1)[0] != drawn


def test_what_was_answered_is_not_asked_again_whatever_the_order_of_the_questions(tmp_path):
    first, _ = ask(engine(lambda request: "a dam"), tmp_path)

    def never(request):
        raise AssertionError("asked again")

    assert ask(engine(never), tmp_path, ASKS[::-1])[0] == first


def test_a_folder_takes_answers_of_one_seed_and_one_set_of_questions(tmp_path):
    ask(engine(lambda request: "a"), tmp_path)
    with pytest.raises(OutputError, match="holds another run: seed was 0, is 1"):
        ask(engine(lambda request: "a"), tmp_path, seed=1)
    with pytest.raises(OutputError, match="holds another run: rows"):
        ask(engine(lambda request: "a"), tmp_path, ASKS[:3])


def test_prompts_without_an_answer_are_counted_and_the_others_go_on(tmp_path):
    def some(request):
        if "iris" in prompt_text(request):
            raise RequestError("the prompt is too long")
        return "a dam"

    answers, asker = ask(engine(some), tmp_path)
    assert set(answers) == {(q.id, 0) for q in QUESTIONS if "iris" not in q.text}
    assert (asker.tally.failed, asker.tally.answers) == (1, 9)
    assert "the prompt is too long" in asker.tally.failure


def test_no_answer_at_all_is_an_error_with_the_first_reason(tmp_path):
    def none(request):
        raise RequestError("the prompt is too long")

    with pytest.raises(DataError, match=r"none of 10 prompts got an answer; the first: .*the prompt is too long"):
        ask(engine(none), tmp_path)


def test_a_model_that_dies_leaves_what_it_answered_for_the_next_run(tmp_path):
    lock, count = threading.Lock(), [0]

    def dies(request):
        with lock:
            count[0] += 1
            if count[0] > 4:
                raise EngineError("gone")
        return "a dam"

    with pytest.raises(EngineError, match=r"gone\n.*4 of 10 episodes are finished and kept"):
        ask(engine(dies), tmp_path)
    asked = []
    answers, _ = ask(engine(lambda request: asked.append(1) or "a dam"), tmp_path)
    assert len(asked) == 6
    assert len(answers) == 10


def test_nothing_to_ask_asks_nothing(tmp_path):
    assert ask(engine(), tmp_path, [])[0] == {}


def test_rules_answer_under_the_name_of_their_style():
    asker = RuleAsker({"first": lambda question, passages: question.split()[0], "count": lambda q, p: str(len(p))})
    asks = [Ask("a", "where is it", PASSAGES, style("first")), Ask("b", "where is it", PASSAGES, style("count"))]
    answers = asker.ask(asks, samples=3, temperature=0.5, seed=0, folder=None)
    assert {key: answer.query for key, answer in answers.items()} == {("a", 0): "where", ("b", 0): "1"}
    assert not any(answer.token_ids for answer in answers.values())


# --- ids of queries that nobody sampled -------------------------------------------------------------------------------

MESSAGES = (Message("system", "You search."), Message("user", "Question: Who?\nWrite."))


def of_family(name, end):
    """The small tokenizer with the chat template and the control tokens of a family, as trl ships it."""
    made = type(tokenizer()).from_pretrained(tokenizer().name_or_path)
    names = ["<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    made.add_special_tokens({"additional_special_tokens": names})
    made.eos_token = end
    made.chat_template = (importlib.resources.files("trl") / "chat_templates" / name).read_text(encoding="utf-8")
    return made


@pytest.fixture(params=["tiny_lm", "qwen2_5", "llama3"])
def family(request):
    ends = {"qwen2_5": "<|im_end|>", "llama3": "<|eot_id|>"}
    end = ends.get(request.param, END)
    return (tokenizer() if end == END else of_family(f"{request.param}.jinja", end)), end


@pytest.mark.parametrize("query", ["foxglove dam", "Who's “é” 犬", ""])
def test_a_written_query_is_what_the_model_would_sample_up_to_its_end_token(family, query):
    made, end = family
    ids = written_ids(made, MESSAGES, query)
    assert ids == (*made.encode(query, add_special_tokens=False), made.convert_tokens_to_ids(end))
    whole = made.apply_chat_template(
        [*(m.to_json() for m in MESSAGES), {"role": "assistant", "content": query}], return_dict=False
    )
    prompt = prompt_ids(made, MESSAGES)
    assert tuple(whole[: len(prompt) + len(ids)]) == prompt + ids  # behind it a template may write a line break


def test_the_name_of_a_control_token_in_a_query_does_not_end_it(family):
    made, end = family
    ids = written_ids(made, MESSAGES, f"foxglove {end} dam")
    assert ids.count(made.convert_tokens_to_ids(end)) == 1
    assert made.decode(ids) == f"foxglove {end} dam{end}"


@pytest.mark.parametrize(
    ("template", "complaint"),
    [
        ("{% for m in messages %}{{ m.content }}\n{% endfor %}", "no end token behind an answer"),
        (
            "{% for m in messages %}{{ m.role + m.content }}<|end|>{% endfor %}{% if add_generation_prompt %}say:{% endif %}",
            "otherwise than it asks for one",
        ),
    ],
)
def test_a_template_that_cannot_be_trained_on_is_refused(template, complaint):
    made = type(tokenizer()).from_pretrained(tokenizer().name_or_path)
    made.chat_template = template
    with pytest.raises(DataError, match=complaint):
        written_ids(made, MESSAGES, "foxglove dam")


def test_template_options_reach_prompt_and_answer():
    """As with a thinking model, whose template opens and closes its thoughts before the answer when told not to think."""
    made = copy.deepcopy(tokenizer())
    made.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{% if m.role == 'assistant' and enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}"
        "{{ m.content }}" + made.eos_token + "\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n"
        "{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}{% endif %}"
    )
    off = {"enable_thinking": False}
    assert made.decode(prompt_ids(made, MESSAGES, off)).endswith("<think></think>")
    assert not made.decode(prompt_ids(made, MESSAGES)).endswith("</think>")
    assert "think" not in made.decode(written_ids(made, MESSAGES, "foxglove dam", off))
