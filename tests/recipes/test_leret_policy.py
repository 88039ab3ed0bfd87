"""recipes/leret_policy.py: its tokenizer, packed attention and first weights, and a short run that goes on and is published."""

import importlib
import json
import random
import sys
from pathlib import Path

import pytest
import torch

from llmrl.errors import LlmrlError

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
NAMES = ("leret_policy", "leret_policy_data", "leret_policy_eval", "leret_policy_model", "leret_policy_tokens")
PEOPLE = (
    "Ada Lovelace",
    "Boris Karloff",
    "Clara Schumann",
    "Dario Fo",
    "Erika Mann",
    "Fritz Lang",
    "Greta Garbo",
    "Hugo Ball",
)
PLACES = ("Aachen", "Bern", "Celle", "Dresden", "Emden", "Fulda", "Goslar", "Halle")


@pytest.fixture(scope="module")
def modules():
    """The recipe's modules by name; a script finds those beside it without being told where they are."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(RECIPES))
        yield {name: importlib.import_module(name) for name in NAMES}
    for name in NAMES:
        sys.modules.pop(name)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Passages that name a person's birthplace, and a question about each person that is answered by two of them."""
    folder = tmp_path_factory.mktemp("search")
    passages = [
        {
            "id": f"p{i}",
            "title": who,
            "text": f"{who} (artist) was born in {where}. They saw \u201cFilm {i}\u201d there.",
        }
        for i, (who, where) in enumerate(zip(PEOPLE, PLACES, strict=True))
    ]
    passages += [{"id": f"c{i}", "title": where, "text": f"{where} is a town."} for i, where in enumerate(PLACES)]
    questions = [
        {"id": f"q{i}", "question": f"In what town was the artist {who} born?", "gold_ids": [f"p{i}", f"c{i}"]}
        for i, who in enumerate(PEOPLE)
    ]
    paths = {}
    for name, rows in (("passages", passages), ("questions", questions)):
        paths[name] = folder / f"{name}.jsonl"
        paths[name].write_text("".join(json.dumps({"answer": "", "type": "bridge", **row}) + "\n" for row in rows))
    return paths


def arguments(files, output, **options):
    small = {"max_steps": 4, "save_steps": 2, "log_steps": 1, "eval_steps": 99, "vocab_size": 400, "batch_states": 2}
    small |= {"segments": 3, "validation_share": 0.3, "quiet": True, "intermediate_size": 64, "threads": 1} | options
    paths = {"passages": files["passages"], "questions": files["questions"], "output_dir": output}
    return [str(part) for name, value in (paths | small).items() for part in (f"--{name}", value)]


@pytest.fixture(scope="module")
def published(modules, files, tmp_path_factory):
    """The folder of a run of four steps without a break."""
    output = tmp_path_factory.mktemp("run") / "policy"
    assert modules["leret_policy"].main(arguments(files, output)) == 0
    return output


@pytest.fixture(scope="module")
def tokenizer(modules):
    tokens, data = modules["leret_policy_tokens"], modules["leret_policy_data"]
    texts = [f"{who} was born in {where} and saw films" for who, where in zip(PEOPLE, PLACES, strict=True)] * 5
    return tokens.train_tokenizer(texts, (data.INSTRUCTION, *data.INSTRUCTIONS.values()), 500, 256)


def test_tokenizer_gives_a_query_the_tokens_of_the_words_it_copies(tokenizer):
    text = "<|user|>Question: Was \u201cErika\u201d Mann's film (1933) good?\n[1] Mann &amp; Co | Born in Bern.<|assistant|>"
    prompt = tokenizer(text, add_special_tokens=False)["input_ids"]
    query = tokenizer("Was Erika Mann film 1933 good", add_special_tokens=False)["input_ids"]
    assert prompt[2 : 2 + len(query)] == query
    assert tokenizer.convert_ids_to_tokens(prompt)[2 + len(query)] == "[1]"
    assert tokenizer.decode(prompt[2:-1]) == " Was Erika Mann film 1933 good[1] Mann Co| Born in Bern"


def test_tokenizer_has_one_token_for_each_instruction_and_mark(tokenizer, modules):
    data = modules["leret_policy_data"]
    for text in (data.INSTRUCTION, *data.INSTRUCTIONS.values(), "Question:", "[1]", "|"):
        assert len(tokenizer(text, add_special_tokens=False)["input_ids"]) == 1


