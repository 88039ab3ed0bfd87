"""Opening what training left, with a beta of one's own: how far Q moves the policy is chosen when it is loaded."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from llmrl.base_model import open_causal_lm
from llmrl.errors import ModelError, UsageError
from llmrl.heads import CONFIG_KEY, HeadsConfig, asked_steering
from llmrl.heads_forward import decoder_of, states_of
from llmrl.hindsight.policy_folder import VALUES
from llmrl.logits_heads import apply_logits_heads
from llmrl.modeling import read_heads_config
from llmrl.rollout.backends import choose_backend, open_engine
from llmrl.rollout.engine import BaseEngine
from llmrl.rollout.model_facts import read_facts


def value_config(policy: Path | str) -> HeadsConfig | None:
    """Return the description of a policy's value head, wherever its trunk lies; None of a policy without one.

    Raises:
        ModelError: the folder is damaged, or carries other heads.
    """
    folder = Path(policy).expanduser()
    folder = folder / VALUES if (folder / VALUES).is_dir() else folder
    if not folder.is_dir():
        return None
    try:
        fields = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{folder} is no model: {error}") from None
    if CONFIG_KEY not in fields:
        return None
    config = read_heads_config(folder)
    if [spec.kind for spec in config.heads.values()] != ["value"]:
        raise ModelError(f"{policy} carries heads that are no values: expected a folder of llmrl hindsight train")
    return config


def steering_of(policy: Path | str, beta: float | None, support: float | None) -> tuple[float, float] | None:
    """Return the beta and support that a policy is played with here, see `asked_steering`; None of one without values.

    Raises:
        ModelError: see `value_config`.
    """
    config = value_config(policy)
    if config is None:
        return None
    return asked_steering(next(iter(config.heads.values())), {"beta": beta, "support": support})


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
        beta, support: of its value head; None takes LLMRL_BETA and LLMRL_SUPPORT, else what the folder says. A beta of 0 is
            the behaviour policy.
        rollout_backend, server_url, options: of `llmrl.rollout.backends.open_engine`.

    Raises:
        UsageError: a beta for a policy without values, or for a server, which has its own.
        ModelError: the policy cannot be opened.
    """
    folder = Path(policy).expanduser()
    separate = (folder / VALUES).is_dir()
    head = value_config(policy)
    given = {name: value for name, value in (("beta", beta), ("support", support)) if value is not None}
    if given and head is None:
        raise UsageError(f"--{min(given)} moves a policy by its values, and {policy} has none")
    urls = list(server_url or ())
    name = rollout_backend
    if name == "auto":
        name = "transformers" if separate else choose_backend(read_facts(policy), urls)[0]
    if separate and name != "transformers":
        raise UsageError(
            f"{policy} has values on a trunk of its own, which vLLM does not run beside the policy's: use --rollout_backend "
            "transformers, or train with --trunk shared"
        )
    if given and name == "server":
        raise UsageError(
            "a server has its own beta and support: start it with LLMRL_BETA and LLMRL_SUPPORT, and leave them out here"
        )
    if name == "server" or head is None:
        return open_engine(policy, rollout_backend=name, server_url=urls, **options)
    beta, support = steering_of(policy, beta, support) or (None, None)
    if name == "vllm":
        overrides = {"llmrl_beta": beta, "llmrl_support": support}
        return open_engine(policy, rollout_backend=name, hf_overrides=overrides, **options)
    dtype = options.get("dtype", "auto")
    loaded = load_policy(folder if folder.is_dir() else policy, dtype=dtype, beta=beta, support=support)
    return open_engine(policy, rollout_backend=name, loaded=loaded, **options)


def load_policy(
    policy: Path | str,
    *,
    dtype: str = "auto",
    device: str | None = None,
    beta: float | None = None,
    support: float | None = None,
) -> Any:
    """Return a policy as a model of transformers, or two of them as one.

    Args:
        policy: a folder of `llmrl hindsight train`.
        dtype: "auto" is float32 on a CPU, else as stored.
        device: a torch device; None takes the GPU when there is one.
        beta, support: see `open_policy`.
    """
    dtype = "float32" if dtype == "auto" and not torch.cuda.is_available() else dtype
    model = open_causal_lm(str(policy), dtype=dtype, device=device)
    if (Path(policy) / VALUES).is_dir():
        model = TwoTrunks(model, open_causal_lm(str(Path(policy) / VALUES), dtype=dtype, device=device))
    for head in getattr(model, "llmrl_heads", {}).values():
        head.beta = head.beta if beta is None else beta
        head.support = head.support if support is None else support
    return model


class TwoTrunks(nn.Module):
    """A policy and a trunk of values as one model: logits of the first, moved by Q of the second; a KV cache of two.

    Args:
        policy: a causal LM.
        values: one with a value head, whose own logits are of no use.
    """

    def __init__(self, policy: Any, values: Any) -> None:
        super().__init__()
        self.policy, self.values = policy, values
        self.llmrl_heads = values.llmrl_heads

    @property
    def device(self) -> torch.device:
        """Of the policy."""
        return self.policy.device  # type: ignore[no-any-return]

    @property
    def dtype(self) -> torch.dtype:
        """Of the policy."""
        return self.policy.dtype  # type: ignore[no-any-return]

    @property
    def config(self) -> Any:
        """Of the policy."""
        return self.policy.config

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: tuple[Any, Any] | None = None,
        use_cache: bool = False,
        logits_to_keep: int = 0,
    ) -> SimpleNamespace:
        """Return `logits` `[B, T, V]`, of the last `logits_to_keep` positions if that is not 0, and `past_key_values`."""
        first, second = past_key_values or (None, None)
        read = {"attention_mask": attention_mask, "position_ids": position_ids, "use_cache": use_cache}
        out = self.policy(input_ids, past_key_values=first, logits_to_keep=logits_to_keep, **read)
        decoder = decoder_of(self.values)
        own = decoder(input_ids, past_key_values=second, **read)
        states = states_of(decoder, own)[:, -logits_to_keep:]
        logits = apply_logits_heads(self.llmrl_heads, out.logits, states)
        return SimpleNamespace(logits=logits, past_key_values=(out.past_key_values, own.past_key_values))
