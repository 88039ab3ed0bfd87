"""The callback that writes the files of llmrl/training/run.py for a transformers or trl trainer."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from llmrl.training.run import write_model_card, write_run_files


class RunFilesCallback(TrainerCallback):
    """Writes config.resolved.yaml and env.json when training begins and, with `card`, README.md when it ends.

    Args:
        config: every option of the run with its final value.
        command: the command line, for env.json.
        card: keyword arguments of `write_model_card`, or None for no card.
    """

    def __init__(
        self, config: dict[str, Any], *, command: list[str] | None = None, card: dict[str, Any] | None = None
    ) -> None:
        self.config, self.command, self.card = config, command, card

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Write config.resolved.yaml and env.json."""
        if state.is_world_process_zero:
            write_run_files(args.output_dir, self.config, command=self.command)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Write the model card."""
        if state.is_world_process_zero and self.card is not None:
            write_model_card(args.output_dir, **self.card)
