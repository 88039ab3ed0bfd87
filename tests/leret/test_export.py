"""Rows for training: prompts that the engine was given in the bare style, completions that it sampled, and the same for trl."""

import importlib.resources
import json

import pytest
from explore_world import BARE, CORPUS, QUESTIONS, TINY_LM, engine, explorer, say, style, tokenizer

from llmrl.leret.ask import written_ids
from llmrl.leret.context import SearchState
from llmrl.leret.export import write_rows
from llmrl.leret.pairs import PairRule
from llmrl.leret.preference_data import read_pairs, read_sft_rows
from llmrl.leret.prompts import PromptFormat
from llmrl.leret.records import group_candidates
from llmrl.leret.states import StateRule

TEXTS = {question.id: question.text for question in QUESTIONS}
STYLES = [BARE, style("person"), style("talk"), style("junk")]


def renderer(made):
    form = made.asker.format

    def render(state):
        passages = [CORPUS.by_id[name] for name in made.context(state)]
        return form.messages(form.bare, TEXTS[state.question_id], passages)

    return render


def export(folder, made, groups, rule=None, with_tokenizer=True):
    folder.mkdir(exist_ok=True)
    used = made.asker.engine.tokenizer if with_tokenizer else None
    counts = write_rows(folder, groups, rule or PairRule(), renderer(made), used)
    return counts, [rows(folder / name) for name in ("sft.jsonl", "pairs.jsonl", "grpo.jsonl")]


