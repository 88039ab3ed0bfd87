"""Opening what training left, with a beta of one's own: how far Q moves the policy is chosen when it is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llmrl.errors import ModelError, UsageError
from llmrl.heads import HeadsConfig
from llmrl.hindsight.policy_folder import VALUES
from llmrl.modeling import read_heads_config
from llmrl.rollout.backends import choose_backend, open_engine
from llmrl.rollout.engine import BaseEngine
from llmrl.rollout.model_facts import read_facts
from llmrl.value_heads import ValueHead


def value_config(policy: Path | str) -> HeadsConfig | None:
    """Return the description of a policy's value head; None of a policy without one.

    Raises:
        ModelError: the folder is damaged, or carries other heads.
    """
    folder = Path(policy).expanduser()
    if not folder.is_dir():
        return None
    try:
        config = read_heads_config(folder)
    except ModelError:
        return None
    if [spec.kind for spec in config.heads.values()] != ["value"]:
        raise ModelError(f"{policy} carries heads that are no values: expected a folder of llmrl hindsight train")
    return config


def open_policy(
    policy: str,
    *,
    beta: float | None = None,
    support: float | None = None,
    rollout_backend: str = "auto",
    server_url: list[str] | None = None,
    **options: Any,
) -> BaseEngine:
    """Open an engine on a policy.

    Args:
        policy: a folder of `llmrl hindsight train`, or any model.
        beta, support: of its value head; None takes what the folder says. 0 is the behaviour policy.
        rollout_backend, server_url, options: of `llmrl.rollout.backends.open_engine`.

    Raises:
        UsageError: a beta for a policy without values, or for a server, which has its own.
        ModelError: the policy cannot be opened.
    """
    head = value_config(policy)
    given = {name: value for name, value in (("beta", beta), ("support", support)) if value is not None}
    if given and head is None:
        raise UsageError(f"--{min(given)} moves a policy by its values, and {policy} has none")
    if (Path(policy).expanduser() / VALUES).is_dir():
        raise UsageError(
            f"{policy} has values on a trunk of its own, which no engine runs: use llmrl.hindsight.separate"
        )
    urls = list(server_url or ())
    name = choose_backend(read_facts(policy), urls)[0] if rollout_backend == "auto" else rollout_backend
    if given and name == "server":
        raise UsageError(
            "a server has its own beta and support: start it with LLMRL_BETA and LLMRL_SUPPORT, and leave them out here"
        )
    if not given:
        return open_engine(policy, rollout_backend=name, server_url=urls, **options)
    if name == "vllm":
        overrides = {f"llmrl_{key}": value for key, value in given.items()}
        return open_engine(policy, rollout_backend=name, hf_overrides=overrides, **options)
    import torch

    from llmrl.base_model import open_causal_lm

    dtype = options.get("dtype", "auto")
    on_cpu = not torch.cuda.is_available()
    loaded = open_causal_lm(policy, dtype="float32" if dtype == "auto" and on_cpu else dtype)
    for part in loaded.llmrl_heads.values():
        if isinstance(part, ValueHead):
            part.beta, part.support = given.get("beta", part.beta), given.get("support", part.support)
    return open_engine(policy, rollout_backend=name, loaded=loaded, **options)
