"""What is sent to a vLLM server for one sample or score, and what its answer must hold to be believed.

Pure functions of plain JSON values. An answer that does not hold up is a `ServerFault`: another server is asked.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from llmrl.errors import RequestError
from llmrl.rollout.engine import Request, cut_answer
from llmrl.rollout.http import ServerFault
from llmrl.rollout.protocols import Sample
from llmrl.types import FinishReason, PolicyVersion, SamplingConfig

_FINISH = {"stop": FinishReason.STOP, "length": FinishReason.LENGTH}
_ID = "token_id:"
# a log_softmax may end a rounding error above zero; logits, which some servers report instead, are far above
_MAX_LOGPROB = 1e-2
NOT_A_NUMBER = "the model gave a logprob that is not a number for this prompt"
NOT_IN_JSON = "not JSON compliant"  # what vLLM answers in place of NaN


def completion_body(request: Request, model: str) -> dict[str, Any]:
    """Return the body of POST /v1/completions for one sample.

    Every setting is spelled out: what is absent, a server fills in from the model's generation_config.json.
    """
    wanted = request.sampling
    body: dict[str, Any] = {
        "model": model,
        "prompt": list(request.token_ids),
        **sampling_body(wanted),
        "stop": list(wanted.stop),
        "stop_token_ids": sorted(request.end_ids),
        "ignore_eos": True,  # the end tokens are all in stop_token_ids, as for the other backends
        "skip_special_tokens": True,
        "logprobs": wanted.logprobs,
        "return_token_ids": True,
        "return_tokens_as_token_ids": True,
    }
    if wanted.seed is not None:
        body["seed"] = wanted.seed
    if wanted.json_schema is not None:
        body["structured_outputs"] = {"json": wanted.json_schema}
    return body


def sampling_body(wanted: SamplingConfig) -> dict[str, Any]:
    """Return every setting of how tokens are drawn, penalties that llmrl never uses among them."""
    return {
        "max_tokens": wanted.max_tokens,
        "temperature": wanted.temperature,
        "top_p": wanted.top_p,
        "top_k": wanted.top_k,
        "min_p": wanted.min_p,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
    }


def score_body(token_ids: Sequence[int], model: str) -> dict[str, Any]:
    """Return the body of POST /v1/completions that scores given tokens; vLLM cannot do without one new token."""
    return {
        "model": model,
        "prompt": list(token_ids),
        "max_tokens": 1,
        "temperature": 0.0,
        "prompt_logprobs": 0,
        "return_token_ids": True,
    }


def read_completion(
    answer: Any, request: Request, *, tokenizer: Any, vocab_size: int, version: PolicyVersion
) -> Sample:
    """Return the sample an answer holds.

    Raises:
        ServerFault: The answer is not one to this request; the message says what does not fit.
        RequestError: A logprob is NaN or infinite, which any server with these weights would answer.
    """
    choice = _choice(answer, request.token_ids)
    wanted = request.sampling
    ids = _ids(choice.get("token_ids"), "token_ids")
    beyond = next((token for token in ids if not 0 <= token < vocab_size), None)
    if not ids or len(ids) > wanted.max_tokens:
        raise ServerFault(f"answered with {len(ids)} tokens, expected 1 to {wanted.max_tokens}")
    if beyond is not None:
        raise ServerFault(f"answered with token id {beyond}, the vocabulary has {vocab_size}")
    reported = choice.get("logprobs")
    if not isinstance(reported, dict):
        raise ServerFault("answered without logprobs")
    logprobs = _logprobs(reported.get("token_logprobs"), len(ids))
    reason = _FINISH.get(str(choice.get("finish_reason")))
    if reason is None:  # "abort": somebody else paused or stopped the server, and the answer is only a part
        raise ServerFault(f"ended with finish_reason {choice.get('finish_reason')!r}, expected stop or length")
    stopped_by = choice.get("stop_reason")
    if stopped_by is None and reason == FinishReason.STOP and ids[-1] in request.end_ids:
        stopped_by = ids[-1]
    # never taken from the server: text is what the ids say, the same for every backend
    text, _ = cut_answer(tokenizer, request.token_ids, ids, wanted.stop)
    return Sample(
        token_ids=tuple(ids),
        logprobs=tuple(logprobs),
        text=text,
        finish_reason=reason,
        policy_version=version,
        stop_reason=stopped_by,
        top_logprobs=_top(reported.get("top_logprobs"), len(ids), wanted.logprobs),
    )


def read_score(answer: Any, token_ids: Sequence[int]) -> list[float]:
    """Return the log-probability of each token but the first.

    Raises:
        ServerFault: The answer is not one to this request.
        RequestError: A logprob is NaN or infinite.
    """
    steps = _choice(answer, token_ids).get("prompt_logprobs")
    if not isinstance(steps, list) or len(steps) != len(token_ids):
        got = len(steps) if isinstance(steps, list) else "none"
        raise ServerFault(f"answered with {got} prompt logprobs, expected {len(token_ids)}")
    try:
        found = [step[str(token)]["logprob"] for token, step in zip(token_ids[1:], steps[1:], strict=True)]
    except (KeyError, TypeError):
        raise ServerFault("answered with prompt logprobs of other tokens than were sent") from None
    return _logprobs(found, len(token_ids) - 1)


def _choice(answer: Any, prompt: Sequence[int]) -> dict[str, Any]:
    choices = answer.get("choices") if isinstance(answer, dict) else None
    if not isinstance(choices, list) or len(choices) != 1 or not isinstance(choices[0], dict):
        raise ServerFault(f"answered with something that is no completion: {answer!r:.80}")
    echoed = choices[0].get("prompt_token_ids")
    if echoed is None:
        raise ServerFault("returns no token ids: it is no vLLM of a version llmrl was run with")
    if echoed != list(prompt):
        raise ServerFault(f"answered to another prompt: {echoed!r:.60}, sent {list(prompt)!r:.60}")
    return choices[0]


def _ids(value: Any, what: str) -> list[int]:
    if not isinstance(value, list) or not all(isinstance(v, int) and not isinstance(v, bool) for v in value):
        raise ServerFault(f"answered with {what} {value!r:.60}, expected a list of integers")
    return value


def _logprobs(values: Any, count: int) -> list[float]:
    if not isinstance(values, list) or len(values) != count:
        got = len(values) if isinstance(values, list) else "no"
        raise ServerFault(f"answered with {got} logprobs, expected {count}, one a token")
    for value in values:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if number and not math.isfinite(value):
            raise RequestError(NOT_A_NUMBER)
        if not number or value > _MAX_LOGPROB:
            raise ServerFault(f"answered with the logprob {value!r}, expected a number of at most 0")
    return [float(value) for value in values]


def _top(steps: Any, count: int, k: int) -> tuple[tuple[tuple[int, float], ...], ...]:
    """Return the k most likely tokens a step; vLLM adds the sampled one where it is not among them."""
    if not k:
        return ()
    if not isinstance(steps, list) or len(steps) != count:
        raise ServerFault(f"answered without the {k} most likely tokens of each step")
    rows = []
    for step in steps:
        try:
            row = [(int(name.removeprefix(_ID)), float(logprob)) for name, logprob in step.items()]
        except (AttributeError, ValueError, TypeError):
            raise ServerFault(f"answered with the alternatives {step!r:.80}, expected logprobs by token id") from None
        rows.append(tuple(sorted(row, key=lambda item: -item[1])[:k]))
    return tuple(rows)
