"""The text maze: its optimum by breadth-first search, random moves by following the distribution of cells, logs."""

from collections import deque

import pytest

from llmrl.errors import DataError
from llmrl.hindsight.dialogues import Dialogue
from llmrl.hindsight.envs import maze
from llmrl.hindsight.envs.common import play
from llmrl.hindsight.envs.maze import CAP, GOAL, LAYOUT, MOVES, STARTS, Maze, best_action
from llmrl.rollout.environment import Environment
from llmrl.types import Message


def at(cell, observation="short"):
    return Maze({"start": list(cell), "observation": observation}, 0)


def say(environment, text):
    return environment.step(Message("assistant", text))


def neighbours(cell):
    """Return the cells that the four moves lead to, read from the drawing."""
    reached = [(cell[0] + r, cell[1] + c) for r, c in ((-1, 0), (1, 0), (0, -1), (0, 1))]
    return [to if LAYOUT[to[0]][to[1]] == " " else cell for to in reached]


def distances():
    """Return the number of moves to the goal, by breadth-first search from it."""
    found, queue = {GOAL: 0}, deque([GOAL])
    while queue:
        cell = queue.popleft()
        for to in neighbours(cell):
            if to not in found:
                found[to] = found[cell] + 1
                queue.append(to)
    return found


def test_optimum_is_what_breadth_first_search_finds():
    moves = distances()
    assert len(STARTS) == 25
    assert set(moves) == {*STARTS, GOAL}
    assert maze.optimum() == pytest.approx(-6.84, abs=1e-9)
    for start, best in maze.best_values().items():
        assert best == -(moves[start] - 1)  # the last move is free


def test_expert_reaches_the_optimum_from_every_start():
    for observation in maze.OBSERVATIONS:
        rows = maze.rows(observation)
        played = [play(Maze(row, 0), best_action, id=row["id"], task="maze") for row in rows]
        assert len({row["id"] for row in rows}) == 25
        assert all(dialogue.done for dialogue in played)
        assert sum(dialogue.total for dialogue in played) / 25 == pytest.approx(maze.optimum(), abs=1e-9)


def test_random_return_is_what_the_distribution_of_cells_gives():
    share, expected = dict.fromkeys(STARTS, 1 / 25), 0.0
    for _ in range(CAP):
        after = dict.fromkeys([*STARTS, GOAL], 0.0)
        for cell, mass in share.items():
            for to in neighbours(cell):
                after[to] += mass / 4
        del after[GOAL]
        share, expected = after, expected - sum(after.values())
    assert maze.random_return() == pytest.approx(expected, abs=1e-9)
    assert expected == pytest.approx(-85.1, abs=0.05)


def test_moves_walls_and_the_goal():
    environment = at((7, 6))
    assert isinstance(environment, Environment)
    assert environment.observe()[0].content == "You are at row 7 column 6."
    wall = say(environment, "move left")
    assert (wall.rewards, environment.cell, wall.done) == ({"reward": -1.0}, (7, 6), False)
    up = say(environment, "  MOVE Up\n")
    assert (up.rewards, up.messages[0].content) == ({"reward": -1.0}, "You are at row 6 column 6.")
    say(environment, "move down")
    goal = say(environment, "move down")
    assert (goal.rewards, goal.done, goal.truncated) == ({"reward": 0.0}, True, False)


@pytest.mark.parametrize("text", ["", "go up", "move", "move up.", "move up move up", "move  up", "up"])
def test_any_other_text_costs_four_and_does_not_move(text):
    environment = at((7, 6))
    step = say(environment, text)
    assert (step.rewards, step.metadata["invalid"], environment.cell) == ({"reward": -4.0}, True, (7, 6))
    assert not say(environment, "move up").metadata["invalid"]


def test_hundred_texts_truncate_and_the_hundredth_may_still_reach_the_goal():
    environment = at((7, 6))
    steps = [say(environment, "nowhere") for _ in range(CAP)]
    assert [step.truncated for step in steps] == [False] * (CAP - 1) + [True]
    assert not steps[-1].done
    assert steps[-1].messages[0].content == "You are at row 7 column 6."  # its state still has a value
    environment = at((7, 6))
    steps = [say(environment, "move left") for _ in range(CAP - 1)] + [say(environment, "move down")]
    assert steps[-1].done
    assert not steps[-1].truncated


def test_long_observation_tells_the_goal_and_the_walls():
    texts = {cell: at(cell, "long").observe()[0].content for cell in STARTS}
    assert texts[5, 6] == "The goal is at row 8 column 6. You are at row 5 column 6. There is a wall above you."
    assert texts[1, 1].endswith("There are walls above you, below you, to your left.")
    for cell, text in texts.items():
        assert maze.position([Message("user", text)]) == cell


@pytest.mark.parametrize(
    "row", [{}, {"start": [0, 0]}, {"start": GOAL}, {"start": "5 3"}, {"start": [5, 3], "observation": "x"}]
)
def test_a_wrong_row_is_refused(row):
    with pytest.raises(DataError, match=r"expected '(start|observation)' to be"):
        Maze(row, 0)


def test_best_action_needs_a_position():
    with pytest.raises(DataError, match="You are at row R column C"):
        best_action([Message("user", "Where am I?"), Message("assistant", "You are at row 5 column 3.")])
    with pytest.raises(DataError, match="row 8 column 6 is no cell to move from"):
        best_action([Message("user", "You are at row 8 column 6.")])


def test_logs_are_mediocre_dialogues_of_the_class():
    logs = maze.logs(300, seed=5)
    assert logs == maze.logs(300, seed=5)
    assert logs != maze.logs(300, seed=6)
    assert logs[:100] == maze.logs(100, seed=5)
    assert len({dialogue.id for dialogue in logs}) == 300
    assert all(dialogue.task == "maze" and Dialogue.from_json(dialogue.to_json()) == dialogue for dialogue in logs)
    # 1,000 such walks of a prototype had -60.4; a walk has a standard deviation of about 45
    assert sum(dialogue.total for dialogue in logs) / 300 == pytest.approx(-60, abs=8)
    texts = [dialogue.messages[i].content for dialogue in logs for i in dialogue.agent_turns]
    assert sum(text not in MOVES for text in texts) / len(texts) == pytest.approx(0.02, abs=0.004)
    for dialogue in logs:
        assert dialogue.truncated == (len(dialogue.agent_turns) == CAP and dialogue.rewards[-2] != 0)
    assert 0.2 < sum(dialogue.truncated for dialogue in logs) / 300 < 0.6
    at_random = [dialogue.provenance["random_moves"] for dialogue in logs]
    assert set(at_random[::2]) == {1.0}
    assert all(0.5 <= share <= 0.8 for share in at_random[1::2])


def test_a_log_replays_from_its_provenance():
    for dialogue in maze.logs(10, seed=0):
        texts = iter([dialogue.messages[i].content for i in dialogue.agent_turns])
        again = Maze(dialogue.provenance["row"], dialogue.provenance["seed"])
        replayed = play(again, lambda _, texts=texts: next(texts), id="again", task="maze")
        assert (replayed.messages, replayed.rewards) == (dialogue.messages, dialogue.rewards)
