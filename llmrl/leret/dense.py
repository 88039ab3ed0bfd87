"""Dense retrieval in process: any encoder folder (`llmrl.encoder`), cosine similarity, every passage compared.

Passages are embedded once and kept on disk; the search is a plain matrix product, which for millions of passages wants an
accelerator. A query or passage is cut at `max_length` tokens, and `truncated` counts how many were.
"""

from __future__ import annotations

import json
import os
import threading
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from llmrl.encoder import Encoder
from llmrl.errors import DataError
from llmrl.leret.corpus import Corpus, fingerprint
from llmrl.leret.retriever import Hit, check_query_batch

_SCORES_AT_ONCE = 1 << 26


class DenseRetriever:
    """Cosine similarity of title + text with the query.

    Args:
        corpus: the passages.
        encoder: a folder or hub name of an encoder in safetensors.
        query_prefix: put before every query, such as "query: " for e5.
        passage_prefix: put before every passage, such as "passage: " for e5.
        max_length: tokens read of a query or passage, prefix and special tokens included; None: what the folder says.
        cache_dir: folder in which embeddings of passages are kept; None keeps none.
        device: a torch device; None takes the GPU if there is one.
        batch_size: passages embedded at once.
        query_batch_size: queries embedded at once. At 1 a score does not depend on what else is asked, bit for bit.
        progress: show a bar while passages are embedded.

    Raises:
        UsageError: the folder is not there, or max_length is out of range.
        ModelError: no safetensors, an encoder that cannot be loaded, another pooling than mean or cls.
        DataError: a file of embeddings that is not one.
    """

    name = "dense"

    def __init__(
        self,
        corpus: Corpus,
        encoder: Path | str,
        *,
        query_prefix: str = "",
        passage_prefix: str = "",
        max_length: int | None = None,
        cache_dir: Path | str | None = None,
        device: str | None = None,
        batch_size: int = 64,
        query_batch_size: int = 1,
        progress: bool = True,
    ) -> None:
        self._corpus, self._query_prefix, self._query_batch = corpus, query_prefix, query_batch_size
        self._encoder = Encoder(encoder, max_length=max_length, device=device)
        settings = self._encoder.settings
        self.max_length = settings.max_length
        index = {
            "kind": "dense",
            "pooling": settings.pooling,
            "max_length": settings.max_length,
            "passage_prefix": passage_prefix,
            "encoder": self._encoder.fingerprint,
            "corpus": corpus.fingerprint,
        }
        self.fingerprint = fingerprint([index, query_prefix])
        self.truncated: Counter[str] = Counter()
        self._lock = threading.Lock()

        def embed() -> Tensor:
            texts = [passage_prefix + passage.both for passage in corpus.passages]
            found, cut = self._encoder.embed(texts, batch_size, progress=progress)
            self.truncated["passages"] = cut
            return found.cpu()

        file = None if cache_dir is None else Path(cache_dir).expanduser() / f"{fingerprint([index])[7:]}.safetensors"
        vectors = embed() if file is None else _kept(file, index, len(corpus), embed, self.truncated)
        # a copy, for it is aligned in memory: a matrix product of what lies in a mapped file differs in its last bits
        self._vectors = vectors.to(self._encoder.device, copy=True)

    def search(self, queries: Sequence[str], k: int) -> list[list[Hit]]:
        """Return the k nearest passages; a query without one known token has no hit. See `Retriever`."""
        queries = check_query_batch(queries, k)
        asked = [i for i, query in enumerate(queries) if self._encoder.says_something(query)]
        results: list[list[Hit]] = [[] for _ in queries]
        size = max(1, min(self._query_batch, _SCORES_AT_ONCE // len(self._corpus)))
        for start in range(0, len(asked), size):
            rows = asked[start : start + size]
            vectors, cut = self._encoder.embed([self._query_prefix + queries[i] for i in rows], size)
            if cut:
                with self._lock:
                    self.truncated["queries"] += cut
            # texts that read the same differ in their last bits by where they stand in a batch, on some processors
            scores = (vectors @ self._vectors.T).round(decimals=6)
            for i, row in zip(rows, scores, strict=True):
                results[i] = self._hits(row, k)
        return results

    def _hits(self, scores: Tensor, k: int) -> list[Hit]:
        k = min(k, len(scores))
        lowest = scores.topk(k).values[-1]
        candidates = (scores >= lowest).nonzero().flatten()  # all that tie with the k-th, in order of the corpus
        order = scores[candidates].sort(descending=True, stable=True).indices[:k]
        hits = []
        for i in candidates[order].tolist():
            passage = self._corpus.passages[i]
            hits.append(Hit(passage.id, passage.title, passage.text, float(scores[i])))
        return hits


def _kept(file: Path, index: dict[str, Any], passages: int, embed: Any, truncated: Counter[str]) -> Tensor:
    """Return the embeddings in `file`, or make and keep them."""
    from safetensors import SafetensorError, safe_open
    from safetensors.torch import save_file

    if not file.exists():
        vectors = embed().contiguous()
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary = file.with_name(f".{file.name}.{os.getpid()}.{threading.get_ident()}")
        try:
            said = {"index": json.dumps(index, sort_keys=True), "truncated": str(truncated["passages"])}
            save_file({"embeddings": vectors}, str(temporary), metadata=said)
            os.replace(temporary, file)
        finally:
            temporary.unlink(missing_ok=True)
        return vectors
    try:
        with safe_open(str(file), framework="pt") as tensors:
            said = tensors.metadata() or {}
            vectors = tensors.get_tensor("embeddings")
        same = said.get("index") == json.dumps(index, sort_keys=True) and len(vectors) == passages
    except (SafetensorError, OSError) as error:
        raise DataError(f"{file} is not a whole file of embeddings ({error}); delete it, it is made again") from error
    if not same:
        raise DataError(f"{file} holds embeddings of another corpus or encoder; delete it, it is made again")
    truncated["passages"] = int(said.get("truncated", 0))
    return vectors
