"""A causal LM with value heads in training: one forward for policy and values, or a second trunk for the values.

    shared      the heads read the policy's own hidden states; costs little more than supervised training, and vLLM serves it
    separate    the values have a trunk of their own, which starts as a copy of the policy's: they cannot disturb the policy

Q has slow copies that the V loss reads (`target`); V and the trunks have none, as in trlx.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from llmrl.base_model import bare_model
from llmrl.errors import CheckpointError, ModelError, UsageError
from llmrl.heads_forward import decoder_of, states_of
from llmrl.hindsight.losses import polyak
from llmrl.logit_scale import finish_logits, scale_and_cap
from llmrl.value_heads import ValueHead

TRUNKS = ("shared", "separate")


@dataclass(frozen=True)
class ActionStates:
    """What a forward gives at the agent's tokens.

    Attributes:
        policy: `[N, H]` states that the policy's logits are made of, in its dtype.
        action: `[N, H]` states that Q reads.
        after: `[N, H]` states that are bootstrapped from, without a gradient; anything where nothing comes after.
        value: `[M, H]` states where V is learnt.
    """

    policy: Tensor
    action: Tensor
    after: Tensor
    value: Tensor


class DialogueModel(nn.Module):
    """Policy, values and slow copies.

    Args:
        policy: a causal LM, or peft's model around one; what is trained of it has requires_grad.
        head: the value head, or None where the method has none.
        trunk: "shared" or "separate".
    """

    def __init__(self, policy: Any, head: ValueHead | None, trunk: str = "shared") -> None:
        super().__init__()
        if trunk not in TRUNKS:
            raise UsageError(f"expected a trunk out of {', '.join(TRUNKS)}, got {trunk!r}")
        self.policy, self.head = policy, head
        self.target = None if head is None else copy.deepcopy(head).requires_grad_(False)
        self.values = trainable_copy(policy) if trunk == "separate" and head is not None else None
        self._freeze_unused()
        self._output = [bare_model(policy).get_output_embeddings()]  # in a list: no second submodule

    def _freeze_unused(self) -> None:
        """Take what no loss reaches out of training: processes would wait for its gradient."""
        if self.values is None:
            return
        bare = bare_model(self.values)
        output, embedding = bare.get_output_embeddings(), bare.get_input_embeddings()
        own = {id(p) for p in embedding.parameters()}
        for parameter in output.parameters():
            parameter.requires_grad_(parameter.requires_grad and id(parameter) in own)

    def states(self, batch: dict[str, Tensor]) -> ActionStates:
        """Return the states of a batch of `llmrl.hindsight.batches.DialogueCollator`."""
        own = _states(self.policy, batch)
        read = own if self.values is None else _states(self.values, batch)
        after = read.detach()[batch["next_position"].clamp(min=0)]
        return ActionStates(own[batch["position"]], read[batch["position"]], after, read[batch["value_position"]])

    def logits(self, states: Tensor) -> Tensor:
        """Return the policy's logits `[N, V]` float32 of its states."""
        config = bare_model(self.policy).config.get_text_config(decoder=True)
        return finish_logits(self._output[0](states).float(), *scale_and_cap(config))

    @torch.no_grad()
    def check_logits(self, ids: list[int]) -> None:
        """Compare `logits` with what the model's own forward gives.

        Raises:
            ModelError: they differ: this architecture does something to its states or logits that llmrl does not know.
        """
        bare = bare_model(self.policy)
        training, row = bare.training, torch.tensor([ids], device=next(bare.parameters()).device)
        bare.eval()
        wanted = bare(row, use_cache=False).logits[0].float()
        found = self.logits(_states(self.policy, {"input_ids": row}))
        bare.train(training)
        error = float((wanted - found).abs().max() / wanted.abs().max().clamp_min(1e-6))
        if not error <= (1e-3 if next(bare.parameters()).dtype == torch.float32 else 5e-2):
            raise ModelError(
                f"{type(bare).__name__} computes its logits in a way llmrl does not know (relative error {error:.1e}): "
                "please report the architecture"
            )

    def forward(self, **batch: Tensor) -> ActionStates:
        """Return `states`."""
        return self.states(batch)

    def move_target(self, rate: float) -> None:
        """Let the slow copies of Q follow."""
        if self.head is not None and self.target is not None:
            polyak(self.target.q_parameters(), self.head.q_parameters(), rate)

    def trained_state(self) -> dict[str, Tensor]:
        """Return by name what training changes: all that a checkpoint needs beside the base."""
        wanted = {name for name, p in self.named_parameters() if p.requires_grad}
        wanted |= {name for name, _ in self.named_parameters() if name.startswith(("head.", "target."))}
        found = {name: p for name, p in self.named_parameters() if name in wanted}
        return {name: value.detach().contiguous() for name, value in found.items()}

    def load_trained_state(self, state: dict[str, Tensor]) -> None:
        """Take what `trained_state` returned.

        Raises:
            CheckpointError: it is of another model or method.
        """
        own = self.trained_state()
        other = sorted(own.keys() ^ state.keys()) + [
            n for n in own.keys() & state.keys() if own[n].shape != state[n].shape
        ]
        if other:
            raise CheckpointError(
                f"the checkpoint is of another model or method ({other[0]}): resume with the options it was made with"
            )
        self.load_state_dict(state, strict=False)


def _states(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """Return the states after the final norm of all positions of all rows, `[B * T, H]`."""
    decoder = decoder_of(bare_model(model))
    read = {key: batch[key] for key in ("input_ids", "attention_mask", "position_ids") if key in batch}
    return states_of(decoder, decoder(**read, use_cache=False)).flatten(0, 1)


def trainable_copy(model: Any) -> Any:
    """Return a copy in which what is trained is new, and what is frozen is the same memory."""
    frozen = {id(p): p for p in model.parameters() if not p.requires_grad}
    return copy.deepcopy(model, frozen)


def make_trainable(model: Any, tuning: str, lora_r: int, seed: int) -> Any:
    """Return a causal LM in training form.

    Args:
        model: a causal LM, which is changed.
        tuning: "full", or "lora" for an adapter of scale 2 on all linear layers but the output embedding.
        lora_r: its rank.
        seed: of its start.
    """
    if tuning == "full":
        return model.requires_grad_(True)
    from peft import LoraConfig, get_peft_model
    from transformers import set_seed

    set_seed(seed)
    model.requires_grad_(False)
    config = LoraConfig(
        r=lora_r, lora_alpha=2 * lora_r, lora_dropout=0.0, target_modules="all-linear", bias="none", task_type="CAUSAL_LM"
    )  # fmt: skip
    return get_peft_model(model, config)
