"""Using a policy that is served: its queries from an OpenAI-compatible server, its hops with any retriever.

    client = SearchClient("http://127.0.0.1:8000", "runs/leret/policy")
    client.query("Where was the builder of Alder Dam born?", passages=[])    the next query
    client.search("Where was the builder of Alder Dam born?", retriever)     all hops: queries and passages

The prompt is the one the policy was trained with: `search_prompt.json` of its folder makes the messages, and the server
renders them with the chat template that was saved with the policy. The name of a control token in a question or a passage
is a control token to such a server, while training and `llmrl leret eval` spell it as ordinary text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import httpx

from llmrl.base_model import is_adapter
from llmrl.errors import EngineError, UsageError
from llmrl.leret.context import SearchState, extend, merge
from llmrl.leret.corpus import Passage
from llmrl.leret.prompts import PROMPT_FILE, load_setup, read_query
from llmrl.leret.retriever import Retriever, retrieve
from llmrl.rollout.server_answers import sampling_body
from llmrl.types import SamplingConfig


@dataclass(frozen=True)
class Found:
    """What a search came to: one query a hop, and the passages in the order of the policy's merge rule."""

    queries: tuple[str, ...]
    passages: tuple[Passage, ...]


class SearchClient:
    """Client of one server. Use it as a context manager, or close it.

    Args:
        url: of the server, without /v1.
        folder: of the policy: a model or an adapter that llmrl trained.
        model: what the server calls it; an adapter needs its name, a model is the first that the server lists.
        api_key: sent as a bearer token.
        timeout: seconds one answer may take.

    Raises:
        UsageError: the folder holds no search prompt; an adapter without a name.
        EngineError: the server does not answer.
    """

    def __init__(
        self,
        url: str,
        folder: Path | str,
        *,
        model: str | None = None,
        api_key: str | None = None,
        timeout: float = 120.0,
    ) -> None:
        setup = load_setup(folder)
        if setup is None:
            raise UsageError(f"{folder} has no {PROMPT_FILE}: expected the folder of a policy that llmrl leret trained")
        if model is None and is_adapter(folder):
            raise UsageError(
                f"{folder} is an adapter: give model=NAME, the name the server knows it by (--lora-modules NAME=...)"
            )
        self.setup = setup
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        # a proxy for the outside world does not lead to servers of ours
        self._http = httpx.Client(base_url=url.rstrip("/"), headers=headers, timeout=timeout, trust_env=False)
        self.model = model or str(self._ask("GET", "/v1/models")["data"][0]["id"])

    def query(self, question: str, passages: Sequence[Passage] = (), *, temperature: float = 0.0) -> str:
        """Return the next query; "" means that nothing more is to be searched.

        Args:
            question: what is to be answered.
            passages: found so far, in the order of the policy's merge rule.
            temperature: 0 is greedy, as the policy is evaluated.
        """
        form = self.setup.format
        messages = [{"role": m.role, "content": m.content} for m in form.messages(form.bare, question, passages)]
        wanted = SamplingConfig(temperature=temperature, max_tokens=form.max_tokens)
        body: dict[str, Any] = {"model": self.model, "messages": messages, **sampling_body(wanted)}
        if form.template_options:
            body["chat_template_kwargs"] = form.template_options
        return read_query(self._ask("POST", "/v1/chat/completions", body)["choices"][0]["message"]["content"] or "")

    def search(self, question: str, retriever: Retriever) -> Found:
        """Search as often as the policy was trained to, or until it writes no query."""
        state, known = SearchState(question), dict[str, Passage]()
        while state.hop < self.setup.hops:
            shown = [known[name] for name in merge(state, self.setup.merge)]
            first = self.setup.question_first and not state.hop
            query = question if first else self.query(question, shown)
            if not query.strip():
                break
            seen = [state.seen] if self.setup.unseen_only else None
            (hits,) = retrieve(retriever, [query], self.setup.k, seen=seen)
            known.update((hit.id, Passage(hit.id, hit.title, hit.text)) for hit in hits)
            state = extend(state, query, hits)
        return Found(state.queries, tuple(known[name] for name in merge(state, self.setup.merge)))

    def _ask(self, method: str, path: str, body: Any = None) -> Any:
        try:
            answer = self._http.request(method, path, json=body)
        except httpx.HTTPError as error:
            where = f"{self._http.base_url}{path.lstrip('/')}"
            raise EngineError(f"{where} does not answer ({type(error).__name__}: {error}); check the server") from None
        if not answer.is_success:
            raise EngineError(f"{answer.url}: status {answer.status_code}: {' '.join(answer.text.split())[:300]}")
        return answer.json()

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