def rows(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def letter_by_letter(text):
    """Ids that the tokenizer itself would never give."""
    return [token for letter in text for token in tokenizer().encode(letter, add_special_tokens=False)]


@pytest.fixture(scope="module", params=[None, "You search."])
def explored(request, tmp_path_factory):
    """An exploration of three questions, what the engine was prompted with in the bare style, and its rows."""
    prompted = set()

    def watched(request):
        if not tokenizer().decode(request.token_ids).endswith("name<|end|><|assistant|>"):
            return say(request)
        prompted.add(request.token_ids)
        return [*letter_by_letter(say(request)), tokenizer().eos_token_id]

    folder = tmp_path_factory.mktemp("rows")
    form = PromptFormat(instruction="name", system=request.param)
    made = explorer(engine(watched), prompts=form, state_rule=StateRule("top1", keep_solved=True))
    groups = made.explore(QUESTIONS[5:8], STYLES, folder / "explored")
    return prompted, groups, *export(folder, made, groups)


def test_prompts_are_the_ids_that_the_engine_was_given_in_the_bare_style(explored):
    prompted, _, counts, (sft, pairs, _) = explored
    assert len(prompted) == 6
    assert {tuple(row["prompt_ids"]) for row in pairs} == prompted
    assert {tuple(row["prompt_ids"]) for row in sft} <= prompted
    assert counts["sft"] == len(sft) > 3
    assert counts["pairs"] == len(pairs) > 9


def test_completions_are_the_ids_that_were_sampled_from_that_state(explored):
    """talk writes "NAME dam" in quotes, so those ids are bare's in hop 1; in hop 2 bare asks for another query."""
    _, groups, counts, (sft, pairs, _) = explored
    end = tokenizer().eos_token_id
    bare = {(g.state.key, c.query) for g in groups for c in g.candidates if c.prompt_name == "bare"}

    def expected(state, query):
        spelled = letter_by_letter(query) if (state, query) in bare else tokenizer().encode(query)
        cut_out = query.endswith("dam") and (state, query) not in bare
        return [*spelled, tokenizer().convert_tokens_to_ids("<|end|>") if cut_out else end]

    for row in sft:
        assert row["completion_ids"] == expected(row["state"], row["query"])
    for row in pairs:
        for side in ("chosen", "rejected"):
            assert row[f"{side}_ids"] == expected(row["state"], row[f"{side}_query"])
            assert row[side] == [{"role": "assistant", "content": row[f"{side}_query"]}]
    cut_out = {
        (r["state"], r[f"{s}_query"]) for r in pairs for s in ("chosen", "rejected") if r[f"{s}_query"][-3:] == "dam"
    }
    assert counts["encoded"] == len(cut_out - bare) > 0
    assert cut_out & bare


def test_a_query_that_was_cut_out_of_an_answer_is_written_as_the_template_writes_it(tmp_path):
    made = explorer()
    groups = made.explore(QUESTIONS[5:6], [style("talk"), style("junk")], tmp_path / "explored")
    counts, (sft, pairs, _) = export(tmp_path, made, groups)
    assert sft[0]["query"] == pairs[0]["chosen_query"] == "foxglove dam"
    messages = renderer(made)(SearchState("q5"))
    assert tuple(sft[0]["completion_ids"]) == written_ids(tokenizer(), messages, "foxglove dam")
    assert pairs[0]["chosen_ids"] == sft[0]["completion_ids"]
    # once for hop 1; the engine sampled "zzz" itself; at hop 2 both find nothing new
    assert counts["encoded"] == 1


def test_the_stop_of_a_solved_state_is_the_end_token_alone(tmp_path):
    made = explorer(state_rule=StateRule("top1", keep_solved=True))
    groups = made.explore(QUESTIONS[:1], [style("echo"), style("junk")], tmp_path / "explored")
    _, (sft, pairs, _) = export(tmp_path, made, groups, PairRule(stop_query=""))
    end = tokenizer().convert_tokens_to_ids("<|end|>")
    assert [row["completion_ids"] for row in sft if row["query"] == ""] == [[end]]
    stops = [row for row in pairs if row["chosen_query"] == ""]
    assert {row["rejected_query"] for row in stops} == {QUESTIONS[0].text, "zzz"}
    assert all(row["chosen_ids"] == [end] for row in stops)


def test_rows_read_as_training_reads_them_and_do_not_depend_on_the_order(explored, tmp_path):
    _, groups, _, (sft, pairs, grpo) = explored
    made = explorer(prompts=PromptFormat(instruction="name"))
    _, first = export(tmp_path / "a", made, groups)
    mixed = group_candidates([c for g in groups[::-1] for c in g.candidates[::-1]], {q.id: q.gold for q in QUESTIONS})
    _, second = export(tmp_path / "b", made, mixed)
    assert first[:2] == second[:2]
    assert len(read_sft_rows(tmp_path / "a" / "sft.jsonl")) == len(sft)
    assert len(read_pairs(tmp_path / "a" / "pairs.jsonl")) == len(pairs)
    assert sum(len(row["candidates"]) for row in grpo) == sum(len(g.candidates) for g in groups)


def test_pairs_that_the_tokenizer_cannot_tell_apart_are_left_out(tmp_path):
    made = explorer()
    groups = made.explore(QUESTIONS[5:6], [BARE, style("junk")], tmp_path / "explored")

    class Forgetful:
        """Writes the same ids for anything it did not sample."""

        def __getattr__(self, name):
            return getattr(tokenizer(), name)

        def __len__(self):
            return len(tokenizer())

    bare = [g for g in groups if g.hop == 1]
    ids = {c.prompt_name: c.token_ids for c in bare[0].candidates}
    object.__setattr__(bare[0].candidates[0], "token_ids", ids["junk"])
    (tmp_path / "out").mkdir()
    counts = write_rows(tmp_path / "out", bare, PairRule(), renderer(made), Forgetful())
    assert counts["pairs"] == 0
    assert (tmp_path / "out" / "pairs.jsonl").read_text() == ""


def test_without_a_tokenizer_the_rows_hold_text_alone(tmp_path):
    made = explorer()
    groups = made.explore(QUESTIONS[5:6], [BARE, style("junk")], tmp_path / "explored")
    _, (sft, pairs, _) = export(tmp_path, made, groups, with_tokenizer=False)
    assert "prompt_ids" not in sft[0]
    assert "chosen_ids" not in pairs[0]
    assert pairs[0]["prompt"][-1]["content"].startswith("Question: where was the builder of foxglove dam born")


# --- trl --------------------------------------------------------------------------------------------------------------


def with_template(name, end):
    """The small tokenizer with a family's template, where nothing of it is in the text of the tests."""
    made = type(tokenizer()).from_pretrained(TINY_LM)
    names = ["<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    made.add_special_tokens({"additional_special_tokens": names})
    made.chat_template = (importlib.resources.files("trl") / "chat_templates" / name).read_text(encoding="utf-8")
    made.eos_token = end
    return made


@pytest.mark.parametrize(
    ("template", "end", "behind"),
    [(None, "<|end|>", ""), ("qwen2_5.jinja", "<|im_end|>", "\n"), ("llama3.jinja", "<|eot_id|>", "")],
)
def test_trl_makes_the_same_ids_of_the_columns_of_text(tmp_path, template, end, behind):
    """As trl's DPOTrainer tokenises: the prompt with a generation prompt, the rest behind what both share with it.

    What a template writes behind the end of an answer is never sampled, so our completions leave it out.
    """
    from trl.trainer.dpo_trainer import _tokenize

    used = tokenizer() if template is None else with_template(template, end)
    form = PromptFormat(instruction="name", system="You search.")
    made = explorer(prompts=form, state_rule=StateRule("top1"))
    groups = made.explore(QUESTIONS[5:6], STYLES, tmp_path / "explored")
    for group in groups:
        for candidate in group.candidates:
            object.__setattr__(candidate, "token_ids", ())  # sampled with another template
    write_rows(tmp_path, groups, PairRule(), renderer(made), used)
    tail = used.encode(behind, add_special_tokens=False)
    for row in rows(tmp_path / "pairs.jsonl"):
        prompt = _tokenize(used, row["prompt"], add_generation_prompt=True)["input_ids"]
        assert prompt == row["prompt_ids"]
        for side in ("chosen", "rejected"):
            assert _tokenize(used, row["prompt"] + row[side])["input_ids"] == prompt + row[f"{side}_ids"] + tail
            assert used.convert_ids_to_tokens(row[f"{side}_ids"][-1]) == end
