"""The ten chains of small_world as a corpus, a retriever and questions, and a scripted model that does what it is told.

The instruction of a style is what the model does, so a test says in a style's name what comes of it. With NAME the dam of the
question and PERSON its builder, read from a passage in the prompt:

    name      "NAME dam" as long as no passage names the builder, then "PERSON born"
    person    "PERSON born", out of nowhere: it knows the builder of every dam
    junk      "zzz", which nothing holds
    echo      the question
    stop      nothing at all
    talk      a sentence around "NAME dam", on a line of its own with a label
    seed      one of several queries, by the seed of the request: all that sampling is
"""

import functools
from pathlib import Path

from small_world import DAMS, PASSAGES, PEOPLE

from llmrl.leret.ask import EngineAsker
from llmrl.leret.corpus import Corpus, Passage
from llmrl.leret.explore import Explorer, ExploreSettings
from llmrl.leret.prompts import PromptFormat, PromptStyle
from llmrl.leret.questions import Question
from llmrl.leret.retriever import Hit
from llmrl.leret.rewards import reward_named
from llmrl.leret.search import Searcher
from llmrl.rollout.scripted import ScriptedEngine

TINY_LM = Path(__file__).resolve().parents[2] / "examples" / "tiny_lm"
CORPUS = Corpus(tuple(Passage(name, "", " ".join(words)) for name, words in PASSAGES.items()))
QUESTIONS = [
    Question(
        f"q{i}", f"where was the builder of {dam} dam born", tuple(frozenset({f"{x}{i}"}) for x in "dp"), f"t{i % 2}"
    )
    for i, dam in enumerate(DAMS)
]


def style(name, does=None, **fields):
    return PromptStyle(name, does or name, **fields)


BARE = style("bare", "name")


@functools.cache
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(TINY_LM)


class ChainRetriever:
    """small_world's search as a retriever; keeps what it was asked for."""

    name = fingerprint = "chain"

    def __init__(self, corpus=CORPUS):
        self.words = {passage.id: set(passage.text.split()) for passage in corpus.passages}
        self.batches = []

    def search(self, queries, k):
        self.batches.append((list(queries), k))
        return [self._one(set(query.split()), k) for query in queries]

    def _one(self, wanted, k):
        scores = {name: len(wanted & words) for name, words in self.words.items()}
        best = sorted((name for name in self.words if scores[name]), key=lambda name: -scores[name])
        return [Hit(name, "", "", float(scores[name])) for name in best[:k]]


def prompt_text(request):
    return tokenizer().decode(request.token_ids)


def say(request):
    """What the scripted model answers."""
    asked = prompt_text(request).rpartition("<|user|>")[2].partition("<|end|>")[0].split("\n")
    question, passages, does = asked[0].removeprefix("Question: "), asked[1:-1], asked[-1]
    dam = question.split()[-3]
    person = PEOPLE[DAMS.index(dam)]
    known = any(person in line for line in passages)
    queries = [f"{dam} dam", f"{person} born", "dam built", "zzz", question]
    return {
        "name": f"{person} born" if known else f"{dam} dam",
        "person": f"{person} born",
        "junk": "zzz",
        "echo": question,
        "stop": "",
        "talk": f"Query: '{dam} dam'\nThat helps.",
        "seed": queries[(request.sampling.seed or 0) % len(queries)],
    }[does]


def engine(script=say, **options):
    return ScriptedEngine(tokenizer(), script, **options)


def explorer(scripted=None, *, k=3, unseen_only=False, retriever=None, reward="ap", prompts=None, **settings):
    """An explorer of the chains; `.retriever` is what it searches with."""
    settings = {"hops": 2, "merge": "hop_order", "reward": reward_named(reward), **settings}
    asker = EngineAsker(scripted or engine(), prompts or PromptFormat(instruction="name"), "scripted", quiet=True)
    searcher = Searcher(retriever or ChainRetriever(), k, unseen_only=unseen_only)
    return Explorer(asker, searcher, CORPUS, ExploreSettings(**settings))


def write_files(folder, questions=QUESTIONS):
    """Write passages.jsonl and questions.jsonl; return both paths."""
    import json

    passages, asked = folder / "passages.jsonl", folder / "questions.jsonl"
    passages.write_text(
        "".join(json.dumps({"id": p.id, "title": p.title, "text": p.text}) + "\n" for p in CORPUS.passages)
    )
    rows = [
        {"id": q.id, "question": q.text, "type": q.type, "gold_ids": sorted(next(iter(g)) for g in q.gold)}
        for q in questions
    ]
    asked.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return passages, asked
