"""An ensemble behind a server, or in vLLM in this process: one reward model for all users, whose weights stay with the client.

    # llmrl serve runs/hyre_served --port 8001
    served = ServedEnsemble(HttpRewardClient("http://127.0.0.1:8001"), "runs/hyre_served")
    served.scores(prompts, answers)  # [N, K]

A sentence encoder has no form with K scores: there the server gives vectors, and the client applies the heads.

    # vllm serve ENCODER --runner pooling --port 8002
    client = EmbeddingRewardClient("http://127.0.0.1:8002", load_ensemble("runs/hyre"))
    served = ServedEnsemble(client, "runs/hyre")
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from llmrl.base_model import load_tokenizer
from llmrl.errors import EngineError, ModelError
from llmrl.hyre.ensemble import RewardEnsemble, load_ensemble
from llmrl.hyre.export import BIAS_KEY, EXPORT_FILE, EXPORT_FORMAT
from llmrl.hyre.pairs import Messages, model_text, plain_text
from llmrl.rollout.http import ServerFault
from llmrl.rollout.protocols import RewardClient
from llmrl.rollout.rewards import HttpRewardClient
from llmrl.rollout.server_pool import Member

Array = NDArray[np.float64]
LARGEST_DIFFERENCE = 0.25  # of the largest score; rounding to 16 bits stays far below, another model far above


class ServedEnsemble:
    """Scores of a `RewardEnsemble` whose base somebody else runs.

    Args:
        client: of the server, or `VllmRewards`; it gives K numbers a text.
        folder: that `export_ensemble` wrote and the server serves, or a copy without the weights; of a sentence encoder, the
            folder of the ensemble.
        check: ask for the scores of the texts that were scored when the folder was written, and refuse a server with others.

    Raises:
        ModelError: the folder is no ensemble, or one on a causal LM that was not exported.
        EngineError: what is served is not what lies in the folder, or does not answer.
    """

    def __init__(self, client: RewardClient, folder: Path | str, *, check: bool = True) -> None:
        self.client, self.folder = client, Path(folder).expanduser()
        self.ensemble = load_ensemble(self.folder)
        self.heads, self.fingerprint = self.ensemble.heads, self.ensemble.fingerprint
        self._bias, self._tokenizer = np.zeros(self.heads), None
        probes = self.ensemble.facts.get("probes", [])
        if self.ensemble.base_kind != "encoder":
            probes, self._bias = _read_export(self.folder, self.heads)
            self._tokenizer = load_tokenizer(self.folder)
        if check and probes:
            self._check(probes)

    def text(self, prompt: Messages, answer: str) -> str:
        """Return what the server is asked to read: the text that `RewardEnsemble.text` gives."""
        read = prompt if self.ensemble.reads == "dialogue" else ()
        return plain_text(read, answer) if self._tokenizer is None else model_text(self._tokenizer, read, answer)

    def scores(self, prompts: Sequence[Messages], answers: Sequence[str]) -> Array:
        """Return the heads' scores of answers, `[N, K]`.

        Raises:
            DataError, RequestError: a text is empty, or longer than the model reads.
            EngineError: the server is gone, or gives another number of scores.
        """
        return self._scores([self.text(prompt, answer) for prompt, answer in zip(prompts, answers, strict=True)])

    def _scores(self, texts: list[str]) -> Array:
        if not texts:
            return np.zeros((0, self.heads))
        found = np.asarray(self.client.scores(texts), np.float64)
        if found.shape != (len(texts), self.heads):
            raise EngineError(
                f"the served model gives {found.shape[-1]} scores a text, {self.folder} has {self.heads} heads: serve that "
                "folder"
            )
        return found + self._bias

    def _check(self, probes: list[dict[str, Any]]) -> None:
        wanted = np.asarray([probe["scores"] for probe in probes])
        difference = float(np.abs(self._scores([probe["text"] for probe in probes]) - wanted).max())
        largest = float(np.abs(wanted).max())
        if not difference <= LARGEST_DIFFERENCE * largest:
            raise EngineError(
                f"the served model is not the one in {self.folder}: a score of its own texts differs by {difference:.3g}, the "
                f"largest is {largest:.3g}\nserve that folder, in float32 or bfloat16"
            )


def _read_export(folder: Path, heads: int) -> tuple[list[dict[str, Any]], Array]:
    """Return the texts with their scores, and the bias of each head that the server leaves out.

    Raises:
        ModelError: the folder was not exported, by another version, or is damaged.
    """
    path = folder / EXPORT_FILE
    if not path.is_file():
        raise ModelError(f"{folder} is no exported ensemble: write one with llmrl hyre export and serve it")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if found["format"] != EXPORT_FORMAT:
            raise ModelError(
                f"{path} has format {found['format']!r}, expected {EXPORT_FORMAT}: install the llmrl that wrote it"
            )
        bias = np.zeros(heads)
        if found["form"] == "stock":
            bias = np.asarray(json.loads((folder / "config.json").read_text(encoding="utf-8"))[BIAS_KEY], np.float64)
        probes = [{"text": str(p["text"]), "scores": list(p["scores"])} for p in found["probes"]]
        if bias.shape != (heads,) or any(len(p["scores"]) != heads for p in probes):
            raise ValueError(f"expected {heads} numbers a text")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{folder} is damaged ({type(error).__name__}: {error}): export it again") from error
    return probes, bias


class EmbeddingRewardClient(HttpRewardClient):
    """K scores from a server that gives a sentence encoder's vectors (POST /v1/embeddings); the heads are applied here.

    Args:
        url: of the server, or several that serve the same encoder.
        ensemble: on that encoder.
        model: its name there; None takes the only one.
        max_length: tokens the encoder reads of a text, as where it was trained (256 for all-MiniLM-L6-v2); None takes the
            ensemble's own. Where neither says, the server refuses a longer text.
        options: of `HttpRewardClient`.

    Raises:
        ModelError: the ensemble's base is a causal LM.
        EngineError: a server does not answer, or they serve different models.
    """

    def __init__(
        self,
        url: str | Sequence[str],
        ensemble: RewardEnsemble,
        model: str | None = None,
        *,
        max_length: int | None = None,
        **options: Any,
    ) -> None:
        if ensemble.base_kind != "encoder":
            raise ModelError("the ensemble's base is a causal LM: write it with export_ensemble and serve that folder")
        self.head, self.max_length = ensemble.head, max_length or ensemble.max_length
        super().__init__(url, model, **options)

    def scores(self, texts: Sequence[str]) -> list[list[float]]:
        """Return `[N, K]`; see `HttpRewardClient.scores`. An empty text, which a server refuses, is sent as a space."""
        return super().scores([text or " " for text in texts])

    async def _batch(self, texts: list[str]) -> list[list[float]]:
        async def work(member: Member) -> list[list[float]]:
            body: dict[str, Any] = {"model": self.model, "input": texts, "encoding_format": "float"}
            if self.max_length is not None:
                body["truncate_prompt_tokens"] = self.max_length
            return self._apply(read_vectors(await member.http.post("/v1/embeddings", body), len(texts)))

        return await self._pool.call(work)

    def _apply(self, vectors: Array) -> list[list[float]]:
        width = self.head.spec.hidden_size
        if vectors.shape[1] != width:
            raise ServerFault(f"answered with vectors of {vectors.shape[1]} numbers, the heads read {width}")
        with torch.inference_mode():
            return [list(row) for row in self.head(torch.from_numpy(vectors)).double().tolist()]


def read_vectors(answer: Any, count: int) -> Array:
    """Return the vectors in an answer of /v1/embeddings, `[count, H]`, in the order of the texts.

    Raises:
        ServerFault: they are not `count` vectors of finite numbers of one length.
    """
    try:
        rows = {int(item["index"]): item["embedding"] for item in answer["data"]}
        found = np.asarray([rows[i] for i in range(count)], np.float64)
    except (KeyError, TypeError, ValueError):
        raise ServerFault(f"answered with something that is no embedding of {count} texts: {answer!r:.80}") from None
    if found.ndim != 2 or len(rows) != count or not np.isfinite(found).all():
        raise ServerFault(f"answered with {len(rows)} vectors of {count} texts, or with numbers that are not finite")
    return found
