import pytest
from dataset_files import GAME, TRAJECTORY, reasons, said, write_rows

from llmrl.hindsight.datasets import load_guess_my_city, load_lmrl_gym


@pytest.fixture
def write(tmp_path):
    """`write(rows)`: a file of these rows."""
    return lambda rows, name="rows.jsonl": write_rows(tmp_path / name, rows)


def test_guess_my_city(write):
    won, lost = load_guess_my_city(write([GAME, GAME | {"id": "gmc1", "done": False}])).dialogues
    assert said(won)[0][0] == "system"
    assert said(won)[1:] == [
        ("assistant", 'I ask: "Is it www.old?q=town, or new?'),
        ("user", 'Which one?" It is old. Is that all?'),
        ("assistant", "Is it hot?"),
        ("user", "Yes, it is."),
        ("assistant", "Are you from Madrid?"),
        ("user", "Yes."),
    ]
    assert won.rewards == (0.0, -1.0, 0.0, -1.0, 0.0, 0.0, 0.0)
    assert lost.rewards == (0.0, -1.0, 0.0, -1.0, 0.0, -1.0, 0.0)
    assert (won.done, lost.done) == (True, True)  # the limit is a rule of the game
    assert won.provenance == {"row": "rows.jsonl:1", "joined": 0, "word": "madrid,spain"}


def test_a_closing_quotation_mark_stays_with_its_question(write):
    (game,) = load_guess_my_city(write([GAME | {"turns": ['He asks "Is it old?" It is.']}])).dialogues
    assert said(game)[1:] == [("assistant", 'He asks "Is it old?"'), ("user", "It is.")]


@pytest.mark.parametrize(
    "turn", ["Tell me more. It is old.", "Is it old?", "Is it old? ", "? Yes.", "Is it old?Yes.", ""]
)
def test_a_turn_that_cannot_be_cut_is_refused(turn, write):
    read = load_guess_my_city(write([GAME, GAME | {"id": "gmc1", "turns": ["Is it hot? Yes.", turn]}]))
    assert reasons(read) == ["no question"]


def test_guess_my_city_keeps_bad_rows_aside(write):
    rows = [GAME, GAME | {"turns": []}, GAME | {"done": 1}, GAME | {"turns": [["Is it hot?", "Yes."]]}]
    assert reasons(load_guess_my_city(write(rows))) == [
        "no turns",
        "broken row",
        "broken row",
    ]


HISTORY = [
    ("user", "Questions:"),
    ("assistant", "Is it hot?"),
    ("user", "Yes."),
    ("assistant", "Sun?"),
    ("user", "No."),
]


@pytest.mark.parametrize("name", ["train.json", "train.json.gz", "train.jsonl", "train.jsonl.gz"])
def test_lmrl_gym_trajectories(name, write):
    first, second = load_lmrl_gym(write([TRAJECTORY, TRAJECTORY | {"done": True, "id": 7}], name)).dialogues
    assert said(first) == HISTORY
    assert first.rewards == (0.0, -1.0, 0.0, -1.0, 0.0)
    assert (first.id, first.done, first.truncated) == (f"{name}:1", False, True)
    assert (second.id, second.done, second.truncated) == ("7", True, False)
    assert second.provenance == {"row": f"{name}:2", "joined": 0}


def test_lmrl_gym_wordle_has_no_reward_for_the_opening_text(write):
    row = {
        "sequence": [["Wordle:\n", 0.0], ["s t a r e\n", 1.0], ["b b g y b\n", 0.0]],
        "reward": [-1.0, 0.0],
        "done": True,
    }
    (game,) = load_lmrl_gym(write([row])).dialogues
    assert said(game) == [("user", "Wordle:"), ("assistant", "s t a r e"), ("user", "b b g y b")]
    assert game.rewards == (0.0, -1.0, 0.0)


def test_lmrl_gym_texts_of_one_side_are_joined_and_their_rewards_added(write):
    row = {
        "text_history": [["Begin", 0], ["You are here", 0], ["go", 1], ["left\n", 1], ["A wall.", 0]],
        "reward": [0, 0, -1, -4, 0],
        "done": True,
    }
    (game,) = load_lmrl_gym(write([row])).dialogues
    assert said(game) == [("user", "Begin\nYou are here"), ("assistant", "go\nleft"), ("user", "A wall.")]
    assert game.rewards == (0.0, -5.0, 0.0)
    assert game.provenance["joined"] == 2


