"""Which backend `auto` takes and why, and what `open_engine` refuses."""

from dataclasses import replace
from pathlib import Path

import pytest

from llmrl.errors import ModelError, UsageError, VersionError
from llmrl.rollout import backends
from llmrl.rollout.model_facts import end_token_ids, read_facts
from llmrl.rollout.protocols import Engine, Sampler, Scorer, Syncable
from llmrl.rollout.scripted import ScriptedEngine

STORIES = Path(__file__).resolve().parents[2] / "examples" / "stories260k"


@pytest.fixture(scope="module")
def facts():
    return read_facts(str(STORIES))


@pytest.fixture
def machine(monkeypatch):
    """Say what is installed: build, problem of its version, GPU."""

    def have(build="cpu", problems=(), gpu=False):
        monkeypatch.setattr(backends, "vllm_build", lambda: build)
        monkeypatch.setattr(backends, "why_no_vllm", lambda: "not installed: pip install vllm")
        monkeypatch.setattr(backends, "check_versions", lambda names, strict: list(problems))
        monkeypatch.setattr(backends, "has_nvidia_driver", lambda: gpu)
        monkeypatch.setattr(backends, "vllm_architectures", lambda: frozenset({"LlamaForCausalLM"}))

    return have


def test_choose_backend_takes_vllm_where_it_can_be_used(machine, facts):
    machine()
    assert backends.choose_backend(facts)[0] == "vllm"
    machine(build="cuda", gpu=True)
    assert backends.choose_backend(facts)[0] == "vllm"


def test_choose_backend_takes_vllm_for_a_folder_with_heads(machine, facts):
    machine()
    assert backends.choose_backend(replace(facts, architecture="LlmrlLlamaForCausalLM"))[0] == "vllm"


@pytest.mark.parametrize(
    ("have", "architecture", "why"),
    [
        ({"build": None}, "LlamaForCausalLM", "not installed: pip install vllm"),
        ({"problems": ["vllm 0.2.5 is installed, llmrl needs >=0.32"]}, "LlamaForCausalLM", "vllm 0.2.5 is installed"),
        ({"build": "cuda"}, "LlamaForCausalLM", "needs a GPU"),
        ({}, "NobodyForCausalLM", "does not know NobodyForCausalLM"),
    ],
)
def test_choose_backend_falls_back_to_transformers_and_says_why(machine, facts, have, architecture, why):
    machine(**have)
    name, reason = backends.choose_backend(replace(facts, architecture=architecture))
    assert name == "transformers"
    assert why in reason


def test_choose_backend_takes_servers_that_were_named(machine, facts):
    machine(build=None)
    assert backends.choose_backend(facts, ["http://127.0.0.1:8000"])[0] == "server"


def test_open_engine_refuses_an_unknown_backend_with_the_nearest():
    with pytest.raises(UsageError, match="did you mean 'transformers'"):
        backends.open_engine(str(STORIES), rollout_backend="transformer")


def test_open_engine_refuses_a_dtype_and_passes_the_context_on_to_servers(monkeypatch):
    from llmrl.rollout import server

    given = []
    monkeypatch.setattr(server, "ServerEngine", lambda *args, **options: given.append(options))
    url = ["http://127.0.0.1:8000"]
    for backend in ("auto", "server"):
        with pytest.raises(UsageError, match="dtype bfloat16 with the server backend: a server has its own dtype"):
            backends.open_engine(str(STORIES), rollout_backend=backend, server_url=url, dtype="bfloat16")
    assert given == []
    backends.open_engine(str(STORIES), server_url=url, max_model_len=64)
    assert given == [{"adapter": None, "max_model_len": 64}]


def test_open_engine_says_what_to_install_when_vllm_is_asked_for_and_absent(monkeypatch):
    from llmrl.rollout import vllm_start

    monkeypatch.setattr(vllm_start, "vllm_build", lambda: None)
    monkeypatch.setattr(vllm_start, "why_no_vllm", lambda: "not installed: pip install vllm")
    with pytest.raises(VersionError, match="pip install vllm"):
        backends.open_engine(str(STORIES), rollout_backend="vllm")


def test_open_engine_checks_the_version_of_vllm(monkeypatch):
    from llmrl.rollout import vllm_start

    def wrong(names):
        raise VersionError("vllm 0.2.5 is installed, llmrl needs >=0.32,<0.33\npip install 'vllm>=0.28,<0.33'")

    monkeypatch.setattr(vllm_start, "vllm_build", lambda: "cpu")
    monkeypatch.setattr(vllm_start, "check_versions", wrong)
    with pytest.raises(VersionError, match=r"0\.2\.5 is installed"):
        backends.open_engine(str(STORIES), rollout_backend="vllm")


def test_open_engine_samples_and_satisfies_the_protocols():
    with backends.open_engine(str(STORIES), rollout_backend="transformers") as engine:
        for protocol in (Sampler, Scorer, Syncable, Engine):
            assert isinstance(engine, protocol)
        assert engine.dtype == "float32"
    scripted = ScriptedEngine(engine.tokenizer, lambda request: "yes")
    assert all(isinstance(scripted, protocol) for protocol in (Sampler, Scorer, Syncable, Engine))


def test_read_facts_refuses_a_missing_folder_and_a_context_that_is_too_long(tmp_path):
    with pytest.raises(UsageError, match="not found"):
        read_facts(str(tmp_path / "nowhere"))
    with pytest.raises(ModelError, match="more than the 512 positions"):
        read_facts(str(STORIES), max_model_len=513)


def test_end_token_ids_joins_all_sources(tmp_path, facts):
    assert facts.end_ids == {1, 2}
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [7, 8]}')
    (tmp_path / "config.json").write_text('{"eos_token_id": 9}')
    assert end_token_ids(tmp_path, facts.tokenizer) == {2, 7, 8, 9}


def test_settings_for_a_cpu_hold_one_whole_context_and_float32(facts):
    from llmrl.rollout.vllm_start import settings_for

    small = settings_for(facts, "cpu", "auto", 0, None)
    assert (small["dtype"], small["kv_cache_memory_bytes"]) == ("float32", 1 << 30)
    # 32 layers of 8 heads of 128: 65,536 numbers a token, 128k tokens
    long = replace(facts, cached_numbers=65536, max_model_len=131072)
    assert settings_for(long, "cpu", "auto", 0, None)["kv_cache_memory_bytes"] >= 65536 * 4 * 131072


def test_settings_for_a_gpu_keep_the_dtype_of_the_checkpoint(facts):
    from llmrl.rollout.vllm_start import settings_for

    assert facts.dtype == "float32"
    assert settings_for(facts, "cuda", "auto", 0, None)["dtype"] == "float32"
    assert settings_for(facts, "cuda", "bfloat16", 0, None)["dtype"] == "bfloat16"
    assert facts.cached_numbers == 2 * 5 * 4 * 32


def test_stop_strings_that_are_special_tokens_are_refused(facts):
    from llmrl.errors import RequestError
    from llmrl.types import SamplingConfig

    engine = ScriptedEngine(facts.tokenizer, lambda request: "yes")
    with pytest.raises(RequestError, match=r"stop \['</s>'\]: special tokens .* stop_token_ids"):
        engine.generate([[1, 5]], SamplingConfig(stop=("</s>", "x")))
