"""The check behind --check_serving: it passes on a good folder, and fails when vLLM reads another head."""

import json
import shutil

import pytest
from serving_folders import STORIES, heads_folder

from llmrl.errors import HeadMismatchError, ModelError
from llmrl.serving import check

pytestmark = pytest.mark.vllm


@pytest.fixture(scope="module")
def penalising(tmp_path_factory):
    """A folder on a base that asks for a repetition penalty and for sampling."""
    root = tmp_path_factory.mktemp("penalising")
    base = shutil.copytree(STORIES, root / "base")
    path = base / "generation_config.json"
    wishes = {"repetition_penalty": 1.3, "do_sample": True, "temperature": 0.6}
    path.write_text(json.dumps({**json.loads(path.read_text()), **wishes}))
    return heads_folder(base, root / "calibrated", seed=1)


def test_check_serving_decodes_without_the_penalties_of_the_base(served, penalising):
    neutral, penalised = check._transformers_side(str(served)), check._transformers_side(str(penalising))
    assert penalised["greedy"] == neutral["greedy"]


def test_check_serving_agrees(penalising):
    result = check.check_serving(str(penalising))
    assert result.max_logprob_difference < 1e-3
    assert result.tokens > 50
    assert result.greedy_identical
    assert result.dtype == "float32"
    assert "greedy text the same" in result.sentence()


def test_check_serving_fails_when_vllm_reads_another_head(served, other_head, tmp_path, monkeypatch):
    folder = shutil.copytree(served, tmp_path / "folder")
    real = check._transformers_side

    def then_alter(path):
        reference = real(path)
        shutil.copyfile(other_head / "llmrl_heads.safetensors", folder / "llmrl_heads.safetensors")
        return reference

    monkeypatch.setattr(check, "_transformers_side", then_alter)
    with pytest.raises(ModelError, match="vLLM and transformers disagree"):
        check.check_serving(str(folder))


@pytest.fixture
def answers(monkeypatch):
    """`answers(text, code, difference)`: what vLLM's process printed and returned, and the difference that was found."""

    def pretend(text="", code=0, difference=0.0):
        def call(command, *, stdout, **kwargs):
            stdout.write(text)
            stdout.flush()
            check.write_json(command[-1], {})
            return code

        result = check.ServingCheck(difference, 1, True, "float32")
        monkeypatch.setattr(check, "_transformers_side", lambda folder: {"prompts": [[1, 2]], "dtype": "float32"})
        monkeypatch.setattr(check.subprocess, "call", call)
        monkeypatch.setattr(check, "_compare", lambda reference, found: result)

    return pretend


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_check_serving_different_greedy_text_fails_in_float32_only(dtype, served, monkeypatch):
    """In 16 bits a rounding can turn a near-tie."""
    reference = {"prompts": [[1, 2]], "dtype": dtype, "logprobs": [[-1.5]], "greedy": [[3, 4]]}

    def serve(greedy):
        def call(command, **kwargs):
            check.write_json(command[-1], {"logprobs": [[-1.5]], "greedy": [greedy]})
            return 0

        monkeypatch.setattr(check.subprocess, "call", call)
        return check.check_serving(str(served))

    monkeypatch.setattr(check, "_transformers_side", lambda folder: reference)
    assert serve([3, 4]).greedy_identical
    if dtype == "float32":
        with pytest.raises(ModelError, match=r"disagree on .* greedy text DIFFERENT"):
            serve([3, 5])
    else:
        assert not serve([3, 5]).greedy_identical


def test_check_serving_tolerates_rounding_and_no_more(served, answers):
    answers(difference=9e-4)
    check.check_serving(str(served))
    answers(difference=2e-3)
    with pytest.raises(ModelError, match="disagree"):
        check.check_serving(str(served))
    answers(difference=float("nan"))  # every comparison with it is false
    with pytest.raises(ModelError, match="disagree"):
        check.check_serving(str(served))


def test_check_serving_says_why_vllm_does_not_load(served, answers):
    answers(text="a line\nValueError: no head of size 8\na last line\n", code=1)
    with pytest.raises(ModelError, match=r"vLLM does not load .*: ValueError: no head of size 8"):
        check.check_serving(str(served))


def test_check_serving_refuses_a_changed_folder(served, tmp_path):
    folder = shutil.copytree(served, tmp_path / "folder")
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    with pytest.raises(HeadMismatchError, match="the chat template"):
        check.check_serving(str(folder))
