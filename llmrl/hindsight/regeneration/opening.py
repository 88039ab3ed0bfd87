"""Opening what the options name: scripts, models, endpoints; each model once, whatever roles it has."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np

from llmrl.errors import DataError, UsageError
from llmrl.hindsight.dialogues import Dialogue
from llmrl.hindsight.envs import charity, maze, twenty_questions
from llmrl.hindsight.regeneration.answers import Answers
from llmrl.hindsight.regeneration.asking import Asker, EndpointSource, EngineSource, Source, only_model, split_endpoint
from llmrl.hindsight.regeneration.budget import Meter
from llmrl.hindsight.regeneration.controllers import (
    Controller,
    Foresight,
    ModelController,
    RandomEdits,
    Scripted,
    ScriptedForesight,
)
from llmrl.hindsight.regeneration.forward import Forward, ModelForward, Replay
from llmrl.hindsight.regeneration.options import RegenerateConfig
from llmrl.hindsight.regeneration.prompts import RUBRIC, USER
from llmrl.hindsight.regeneration.rewards import JudgeReward, RegressionReward, Reward, RuleReward
from llmrl.hindsight.regeneration.rounds import Parts
from llmrl.hindsight.regeneration.validation import Limits
from llmrl.rollout.seeds import derive_seed
from llmrl.rollout.users import ChatEndpoint
from llmrl.types import Message, SamplingConfig

if TYPE_CHECKING:
    from llmrl.rollout.engine import BaseEngine

USER_FILE = "user.json"
"""In the folder of a trained forward model: its persona, and the ids of the dialogues that it was not trained on."""

_SCRIPTS: dict[str, tuple[ModuleType, Any]] = {
    "charity": (charity, charity.Charity),
    "maze": (maze, maze.Maze),
    "twenty-questions": (twenty_questions, twenty_questions.TwentyQuestions),
}
_TEMPERATURE = {"controller": 0.7, "judge": 0.0, "user": 1.0, "agent": 1.0}
# JSON allows white space anywhere, and a weak model that may write it never stops
_OPTIONS: dict[str, dict[str, Any]] = {
    "vllm": {"structured_outputs_config": {"backend": "xgrammar", "disable_any_whitespace": True}}
}
_TURN_SHARE = 4  # a turn is this much shorter than the longest answer
_FEATURE_TOKENS = 2048


class Opener:
    """Opens models for roles; use `stack` to close them.

    Args:
        config: the options.
        stack: that what is opened is closed with.
        answers: what is known already.
        meter: of the run.
    """

    def __init__(self, config: RegenerateConfig, stack: ExitStack, answers: Answers, meter: Meter) -> None:
        self._config, self._stack, self._answers, self._meter = config, stack, answers, meter
        self._engines: dict[str, BaseEngine] = {}
        self._names: dict[str, str] = {}

    def asker(self, who: str, role: str) -> Asker:
        """Return who answers in a role."""
        return Asker(self._source(who, role), role, self._answers, self._meter)

    def _source(self, who: str, role: str) -> Source:
        config = self._config
        tokens = config.max_tokens if role in ("controller", "judge") else max(8, config.max_tokens // _TURN_SHARE)
        temperature = _TEMPERATURE[role]
        at = split_endpoint(who)
        if at is None:
            sampling = SamplingConfig(temperature=temperature, max_tokens=tokens)
            return EngineSource(self._engine(who), who, sampling, constrained=config.constrained)
        name, url = at
        if name is None:
            if url not in self._names:
                self._names[url] = only_model(url, config.key_env)
            name = self._names[url]
        endpoint = ChatEndpoint(url, name, api_key_env=config.key_env)
        self._stack.callback(endpoint.close)
        return EndpointSource(endpoint, tokens, temperature, constrained=config.constrained)

    def _backend(self, who: str) -> str:
        from llmrl.hindsight.policy_folder import VALUES
        from llmrl.rollout.backends import choose_backend
        from llmrl.rollout.model_facts import read_facts

        if self._config.rollout_backend != "auto":
            return self._config.rollout_backend
        if (Path(who).expanduser() / VALUES).is_dir():  # two trunks, which vLLM does not run
            return "transformers"
        return choose_backend(read_facts(who), self._config.server_url)[0]

    def _engine(self, who: str) -> BaseEngine:
        if who not in self._engines:
            # with endpoints and scripts alone no torch is loaded
            from llmrl.base_model import ADAPTER_CONFIG
            from llmrl.hindsight.policy import open_policy
            from llmrl.rollout.backends import open_engine

            config, folder = self._config, Path(who).expanduser()
            if (folder / ADAPTER_CONFIG).is_file():
                base = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))["base_model_name_or_path"]
                name = self._backend(base)
                engine = open_engine(
                    base, adapter=folder, rollout_backend=name, server_url=config.server_url, **_OPTIONS.get(name, {})
                )
            else:
                name = self._backend(who)
                engine = open_policy(who, rollout_backend=name, server_url=config.server_url, **_OPTIONS.get(name, {}))
            self._engines[who] = self._stack.enter_context(engine)
        return self._engines[who]


def open_parts(
    config: RegenerateConfig,
    dialogues: Sequence[Dialogue],
    opener: Opener,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Parts:
    """Open controller, forward model and reward model.

    Args:
        config: the options.
        dialogues: the logs.
        opener: of models.
        progress: called with (done, total) while a judge scores logs.

    Raises:
        UsageError: a script for dialogues of no environment, or options that do not fit.
        ModelError, EngineError: a model cannot be opened, or a judge not be asked.
    """
    forward = _forward(config, dialogues, opener)
    return Parts(_controller(config, dialogues, opener), forward, _reward(config, dialogues, opener, progress))


def _controller(config: RegenerateConfig, dialogues: Sequence[Dialogue], opener: Opener) -> Controller:
    if config.control == "random":
        return RandomEdits(dialogues)
    without = config.control == "no_hindsight"
    if config.controller == "scripted":
        module, _ = _script(dialogues, "--controller")
        return ScriptedForesight(module) if without else Scripted(module)
    asker = opener.asker(config.controller, "controller")
    usual = float(np.mean([dialogue.total for dialogue in dialogues]))
    return Foresight(asker) if without else ModelController(asker, usual)


def _forward(config: RegenerateConfig, dialogues: Sequence[Dialogue], opener: Opener) -> Forward:
    if config.forward == "scripted":
        return Replay(*_script(dialogues, "--forward"))
    trained = read_user(config.forward)
    return ModelForward(
        opener.asker(config.forward, "user"),
        opener.asker(config.agent or config.forward, "agent"),
        turns=max(len(dialogue.agent_turns) for dialogue in dialogues),
        words=max(Limits.of(dialogues).words, _longest_reply(dialogues)),
        persona=trained["persona"] if trained else USER,
    )


def read_user(who: str) -> dict[str, Any] | None:
    """Return what the folder of a trained forward model says of it; None of any other model.

    Raises:
        DataError: the file is broken.
    """
    path = Path(who).expanduser() / USER_FILE
    if split_endpoint(who) is not None or not path.is_file():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return {"persona": str(found["persona"]), "held_out": [str(name) for name in found["held_out"]]}
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is broken ({type(error).__name__}: {error}): train the forward model again") from None


def _reward(
    config: RegenerateConfig, dialogues: Sequence[Dialogue], opener: Opener, progress: Callable[[int, int], None]
) -> Reward:
    kind, _, who = config.reward.partition("=")
    if kind == "rule":
        return RuleReward(dialogues, exact=config.forward == "scripted")
    if kind == "regression":
        if split_endpoint(who) is not None:
            raise UsageError(
                "--reward regression=MODEL reads the states of a model that is opened here, not of an endpoint"
            )
        return RegressionReward(state_features(who), dialogues, config.seed, who)
    rubric = RUBRIC if config.rubric is None else _read_rubric(config.rubric)
    some = sorted(dialogues, key=lambda d: derive_seed(config.seed, "judged", d.id))[: config.calibration]
    return JudgeReward(opener.asker(who, "judge"), some, config.seed, rubric, progress, config.concurrency)


def _read_rubric(path: str) -> str:
    try:
        text = Path(path).expanduser().read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--rubric {path} cannot be read: {error}") from None
    if not text:
        raise UsageError(f"--rubric {path} is empty: expected what the scores 0 to 10 mean")
    return text


def _script(dialogues: Sequence[Dialogue], what: str) -> tuple[ModuleType, Any]:
    task = _task(dialogues)
    if task not in _SCRIPTS:
        raise UsageError(
            f"{what} scripted: the dialogues are of task {task!r}, and scripts are there for {', '.join(_SCRIPTS)}; name a "
            "model or NAME@URL"
        )
    return _SCRIPTS[task]


def _task(dialogues: Sequence[Dialogue]) -> str:
    tasks = sorted({dialogue.task for dialogue in dialogues})
    if len(tasks) > 1:
        raise UsageError(
            f"the dialogues are of several tasks ({', '.join(map(repr, tasks))}): regenerate each by itself"
        )
    return tasks[0]


def _longest_reply(dialogues: Sequence[Dialogue]) -> int:
    return max(len(m.content.split()) for d in dialogues for m in d.messages if m.role != "system")


def state_features(model: str) -> Callable[[Sequence[Sequence[Message]]], Any]:
    """Return a function from dialogues to the mean state of their tokens after the last layer, `[N, H]`, of a frozen model.

    Of a dialogue that is longer than the context the end is read, where its outcome stands.

    Raises:
        ModelError: the model cannot be loaded.
    """
    import threading

    import torch

    from llmrl.base_model import context_length, load_base
    from llmrl.heads_forward import decoder_of, states_of
    from llmrl.hindsight.regeneration.prompts import transcript

    base = load_base(model, dtype="float32")
    decoder = decoder_of(base.model)
    longest = min(_FEATURE_TOKENS, context_length(base.model, base.tokenizer, None))
    device, lock = next(base.model.parameters()).device, threading.Lock()

    @torch.no_grad()
    def features(dialogues: Sequence[Sequence[Message]]) -> Any:
        rows = []
        for messages in dialogues:
            # fast tokenizers are not safe under threads
            with lock:
                ids = base.tokenizer.encode(transcript(messages))[-longest:]
            states = states_of(decoder, decoder(input_ids=torch.tensor([ids], device=device), use_cache=False))
            rows.append(states[0].float().mean(0).cpu().double().numpy())
        return np.stack(rows)

    return features
