"""The real runs of offline RL for dialogues: `python evals/hindsight.py --output_dir evals/results`.

    charity     the charity talk in short words: a language model without any knowledge learns it from 1,000 raw logs
    charity-long   the same in utterances of 8 to 14 words, four templates an act
    charity-lora   the same in short words, the small pretrained language model of this repository under LoRA
    charity-long-lora   both
    charity-users   the same as charity, but the user is a model too, which learnt the other side of the logs
    charity-ablations   what ILQL's settings are worth there
    maze        the double-T maze in text: free generation, sampled and greedy, over a grid of beta
    maze-ablations   what settings, and shorter training, are worth there
    questions   twenty questions
    questions-10k   the same from ten times as many games
    regeneration   the charity talk in short words, from logs with three rounds of regenerated ones beside them; what controls,
                worse controllers and a worse user make of it (see hindsight_regenerated.py)
    regeneration-long   the same in long words

Each method and seed is trained once and kept in `--work_dir`; a run that is cut off goes on. Beta is chosen on episodes of
another luck (seed SELECTION) than those that are reported. One policy a seed: a seed is of the logs, the weights and the order.
All policies of a seed play the same episodes; evals/hindsight_report.py makes the tables and pictures.
"""

from __future__ import annotations

import json
import shlex
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llmrl.config import option, parse_config
from llmrl.errors import EXIT_DONE, UsageError, run_command

SELECTION = 1000
STEERED = ("ilql", "mc")


@dataclass(frozen=True)
class Part:
    """One environment with one kind of model.

    Attributes:
        env, variant: of `llmrl hindsight eval`.
        methods: what is compared, in the order of the table, by its name, with its own options of `llmrl hindsight train`
            (`method` is the name where it is left out), and under "play" those of `llmrl hindsight eval`; "data" names
            regenerated dialogues and how many rounds of them are learnt from, beside the logs; "seeds" are fewer than all.
        options: of training, for all of them.
        betas: of the grid.
        episodes: reported, for each policy.
        greedy: episodes played greedily; where nothing is left to luck, one a start is all there is to see.
        model: None is a model without any knowledge.
        file: the JSON's name.
        user: train a simulated user of each seed, and play with it.
        logs: logged dialogues of each seed.
    """

    env: str
    variant: str | None
    methods: dict[str, dict[str, Any]]
    options: dict[str, Any]
    betas: tuple[float, ...]
    episodes: int
    greedy: int
    model: str | None = None
    file: str | None = None
    user: bool = False
    logs: int = 1000


