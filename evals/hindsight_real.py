"""PersuasionForGood and CaSiNo, whole, on the small pretrained model.

    python evals/hindsight_real.py --data DIR --output_dir evals/results

    forward     a LoRA adapter on the user's side (trl SFT), and how it goes on from real prefixes of held-out dialogues, beside
                the same model before training, which is told to be the user
    leaks       how often the check of edits finds a later turn of the user's word for word, and how often what agents said in
                other dialogues
    policies    bc, mc and ilql under LoRA on four fifths of the dialogues; on the rest how likely their words are, and whether
                Q and V follow what was earned

DIR holds persuasionforgood/dialogues.jsonl.gz and casino/{train,valid,test}.jsonl.gz. Donations are clipped to the 2 dollars
that a participant had; how many that changes is in the file. A run that is cut off goes on.
"""

from __future__ import annotations

import json
import random
import sys
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llmrl.config import option, parse_config
from llmrl.errors import EXIT_DONE, UsageError, run_command

SETS = {
    "persuasion_for_good": ("persuasionforgood/dialogues.jsonl.gz",),
    "casino": ("casino/train.jsonl.gz", "casino/valid.jsonl.gz", "casino/test.jsonl.gz"),
}
METHODS = ("bc", "mc", "ilql")
HELD_OUT = 0.2


@dataclass
class RunConfig:
    """Options of the runs."""

    data: str | None = option(None, help="folder of the data sets")
    output_dir: str | None = option(None, help="where hindsight-real.json goes")
    only: list[str] = option([], help=f"data sets: {', '.join(SETS)} (default: both)")
    model: str = option("examples/tiny_lm", help="what is trained")
    max_steps: int = option(80, help="of each policy")
    forward_steps: int = option(150, help="of the forward model")
    prefixes: int = option(100, help="that the forward model goes on from")
    work_dir: str = option("runs/hindsight-real", help="where models are kept")


def main(argv: list[str]) -> int:
    """Run both data sets and write one file."""
    config = parse_config(RunConfig, argv, prog="evals/hindsight_real.py", description=str(__doc__).splitlines()[0])
    if config.data is None or config.output_dir is None:
        raise UsageError("missing --data or --output_dir")
    from llmrl.commands import quiet_libraries
    from llmrl.files import write_json
    from llmrl.training.run import environment

    quiet_libraries(quiet=True)
    path = Path(config.output_dir) / "hindsight-real.json"
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    found["environment"] = environment()
    found["options"] = {"model": config.model, "max_steps": config.max_steps, "forward_steps": config.forward_steps}
    for name in config.only or SETS:
        one = found.setdefault("sets", {}).setdefault(name, {})
        folder = Path(config.work_dir) / name
        one["leaks"] = leaks([Path(config.data) / part for part in SETS[name]], name)
        one["data"] = split([Path(config.data) / part for part in SETS[name]], name, folder)
        for method in METHODS:
            one.setdefault("policies", {})[method] = policy(config, folder, method)
            write_json(path, found)
            print(name, method, json.dumps(one["policies"][method])[:300], flush=True)
        one["forward"] = forward(config, folder)
        write_json(path, found)
        print(name, json.dumps(one["forward"])[:600], flush=True)
    return EXIT_DONE


def split(sources: list[Path], name: str, folder: Path) -> dict[str, Any]:
    """Write train.jsonl and test.jsonl once, and return what is in the data."""
    from llmrl.hindsight.datasets import read_files
    from llmrl.jsonl import write_objects
    from llmrl.rollout.seeds import derive_seed

    read = read_files(sources, name)
    order = sorted(read.dialogues, key=lambda d: derive_seed(0, "split", d.id))
    cut = round(HELD_OUT * len(order))
    for part, rows in (("test", order[:cut]), ("train", order[cut:])):
        write_objects(folder / f"{part}.jsonl", [d.to_json() for d in rows])
    totals = np.array([d.total for d in read.dialogues])
    donated = [d.provenance["donation"] for d in read.dialogues if "donation" in d.provenance]
    return {
        "read": read.summary(),
        "train": len(order) - cut,
        "test": cut,
        "return": {"mean": float(totals.mean()), "sd": float(totals.std()), "most": float(totals.max())},
        "agent_turns": float(np.mean([len(d.agent_turns) for d in read.dialogues])),
        "clipped": sum(donation > 2 for donation in donated),
        "most_before_clipping": max(donated, default=None),
    }


