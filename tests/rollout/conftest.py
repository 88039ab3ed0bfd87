"""Engines for tests: each model is opened once for all of them, and a test that gives it weights puts the old ones back."""

import contextlib
import functools

import pytest
from engine_support import SMALL, STORIES, TEXTS, trainer, weights, write_tiny
from fake_vllm import FakeVllm
from server_support import on_completion

from llmrl.rollout import server
from llmrl.rollout.server import ServerEngine
from llmrl.vllm_compat import vllm_build, why_no_vllm

read_facts_once = functools.cache(server.read_facts)  # one model for all tests of the client


def pytest_runtest_setup(item):
    if item.get_closest_marker("vllm") and vllm_build() is None:
        pytest.skip(f"no vLLM: {why_no_vllm()}")


@pytest.fixture(scope="session")
def text_ids(stories_tokenizer):
    return [stories_tokenizer(text)["input_ids"] for text in TEXTS]


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    """Return `tiny_folder(name) -> folder`; "stories" is the pretrained model of the repository."""
    made = {"stories": STORIES}

    def make(name):
        if name not in made:
            made[name] = write_tiny(name, tmp_path_factory.mktemp("tiny") / name)
        return made[name]

    return make


@pytest.fixture(scope="session")
def open_vllm():
    """Return `open_vllm(folder, **options) -> engine`, the same one for the same arguments; closed at the end."""
    from llmrl.rollout.vllm_engine import VllmEngine

    opened = {}
    with contextlib.ExitStack() as stack:
        if vllm_build() is not None:
            from vllm.model_executor.models import registry

            patch = stack.enter_context(pytest.MonkeyPatch.context())
            # a process to inspect an architecture in costs five seconds; the serving tests go through the real one
            patch.setattr(registry, "_run_in_subprocess", lambda function: function())

        def get(folder, **options):
            key = (str(folder), repr(sorted(options.items())))
            if key not in opened:
                opened[key] = stack.enter_context(VllmEngine(str(folder), **(SMALL | options)))
            return opened[key]

        yield get


@pytest.fixture(scope="session")
def stories_vllm(open_vllm):
    """vLLM on the example model, for reading only."""
    return open_vllm(STORIES)


@pytest.fixture(scope="session")
def stories_hf():
    """The transformers backend on the example model, for reading only."""
    from llmrl.rollout.transformers_engine import TransformersEngine

    with TransformersEngine(str(STORIES)) as engine:
        yield engine


@pytest.fixture(params=["transformers", pytest.param("vllm", marks=pytest.mark.vllm)])
def engine(request):
    """Each backend in turn, for reading only."""
    return request.getfixturevalue({"transformers": "stories_hf", "vllm": "stories_vllm"}[request.param])


@pytest.fixture(scope="session")
def stories_model():
    """The example model as a trainer holds it; not to be changed."""
    return trainer(STORIES)


@pytest.fixture(scope="session")
def _synced_engines(open_vllm):
    from llmrl.rollout.transformers_engine import TransformersEngine

    opened = {}
    with contextlib.ExitStack() as stack:

        def get(backend):
            if backend not in opened:
                if backend == "vllm":
                    opened[backend] = open_vllm(STORIES, max_model_len=500)  # another engine than the one only read
                else:
                    opened[backend] = stack.enter_context(TransformersEngine(str(STORIES)))
            return opened[backend]

        yield get


@pytest.fixture(params=["transformers", pytest.param("vllm", marks=pytest.mark.vllm)])
def synced(request, _synced_engines, stories_model):
    """Each backend in turn, with the example model's weights, to be updated as the test likes."""
    engine = _synced_engines(request.param)
    engine.update(weights(stories_model))
    return engine


@pytest.fixture
def synced_vllm(_synced_engines, stories_model):
    engine = _synced_engines("vllm")
    engine.update(weights(stories_model))
    return engine


@pytest.fixture
def fakes(stories_tokenizer):
    """Return `fakes(*faults, ...)`: one fake server a fault (None: a good one), stopped at the end."""
    started = []

    def start(*faults, **options):
        new = [FakeVllm(stories_tokenizer, **options) for _ in faults]
        started.extend(new)
        for fake, fault in zip(new, faults, strict=True):
            fake.later = on_completion(fault)
        return new

    start.more = started.append
    yield start
    for fake in started:
        if not fake.stopping.is_set():
            fake.stop()


@pytest.fixture
def client(stories_dir, tmp_path, monkeypatch):
    """Return `client(fakes, ...)`: opened while all servers are well; their faults begin after that."""
    opened = []
    monkeypatch.setattr(server, "read_facts", read_facts_once)

    def open_on(servers, **options):
        options = {"retries": 3, "patience": 0.6, "timeout": 20.0, "transfer_dir": tmp_path} | options
        new = ServerEngine(str(stories_dir), [fake.url for fake in servers], **options)
        opened.append(new)
        for fake in servers:
            fake.seen.clear()
            fake.fault = fake.later
        return new

    yield open_on
    for one in opened:
        one.close()
