"""trl's GRPOTrainer on our engine, through its `rollout_func` hook.

    trainer = GRPOTrainer(..., rollout_func=EngineRollouts(engine))

Before the first answers of each optimizer step the trainer's weights go into the engine, and the sync canary proves that
they arrived. Answers are token ids with the engine's own logprobs; nothing is encoded again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llmrl.errors import ConfigError, DataError, DistributedError
from llmrl.rollout.chat import Conversation
from llmrl.rollout.seeds import derive_seed
from llmrl.rollout.sync import WeightSync
from llmrl.types import Message, SamplingConfig


class EngineRollouts:
    """What `rollout_func` calls: prompts in, trl's columns out.

    Args:
        engine: Any engine of ours. With several training processes each opens its own.
        stop: Texts that end an answer.
        tolerance: Of the canary, in nats a token; None takes that of the dtype.

    Raises:
        ConfigError: From a call, when the trainer's sampling options would make its ratios wrong.
        SyncError: From a call, when engine and trainer disagree.
    """

    def __init__(self, engine: Any, *, stop: Sequence[str] = (), tolerance: float | None = None) -> None:
        self.engine, self.stop, self.tolerance = engine, tuple(stop), tolerance
        self.sync: WeightSync | None = None
        self._synced_step = -1
        # optimizer step, and calls within it: what is sampled does not depend on the steps before
        self._last_call = (-1, 0)

    def __call__(self, prompts: list[Any], trainer: Any) -> dict[str, Any]:
        """Sample one answer for each prompt; trl repeats a prompt as often as it wants answers to it."""
        sampling = sampling_of(trainer.args, self.stop)
        self._check_ends(trainer)
        self._update(trainer)
        step = trainer.state.global_step
        self._last_call = (step, self._last_call[1] + 1 if self._last_call[0] == step else 0)
        rank = trainer.accelerator.process_index
        ids = [_encode(prompt, trainer) for prompt in prompts]
        seeds = [derive_seed(trainer.args.seed, rank, *self._last_call, i) for i in range(len(prompts))]
        configs = [SamplingConfig(**{**vars(sampling), "seed": seed}) for seed in seeds]
        samples = [answer[0] for answer in self.engine.generate(ids, configs)]
        return {
            "prompt_ids": [list(prompt) for prompt in ids],
            "completion_ids": [list(sample.token_ids) for sample in samples],
            "logprobs": [list(sample.logprobs) for sample in samples],
            "finish_reason": [str(sample.finish_reason) for sample in samples],
            "policy_version": [sample.policy_version.number for sample in samples],
        }

    def _update(self, trainer: Any) -> None:
        if trainer.accelerator.num_processes > 1 and self.engine.is_shared:
            raise DistributedError(
                "several training processes would each update the same servers; train in one process, or open an engine "
                "in each (rollout_backend vllm or transformers)"
            )
        if self.sync is None:
            model = trainer.accelerator.unwrap_model(trainer.model)
            self.sync = WeightSync(self.engine, model, tolerance=self.tolerance)
            if trainer.state.global_step == 0:
                self.sync.check()
                self._synced_step = 0
        if trainer.state.global_step != self._synced_step:
            self.sync.update()
            self._synced_step = trainer.state.global_step
            report = self.sync.reports[-1]
            trainer._metrics["train"]["sync/difference"].append(report.difference)

    def _check_ends(self, trainer: Any) -> None:
        """Refuse to let trl leave out, as cut off, answers that ended otherwise than with the tokenizer's end token."""
        others = self.engine.end_ids - {_tokenizer(trainer).eos_token_id}
        if trainer.args.mask_truncated_completions and (self.stop or others):
            raise ConfigError(
                "mask_truncated_completions=True would take answers for cut off that end with "
                f"{'a stop string' if self.stop else f'the tokens {sorted(others)}'}: trl knows the tokenizer's end token "
                "alone; set it to False"
            )


def _tokenizer(trainer: Any) -> Any:
    return getattr(trainer.processing_class, "tokenizer", trainer.processing_class)


def _encode(prompt: Any, trainer: Any) -> tuple[int, ...]:
    """Return the ids the trainer means by a prompt: its own tokenizer, template and template options."""
    tokenizer = _tokenizer(trainer)
    if isinstance(prompt, str):
        return tuple(tokenizer(prompt)["input_ids"])
    try:
        messages = [Message.from_json(message) for message in prompt]
    except (TypeError, DataError) as error:
        raise DataError(f"prompt: expected text or a list of messages, got {prompt!r:.60} ({error})") from None
    talk = Conversation(tokenizer, template_options=trainer.args.chat_template_kwargs)
    talk.add(*messages)
    return talk.prompt()


def sampling_of(args: Any, stop: Sequence[str] = ()) -> SamplingConfig:
    """Return the sampling that a GRPOConfig asks for.

    Raises:
        ConfigError: It leaves tokens out (top_p, top_k, min_p) or is greedy, so that ratios are not defined, or it has an
            option that the engines do not have.
    """
    sampling = SamplingConfig(
        temperature=args.temperature,
        top_p=1.0 if args.top_p is None else args.top_p,
        top_k=args.top_k or 0,
        min_p=args.min_p or 0.0,
        max_tokens=args.max_completion_length,
        stop=tuple(stop),
    )
    sampling.require_full_support()
    if getattr(args, "repetition_penalty", 1.0) not in (None, 1.0):
        raise ConfigError(f"repetition_penalty={args.repetition_penalty} changes what is sampled from; set it to 1.0")
    if getattr(args, "off_policy_mask_threshold", None) is not None and args.temperature != 1.0:
        raise ConfigError(
            f"off_policy_mask_threshold compares the engine's logprobs, taken at temperature 1, with the trainer's at "
            f"{args.temperature:g}; set temperature=1.0, or off_policy_mask_threshold=None"
        )
    if args.generation_kwargs:
        raise ConfigError(
            f"generation_kwargs={args.generation_kwargs} would not be used; set the options of GRPOConfig"
        )
    if getattr(args, "use_vllm", False):
        raise ConfigError("use_vllm=True starts trl's own vLLM beside this engine; set it to False")
    return sampling
