"""Simulated users of dialogue policies: a model that learnt the user's side of logs, or any LLM by URL.

    mirrored = [user_side(dialogue, persona) for dialogue in logs]      # then: llmrl hindsight train --method bc
    llmrl hindsight eval --policy policy --env charity --user runs/user --output_dir report

A policy that is good with a script may be good at the script alone; a second user who is somebody else shows it. What a user
says is drawn from seeds of the episode and the turn: policies that are compared meet the same luck.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from llmrl.errors import UsageError
from llmrl.hindsight.dialogues import AGENT, Dialogue
from llmrl.rollout.http import is_http_url
from llmrl.rollout.users import Chat, ChatEndpoint, EngineChat, users_view
from llmrl.types import SamplingConfig


def user_side(dialogue: Dialogue, persona: str) -> Dialogue:
    """Return a dialogue as its user lived it, in the form that `llmrl.rollout.users.as_user` asks a model in.

    Args:
        dialogue: what system messages and tools said is left out: it is between the agent and its world.
        persona: the system message, who the user is.

    Raises:
        BadDialogue: the user says nothing, or two things in a row.
    """
    messages = users_view(dialogue.messages, persona)
    while messages[-1].role not in (AGENT, "system"):
        messages.pop()  # the agent has the last word: nothing of the user's is learnt from it
    provenance = {**dialogue.provenance, "side": "user"}
    return Dialogue(dialogue.id, tuple(messages), (0.0,) * len(messages), task=dialogue.task, provenance=provenance)


@contextmanager
def open_user(user: str, model: str | None, api_key_env: str | None, tokens: int) -> Iterator[Chat]:
    """Open who answers as the user.

    Args:
        user: a folder or hub name of a model, or the URL of an OpenAI-compatible endpoint.
        model: name that the endpoint knows its model by.
        api_key_env: environment variable with the endpoint's key.
        tokens: most tokens of an answer.

    Raises:
        UsageError: a URL without a name, or a name without a URL.
        ModelError: the model cannot be opened.
    """
    if not is_http_url(user):
        if model is not None or api_key_env is not None:
            raise UsageError("--user_model and --user_key_env go with the URL of an endpoint as --user")
        from llmrl.rollout.backends import open_engine

        with open_engine(user, rollout_backend="transformers") as engine:
            yield EngineChat(engine, SamplingConfig(temperature=1.0, max_tokens=tokens))
        return
    if model is None:
        raise UsageError(f"--user {user}: expected --user_model, the name of the model there")
    endpoint = ChatEndpoint(user, model, api_key_env=api_key_env, options={"max_tokens": tokens})
    try:
        yield endpoint
    finally:
        endpoint.close()
