"""Exploration: hop after hop, ask for queries in every style, search with them, score what they found, go on from there.

    hop-1/candidates.jsonl     every query that was tried, with its hits, reward and return
    hop-1/foreign.jsonl        passages of a remote retriever that the corpus does not hold, if there are any
    hop-1/answers-T/           the engine's own record of the answers at temperature T (shards)
    hop-1/futures/             of sampled futures, hop by hop

A hop whose candidates lie there is not done again, so a run that was killed goes on at its hop, and within it at the
answers that were there. Which context goes on is a function of the candidates and the seed.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from pathlib import Path

from llmrl.errors import UsageError
from llmrl.files import write_text
from llmrl.jsonl import read_objects
from llmrl.leret.ask import Answer, Ask, Asker
from llmrl.leret.context import SearchState, extend, merge, up_to
from llmrl.leret.corpus import Corpus, Passage
from llmrl.leret.prompts import BARE, PromptStyle
from llmrl.leret.questions import Question
from llmrl.leret.records import Candidate, Group, group_candidates, read_records, write_records
from llmrl.leret.retriever import Hit
from llmrl.leret.returns import future_return
from llmrl.leret.rewards import Reward, average_precision, recall
from llmrl.leret.search import Searcher
from llmrl.leret.states import StateRule, next_states
from llmrl.rollout.seeds import derive_seed
from llmrl.training.distributed import barrier, is_main_process

FOREIGN_FILE = "foreign.jsonl"
QUESTION, STOP = "question", "stop"  # who wrote a query that nobody was asked for


@dataclass(frozen=True)
class ExploreSettings:
    """What decides which queries are tried and what they are worth.

    Attributes:
        hops: searches a question.
        merge: order of passages in prompt and reward.
        reward: of the context after a hop, against the gold documents.
        samples: queries a style and temperature above 0.
        temperatures: each style is asked at each of them.
        question_first: hop 1 searches with the question itself.
        returns: "greedy", or "mean" or "best" over `futures` sampled futures.
        futures: of each query.
        discount: of a reward one hop later.
        state_rule: which states go on; with its `keep_solved` a solved state goes on too, with the stop action among its
            candidates.
        seed: of this round.
    """

    hops: int
    merge: str
    reward: Reward
    samples: int = 1
    temperatures: tuple[float, ...] = (0.0,)
    question_first: bool = False
    returns: str = "greedy"
    futures: int = 2
    discount: float = 1.0
    state_rule: StateRule = field(default_factory=StateRule)
    seed: int = 0


@dataclass
class Clock:
    """Wall-clock seconds of what is ours: scoring, and choosing states."""

    seconds: float = 0.0

    def measure(self) -> _Timer:
        """Add what passes within a `with` block."""
        return _Timer(self)


class _Timer:
    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def __enter__(self) -> None:
        self.begun = time.perf_counter()

    def __exit__(self, *exc: object) -> None:
        self.clock.seconds += time.perf_counter() - self.begun


@dataclass
class Explorer:
    """Explores questions with one asker and one retriever.

    Args:
        asker: answers with queries.
        searcher: finds passages.
        corpus: what is searched.
        settings: how.

    Attributes:
        foreign: passages that a remote retriever returned and the corpus does not hold, by id.
    """

    asker: Asker
    searcher: Searcher
    corpus: Corpus
    settings: ExploreSettings
    clock: Clock = field(default_factory=Clock)
    foreign: dict[str, Passage] = field(default_factory=dict)

    def explore(self, questions: Sequence[Question], styles: Sequence[PromptStyle], folder: Path | str) -> list[Group]:
        """Try every style in every state of every hop; return the groups of all hops.

        Args:
            questions: to search for.
            styles: ways of asking; each is used at the hops it names.
            folder: of the round; what lies there is kept.

        Raises:
            EngineError: the engine died; what is finished is kept, here and below.
            RetrieverError: the retriever failed, or finds nothing for most queries.
            UsageError: two styles of one name, or futures without a bare style to play them in.
        """
        folder = Path(folder)
        self._check(styles)
        by_id = {question.id: question for question in questions}
        gold = {question.id: question.gold for question in questions}
        states = [SearchState(question.id) for question in questions]
        groups: list[Group] = []
        for hop in range(1, self.settings.hops + 1):
            candidates = self._hop(hop, states, by_id, [s for s in styles if s.at(hop)], folder / f"hop-{hop}")
            with self.clock.measure():
                new = group_candidates(candidates, gold)
                groups += new
                if hop < self.settings.hops:
                    states = self._next(new)
        return groups

    def follow(
        self,
        states: Sequence[SearchState],
        questions: Mapping[str, Question],
        style: PromptStyle,
        folder: Path | str,
        *,
        samples: int = 1,
        temperature: float = 0.0,
    ) -> list[list[SearchState]]:
        """Play on from states of one hop to the last hop, always in `style`; an empty query ends a search early.

        Args:
            states: where to begin, all different; all have done the same number of hops.
            questions: by id.
            style: how to ask.
            folder: of the answers; what lies there is kept.
            samples: times each state is played; 1 where decoding is greedy.
            temperature: of the answers.

        Returns:
            The final states of each state, one a sample.
        """
        drawn = 1 if temperature == 0 else samples
        ends = [[state] * drawn for state in states]
        live = [(i, sample) for i in range(len(states)) for sample in range(drawn)]
        hop = states[0].hop if states else 0
        while live and hop < self.settings.hops:
            hop += 1
            now = {f"{ends[i][s].question_id}|{ends[i][s].key}|{s}": (i, s) for i, s in live}
            asks = [self._ask(name, ends[i][s], questions, style) for name, (i, s) in now.items()]
            answers = self._ask_all(hop, asks, style, temperature, Path(folder) / f"hop-{hop}")
            # a prompt without an answer ends its search with what was found, as an empty query does
            wanted = [(now[name], answer.query) for name, answer in sorted(answers.items())]
            hits = self._search([(ends[i][s], query) for (i, s), query in wanted])
            for ((i, s), query), found in zip(wanted, hits, strict=True):
                if query.strip():
                    ends[i][s] = extend(ends[i][s], query, found)
            live = sorted(key for key, query in wanted if query.strip())
        return ends

    def context(self, state: SearchState) -> tuple[str, ...]:
        """Return the passages of a state in the order of prompt and reward."""
        return merge(state, self.settings.merge)

    def passage(self, name: str) -> Passage:
        """Return a passage that was found, by its id: one of the corpus, or one that only the retriever knows."""
        return self.corpus.by_id.get(name) or self.foreign[name]

    def _search(self, wanted: Sequence[tuple[SearchState, str]]) -> list[list[Hit]]:
        found = self.searcher.search(wanted)
        for hit in (hit for hits in found for hit in hits if hit.id not in self.corpus.by_id):
            self.foreign[hit.id] = Passage(hit.id, hit.title, hit.text)
        return found

    def _write_foreign(self, file: Path) -> None:
        if self.foreign:
            rows = [asdict(self.foreign[name]) for name in sorted(self.foreign)]
            write_text(file, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))

    def _check(self, styles: Sequence[PromptStyle]) -> None:
        names = [style.name for style in styles]
        twice = next((name for name in names if names.count(name) > 1 or name == STOP), None)
        if twice is not None:
            raise UsageError(f"the name '{twice}' of a prompt style is taken: give each a name of its own")
        if self.settings.returns != "greedy" and BARE not in names:
            raise UsageError(
                f"returns '{self.settings.returns}' plays futures in the style '{BARE}', which is not there"
            )

    def _ask_all(
        self, hop: int, asks: Sequence[Ask], style: PromptStyle, temperature: float, folder: Path
    ) -> dict[str, Answer]:
        if self.settings.question_first and hop == 1:
            return {ask.key: Answer(ask.question) for ask in asks}
        seed = derive_seed(self.settings.seed, "follow", style.name, hop)
        answers = self.asker.ask(asks, samples=1, temperature=temperature, seed=seed, folder=folder)
        return {name: answer for (name, _), answer in answers.items()}

    def _ask(self, key: str, state: SearchState, questions: Mapping[str, Question], style: PromptStyle) -> Ask:
        passages = tuple(self.passage(name) for name in self.context(state))
        return Ask(key, questions[state.question_id].text, passages, style)

    def _hop(
        self,
        hop: int,
        states: Sequence[SearchState],
        questions: Mapping[str, Question],
        styles: Sequence[PromptStyle],
        folder: Path,
    ) -> list[Candidate]:
        file = folder / "candidates.jsonl"
        barrier()
        if file.is_file():
            self.asker.recount(folder)
        else:
            candidates = self._candidates(hop, states, questions, styles, folder)
            if self.settings.returns != "greedy" and hop < self.settings.hops:
                bare = next(style for style in styles if style.name == BARE)
                candidates = self._with_futures(candidates, questions, bare, folder / "futures")
            barrier()  # nobody looks for the file of this hop any more
            if is_main_process():
                folder.mkdir(parents=True, exist_ok=True)
                candidates.sort(key=lambda candidate: candidate.order)
                self._write_foreign(folder / FOREIGN_FILE)
                write_records(file, candidates)
        barrier()
        if (folder / FOREIGN_FILE).is_file():
            found = [Passage(**row) for _, row in read_objects(folder / FOREIGN_FILE)]
            self.foreign |= {passage.id: passage for passage in found}
        return read_records(file, Candidate)

    def _candidates(
        self,
        hop: int,
        states: Sequence[SearchState],
        questions: Mapping[str, Question],
        styles: Sequence[PromptStyle],
        folder: Path,
    ) -> list[Candidate]:
        """Ask, search, score."""
        tried: list[tuple[SearchState, str, int, float, Answer]] = []
        by_key = {state.key: state for state in states}
        if self.settings.question_first and hop == 1:
            tried = [(s, QUESTION, 0, 0.0, Answer(questions[s.question_id].text)) for s in states]
        else:
            asks = {
                f"{state.question_id}|{state.key}|{style.name}": (state.key, style)
                for state in states
                for style in styles
            }
            for temperature in self.settings.temperatures:
                answers = self.asker.ask(
                    [self._ask(name, by_key[key], questions, style) for name, (key, style) in asks.items()],
                    samples=self.settings.samples,
                    temperature=temperature,
                    seed=derive_seed(self.settings.seed, "explore", hop, f"{temperature:g}"),
                    folder=folder / f"answers-{temperature:g}",
                )
                for (name, sample), answer in answers.items():
                    key, style = asks[name]
                    tried.append((by_key[key], style.name, sample, temperature, answer))
        tried += [(s, STOP, 0, 0.0, Answer("")) for s in states if self._is_solved(s, questions[s.question_id])]
        hits = self._search([(state, answer.query) for state, *_, answer in tried])
        with self.clock.measure():
            return [
                self._scored(questions[one[0].question_id], *one, found) for one, found in zip(tried, hits, strict=True)
            ]

    def _is_solved(self, state: SearchState, question: Question) -> bool:
        return (
            state.hop > 0 and recall(self.context(state), question.gold) >= 1 and self.settings.state_rule.keep_solved
        )

    def _scored(
        self,
        question: Question,
        state: SearchState,
        style: str,
        sample: int,
        temperature: float,
        answer: Answer,
        found: Sequence[Hit],
    ) -> Candidate:
        stopped = not answer.query.strip()
        after = state if stopped else extend(state, answer.query, found)
        context = self.context(after)
        hits = () if stopped else after.hops[-1]
        reward = self.settings.reward(context, question.gold, before=self.context(state), hits=hits, question=question)
        return Candidate(
            state_before=state,
            prompt_name=style,
            sample=sample,
            temperature=temperature,
            query=answer.query,
            hits=hits,
            scores=() if stopped else after.scores[-1],
            reward=reward,
            ap=average_precision(context, question.gold),
            recall=recall(context, question.gold),
            finish=answer.finish or "stop",
            stopped=stopped,
            token_ids=answer.token_ids if answer.exact else (),
        )

    def _with_futures(
        self, candidates: Sequence[Candidate], questions: Mapping[str, Question], style: PromptStyle, folder: Path
    ) -> list[Candidate]:
        """Give each candidate the worth of what the bare style makes of it in the hops that are left."""
        states = list({c.state_after.key: c.state_after for c in candidates if not c.stopped}.values())
        ends = self.follow(
            states,
            questions,
            style,
            folder,
            samples=self.settings.futures,
            temperature=max(self.settings.temperatures) or 1.0,
        )
        futures = {
            state.key: [self._rewards_after(questions[state.question_id], state.hop, final) for final in finals]
            for state, finals in zip(states, ends, strict=True)
        }
        how, discount = self.settings.returns, self.settings.discount
        return [
            replace(c, ret=future_return(c.reward, [] if c.stopped else futures[c.state_after.key], how, discount))
            for c in candidates
        ]

    def _rewards_after(self, question: Question, hop: int, final: SearchState) -> list[float]:
        """Return the rewards of a future, hop after hop."""
        contexts = [self.context(up_to(final, done)) for done in range(hop, final.hop + 1)]
        return [
            self.settings.reward(after, question.gold, before=before, hits=final.hops[hop + i], question=question)
            for i, (before, after) in enumerate(pairwise(contexts))
        ]

    def _next(self, groups: Sequence[Group]) -> list[SearchState]:
        """Choose the states of the next hop, question by question."""
        by_question: dict[str, list[Candidate]] = {}
        for group in groups:
            by_question.setdefault(group.question_id, []).extend(group.candidates)
        states = []
        for candidates in by_question.values():
            chosen = next_states(candidates, self.settings.state_rule, self.settings.seed)
            kept = [*chosen.open, *([chosen.solved] if chosen.solved else [])]
            states += [candidate.state_after for candidate in kept]
        return states
