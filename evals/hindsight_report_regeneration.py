"""Tables and the picture of regeneration, for evals/hindsight_report.py."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from llmrl.tables import aligned_table

_RED, _BLUE, _GREEN, _GREY = "#c8442f", "#1f6fb4", "#2e8b57", "#9aa0a6"
_STEPS = ("ilql on logs", "ilql round 1", "ilql rounds 1-2", "ilql")


def regenerated_section(found: Mapping[str, Any]) -> list[str]:
    """Return what each source of regenerated dialogues made, and what its user was like."""
    rows = []
    for seed, sources in found["regenerated"].items():
        for source, told in sources.items():
            made = [one["made"] for one in told["rounds"]]
            earned = told["realism"]["earned"]
            rows.append(
                [
                    seed, source, " + ".join(map(str, made)), str(sum(told["refused"].values())),
                    f"{earned['simulated']:.2f} ({earned['real']:.2f})", _cell(earned["difference"]),
                    "alarm" if told["realism"]["alarms"] else "",
                ]
            )  # fmt: skip
    head = [
        "seed",
        "source",
        "new dialogues by round",
        "refused",
        "simulated users give (real)",
        "difference [95%]",
        "",
    ]
    return [aligned_table(head, rows)]


def real_section(found: Mapping[str, Any]) -> list[str]:
    """Return the tables of PersuasionForGood and CaSiNo."""
    options = found["options"]
    parts = [
        "## Real dialogues",
        f"{options['model']} under LoRA, policies {options['max_steps']} steps of 8 dialogues, forward model "
        f"{options['forward_steps']}. Q and V on held-out dialogues: rank correlation with what was earned from there on [95% "
        "interval over dialogues]; the error of V beside that of saying the mean of all (deviation).",
    ]
    for name, one in found["sets"].items():
        data, forward = one["data"], one.get("forward")
        parts.append(
            f"**{name}**: {data['read']}; {data['train']} to train on, {data['test']} held out; mean return "
            f"{data['return']['mean']:.2f}, deviation {data['return']['sd']:.2f}; {data['clipped']} donations clipped."
        )
        rows = []
        for method, policy in one["policies"].items():
            held = policy["held_out"]
            cells = [_rank(held.get(key)) for key in ("q", "v", "first_v")]
            error = f"{held['v']['error']:.2f} ({held['v']['to_go']['sd']:.2f})" if "v" in held else ""
            rows.append([method, f"{held['nll']:.3f}", *cells, error, f"{policy['seconds']:.0f} s"])
        head = [
            "",
            "nats a token",
            "Q, all turns",
            "V, all turns",
            "V, first turn",
            "error of V (deviation)",
            "training",
        ]
        parts.append(aligned_table(head, rows))
        if forward:
            parts += _forward(one, forward)
    return parts


def _forward(one: Mapping[str, Any], forward: Mapping[str, Any]) -> list[str]:
    nll, leaks = forward["report"]["held_out_nll"], one["leaks"]
    regression = forward.get("regression", {"agreement": None})
    rows = []
    for label in (name for name in ("trained", "told") if name in forward):
        told = forward[label]
        if "earned" not in told:
            rows.append([label, "0", str(told["lost"]), "", "", "", ""])
            continue
        cells = [_both(told[key]) for key in ("earned", "reply_words", "agreement")]
        rows.append(
            [label, str(told["prefixes"]), str(sum(told["lost"].values())), *cells, "; ".join(told["alarms"])[:60]]
        )
    head = ["forward model", "prefixes", "lost", "earned (real)", "words of a reply (real)", "agrees (real)", "alarm"]
    rule = forward["rule"]
    return [
        aligned_table(head, rows),
        f"Held-out users' words under the forward model: {nll['before']:.2f} nats a token before training, {nll['after']:.2f} "
        f"after. What the logs earned, by the rule: rank correlation {_rank(rule['agreement'])}; by a regression on the "
        f"model's states: {_rank(regression['agreement']) or 'not run'}. The check for leaks finds "
        f"{leaks['quotations']['share']:.0%} of later turns that are quoted, and refuses "
        f"{leaks['said_elsewhere']['share']:.1%} of what agents said in other dialogues and "
        f"{leaks['said_here']['share']:.1%} of what they said at the turn itself.",
    ]


def llm_section(found: Mapping[str, Any]) -> list[str]:
    """Return what the runs on a served model did."""
    rows = []
    for name, run in found.items():
        if not isinstance(run, Mapping) or "cost" not in run:
            continue
        cost, refused = run["cost"], run["refused"]
        reasons = ", ".join(f"{count} {reason}" for reason, count in refused.items())
        left = ", ".join(f"{count} {reason}" for reason, count in run["unfinished"].items())
        idle = "" if cost["idle_share"] is None else f"{cost['idle_share']:.1%}"
        rows.append([name, str(run["made"]), reasons, left, str(cost["requests"]), str(cost["tokens"]), idle])
    head = ["run", "new", "refused", "unfinished", "requests", "tokens", "engine idle"]
    killed = found["killed"]
    same = "the same" if killed["same_bytes_as_uninterrupted"] else "other"
    return [
        "## A served model",
        f"{found['model']} as controller, user, agent and judge behind `{found['server']}`.",
        aligned_table(head, rows),
        f"Killed with SIGKILL at {killed['answers_at_the_kill']} answers: the same command used "
        f"{killed['answers_known_afterwards']} of them, asked {killed['requests_afterwards']} more, and wrote {same} bytes "
        "than the run that was not killed.",
    ]


def _both(one: Mapping[str, Any] | None) -> str:
    return "" if one is None else f"{one['simulated']:.2f} ({one['real']:.2f})"


def _rank(one: Mapping[str, Any] | None) -> str:
    if one is None:
        return ""
    return "all alike" if one["spearman"] is None else _cell(one["spearman"])


def _cell(value: Mapping[str, float]) -> str:
    return f"{value['value']:.2f} [{value['low']:.2f}, {value['high']:.2f}]"


def draw_rounds(found: Mapping[str, Any], path: Path) -> None:
    """Draw the mean return over rounds, with the controls of equal size at the last one."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    policies = found["policies"]
    figure, axis = plt.subplots(figsize=(6.4, 4.0))
    steps = [i for i, label in enumerate(_STEPS) if label in policies]
    means = [[np.mean(one["returns"]) for one in policies[_STEPS[i]].values()] for i in steps]
    axis.plot(steps, [np.mean(values) for values in means], "-", color=_RED, label="ILQL, edits in hindsight")
    for i, values in zip(steps, means, strict=True):
        axis.plot([i] * len(values), values, "o", color=_RED, markersize=4)
    for label, told, colour in (
        ("ilql random", "ILQL, random edits", _BLUE),
        ("ilql no hindsight", "ILQL, edits without hindsight", _GREY),
        ("bc", "cloning, edits in hindsight", "#c58b1b"),
    ):
        if label in policies:
            values = [np.mean(one["returns"]) for one in policies[label].values()]
            axis.plot([3] * len(values), values, "D", color=colour, markersize=5, markerfacecolor="none", label=told)
    axis.axhline(found["optimum"], color=_GREEN, linestyle="--", linewidth=1.2, label="the best there is")
    axis.set_xticks(range(4), ["logs alone", "1", "2", "3"])
    axis.set(xlabel="rounds of regeneration", ylabel="mean return (dots: seeds)")
    axis.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(0.0, 0.62))
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)