_ALL: dict[str, dict[str, Any]] = {name: {} for name in ("bc", "filtered-bc", "awr", "dpo", "mc", "ilql")}
_FOUR: dict[str, dict[str, Any]] = {name: {} for name in ("bc", "filtered-bc", "mc", "ilql")}
_SCRATCH = {"lr": 2e-3, "heads_lr": 2e-3, "batch_size": 16}
_WALK = {
    "lr": 1e-3, "heads_lr": 1e-3, "batch_size": 32, "max_steps": 4000, "discount": 0.99, "window": 1, "trunk": "separate",
    "head": "mlp", "support": 0.05,
}  # fmt: skip
_ILQL = {"method": "ilql"}
_ROUNDS = {"data": ("hindsight", 3)}
_REGENERATED: dict[str, dict[str, Any]] = {
    "bc on logs": {"method": "bc"},
    "ilql on logs": _ILQL,
    "bc": _ROUNDS,
    "filtered-bc": _ROUNDS,
    "mc": _ROUNDS,
    "dpo": _ROUNDS | {"start": "bc"},
    "ilql round 1": _ILQL | {"data": ("hindsight", 1)},
    "ilql rounds 1-2": _ILQL | {"data": ("hindsight", 2)},
    "ilql": _ROUNDS,
    "ilql copies learnt": _ILQL | {"data": ("hindsight", 3), "copies": True},
    "ilql random": _ILQL | {"data": ("random", 3)},
    "ilql no hindsight": _ILQL | {"data": ("no hindsight", 3)},
}
_FAULTS: dict[str, dict[str, Any]] = {
    f"ilql {source}": _ILQL | {"data": (source, 3), "seeds": 1}
    for source in ("leaking", "noisy 30", "noisy 60", "agreeable")
}
PARTS = {
    "charity": Part("charity", "short", _ALL, {**_SCRATCH, "max_steps": 800}, (2, 4, 8, 16, 32), 300, 150),
    "charity-long": Part("charity", "long", _ALL, {**_SCRATCH, "max_steps": 1200}, (2, 4, 8, 16, 32), 300, 150),
    "charity-lora": Part(
        "charity", "short", _FOUR,
        {"tuning": "lora", "lora_r": 16, "lr": 2e-3, "heads_lr": 2e-3, "batch_size": 8, "max_steps": 400},
        (4, 8, 16), 300, 150, model="examples/tiny_lm",
    ),
    "charity-long-lora": Part(
        "charity", "long", _FOUR,
        {"tuning": "lora", "lora_r": 16, "lr": 2e-3, "heads_lr": 2e-3, "batch_size": 8, "max_steps": 400},
        (4, 8, 16), 300, 150, model="examples/tiny_lm",
    ),
    "charity-users": Part(
        "charity", "short", _FOUR, {**_SCRATCH, "max_steps": 800}, (4, 8, 16, 32), 300, 150, user=True
    ),
    "charity-ablations": Part(
        "charity", "short",
        {
            "ilql": {},
            "backup token": _ILQL | {"backup": "token"},
            "cql .1": _ILQL | {"cql": 0.1},
            "expectile .7": _ILQL | {"expectile": 0.7},
            "two trunks and mlp": _ILQL | {"trunk": "separate", "head": "mlp"},
            "no support filter": _ILQL | {"support": 0.0},
            "best of 8 by Q": _ILQL | {"play": {"rerank": 8, "beta": 0.0}},
        },
        {**_SCRATCH, "max_steps": 800}, (2, 4, 8, 16, 32), 300, 150,
    ),
    "maze": Part("maze", None, _FOUR, _WALK, (1, 2, 4, 8, 16), 100, 25, file="maze.json"),
    "maze-ablations": Part(
        "maze", None,
        {
            "ilql": {},
            "1000 steps": _ILQL | {"max_steps": 1000},
            "one trunk and mlp": _ILQL | {"trunk": "shared"},
            "one trunk and linear": _ILQL | {"trunk": "shared", "head": "linear"},
            "backup token": _ILQL | {"backup": "token"},
            "no support filter": _ILQL | {"support": 0.0},
        },
        _WALK | {"max_steps": 2000}, (1, 2, 4, 8, 16), 100, 25,
    ),
    "questions": Part(
        "twenty-questions", None, _FOUR, {**_SCRATCH, "max_steps": 1600, "batch_size": 16}, (1, 2, 4, 8, 16), 200, 100
    ),
    "questions-10k": Part(
        "twenty-questions", None, _FOUR, {"lr": 1e-3, "heads_lr": 1e-3, "max_steps": 4000, "batch_size": 32},
        (0.5, 1, 2, 4, 8), 200, 100, logs=10_000,
    ),
    "regeneration": Part(
        "charity", "short", _REGENERATED | _FAULTS, _SCRATCH | {"max_steps": 1600}, (8, 32, 128), 300, 60,
    ),
    "regeneration-long": Part(
        "charity", "long", _REGENERATED, _SCRATCH | {"max_steps": 2400}, (8, 32, 128), 300, 60,
    ),
}  # fmt: skip


@dataclass
class RunConfig:
    """Options of the runs."""

    output_dir: str | None = option(None, help="where hindsight-PART.json goes")
    only: list[str] = option([], help=f"parts: {', '.join(PARTS)} (default: all)")
    methods: list[str] = option([], help="methods (default: all of the part)")
    seeds: int = option(3, help="policies of each method")
    logs: int | None = option(None, help="logged dialogues of each seed, in place of the part's own")
    max_steps: int | None = option(None, help="of the training, in place of the part's own")
    work_dir: str = option("runs/hindsight", help="where logs, models and policies are kept")
    quiet: bool = option(False, help="print errors only")