def test_attend_equals_attention_with_a_mask_forward_and_backward(modules):
    tokens, rng = modules["leret_policy_tokens"], random.Random(0)
    pieces = [[rng.randint(3, 7) for _ in range(rng.randint(1, 3))] for _ in range(4)]
    examples = [tokens.Example((1,) * rng.randint(5, 12), tuple((1,) * n for n in lengths)) for lengths in pieces]
    batch = tokens.collate(examples)
    total, at = sum(map(len, examples)), 0
    mask = torch.zeros(total, total, dtype=torch.bool)
    for example in examples:
        context = slice(at, at + len(example.context))
        mask[context, context] = True
        at = context.stop
        for piece in example.segments:
            own = slice(at, at + len(piece))
            mask[own, context] = mask[own, own] = True
            assert batch.positions[0, own].tolist() == list(
                range(len(example.context), len(example.context) + len(piece))
            )
            at = own.stop
    mask &= torch.ones_like(mask).tril()
    torch.manual_seed(0)
    query, key, value, weight = (torch.randn(total, 2, 8, dtype=torch.float64, requires_grad=True) for _ in range(4))
    scores = torch.einsum("ihd,jhd->hij", query, key) * 0.3
    expected = torch.einsum("hij,jhd->ihd", scores.masked_fill(~mask, float("-inf")).softmax(-1), value)
    found = tokens.attend(query, key, value, batch, 0.3)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    ours, theirs = (torch.autograd.grad((out * weight).sum(), (query, key, value)) for out in (found, expected))
    for one, two in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=1e-12)


@pytest.mark.parametrize("plain", [False, True])
def test_first_weights_copy_the_question_and_plain_ones_do_not(modules, files, tmp_path, plain):
    recipe, data = modules["leret_policy"], modules["leret_policy_data"]
    config = recipe.parse_config(
        recipe.PolicyConfig, arguments(files, tmp_path / "x", plain_weights=plain), prog="x", description=""
    )
    run = recipe.Run(config, tmp_path, data.load_pools(config.passages, config.questions, 0.3))
    right = run.exact_rates(8)["question tokens"]
    assert right < 0.05 if plain else right > 0.6, right


def test_a_run_that_goes_on_ends_with_the_same_policy(modules, files, published, tmp_path):
    recipe, output = modules["leret_policy"], tmp_path / "policy"
    stopped = recipe.parse_config(recipe.PolicyConfig, arguments(files, output, max_steps=4), prog="x", description="")
    pools = modules["leret_policy_data"].load_pools(stopped.passages, stopped.questions, 0.3)
    work = tmp_path / ".policy.work"
    first = recipe.Run(stopped, work, pools)
    first.config.save_steps, update = 2, first._update

    def stop():
        if first.step == 3:
            raise KeyboardInterrupt
        return update()

    first._update = stop
    with pytest.raises(KeyboardInterrupt):
        first.train(None)
    with pytest.raises(LlmrlError, match="resume_from_checkpoint goes on"):
        recipe.main(arguments(files, output))
    assert recipe.main([*arguments(files, output), "--resume_from_checkpoint"]) == 0
    names = ("model.safetensors", "tokenizer.json", "search_prompt.json")
    assert all((output / name).read_bytes() == (published / name).read_bytes() for name in names)


def test_published_policy_is_stock_and_reads_its_prompt_as_in_training(modules, published, files, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from llmrl.leret.corpus import Passage
    from llmrl.leret.prompts import load_setup

    recipe, data = modules["leret_policy"], modules["leret_policy_data"]
    model, tokenizer = AutoModelForCausalLM.from_pretrained(published), AutoTokenizer.from_pretrained(published)
    assert type(model).__name__ == "LlamaForCausalLM"
    setup = load_setup(published)
    state = data.State("Who (else) is Ada Lovelace's?", (Passage("p0", "Ada &amp; Co", "Ada (artist) was born."),))
    config = recipe.parse_config(recipe.PolicyConfig, arguments(files, tmp_path / "x"), prog="x", description="")
    run = recipe.Run(config, tmp_path, data.load_pools(config.passages, config.questions, 0.3))
    for style in (setup.format.bare, *setup.format.styles):
        messages = setup.format.messages(style, state.question, state.passages)
        rows = [{"role": message.role, "content": message.content} for message in messages]
        text = tokenizer.apply_chat_template(rows, add_generation_prompt=True, tokenize=False)
        assert tokenizer(text, add_special_tokens=False)["input_ids"] == run.prompt(state, style.name)
    report = json.loads((published / "report.json").read_text())
    assert {"question / rest+names-1", "bare / bare", "rule / rest+names-1"} <= set(report["two_hops"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"validation_share": 1.0}, "below 1"),
        ({"max_steps": 0}, "at least 1"),
        ({"num_layers": 3}, "at least 4"),
        ({"segments": 1}, "expected 2 to"),
        ({"validation_share": 0.9999}, "no question is left for training"),
    ],
)
def test_bad_options_are_refused(modules, files, tmp_path, options, message):
    with pytest.raises(LlmrlError, match=message):
        modules["leret_policy"].main(arguments(files, tmp_path / "x", **options))


@pytest.mark.parametrize(
    ("found", "dtype"),
    [({"amx_bf16": True}, "bfloat16"), ({"avx512_bf16": True}, "bfloat16"), ({"avx2": True}, "float32")],
)
def test_products_are_in_bfloat16_where_the_processor_has_instructions_for_it(modules, monkeypatch, found, dtype):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found)
    assert modules["leret_policy"].fast_dtype() == dtype
