"""Windows whose answer is one of some letters, and windows that hold a graded answer of the model itself."""

from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

from llmrl.ats import output_layer as module
from llmrl.ats.data import Window
from llmrl.ats.extract import extract_features
from llmrl.ats.features import exact_lse
from llmrl.ats.output_layer import OutputLayer
from llmrl.errors import DataError, ModelError
from llmrl_kernels import curve_knots

LETTERS = (40, 17, 300, 5)
THREE = (17, 300, 40)


def question(index, choices, answer, length=12):
    ids = torch.randint(3, 500, (length,), generator=torch.Generator().manual_seed(index)).tolist()
    scored = [False] * length + [True]
    return Window([*ids, answer], scored, index, "q.jsonl", f"q.jsonl:{index + 1}", choices=choices)


def sample(index, grade, prompt=4, answer=5):
    ids = torch.randint(3, 500, (prompt + answer,), generator=torch.Generator().manual_seed(100 + index)).tolist()
    return Window(
        ids, [False] * prompt + [True] * answer, index, "s.jsonl", f"s.jsonl:{index + 1}", grade=grade
    )  # fmt: skip


@pytest.fixture(scope="module")
def llama(tiny_model):
    return AutoModelForCausalLM.from_pretrained(tiny_model("llama")).eval()


def extract(model, windows, folder, **options):
    return extract_features(model, windows, batch_size=4, cache_dir=folder, fingerprint="base", **options)


def last_logits(model, window):
    with torch.inference_mode():
        return model(input_ids=torch.tensor([window.token_ids])).logits[0, -2].double()


@pytest.fixture
def questions():
    sets = [LETTERS, THREE, LETTERS, None, THREE, LETTERS]
    return [question(i, ids, (ids or LETTERS)[(i + 1) % 3]) for i, ids in enumerate(sets)]


def test_extract_features_choices_restrict_everything_to_the_letters(llama, questions, tmp_path):
    found = extract(llama, questions, tmp_path)
    knots = curve_knots()
    for i, window in enumerate(questions):
        z = last_logits(llama, window)
        if window.choices is not None:
            z = z[list(window.choices)]
            right = window.choices.index(window.token_ids[-1])
        else:
            right = window.token_ids[-1]
        assert found.gap[i].item() == pytest.approx((z.max() - z[right]).item(), abs=1e-4)
        assert found.mean_gap[i].item() == pytest.approx((z.max() - z.mean()).item(), abs=1e-4)
        assert found.top_gap[i].item() == pytest.approx(
            (z.max() - z.topk(min(5, len(z))).values.mean()).item(), abs=1e-4
        )
        assert bool(found.correct[i]) == (int(z.argmax()) == right)
        for k in (0, 30, len(knots) - 1):
            lse = ((z - z.max()) * knots[k].exp()).logsumexp(-1).item()
            assert found.curve[i, k].item() == pytest.approx(lse, abs=1e-3)
    assert found.target.tolist() == [window.token_ids[-1] for window in questions]
    assert not found.graded.any()


def test_exact_lse_of_choices_is_over_the_letters(llama, questions, tmp_path):
    found = extract(llama, questions, tmp_path).of_windows([0, 1, 3, 4])
    scale = torch.tensor([-0.5, 0.2, 0.0, 1.0])
    lse = exact_lse(OutputLayer.of(llama), found, {"x": scale})["x"]
    for row, i in enumerate([0, 1, 3, 4]):
        z = last_logits(llama, questions[i])
        z = z if questions[i].choices is None else z[list(questions[i].choices)]
        expected = ((z - z.max()) * scale[row].double().exp()).logsumexp(-1).item()
        assert lse[row].item() == pytest.approx(expected, abs=1e-4)


def test_extract_features_refuses_an_answer_that_is_no_choice(llama, questions, tmp_path):
    questions[4] = replace(questions[4], choices=(1, 2, 3))
    with pytest.raises(DataError, match=r"q\.jsonl:5: the answer is not one of the choices"):
        extract(llama, questions, tmp_path)


@pytest.mark.parametrize("sequences", [False, True])
def test_extract_features_grade_is_the_answers_and_confidence_that_of_what_was_said(sequences, llama, tmp_path):
    windows = [sample(0, True), sample(1, False), replace(sample(2, True), grade=None)]
    found = extract(llama, windows, tmp_path, sequences=sequences)
    plain = extract(llama, [replace(w, grade=None) for w in windows], tmp_path / "plain", sequences=sequences)
    assert found.graded.tolist() == [True] * 10 + [False] * 5
    assert found.correct[:10].tolist() == [True] * 5 + [False] * 5
    assert found.correct[10:].equal(plain.correct[10:])
    assert found.confidence_gap[:10].equal(found.gap[:10])
    assert found.confidence_gap[10:].eq(0).all()
    assert found.gap[:10].gt(0).any()
    for name in ("gap", "curve", "slope", "mean_gap", "states"):
        assert getattr(found, name).equal(getattr(plain, name))


# --- masked vocabulary ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [-torch.inf, torch.finfo(torch.float32).min])
def test_extract_features_leave_masked_vocabulary_out_of_the_means(value, llama, tmp_path, monkeypatch):
    masked = list(range(400, 512))
    plain = module.OutputLayer.logits

    def logits(self, hidden):
        z = plain(self, hidden).clone()
        if z.shape[-1] == 512:
            z[:, masked] = value
        return z

    window = question(0, None, 7)
    expected = last_logits(llama, window)[:400]
    monkeypatch.setattr(module.OutputLayer, "logits", logits)
    monkeypatch.setattr("llmrl.ats.extract.check_output_layer", lambda *_: None)
    found = extract(llama, [window], tmp_path)
    assert found.mean_gap.item() == pytest.approx((expected.max() - expected.mean()).item(), abs=1e-4)
    assert torch.isfinite(found.curve).all()
    if value == -torch.inf:
        with pytest.raises(ModelError, match=r"cannot say a token of q\.jsonl:2"):
            extract(llama, [window, question(1, None, 450)], tmp_path / "said")


def test_extract_features_says_which_answers_are_to_one_question_and_what_does_not_count(llama, tmp_path):
    """The same prompt in another row is the same question; text and choices stand each for themselves."""
    asked = [3, 9, 27, 81]
    windows = [
        Window([*asked, 5, 6], [False] * 4 + [True] * 2, 0, "q", "q:1", grade=True),
        Window([*asked, 7], [False] * 4 + [True], 0, "q", "q:1", grade=False),
        Window([*asked, 5, 6, 2], [False] * 4 + [True] * 2 + [False], 4, "q", "q:5", grade=True),
        Window([*asked[:3], 5, 6], [False] * 3 + [True] * 2, 5, "q", "q:6", grade=True),
        Window([1, *asked], [False] + [True] * 4, 6, "t", "t:1"),
        Window([1, *asked], [False] + [True] * 4, 7, "t", "t:2"),
    ]
    found = extract(llama, windows, tmp_path)
    assert found.question.tolist() == [0, 0, 0, 1, 2, 3]
    assert found.unscored.tolist() == [3, 3, 4, 2, 0, 0]  # the first token is not predicted
    assert found.of_windows([2, 4]).question.equal(found.question)  # by the window's number in the whole
