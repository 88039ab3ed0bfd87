"""Options of `llmrl hindsight regenerate|forward`."""

from __future__ import annotations

from dataclasses import dataclass

from llmrl.config import check_least, option
from llmrl.errors import UsageError
from llmrl.hindsight.options import FORMATS

_CONTROLS = ("none", "random", "no_hindsight")


@dataclass
class RegenerateConfig:
    """Options of `llmrl hindsight regenerate`. WHO is a model's folder or hub name, or NAME@URL of a chat endpoint."""

    data: list[str] = option(help="JSONL files of logged dialogues, whose outcome is known")
    output: str = option(help="JSONL file of new dialogues to write; OUTPUT.report.json and others go beside it")
    data_format: str = option("dialogues", choices=FORMATS, help="see train")
    controller: str = option("scripted", help="who says what should have been said: scripted or WHO")
    forward: str = option("scripted", help="who is the user from there on: scripted or WHO")
    agent: str | None = option(None, help="who is the agent from there on: WHO (default: as --forward)")
    reward: str = option("rule", help="who says what was earned: rule, judge=WHO or regression=MODEL")
    rubric: str | None = option(None, help="text file: what the scores 0 to 10 of a judge mean")
    control: str = option(
        "none",
        choices=_CONTROLS,
        help="random: any utterance of the logs at any turn; no_hindsight: the controller sees what the agent knew, no more",
    )
    match: str | None = option(None, help="make as many dialogues a round as this output of another run has")
    rounds: int = option(3, help="each edits what the one before made, at or after the last edit")
    edits_per_dialogue: int = option(
        1, help="turns edited of each, each played on by itself; 0: all that were at fault"
    )
    candidates: int = option(1, help="utterances for each turn, each played on by itself")
    retries: int = option(2, help="times that a controller is asked again when nothing of its answer can be used")
    budget_tokens: int | None = option(
        None, help="most tokens of all models, prompts included; what is made then is kept"
    )
    budget_requests: int | None = option(None, help="most requests")
    dry_run: bool = option(False, help="print what would be asked, and an estimate; ask nobody")
    with_logs: bool = option(False, help="write the logs in front of the new dialogues: one file to learn from")
    limit: int | None = option(None, help="take so many of the dialogues, the same for the same seed")
    calibration: int = option(200, help="logs on which forward model and judge are compared with what really came")
    concurrency: int = option(16, help="dialogues under way")
    max_tokens: int = option(512, help="most tokens of a controller's or judge's answer; a quarter of it for a turn")
    constrained: bool = option(True, help="hold answers to their JSON schema where the backend or endpoint can")
    key_env: str | None = option(None, help="environment variable with the key of the endpoints")
    rollout_backend: str = option(
        "auto", choices=("auto", "transformers", "vllm", "server"), help="of models that are no URL"
    )
    server_url: list[str] = option([], help="vLLM servers by URL, for the server backend")
    seed: int = option(0, help="of everything that is drawn")
    overwrite: bool = option(False, help="replace --output; answers of models are kept and used again")
    quiet: bool = option(False, help="print errors only")

    def __post_init__(self) -> None:
        check_least(
            self,
            {
                **dict.fromkeys(
                    ("rounds", "candidates", "concurrency", "calibration", "limit", "budget_tokens", "budget_requests"),
                    1,
                ),
                **dict.fromkeys(("edits_per_dialogue", "retries", "seed"), 0),
                "max_tokens": 16,
            },
        )
        if not self.output.endswith((".jsonl", ".jsonl.gz")):
            raise UsageError(f"--output {self.output}: expected a name that ends in .jsonl or .jsonl.gz")
        kind, _, who = self.reward.partition("=")
        if (kind == "rule") == bool(who) or kind not in ("rule", "judge", "regression"):
            raise UsageError(f"--reward {self.reward}: expected rule, judge=WHO or regression=MODEL")
        if self.rubric is not None and kind != "judge":
            raise UsageError("--rubric goes with --reward judge=WHO")
        if self.agent is not None and self.forward == "scripted":
            raise UsageError("--agent goes with a model as --forward; a script plays both sides")
        if self.agent == "scripted":
            raise UsageError("--agent scripted: a script plays both sides or none; name a model, or leave --agent out")
        if self.match is not None and self.control == "none":
            raise UsageError("--match makes a control as large as another run; it goes with --control")

    def opens_models(self) -> bool:
        """Tell whether a model is opened here: with scripts and endpoints alone nothing heavy is loaded."""
        named = (self.controller, self.forward, self.agent, self.reward.partition("=")[2])
        return any(who and who != "scripted" and "://" not in who for who in named)


@dataclass
class ForwardConfig:
    """Options of `llmrl hindsight forward`."""

    data: list[str] = option(help="JSONL files of logged dialogues")
    model: str = option(help="causal LM with a chat template: a folder or a hub name")
    output_dir: str = option(help="the folder to write: a LoRA adapter, which regenerate takes as --forward")
    data_format: str = option("dialogues", choices=FORMATS, help="see train")
    revision: str | None = option(None, help="of a hub name")
    held_out: float = option(0.1, help="share of the dialogues that are not trained on, to compare it with people by")
    lora_r: int = option(16, help="rank")
    lr: float = option(2e-4, help="learning rate")
    epochs: float = option(2.0, help="passes over the dialogues")
    max_steps: int | None = option(None, help="steps, in place of --epochs")
    batch_size: int = option(16, help="dialogues a step, over all processes")
    micro_batch_size: int | None = option(None, help="most dialogues in memory at once on a process")
    max_length: int | None = option(None, help="longest dialogue in tokens; longer ones are left out, and counted")
    save_steps: int = option(200, help="steps between checkpoints")
    seed: int = option(0, help="of everything")
    overwrite: bool = option(False, help="replace what is in --output_dir")
    resume_from_checkpoint: str | None = option(None, help="go on with a run that was cut off", const="latest")
    report_to: str = option("none", choices=("none", "tensorboard", "wandb", "trackio"), help="where metrics go too")
    quiet: bool = option(False, help="print errors only")

    def __post_init__(self) -> None:
        least = dict.fromkeys(("lora_r", "batch_size", "micro_batch_size", "max_steps", "save_steps"), 1)
        check_least(self, {**least, "seed": 0, "max_length": 2})
        if not 0 < self.held_out < 1:
            raise UsageError(f"--held_out must be between 0 and 1, got {self.held_out}")
        for name in ("lr", "epochs"):
            if not getattr(self, name) > 0:
                raise UsageError(f"--{name} must be above 0, got {getattr(self, name)}")
