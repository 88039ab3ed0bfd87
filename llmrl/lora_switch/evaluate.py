"""Held-out loss of each task, with intervals, and which experts its tokens go to."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from llmrl.config import to_flat
from llmrl.files import check_output_dir, publish_folder, staging_folder, write_json
from llmrl.intervals import draw_counts, interval
from llmrl.lora_switch.model import SwitchMixin
from llmrl.lora_switch.options import EvalConfig
from llmrl.lora_switch.routing import usage
from llmrl.lora_switch.tasks import EncodedRow, collate, encode, read_rows
from llmrl.tables import aligned_table
from llmrl.training.run import write_run_files
from llmrl.training.tracking import progress_bar

_DRAWS = 1000


@torch.no_grad()
def row_losses(
    model: Any, rows: Sequence[EncodedRow], *, batch_size: int = 16, quiet: bool = True
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Return, a row, the summed loss of its completion in nats, its tokens, and how often each expert was chosen `[N, E]`.

    Choices are counted over prompt and completion; None for a model without experts.
    """
    device, experts = next(model.parameters()).device, getattr(model, "switch_config", None)
    order = sorted(range(len(rows)), key=lambda i: len(rows[i].ids))
    nll, tokens = np.zeros(len(rows)), np.zeros(len(rows))
    chosen = np.zeros((len(rows), experts.num_experts)) if experts is not None else None
    with progress_bar("held-out rows", len(rows), unit="row", quiet=quiet) as advance:
        for start in range(0, len(order), batch_size):
            part = order[start : start + batch_size]
            batch = {key: value.to(device) for key, value in collate([rows[i] for i in part]).items()}
            labels = batch.pop("labels")
            prompts = batch["attention_mask"].bool() & (labels == -100)
            more = {"switch_prompt_mask": prompts} if isinstance(model, SwitchMixin) else {}
            logits = model(**batch, **more).logits[:, :-1].float()
            targets = labels[:, 1:]
            losses = torch.nn.functional.cross_entropy(
                logits.transpose(1, 2), targets, ignore_index=-100, reduction="none"
            )
            nll[part] = losses.sum(1).double().cpu().numpy()
            tokens[part] = (targets != -100).sum(1).cpu().numpy()
            if chosen is not None:
                _count(model, batch["attention_mask"], part, chosen)
            advance(start + len(part), len(order))
    return nll, tokens, chosen


def _count(model: Any, mask: torch.Tensor, part: list[int], chosen: np.ndarray) -> None:
    route, experts = model.last_route(), model.switch_config.num_experts
    for i, row in enumerate(part):
        own = type(route)(*(tensor[i] for tensor in route))
        whole = len(own.ids) == mask.shape[1]
        chosen[row] = usage(own, experts, mask[i] if whole else None).cpu().numpy()


def evaluate_model(
    model: Any, rows: Sequence[EncodedRow], *, batch_size: int = 16, seed: int = 0, quiet: bool = True
) -> dict[str, Any]:
    """Return nats a token of each task and of their mean, with 95% intervals (rows resampled within tasks), and expert use.

    `rows` of the result holds each row's loss and tokens in the order given, for paired comparisons.
    """
    nll, tokens, chosen = row_losses(model, rows, batch_size=batch_size, quiet=quiet)
    names = np.array([row.task for row in rows])
    tasks, draws = {}, []
    for task in sorted(set(names.tolist())):
        own = names == task
        counts = draw_counts(int(own.sum()), _DRAWS, seed)
        drawn = (counts @ nll[own]) / (counts @ tokens[own])
        value = float(nll[own].sum() / tokens[own].sum())
        low, high = _bounds(value, drawn)
        tasks[task] = {"rows": int(own.sum()), "tokens": int(tokens[own].sum()), "nll": value, "low": low, "high": high}
        if chosen is not None:
            share = chosen[own].sum(0)
            tasks[task]["experts"] = (share / share.sum()).round(4).tolist()
        draws.append(drawn)
    mean = float(np.mean([task["nll"] for task in tasks.values()]))
    low, high = _bounds(mean, np.mean(draws, 0))
    return {
        "tasks": tasks,
        "mean": {"nll": mean, "low": low, "high": high},
        "rows": {"nll": nll.round(5).tolist(), "tokens": tokens.astype(int).tolist(), "task": names.tolist()},
    }


def _bounds(value: float, drawn: np.ndarray) -> tuple[float, float]:
    found = interval(value, drawn, basic=False)
    return found["low"], found["high"]


def table(found: dict[str, Any]) -> str:
    """Return the losses as a table."""
    rows = [[name, str(t["tokens"]), *_shown(t)] for name, t in found["tasks"].items()]
    rows.append(["mean of tasks", "", *_shown(found["mean"])])
    return aligned_table(["task", "tokens", "nats a token", "95%"], rows)


def _shown(one: dict[str, Any]) -> list[str]:
    return [f"{one['nll']:.3f}", f"[{one['low']:.3f}, {one['high']:.3f}]"]


def plot_usage(found: dict[str, Any], path: Path) -> None:
    """Draw which share of each task's choices falls on each expert."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = list(found["tasks"])
    shares = np.array([found["tasks"][name].get("experts", [1.0]) for name in names])
    figure, axes = pyplot.subplots(
        figsize=(1.6 + 0.55 * shares.shape[1], 1.4 + 0.45 * len(names)), layout="constrained"
    )
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=max(float(shares.max()), 2 / shares.shape[1]), aspect="auto")
    for (row, column), share in np.ndenumerate(shares):
        dark = share > 0.6 * image.norm.vmax
        axes.text(
            column, row, f"{share:.2f}".lstrip("0"), ha="center", va="center", fontsize=8, color="w" if dark else "k"
        )
    axes.set_yticks(range(len(names)), names)
    axes.set_xticks(range(shares.shape[1]), [str(e) for e in range(shares.shape[1])])
    axes.set_xlabel("expert")
    axes.set_title("share of choices", fontsize=10)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def evaluate(config: EvalConfig) -> dict[str, Any]:
    """Measure a model on rows and write report.json; return the report."""
    from llmrl.base_model import default_device, load_tokenizer, open_causal_lm

    folder = check_output_dir(config.output_dir, overwrite=config.overwrite)
    rows = read_rows(config.data)
    model = open_causal_lm(config.model, dtype=config.dtype, device=default_device())
    kept, too_long = encode(rows, load_tokenizer(config.model), config.max_length)
    found = evaluate_model(model, kept, batch_size=config.batch_size, seed=config.seed, quiet=config.quiet)
    report = {**found, "too_long": too_long}
    with staging_folder(folder) as staging:
        write_json(staging / "report.json", report)
        write_run_files(staging, to_flat(config))
        if isinstance(model, SwitchMixin):
            (staging / "plots").mkdir(exist_ok=True)
            plot_usage(found, staging / "plots" / "experts.png")
        publish_folder(staging, folder, stale=("report.json", "plots"))
    if not config.quiet:
        print(table(found), flush=True)
        print(folder, flush=True)
    return report
