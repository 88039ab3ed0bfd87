"""The client of a served policy: what it sends, and what it refuses before it sends anything."""

import pytest

from llmrl.errors import UsageError
from llmrl.leret.client import SearchClient
from llmrl.leret.prompts import PromptFormat, SearchSetup
from llmrl.rollout.server_answers import sampling_body
from llmrl.types import SamplingConfig


@pytest.fixture
def folder(tmp_path):
    SearchSetup(PromptFormat(instruction="Search.", max_tokens=9, template_options={"enable_thinking": False})).save(
        tmp_path
    )
    return tmp_path


@pytest.fixture
def sent(monkeypatch):
    """What was sent, as (method, path, body)."""
    calls = []

    def ask(self, method, path, body=None):
        calls.append((method, path, body))
        return {"data": [{"id": "first"}], "choices": [{"message": {"content": " dam \n"}}]}

    monkeypatch.setattr(SearchClient, "_ask", ask)
    return calls


def test_every_setting_of_sampling_is_spelled_out(folder, sent):
    """What is left out a server takes from generation_config.json, a repetition penalty for one."""
    with SearchClient("http://127.0.0.1:1", folder) as client:
        assert client.query("Who?") == "dam"
    method, path, body = sent[-1]
    assert (method, path, body["model"]) == ("POST", "/v1/chat/completions", "first")
    for name, value in sampling_body(SamplingConfig(temperature=0.0, max_tokens=9)).items():
        assert body[name] == value
    assert (body["repetition_penalty"], body["top_p"], body["top_k"], body["min_p"]) == (1.0, 1.0, 0, 0.0)
    assert body["chat_template_kwargs"] == {"enable_thinking": False}
    assert body["messages"] == [{"role": "user", "content": "Question: Who?\nSearch."}]


def test_an_adapter_needs_its_name_for_the_first_model_of_a_server_is_the_base(folder, sent):
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(UsageError, match="is an adapter: give model=NAME"):
        SearchClient("http://127.0.0.1:1", folder)
    assert SearchClient("http://127.0.0.1:1", folder, model="search").model == "search"
    assert sent == []


def test_a_folder_without_a_search_prompt_is_refused(tmp_path):
    with pytest.raises(UsageError, match=r"has no search_prompt\.json"):
        SearchClient("http://127.0.0.1:1", tmp_path)