def main(argv: list[str]) -> int:
    """Run the parts and write a JSON file each."""
    config = parse_config(RunConfig, argv, prog="evals/hindsight.py", description=str(__doc__).splitlines()[0])
    if config.output_dir is None:
        raise UsageError("missing --output_dir")
    wrong = [name for name in config.only if name not in PARTS]
    if wrong:
        raise UsageError(f"--only {wrong[0]}: expected some of {', '.join(PARTS)}")
    for name in config.only or PARTS:
        unknown = [label for label in config.methods if label not in PARTS[name].methods]
        if unknown:
            raise UsageError(f"--methods {unknown[0]}: {name} has {', '.join(PARTS[name].methods)}")
    from llmrl.commands import quiet_libraries

    quiet_libraries(quiet=True)
    output = Path(config.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    for name in config.only or PARTS:
        run_part(config, name, PARTS[name], output / (PARTS[name].file or f"hindsight-{name}.json"))
    return EXIT_DONE


def run_part(config: RunConfig, name: str, part: Part, path: Path) -> None:
    """Train and play every method and seed; the file is written again after each."""
    from hindsight_report import summary

    from llmrl.files import write_json
    from llmrl.hindsight.evaluation import ENVIRONMENTS
    from llmrl.training.run import environment

    found: dict[str, Any] = {
        "environment": environment(),
        "command": shlex.join(["python", "evals/hindsight.py", *_told(config, name)]),
        "env": part.env,
        "variant": part.variant,
        "options": part.options | ({"max_steps": config.max_steps} if config.max_steps else {}),
        "methods": {label: options for label, options in part.methods.items() if options},
        "model": part.model or "a Llama of 2 layers and width 64, random weights, whole words as tokens",
        "optimum": float(ENVIRONMENTS[part.env].module.optimum()),
        "logs": {},
        "policies": {},
    }
    for seed in range(config.seeds):
        folder = Path(config.work_dir) / name / str(seed)
        logs, model = make_logs(config, part, folder, seed)
        user = {"user": make_user(config, part, folder, seed)} if part.user else {}
        found["logs"][str(seed)] = logs
        for label in config.methods or part.methods:
            if seed >= part.methods[label].get("seeds", config.seeds):
                continue
            if source := part.methods[label].get("data"):
                from hindsight_regenerated import regenerated

                found.setdefault("regenerated", {}).setdefault(str(seed), {})[source[0]] = regenerated(
                    folder, source[0], seed
                )
            one = one_policy(part, folder, label, seed, model, found["options"], user)
            found["policies"].setdefault(label, {})[str(seed)] = one
            write_json(path, summary(found) | found)
            if not config.quiet:
                value = one["return"]
                print(
                    f"{name} seed {seed} {label}: {value['value']:.3f} [{value['low']:.3f}, {value['high']:.3f}]",
                    flush=True,
                )


def _told(config: RunConfig, name: str) -> list[str]:
    """Return the options that make a part again."""
    told = ["--only", name, "--seeds", str(config.seeds)]
    told += ["--methods", *config.methods] if config.methods else []
    told += ["--logs", str(config.logs)] if config.logs else []
    return told + (["--max_steps", str(config.max_steps)] if config.max_steps else []) + ["--output_dir", "DIR"]


def make_logs(config: RunConfig, part: Part, folder: Path, seed: int) -> tuple[dict[str, float], str]:
    """Write logs and the model to start from, once; return the mean return of the logs, and the model."""
    from llmrl.hindsight.evaluation import write_logs
    from llmrl.hindsight.options import LogsConfig

    path, small = folder / "logs.jsonl.gz", folder / "model"
    if not path.is_file():
        variant = part.variant if part.env == "charity" else None
        write_logs(
            LogsConfig(
                env=part.env, output=str(path), count=config.logs or part.logs, variant=variant, seed=seed, overwrite=True,
                quiet=True, model_dir=None if part.model else str(small),
            )
        )  # fmt: skip
    from llmrl.hindsight.dialogues import read_dialogues

    totals = [dialogue.total for dialogue in read_dialogues([path]).dialogues]
    if len(totals) != (config.logs or part.logs):
        raise UsageError(
            f"{path} holds {len(totals)} dialogues, --logs is {config.logs or part.logs}: choose another --work_dir"
        )
    return {"mean": float(np.mean(totals)), "most": float(np.max(totals))}, part.model or str(small)


def make_user(config: RunConfig, part: Part, folder: Path, seed: int) -> str:
    """Train a model on the user's side of other logs than the policies', once, and return its folder."""
    from llmrl.hindsight.evaluation import write_logs
    from llmrl.hindsight.options import LogsConfig, TrainConfig
    from llmrl.hindsight.run import train

    logs, small, user = folder / "user.jsonl.gz", folder / "user-model", folder / "user"
    if not user.is_dir():
        write_logs(
            LogsConfig(
                env=part.env, output=str(logs), count=config.logs or part.logs, variant=part.variant, seed=SELECTION + seed,
                side="user", model_dir=str(small), overwrite=True, quiet=True,
            )
        )  # fmt: skip
        train(
            TrainConfig(
                data=[str(logs)], model=str(small), output_dir=str(user), method="bc", seed=seed, quiet=True, overwrite=True,
                save_steps=10**6, max_steps=800, lr=2e-3, batch_size=16,
            )
        )  # fmt: skip
    return str(user)


def one_policy(
    part: Part, folder: Path, label: str, seed: int, model: str, options: dict[str, Any], user: dict[str, str]
) -> dict[str, Any]:
    """Train a policy unless it is there, choose beta, and play it; what was found is kept beside it."""
    from llmrl.hindsight.options import TrainConfig
    from llmrl.hindsight.run import train

    own = {key: value for key, value in part.methods[label].items() if key != "seeds"}
    method, how = own.pop("method", label), user | own.pop("play", {})
    name = label.replace(" ", "-")
    target, kept = folder / name, folder / f"{name}.json"
    start = str(folder / own.pop("start", "bc")) if method == "dpo" else model  # preferences begin where cloning ended
    data, source = [str(folder / "logs.jsonl.gz")], own.pop("data", None)
    if source is not None:
        from hindsight_regenerated import up_to

        data.append(str(up_to(folder, *source, copies=own.pop("copies", False))))
    wanted = TrainConfig(
        data=data, model=start, output_dir=str(target), method=method, seed=seed, quiet=True,
        overwrite=True, save_steps=10**6, **options | own,
    )  # fmt: skip
    told = {key: Path(value).name if key == "user" else value for key, value in how.items()}
    plays = {"betas": part.betas, "episodes": part.episodes, "greedy": part.greedy, "how": told}
    if not is_trained(target, wanted):
        kept.unlink(missing_ok=True)
        train(wanted)
    if kept.is_file():
        found = dict(json.loads(kept.read_text(encoding="utf-8")))
        if found["plays"] == json.loads(json.dumps(plays)):
            return found
    trained = json.loads((target / "report.json").read_text(encoding="utf-8"))
    begun = time.monotonic()
    found = {"plays": plays, "train_seconds": trained["seconds"], "last": trained["last"], "curve": curve(target)}
    beta, how = how.get("beta"), {key: value for key, value in how.items() if key != "beta"}
    if method in STEERED and beta is None:
        found["grid"] = {f"{b:g}": both(part, target, b, SELECTION, part.episodes // 2, how) for b in part.betas}
        beta = max(part.betas, key=lambda b: found["grid"][f"{b:g}"]["return"]["value"])
    found |= {"beta": beta, **both(part, target, beta, seed, part.episodes, how, returns=True)}
    found["play_seconds"] = time.monotonic() - begun
    kept.write_text(json.dumps(found), encoding="utf-8")
    return found


def is_trained(folder: Path, wanted: Any) -> bool:
    """Tell whether a policy is there that was trained with these options; what its time did not know had its default."""
    from dataclasses import fields

    import yaml

    from llmrl.config import to_flat

    if not (folder / "report.json").is_file():
        return False
    options = yaml.safe_load((folder / "config.resolved.yaml").read_text(encoding="utf-8"))
    default = {field.name: field.default for field in fields(wanted)}
    told = {name: value for name, value in to_flat(wanted).items() if name not in ("data", "model", "output_dir")}
    return all(options.get(name, default[name]) == value for name, value in told.items())


def both(
    part: Part,
    policy: Path,
    beta: float | None,
    seed: int,
    episodes: int,
    how: dict[str, Any],
    *,
    returns: bool = False,
) -> dict[str, Any]:
    """Play sampled and greedily; return what is reported, each episode's return only where it is asked for."""
    keys = ("return", "invalid_share", "off_template_share", "truncated_share")
    sampled = play(part, policy, beta, seed, episodes, **how)
    found = {key: sampled[key] for key in keys}
    if "rerank" not in how:  # there is nothing to choose among
        greedy = play(part, policy, beta, seed, part.greedy, greedy=True, **how)
        found["greedy"] = {key: greedy[key] for key in keys}
    return found | ({"returns": [round(value, 4) for value in sampled["returns"]]} if returns else {})


def play(
    part: Part, policy: Path, beta: float | None, seed: int, episodes: int, *, greedy: bool = False, **how: Any
) -> dict[str, Any]:
    """Return the report of `llmrl hindsight eval`."""
    from llmrl.hindsight.evaluation import evaluate
    from llmrl.hindsight.options import EvalConfig

    return evaluate(
        EvalConfig(
            policy=str(policy), env=part.env, output_dir=f"{policy}.eval", episodes=episodes, greedy=greedy,
            variant=part.variant, seed=seed, overwrite=True, quiet=True, **how | {"beta": beta},
        )
    )  # fmt: skip


def curve(policy: Path) -> dict[str, list[float]]:
    """Return how V and losses went, at most 50 points."""
    from llmrl.training.metrics import read_metrics

    rows = [row for row in read_metrics(policy) if "policy_nll" in row]
    rows = rows[:: max(1, len(rows) // 50)]
    names = [name for name in ("step", "policy_nll", "value", "earned", "q_loss", "v_loss") if name in rows[-1]]
    return {name: [round(float(row[name]), 5) for row in rows] for name in names}


if __name__ == "__main__":
    sys.exit(run_command(lambda: main(sys.argv[1:])))
