"""Loaders that turn published dialogues into `Dialogue` rows: who the agent is, what it earned, how it ended.

A row that cannot be learnt from is kept aside with a reason. Two turns of one side in a row are joined by a line break; the
provenance of a dialogue counts them as `joined`. Rewards that belong to a whole dialogue stand at the agent's last turn, and
the figure they were made from is in the provenance.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from llmrl.errors import DataError, UsageError, did_you_mean
from llmrl.hindsight.dataset_games import load_guess_my_city, load_lmrl_gym
from llmrl.hindsight.dataset_rows import Said, dialogue_from, paid, read_rows, turns_of, value_of
from llmrl.hindsight.dialogues import BadDialogue, Dialogue, ReadDialogues, read_dialogues

# what a participant of PersuasionForGood was paid and could give away
_MOST_DOLLARS = 2.0
# of CaSiNo: three packages of each issue, and what one is worth by its priority
_ISSUES = ("Food", "Water", "Firewood")
_WORTH = {"High": 5, "Medium": 4, "Low": 3}
_MOST_POINTS = 3 * sum(_WORTH.values())
_FIRST = "first"
DIALOGUES = "dialogues"
# of CraigslistBargain: a number that is no part of another, no percentage, count of something, time or ordinal
_PRICE = re.compile(
    r"(?<![\w.,#/-])(\d{1,3}(?:,\d{3})+|\d+)(\.\d{1,2})?"
    r"(?!\d|[.,]\d|-|\s?(?:k\s)?\s?(?:%|(?:miles?|mi|years?|yrs?|months?|days?|hours?|hrs?|minutes?|mins?|feet|foot|ft|inch"
    r"|inches|off|model|st|nd|rd|th|am|pm)\b))",
    re.IGNORECASE,
)
_GOES_ON = ("propose", "counter", "disagree")


def load(name: str, path: Path | str) -> ReadDialogues:
    """Load a file of a data set by the name that it has in `LOADERS`.

    Raises:
        UsageError: no data set has this name, or the file is not there.
        DataError: see `read_rows`.
    """
    if name not in LOADERS:
        raise UsageError(f"no loader for a data set '{name}'{did_you_mean(name, LOADERS)}")
    return LOADERS[name](path)


def read_files(paths: Sequence[Path | str], form: str = DIALOGUES) -> ReadDialogues:
    """Read files of one form.

    Args:
        paths: files.
        form: "dialogues" for those of `llmrl.hindsight.dialogues`, or a name in `LOADERS`.

    Raises:
        UsageError: there is no such form, or a file is not there.
        DataError: a file cannot be read, two dialogues have one id, or no dialogue is left.
    """
    if form == DIALOGUES:
        return read_dialogues(paths)
    parts = [load(form, path) for path in paths]
    found = [dialogue for part in parts for dialogue in part.dialogues]
    if twice := [name for name, count in Counter(dialogue.id for dialogue in found).items() if count > 1]:
        raise DataError(f"the id {twice[0]!r} is in two of the files {', '.join(map(str, paths))}; ids must be unique")
    return ReadDialogues(found, [row for part in parts for row in part.refused])


_PERSUADE = "Talk to a stranger and persuade them to donate to the charity Save the Children."


def load_persuasion_for_good(path: Path | str) -> ReadDialogues:
    """Load PersuasionForGood, in the form `{"id", "donation_persuadee", "turns": [{"role", "text"}, ...]}`.

    The persuader is the agent. It earns what the persuadee gave, in dollars, between 0 and 2: nobody had more than 2 dollars to
    give, yet a few rows say 50 or 700, and one of them would outweigh hundreds of dialogues in every mean. It speaks first, and
    what it is there for is the system message.

    Raises:
        UsageError, DataError: see `read_rows`.
    """

    def talk(row: dict[str, Any], where: str) -> Dialogue:
        donation = float(value_of(row, "donation_persuadee", (int, float), where))
        turns = paid(turns_of(row, "persuader", ["persuadee"], where), min(max(donation, 0.0), _MOST_DOLLARS))
        id = value_of(row, "id", str, where)
        task, provenance = "persuasion_for_good", {"donation": donation}
        return dialogue_from(where, turns, id=id, task=task, system=_PERSUADE, provenance=provenance)

    return read_rows(path, talk)


def load_casino(path: Path | str, side: str = _FIRST) -> ReadDialogues:
    """Load CaSiNo, in the form `{"id", "participants": {NAME: {...}}, "turns": [{"role", "text", "task_data"}, ...]}`.

    One of the two campers is the agent. What it knew beforehand, its priorities and the reasons for them, is the system
    message. It earns its `points_scored` as a share of the 36 that all packages together are worth, so that rewards are within
    [0, 1] as those of other negotiations; walking away scores 5. Moves in the deal menu are told in words that keep the split.

    Args:
        path: the file.
        side: "first" for the camper who speaks first, or the name of a participant, such as "mturk_agent_1". A row without a
            participant of that name is refused as "unknown side".

    Raises:
        UsageError, DataError: see `read_rows`.
    """
    return read_rows(path, partial(_camp_talk, side))


def _camp_talk(side: str, row: dict[str, Any], where: str) -> Dialogue:
    campers = value_of(row, "participants", dict, where)
    turns = value_of(row, "turns", list, where)
    first = turns[0].get("role") if turns and isinstance(turns[0], dict) else None
    agent = str(first) if side == _FIRST else side
    if agent not in campers:
        raise BadDialogue("unknown side", f"{where}: no participant {agent!r}, only {', '.join(campers)}")
    told = [
        {**t, "text": _in_words(t, f"{where}, turn {i}")} if isinstance(t, dict) else t for i, t in enumerate(turns)
    ]
    said = turns_of({"turns": told}, agent, [name for name in campers if name != agent], where)
    camper = value_of(campers, agent, dict, where)
    points = value_of(value_of(camper, "outcomes", dict, where), "points_scored", (int, float), where)
    return dialogue_from(
        where,
        paid(said, points / _MOST_POINTS),
        id=value_of(row, "id", str, where),
        task="casino",
        system=_priorities(camper, where),
        provenance={"points": points, "side": agent},
    )


def _priorities(camper: Mapping[str, Any], where: str) -> str:
    issues = value_of(camper, "value2issue", dict, where)
    reasons = value_of(camper, "value2reason", dict, where)
    lines = ["You share out 3 packages each of food, water and firewood with another camper."]
    for level, worth in _WORTH.items():
        issue, reason = value_of(issues, level, str, where), value_of(reasons, level, str, where)
        lines.append(f"{level} priority, {worth} points a package: {issue.lower()}. Reason: {reason.strip()}")
    return "\n".join([*lines, "Without a deal you get 5 points."])


def _in_words(turn: Mapping[str, Any], where: str) -> Any:
    """Return the text of a turn, or what a move in the deal menu says."""
    text = turn.get("text")
    if text == "Submit-Deal":
        deal = value_of(turn, "task_data", dict, where)
        mine, yours = (_packages(deal, key, where) for key in ("issue2youget", "issue2theyget"))
        return f"I propose this deal: I get {mine}; you get {yours}."
    moves = {
        "Accept-Deal": "I accept this deal.",
        "Reject-Deal": "I reject this deal.",
        "Walk-Away": "I walk away without a deal.",
    }
    return moves.get(text, text) if isinstance(text, str) else text


def _packages(deal: Mapping[str, Any], key: str, where: str) -> str:
    counts = value_of(deal, key, dict, where)
    return ", ".join(f"{value_of(counts, issue, (str, int), where)} {issue.lower()}" for issue in _ISSUES)


def load_craigslist_bargain(path: Path | str, side: str) -> ReadDialogues:
    """Load CraigslistBargain with strategies, in the form `{"id", "buyer_item_description", "buyer_price",
    "seller_item_description", "seller_price", "turns": [{"role", "text", "strategy"}, ...]}`.

    The side's description of the item and its target price are the system message. The agent earns the share of the range
    between the two targets that the deal gave it, within [0, 1]: a seller 1 at the seller's price, a buyer 1 at the buyer's.

    These files do not tell the outcome. A deal is derived: the last price that was named, if it was still the last one when a
    turn of strategy "agree" answered it, and nobody took up the haggling after that. The other side than the one that agrees
    must have named that price, which is what keeps "2200 and you have a deal" an offer. Prices are numbers from half the
    buyer's target to one and a half of the seller's, so that years and sizes are passed over. All else has "no outcome" and is
    refused: what is left are deals, and a few in a hundred of them are wrong because the labels and the prices are.

    Args:
        path: the file.
        side: "seller" or "buyer", the agent.

    Raises:
        UsageError: another side, or the file is not there.
        DataError: see `read_rows`.
    """
    if side not in ("buyer", "seller"):
        raise UsageError(f"expected the side 'buyer' or 'seller', got {side!r}")
    return read_rows(path, partial(_haggle, side))


def _haggle(side: str, row: dict[str, Any], where: str) -> Dialogue:
    low, high = (value_of(row, f"{who}_price", (int, float), where) for who in ("buyer", "seller"))
    if not 0 < low < high:
        raise BadDialogue(
            "no bargaining range", f"{where}: the buyer's target {low:g} is not below the seller's {high:g}"
        )
    turns = turns_of(row, side, ["buyer" if side == "seller" else "seller"], where)
    if not turns:
        raise BadDialogue("no turns", f"{where}: a dialogue without turns")
    strategies = [value_of(turn, "strategy", str, f"{where}, turn {i}") for i, turn in enumerate(row["turns"])]
    price = _deal(turns, strategies, low / 2, high * 1.5)
    if price is None:
        raise BadDialogue("no outcome", f"{where}: no price that both sides agreed on")
    share = min(max((price - low) / (high - low), 0.0), 1.0)
    item = value_of(row, f"{side}_item_description", str, where).strip()
    verb, target = ("sell", high) if side == "seller" else ("buy", low)
    return dialogue_from(
        where,
        paid(turns, share if side == "seller" else 1 - share),
        id=value_of(row, "id", str, where),
        task="craigslist_bargain",
        system=f"You want to {verb} this item: {item}\nYour target price is ${target:g}.",
        provenance={"price": price, "side": side, "buyer_price": low, "seller_price": high},
    )


def _deal(turns: Sequence[Said], strategies: Sequence[str], least: float, most: float) -> float | None:
    """Return the price that both sides agreed on last, or None."""
    price = deal = None
    named_by: set[bool] = set()
    for turn, strategy in zip(turns, strategies, strict=True):
        numbers = [float(f"{whole.replace(',', '')}{cents}") for whole, cents in _PRICE.findall(turn.text)]
        prices = [number for number in numbers if least <= number <= most]
        if prices and prices[-1] != price:
            price, deal, named_by = prices[-1], None, {turn.by_agent}
        elif prices:
            named_by.add(turn.by_agent)
        if strategy == "agree" and (not turn.by_agent) in named_by:
            deal = price
        elif strategy in _GOES_ON and not prices:
            deal = None
    return deal


LOADERS: dict[str, Callable[[Path | str], ReadDialogues]] = {
    "persuasion_for_good": load_persuasion_for_good,
    "casino": load_casino,
    "craigslist_bargain_buyer": partial(load_craigslist_bargain, side="buyer"),
    "craigslist_bargain_seller": partial(load_craigslist_bargain, side="seller"),
    "guess_my_city": load_guess_my_city,
    "lmrl_gym": load_lmrl_gym,
}