MAZE = {
    "text_history": ["A wall above.\n", "move up\n", "A wall above.\n", "move left\n", "Goal.\n"],
    "rewards": [0, -1, 0, 0, 0],
    "dones": [False, False, False, True, False],
}
MAZE_SAID = [
    ("user", "A wall above."),
    ("assistant", "move up"),
    ("user", "A wall above."),
    ("assistant", "move left"),
    ("user", "Goal."),
]


@pytest.mark.parametrize(
    "row",
    [
        MAZE,
        MAZE | {"rewards": [-1, 0], "dones": [False, True]},  # one an action, as in Text-Nav
        {"text_history": MAZE["text_history"], "rewards": MAZE["rewards"], "done": True},
    ],
)
def test_lmrl_gym_maze(row, write):
    (game,) = load_lmrl_gym(write([row])).dialogues
    assert said(game) == MAZE_SAID
    assert game.rewards == (0.0, -1.0, 0.0, 0.0, 0.0)
    assert (game.done, game.truncated) == (True, False)


@pytest.mark.parametrize("name", ["maze.json", "maze.jsonl"])
def test_lmrl_gym_moves(name, write):
    moves = [
        {"state": "At 1, 1.\n", "action": "move up\n", "reward": -1, "done": False},
        {"state": "At 1, 2.\n", "action": "move up\n", "reward": 0, "done": True},
    ]
    read = load_lmrl_gym(write([moves, [*moves, moves[0]], [{"state": "At 1, 1."}], ["up"], []], name))
    (game,) = read.dialogues
    assert said(game) == [
        ("user", "At 1, 1."),
        ("assistant", "move up"),
        ("user", "At 1, 2."),
        ("assistant", "move up"),
    ]
    assert game.rewards == (0.0, -1.0, 0.0, 0.0)
    assert game.done
    assert reasons(read) == ["done before the end", "broken row", "broken row", "no turns"]
    assert read.refused[0][3] == {"row": [*moves, moves[0]]}


def test_lmrl_gym_lines_of_questions(write):
    line = "Is it hot? Yes."
    rows = [
        {"lines": [line, "Is it a sun? Yes."], "correct": True, "word": ["Sun"]},
        {"lines": [line] * 20, "correct": False, "word": ["Sun"]},
        {"lines": [line] * 3, "correct": False, "word": ["Sun"]},
    ]
    won, lost, cut = load_lmrl_gym(write(rows, "train.json")).dialogues
    assert said(won) == [
        ("assistant", "Is it hot?"),
        ("user", "Yes."),
        ("assistant", "Is it a sun?"),
        ("user", "Yes."),
    ]
    assert won.rewards == (-1.0, 0.0, 0.0, 0.0)
    assert [game.total for game in (won, lost, cut)] == [-1.0, -20.0, -3.0]
    assert [game.done for game in (won, lost, cut)] == [True, True, False]
    assert won.provenance["word"] == ["Sun"]


def test_lmrl_gym_keeps_bad_rows_aside(write):
    nan = float("nan")
    rows = {
        "rewards of another length": TRAJECTORY | {"reward": [0.0, -1.0, 0.0]},
        "reward at another's turn": TRAJECTORY | {"reward": [0.5, -1.0, 0.0, -1.0, 0.0]},
        "broken reward": TRAJECTORY | {"reward": [0.0, nan, 0.0, -1.0, 0.0]},
        "empty turn": TRAJECTORY | {"text_history": [["a", 0], ["b", 1], ["\n", 0], ["c", 1], ["d", 0]]},
        "no agent turn": TRAJECTORY | {"text_history": [["a", 0], ["b", 0]], "reward": [0, 0]},
        "done before the end": MAZE | {"dones": [False, True, False, True, False]},
    }
    broken = [{"state": "At 1, 1."}, TRAJECTORY | {"text_history": [["a", 2]]}, TRAJECTORY | {"done": "yes"}]
    cancelling = {"text_history": [["a", 0], ["b", 0], ["c", 1]], "reward": [1, -1, 0], "done": True}
    read = load_lmrl_gym(write([TRAJECTORY, *rows.values(), *broken, cancelling], "train.json"))
    assert reasons(read) == [*rows, *["broken row"] * 3, "reward at another's turn"]
    assert len(read.dialogues) == 1
