"""Loaders of games that are played in text: Guess My City and the files of LMRL-Gym."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llmrl.errors import DataError
from llmrl.hindsight.dataset_rows import Said, dialogue_from, is_number, read_rows, value_of
from llmrl.hindsight.dialogues import BadDialogue, Dialogue, ReadDialogues

# a question mark inside a word, as in a web address, ends nothing
_QUESTION = re.compile(r"\s*(\S.*?\?[\"'”’)]*)\s+(\S.*)", re.DOTALL)
_QUESTIONS = 20  # that a game of LMRL-Gym ends after


_GUESS = "Ask questions to find out which city somebody comes from, and name it with as few of them as you can."


def load_guess_my_city(path: Path | str) -> ReadDialogues:
    """Load games of Guess My City, in the form `{"id", "word", "done", "turns": ["question answer", ...]}`.

    The guesser is the agent. A turn is cut after its first question mark that white space follows, with the quotation marks
    or brackets that close behind it; what follows is the answer. A game with a turn that cannot be cut so, or that leaves no
    question or no answer, is refused as "no question". Each question earns -1, the one that found the city 0. A game that was
    not won ran out of questions, which is a rule of the game and known to its player: it is done, as in LMRL-Gym. The guesser
    speaks first, and the task is the system message.

    Raises:
        UsageError, DataError: see `read_rows`.
    """

    def game(row: dict[str, Any], where: str) -> Dialogue:
        won = value_of(row, "done", bool, where)
        turns = _questions(value_of(row, "turns", list, where), won, where)
        word = value_of(row, "word", str, where)
        id = value_of(row, "id", str, where)
        return dialogue_from(where, turns, id=id, task="guess_my_city", system=_GUESS, provenance={"word": word})

    return read_rows(path, game)


def _questions(lines: Sequence[Any], won: bool, where: str) -> list[Said]:
    said = []
    for i, line in enumerate(lines):
        if not isinstance(line, str):
            raise DataError(f"{where}, turn {i}: expected a question and its answer in one text, got {line!r:.60}")
        cut = _QUESTION.fullmatch(line)
        if cut is None:
            raise BadDialogue(
                "no question", f"{where}, turn {i}: no question mark with an answer after it: {line!r:.60}"
            )
        right = won and i == len(lines) - 1
        said += [Said(True, cut[1], 0.0 if right else -1.0), Said(False, cut[2])]
    return said


def load_lmrl_gym(path: Path | str) -> ReadDialogues:
    """Load trajectories of LMRL-Gym from JSON lines or a JSON array. Pickles of it are not read.

    These rows are taken; what the game says is the user's, what the policy says is the agent's:

    - `{"text_history": [[text, is_action], ...], "reward": [...], "done": true}`, a `TextTrajectory`; Wordle's files call the
      first key `sequence`. `is_action` is a truth value, or 0 or 1.
    - `{"text_history": [text, ...], "rewards": [...], "dones": [...]}` of the partially observed maze and Text-Nav: every
      second text is an action, beginning with the second.
    - `[{"state": ..., "action": ..., "reward": ..., "done": ...}, ...]` of the fully observed maze and the endgames: one list a
      trajectory, two texts a move.
    - `{"lines": ["question answer", ...], "correct": true, "word": [...]}` of Twenty Questions and Guess My City. Lines are
      cut and paid as in `load_guess_my_city`, and as in LMRL-Gym the 20th question ends a game.

    In the first two, rewards and `dones` are one a text, one an action (Text-Nav), or one a text but the opening one (Wordle);
    `reward` and `rewards`, `done` and `dones` are the same. Only actions may earn anything, and nothing may be done before the
    last action. Neighbouring texts of one side are joined and their rewards added up. A text that is only a line break, as
    Wordle answers a word it does not know, is an empty turn and its trajectory refused. `id` is kept where a row has one;
    otherwise its place is its id.

    Raises:
        UsageError, DataError: see `read_rows`.
    """
    return read_rows(path, _trajectory, lists=True)


def _trajectory(row: Any, where: str) -> Dialogue:
    if isinstance(row, list):
        turns, done = _moves(row, where)
        return dialogue_from(where, turns, id=where, task="lmrl_gym", done=done, provenance={})
    provenance: dict[str, Any] = {}
    if "lines" in row:
        lines, won = value_of(row, "lines", list, where), value_of(row, "correct", bool, where)
        turns, done = _questions(lines, won, where), won or len(lines) >= _QUESTIONS
        provenance = {"word": row.get("word")}
    else:
        turns, done = _history(row, where)
    id = str(value_of(row, "id", (str, int), where)) if "id" in row else where
    return dialogue_from(where, turns, id=id, task="lmrl_gym", done=done, provenance=provenance)


def _moves(row: Sequence[Any], where: str) -> tuple[list[Said], bool]:
    said: list[Said] = []
    done = False
    for i, move in enumerate(row):
        place = f"{where}, move {i}"
        if not isinstance(move, dict):
            raise DataError(f"{place}: expected an object with state, action, reward and done, got {move!r:.60}")
        if done:
            raise BadDialogue("done before the end", f"{place} comes after a move that was the last")
        done = value_of(move, "done", bool, place)
        said += [
            Said(False, value_of(move, "state", str, place)),
            Said(True, value_of(move, "action", str, place), _number(move.get("reward"), place)),
        ]
    return said, done


def _history(row: Mapping[str, Any], where: str) -> tuple[list[Said], bool]:
    history = value_of(row, "sequence" if "sequence" in row else "text_history", list, where)
    if all(isinstance(text, str) for text in history):
        texts, acts = list(history), [i % 2 == 1 for i in range(len(history))]
    elif all(isinstance(t, list) and len(t) == 2 and isinstance(t[0], str) and t[1] in (0, 1) for t in history):
        texts, acts = [text for text, _ in history], [bool(act) for _, act in history]
    else:
        raise DataError(f"{where}: expected a list of texts or of [text, is_action], got {history!r:.60}")
    if not any(acts):
        raise BadDialogue("no agent turn", f"{where}: no text is an action")
    rewards = [
        _number(value, where)
        for value in _one_a_text(
            value_of(row, "rewards" if "rewards" in row else "reward", list, where), acts, 0.0, where
        )
    ]
    ends = value_of(row, "dones" if "dones" in row else "done", (bool, list), where)
    if isinstance(ends, bool):
        return [Said(*turn) for turn in zip(acts, texts, rewards, strict=True)], ends
    ends = _one_a_text(ends, acts, False, where)
    last = max(i for i, act in enumerate(acts) if act)
    if not all(isinstance(end, bool) for end in ends) or any(ends[:last]):
        raise BadDialogue(
            "done before the end", f"{where}: expected 'dones' false before the last action, got {ends!r:.60}"
        )
    return [Said(*turn) for turn in zip(acts, texts, rewards, strict=True)], any(ends)


def _one_a_text(values: Sequence[Any], acts: Sequence[bool], nothing: Any, where: str) -> list[Any]:
    """Spread a list that has one value a text, a text but the opening one, or an action."""
    if len(values) == len(acts):
        return list(values)
    if len(values) == len(acts) - 1 and not acts[0]:
        return [nothing, *values]
    if len(values) == sum(acts):
        each = iter(values)
        return [next(each) if act else nothing for act in acts]
    raise BadDialogue(
        "rewards of another length",
        f"{where}: {len(values)} rewards or ends for {len(acts)} texts, of which {sum(acts)} are actions",
    )


def _number(value: Any, where: str) -> float:
    if not is_number(value):
        raise BadDialogue("broken reward", f"{where}: expected a finite number as reward, got {value!r:.40}")
    return float(value)
