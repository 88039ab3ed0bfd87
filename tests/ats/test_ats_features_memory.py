"""Memory above the weights does not grow with tokens times vocabulary: counted tensor by tensor, so the same on any machine."""

import weakref

import pytest
import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from llmrl.ats import output_layer
from llmrl.ats.data import Window
from llmrl.ats.extract import extract_features
from llmrl.ats.features import exact_lse
from llmrl.ats.fit_vector import fit_vector, predict_vector
from llmrl.ats.output_layer import OutputLayer

VOCABULARY, WINDOW = 6000, 250
LOGITS_OF_A_WINDOW = WINDOW * VOCABULARY * 4
CHUNK = LOGITS_OF_A_WINDOW // 10


class LiveBytes(TorchDispatchMode):
    """Bytes of the tensors made under it that are alive; `peak` is the most there were at a time."""

    def __init__(self):
        super().__init__()
        self.holders, self.sizes, self.level, self.peak = {}, {}, 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = {t.untyped_storage().data_ptr() for t in tree_iter((args, kwargs)) if isinstance(t, torch.Tensor)}
        result = function(*args, **(kwargs or {}))
        for tensor in tree_iter(result):
            if isinstance(tensor, torch.Tensor):
                self._hold(tensor, given)
        return result

    def _hold(self, tensor, given):
        storage = tensor.untyped_storage()
        key = storage.data_ptr()
        if key not in self.holders:
            if key in given or storage.nbytes() == 0:
                return  # a view of something older, such as a weight
            self.holders[key], self.sizes[key] = 0, storage.nbytes()
            self.level += storage.nbytes()
            self.peak = max(self.peak, self.level)
        self.holders[key] += 1
        weakref.finalize(tensor, self._release, key)

    def _release(self, key):
        self.holders[key] -= 1
        if self.holders[key] == 0:
            self.level -= self.sizes.pop(key)
            del self.holders[key]


def peak_of(action):
    with LiveBytes() as live:
        action()
    return live.peak


@pytest.fixture(scope="module")
def model():
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
        num_key_value_heads=1,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config).eval()


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(output_layer, "CHUNK_BYTES", CHUNK)
    monkeypatch.setattr("llmrl.ats.fit_vector.MIN_STEPS", 4)


def windows(count):
    ids = torch.randint(3, VOCABULARY, (count, WINDOW), generator=torch.Generator().manual_seed(1)).tolist()
    return [Window(row, [False] + [True] * (WINDOW - 1), i, "", "") for i, row in enumerate(ids)]


def extract(model, count, folder, sequences=False):
    return extract_features(
        model, windows(count), batch_size=2, cache_dir=folder, fingerprint="base", sequences=sequences
    )  # fmt: skip


def test_live_bytes_sees_logits_that_are_held(model, tmp_path):
    features = extract(model, 2, tmp_path)
    layer = OutputLayer.of(model)
    assert peak_of(lambda: layer.logits(features.hidden)) > 1.9 * LOGITS_OF_A_WINDOW
    # nor can they hide in pieces
    assert peak_of(lambda: [chunk.logits for chunk in features.logits(layer)]) > 1.9 * LOGITS_OF_A_WINDOW
    assert peak_of(lambda: [chunk.logits.sum() for chunk in features.logits(layer)]) < 0.5 * LOGITS_OF_A_WINDOW


@pytest.mark.parametrize("sequences", [False, True])
def test_extract_features_never_hold_tokens_times_vocabulary(sequences, model, tmp_path, monkeypatch):
    monkeypatch.setattr("llmrl.ats.extract.check_output_layer", lambda *_: None)  # 64 tokens' logits, whatever the data
    peaks = {n: peak_of(lambda n=n: extract(model, n, tmp_path / str(n), sequences)) for n in (1, 3)}
    assert CHUNK < peaks[1] < 0.9 * LOGITS_OF_A_WINDOW
    assert peaks[3] - peaks[1] < 0.3 * LOGITS_OF_A_WINDOW  # the features themselves, 0.5 kB a token


@pytest.mark.parametrize("work", ["exact_lse", "fit_vector", "predict_vector"])
def test_features_recomputed_logits_live_a_chunk_at_a_time(work, model, tmp_path):
    layer = OutputLayer.of(model)
    peaks = {}
    for count in (1, 3):
        features = extract(model, count, tmp_path / str(count))
        head = fit_vector(
            layer, features.select(torch.arange(40)), features.select(torch.arange(40)), start=0.0, seed=0
        )
        action = {
            "exact_lse": lambda f=features: exact_lse(layer, f, {"a": torch.zeros(len(f)), "b": torch.ones(len(f))}),
            "fit_vector": lambda f=features: fit_vector(layer, f, f, start=0.0, seed=0),
            "predict_vector": lambda f=features, h=head: predict_vector(h, layer, f),
        }[work]
        peaks[count] = peak_of(action)
    assert CHUNK < peaks[1] < 0.9 * LOGITS_OF_A_WINDOW
    assert peaks[3] - peaks[1] < 0.1 * LOGITS_OF_A_WINDOW
