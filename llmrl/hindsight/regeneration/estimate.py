"""What a regeneration would ask, before anything is asked: requests and tokens, by role."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from llmrl.hindsight.dialogues import AGENT, Dialogue
from llmrl.hindsight.regeneration.asking import split_endpoint
from llmrl.hindsight.regeneration.edits import edit_schema
from llmrl.hindsight.regeneration.options import RegenerateConfig
from llmrl.hindsight.regeneration.prompts import RUBRIC, USER, controller_prompt, judge_prompt, prefix_prompt
from llmrl.tables import aligned_table

_BYTES_A_TOKEN = 4  # English, in most tokenizers
_SAMPLE = 200  # dialogues whose prompts are counted
_ANSWER_TOKENS = 60  # of a diagnosis and the JSON around it


def estimate(config: RegenerateConfig, dialogues: Sequence[Dialogue]) -> dict[str, Any]:
    """Return, by role, requests and tokens, as if every dialogue had a fault in every round and no answer were refused.

    Prompts are counted with the model's tokenizer where it is here, else four bytes a token.
    """
    some = dialogues[:: max(1, len(dialogues) // _SAMPLE)]
    turns = [len(d.agent_turns) for d in dialogues]
    jobs, played = _jobs(config, len(dialogues), _mean(turns))
    _, most = _jobs(config, len(dialogues), max(turns))
    left = _mean([len(d.agent_turns) / 2 for d in dialogues])
    rows = [
        *_controller(config, some, jobs),
        *_forward(config, some, played, left, len(dialogues)),
        *_judge(config, some, played, len(dialogues)),
    ]
    return {"dialogues": len(dialogues), "most_new": most, "roles": [row for row in rows if row["requests"]]}


def _jobs(config: RegenerateConfig, dialogues: int, turns: float) -> tuple[int, int]:
    """Return how often a controller is asked in all rounds, and how many dialogues are played on."""
    edits = min(config.edits_per_dialogue or turns, turns)
    each, width, jobs = edits * config.candidates, float(dialogues), 0.0
    for _ in range(config.rounds):
        jobs += width
        width *= each
    return round(jobs), round(jobs * each)


def table_of(found: dict[str, Any]) -> str:
    """Return the estimate as a person reads it."""
    rows = [
        [r["role"], r["who"], *(f"{r[k]:,}" for k in ("requests", "prompt_tokens", "answer_tokens"))]
        for r in found["roles"]
    ]
    total = sum(r["prompt_tokens"] + r["answer_tokens"] for r in found["roles"])
    head = f"at most {found['most_new']} new dialogues of {found['dialogues']}"
    if not rows:
        return f"{head}; scripts only, no model is asked"
    text = aligned_table(["role", "who", "requests", "prompt tokens", "answer tokens"], rows)
    return f"{head}\n{text}\nabout {total} tokens if every dialogue has a fault in every round; retries come on top"


def _row(role: str, who: str, requests: float, prompt: float, answer: float) -> dict[str, Any]:
    count = round(requests)
    return {
        "role": role,
        "who": who,
        "requests": count,
        "prompt_tokens": round(count * prompt),
        "answer_tokens": round(count * answer),
    }


def _controller(config: RegenerateConfig, some: Sequence[Dialogue], jobs: int) -> list[dict[str, Any]]:
    if config.controller == "scripted" or config.control == "random":
        return []
    count = _counter(config.controller)
    agent = _mean([count(d.messages[i].content) for d in some for i in d.agent_turns])
    prompts, requests = [], jobs
    for dialogue in some:
        turns = dialogue.agent_turns
        edits = min(config.edits_per_dialogue or len(turns), len(turns))
        schema = edit_schema(turns, edits, config.candidates)
        if config.control == "no_hindsight":
            asked = prefix_prompt(dialogue, turns[len(turns) // 2], config.candidates, schema)
        else:
            asked = controller_prompt(dialogue, turns, edits, config.candidates, schema, 0.0)
        prompts.append(sum(count(m.content) for m in asked))
    edits = config.edits_per_dialogue or round(_mean([len(d.agent_turns) for d in some]))
    if config.control == "no_hindsight":
        requests, edits = requests * edits, 1
    return [
        _row(
            "controller",
            config.controller,
            requests,
            _mean(prompts),
            edits * (_ANSWER_TOKENS + config.candidates * agent),
        )
    ]


def _forward(
    config: RegenerateConfig, some: Sequence[Dialogue], played: int, left: float, logs: int
) -> list[dict[str, Any]]:
    if config.forward == "scripted":
        return []
    found = []
    for role, who in (("user", config.forward), ("agent", config.agent or config.forward)):
        count = _counter(who)
        whole = _mean([sum(count(m.content) for m in d.messages) for d in some])
        said = _mean([count(m.content) for d in some for m in d.messages if (m.role == AGENT) == (role == "agent")])
        persona = count(USER) if role == "user" else 0
        prefixes = played + min(config.calibration, logs)
        found.append(_row(role, who, prefixes * max(1.0, left), persona + 0.75 * whole, said))
    return found


def _judge(config: RegenerateConfig, some: Sequence[Dialogue], played: int, logs: int) -> list[dict[str, Any]]:
    kind, _, who = config.reward.partition("=")
    if kind != "judge":
        return []
    count = _counter(who)
    prompts = [sum(count(m.content) for m in judge_prompt(d.messages, RUBRIC, {})) for d in some]
    return [_row("judge", who, played + 3 * min(config.calibration, logs), _mean(prompts), _ANSWER_TOKENS)]


def _counter(who: str) -> Callable[[str], int]:
    if split_endpoint(who) is not None:
        return lambda text: -(-len(text.encode()) // _BYTES_A_TOKEN)
    from llmrl.base_model import load_tokenizer

    tokenizer = load_tokenizer(who)
    return lambda text: len(tokenizer.encode(text, add_special_tokens=False))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
