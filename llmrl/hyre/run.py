"""`llmrl hyre adapt|score`: labels of a user in, a file of numbers out; pairs in, margins out."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from llmrl.errors import DataError, OutputError
from llmrl.hyre.ensemble import RewardEnsemble, load_ensemble
from llmrl.hyre.metrics import accuracy
from llmrl.hyre.options import AdaptConfig, ScoreConfig
from llmrl.hyre.pairs import Pair, read_pairs
from llmrl.hyre.user import User, adapt, load_user, once_each
from llmrl.jsonl import write_objects


def check_output_file(path: str, inputs: Sequence[str | None], *, overwrite: bool) -> Path:
    """Return the path of a file to write.

    Raises:
        OutputError: it is there and may not be replaced, is a folder, or is one of the inputs.
    """
    file = Path(path).expanduser()
    refuse_inputs(file, inputs)
    if file.is_dir():
        raise OutputError(f"--output {file} is a folder: name a file")
    if file.exists() and not overwrite:
        raise OutputError(f"--output {file} is there; --overwrite replaces it")
    return file


def refuse_inputs(output: Path, inputs: Sequence[str | None]) -> None:
    """Refuse an output that would replace what it is made of, whatever may be overwritten.

    Raises:
        OutputError: names it.
    """
    for name in inputs:
        if name is not None and output.resolve() == Path(name).expanduser().resolve():
            raise OutputError(f"{output} is read and would be replaced: name another output")


def adapt_user(config: AdaptConfig) -> User:
    """Weigh the heads by a user's labels and write the user's file.

    Raises:
        DataError: labels that cannot be used: none, contradictory, or with scores that are not finite.
    """
    path = check_output_file(config.output, [*config.pairs, config.model], overwrite=config.overwrite)
    pairs = once_each(read_pairs(config.pairs))
    ensemble = load_ensemble(config.model)
    chosen, rejected = _features(ensemble, pairs, config.cache_dir, config.quiet)
    user = adapt(
        ensemble,
        chosen,
        rejected,
        beta=config.beta,
        loss=config.loss,
        guard=config.guard,
        refined=config.refine,
        l2=config.l2,
    )
    user.save(path)
    _say(config, ensemble, user, ensemble.margins(chosen, rejected), path)
    return user


def score_pairs(config: ScoreConfig) -> list[dict[str, object]]:
    """Write `{"margin", "head_margins"}` of each pair, in order, and return the rows."""
    path = check_output_file(config.output, [*config.pairs, config.model, config.user], overwrite=config.overwrite)
    pairs = read_pairs(config.pairs)
    ensemble = load_ensemble(config.model)
    user = None if config.user is None else load_user(config.user, ensemble)
    chosen, rejected = _features(ensemble, pairs, config.cache_dir, config.quiet)
    head_margins = ensemble.margins(chosen, rejected)
    if not np.isfinite(head_margins).all():
        row = int(np.flatnonzero(~np.isfinite(head_margins).all(1))[0])
        raise DataError(
            f"{pairs[row].where}: a head gave a score that is not a number; check the base model and its dtype"
        )
    margins = head_margins.mean(1) if user is None else user.margins(head_margins, chosen, rejected)
    rows: list[dict[str, object]] = [
        {"margin": float(m), "head_margins": heads.tolist()} for m, heads in zip(margins, head_margins, strict=True)
    ]
    if path.name.endswith((".jsonl", ".jsonl.gz")):
        write_objects(path, rows)
    else:
        _write_plain(path, rows)
    if not config.quiet:
        who = "all heads alike" if user is None else f"{len(user.posterior)} labels of {config.user}"
        print(f"{len(rows)} pairs, {who}: the chosen one wins {float(accuracy(margins)):.1%}\n{path}", flush=True)
    return rows


def _write_plain(path: Path, rows: list[dict[str, object]]) -> None:
    import json

    from llmrl.files import write_text

    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows))


def _features(
    ensemble: RewardEnsemble, pairs: list[Pair], cache_dir: str | None, quiet: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    return ensemble.features(pairs, cache_dir=None if cache_dir is None else Path(cache_dir).expanduser(), quiet=quiet)


def _say(config: AdaptConfig, ensemble: RewardEnsemble, user: User, margins: NDArray[np.float64], path: Path) -> None:
    warning = ensemble.facts.get("warning")
    if warning:
        print(f"warning: {warning}", file=sys.stderr, flush=True)
    choice = user.choice
    if choice is not None and choice.guarded:
        kept = "the uniform ensemble is kept" if config.guard else "--guard false: they are used all the same"
        print(
            f"warning: the labels do not predict each other better than the uniform ensemble does: {kept}",
            file=sys.stderr,
        )
    if config.quiet:
        return
    posterior = user.posterior
    order = np.argsort(-posterior.weights)[:5]
    names = ensemble.names or tuple(f"head {k}" for k in range(ensemble.heads))
    print(
        f"{len(posterior)} labels, loss {posterior.loss}, beta {posterior.beta:g}{', refined' if config.refine else ''}; "
        f"{posterior.effective_heads:.1f} of {posterior.heads} heads effective",
        flush=True,
    )
    for k in order.tolist():
        print(f"  {posterior.weights[k]:6.1%}  {names[k]}")
    print(
        f"of these labels the uniform ensemble gets {float(accuracy(margins.mean(1))):.1%} right, this user's weights "
        f"{float(accuracy(posterior.predict(margins))):.1%}\n{path}",
        flush=True,
    )
