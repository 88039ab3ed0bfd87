"""Users who agree or disagree with statements: some personas train the ensemble, others are met with a few labels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hyre_data import read_statements, split_personas

from llmrl.files import write_json
from llmrl.hyre.ensemble import RewardEnsemble, load_ensemble
from llmrl.hyre.evaluate import UserPairs, table
from llmrl.hyre.evaluation import users_of
from llmrl.hyre.options import TrainConfig
from llmrl.hyre.pairs import read_pairs
from llmrl.hyre.plots import accuracy_curves, heat_map, query_traces, reliability, weight_bars
from llmrl.hyre.train import train
from llmrl.training.run import environment
from llmrl.training.tracking import progress_bar

SIZES = (1, 2, 5, 10, 20, 32)
KINDS = ("natural", "two-sided")  # two-sided: every user also comes as the opposite


def run(config: Any, output: Path) -> dict[str, Any]:
    """Write hyre-persona.json and its pictures."""
    found: dict[str, Any] = {"environment": environment(), "seeds": config.seeds, "training": []}
    users: dict[str, list[UserPairs]] = {kind: [] for kind in KINDS}
    owners: dict[str, list[str]] = {kind: [] for kind in KINDS}
    for seed in range(config.seeds):
        ensemble, files = trained(config, seed)
        found["training"].append(ensemble.facts)
        for kind in KINDS:
            new = users_in(config, ensemble, files[kind])
            users[kind] += new
            owners[kind] += [user.name.removeprefix("not ") for user in new]
    for kind in KINDS:
        with progress_bar(kind, len(users[kind]), unit="user", quiet=config.quiet) as advance:
            found[kind] = table(users[kind], sizes=SIZES, draws=config.draws, clusters=owners[kind], advance=advance)
        accuracy_curves(
            output / f"hyre-persona-{kind}.png", found[kind], f"{len(set(owners[kind]))} personas, {kind} users"
        )
    _pictures(config, output, users["natural"][:20])
    write_json(output / "hyre-persona.json", found)
    return found


def trained(config: Any, seed: int, **changes: Any) -> tuple[RewardEnsemble, dict[str, Path]]:
    """Return the ensemble of one split of the personas, and the pairs of the users it was not trained on."""
    folder = Path(config.work_dir) / f"persona-{seed}"
    statements = read_statements(str(Path(config.data) / "persona_evals" / "statements.jsonl.gz"))
    train_file, natural, two_sided = split_personas(statements, folder, seed)
    model = folder / "-".join(["model", *(f"{key}-{value}" for key, value in sorted(changes.items()))])
    options = {"pairs": [str(train_file)], "output_dir": str(model), "cache_dir": str(Path(config.work_dir) / "cache")}
    train(TrainConfig(**{**options, "seed": seed, "overwrite": True, "quiet": True, **changes}))
    return load_ensemble(model), {"natural": natural, "two-sided": two_sided}


def users_in(config: Any, ensemble: RewardEnsemble, file: Path) -> list[UserPairs]:
    """Return the users of a file of pairs."""
    pairs = read_pairs(file)
    return users_of(ensemble, pairs, *ensemble.features(pairs, cache_dir=Path(config.work_dir) / "cache"))


def _pictures(config: Any, output: Path, users: list[UserPairs]) -> None:
    from llmrl.hyre.evaluation import heat_map as heads

    ensemble, _ = trained(config, 0)
    heat_map(output / "hyre-persona-heads.png", heads(users))
    weight_bars(output / "hyre-persona-weights.png", users[:4], ensemble.names)
    reliability(output / "hyre-persona-reliability.png", users, labels=5)
    query_traces(output / "hyre-persona-queries.png", users[:4], ensemble.names)