def leaks(sources: list[Path], name: str, dialogues: int = 300) -> dict[str, Any]:
    """Return how often the check for leaks finds what the user says later word for word; and, where nothing leaks, what an
    agent said in another dialogue, and what it said at this very turn.
    """
    from llmrl.hindsight.datasets import read_files
    from llmrl.hindsight.dialogues import AGENT
    from llmrl.hindsight.regeneration.validation import Limits, leaked
    from llmrl.types import Message

    logs, luck = read_files(sources, name).dialogues, random.Random(0)
    common = Limits.of(logs).common
    found = {"quotations": [0, 0], "said_elsewhere": [0, 0], "said_here": [0, 0]}
    for dialogue in luck.sample(logs, dialogues):
        for turn in dialogue.agent_turns:
            other = luck.choice(logs)
            said, masked = dialogue.messages[turn].content, list(dialogue.messages)
            masked[turn] = Message(AGENT, "...")  # else the check would know it
            texts = {"said_elsewhere": other.messages[luck.choice(other.agent_turns)].content, "said_here": said}
            later = [m.content for m in dialogue.messages[turn + 1 :] if m.role != AGENT and len(m.content.split()) > 6]
            if later:
                texts["quotations"] = luck.choice(later)
            for key, text in texts.items():
                found[key][0] += leaked(text, masked, turn, common) is not None
                found[key][1] += 1
    return {key: {"share": some / of, "texts": of} for key, (some, of) in found.items()}


def policy(config: RunConfig, folder: Path, method: str) -> dict[str, Any]:
    """Train a policy unless it is there, and return what it says of the held-out dialogues."""
    from llmrl.base_model import context_length
    from llmrl.hindsight.dialogues import read_dialogues
    from llmrl.hindsight.encode import encode_dialogues
    from llmrl.hindsight.held_out import against_returns
    from llmrl.hindsight.options import TrainConfig
    from llmrl.hindsight.policy import load_policy
    from llmrl.hindsight.run import train

    target = folder / method
    if not (target / "report.json").is_file():
        train(
            TrainConfig(
                data=[str(folder / "train.jsonl")], model=config.model, output_dir=str(target), method=method, tuning="lora",
                lr=1e-3, heads_lr=1e-3, batch_size=8, max_steps=config.max_steps, expectile=0.8, quiet=True, overwrite=True,
                max_length=1536, save_steps=10**6,
            )
        )  # fmt: skip
    report = json.loads((target / "report.json").read_text(encoding="utf-8"))
    model = load_policy(target, beta=0.0, support=0.0)
    from llmrl.base_model import load_tokenizer

    tokenizer = load_tokenizer(str(target))
    rows, read = encode_dialogues(
        tokenizer, read_dialogues([folder / "test.jsonl"]), context_length(model, tokenizer, 1536)
    )
    return {
        "steps": report["steps"],
        "seconds": report["seconds"],
        "used": report["dialogues"],
        "alarms": report["alarms"],
        "last": {key: report["last"][key] for key in ("policy_nll", "value", "earned") if key in report["last"]},
        "held_out": against_returns(model, rows),
        "held_out_left_out": len(read.refused),
    }


def forward(config: RunConfig, folder: Path) -> dict[str, Any]:
    """Train the forward model unless it is there; compare it, and the model before training, with what really came."""
    from llmrl.hindsight.dialogues import read_dialogues
    from llmrl.hindsight.regeneration.answers import Answers
    from llmrl.hindsight.regeneration.budget import Meter
    from llmrl.hindsight.regeneration.opening import Opener, open_parts, read_user, state_features
    from llmrl.hindsight.regeneration.options import ForwardConfig, RegenerateConfig
    from llmrl.hindsight.regeneration.realism import compare
    from llmrl.hindsight.regeneration.rewards import RegressionReward
    from llmrl.hindsight.regeneration.user_model import train

    target, logs = folder / "forward", folder / "train.jsonl"
    if not (target / "report.json").is_file():
        train(
            ForwardConfig(
                data=[str(logs)], model=config.model, output_dir=str(target), lr=1e-3, batch_size=8, max_length=1536,
                max_steps=config.forward_steps, quiet=True, overwrite=True,
            )
        )  # fmt: skip
    dialogues = read_dialogues([logs]).dialogues
    told = read_user(str(target)) or {}
    unseen = [d for d in dialogues if d.id in set(told["held_out"])]
    found: dict[str, Any] = {"report": json.loads((target / "report.json").read_text(encoding="utf-8"))}
    for label, who in (("trained", str(target)), ("told", config.model)):
        wanted = RegenerateConfig(
            data=[str(logs)], output=str(folder / f"{label}.jsonl"), controller=config.model, forward=who, max_tokens=512,
            agent=str(folder / "bc"), reward="rule", rollout_backend="transformers", calibration=config.prefixes,
        )  # fmt: skip
        with ExitStack() as stack:
            answers = stack.enter_context(Answers(folder / f"{label}.answers"))
            parts = open_parts(wanted, dialogues, Opener(wanted, stack, answers, meter := Meter()))
            found[label] = compare(unseen, parts.forward, parts.reward, count=config.prefixes, seed=0)
            found["rule"] = {"agreement": parts.reward.agreement, "error": parts.reward.sd}
            found[label]["cost"] = meter.to_json()
    regression = RegressionReward(state_features(config.model), dialogues, 0, config.model)
    found["regression"] = {"agreement": regression.agreement, "error": regression.sd}
    return found


if __name__ == "__main__":
    sys.exit(run_command(lambda: main(sys.argv[1:])))
