"""Twenty entities, ten chains of two hops, and a retriever small enough to run in the head.

Chain i is a dam and its builder. With NAME the i-th of DAMS, PERSON of PEOPLE, CITY of CITIES the passages are, in corpus order

    d{i}   NAME dam was built by PERSON
    p{i}   PERSON was born in CITY

and a passage scores one for each different word of the query that it holds; 0 is no hit; equals stay in corpus order. The
question of the tests is that of chain 5: "where was the builder of foxglove dam born". Its two gold documents are d5, p5.
"""

from types import SimpleNamespace

from llmrl.leret.context import SearchState, extend, merge
from llmrl.leret.records import Candidate, Group
from llmrl.leret.rewards import average_precision, recall

DAMS = ["alder", "birch", "cedar", "dogwood", "elder", "foxglove", "gorse", "hazel", "iris", "juniper"]
PEOPLE = ["abel", "bruno", "clara", "doris", "edgar", "freda", "gerda", "hanno", "ilse", "jonas"]
CITIES = ["aachen", "bonn", "celle", "dresden", "emden", "fulda", "goslar", "halle", "ingolstadt", "jena"]
PASSAGES = {
    name: text.split()
    for i, (dam, person, city) in enumerate(zip(DAMS, PEOPLE, CITIES, strict=True))
    for name, text in ((f"d{i}", f"{dam} dam was built by {person}"), (f"p{i}", f"{person} was born in {city}"))
}
GOLD = (frozenset({"d5"}), frozenset({"p5"}))
QUESTION = "where was the builder of foxglove dam born"


def search(query, k=3):
    wanted = set(query.split())
    scores = {name: len(wanted & set(words)) for name, words in PASSAGES.items()}
    best = sorted((name for name in PASSAGES if scores[name]), key=lambda name: -scores[name])
    return [SimpleNamespace(id=name, score=float(scores[name])) for name in best[:k]]


def tried(query, state=None, *, prompt="bare", sample=0, temperature=0.0, rule="hop_order", gold=GOLD):
    """The candidate that a query makes in a state, with average precision as the reward."""
    state = state or SearchState("q5")
    after = extend(state, query, search(query))
    context = merge(after, rule)
    ap = average_precision(context, gold)
    return Candidate(
        state, prompt, sample, temperature, query, after.hops[-1], after.scores[-1], ap, ap, recall(context, gold)
    )


# hop 1 of the question, with the hits that the scores above give and the average precision of each
HOP_1 = {
    QUESTION: (("d5", "d0", "p0"), 1 / 2),  # d5 holds three of its words; of those with two d0 and p0 come first
    "alder or foxglove dam": (("d0", "d5", "d1"), 1 / 4),
    "born in": (("p0", "p1", "p2"), 0),
    "dam built": (("d0", "d1", "d2"), 0),
    "zzz": ((), 0),
    "foxglove freda born": (("d5", "p5", "p0"), 1),  # two words each for d5 and p5
}


def hop_1():
    """The group of these six queries, one a prompt."""
    prompts = ("bare", "p1", "p2", "p3", "p4", "p5")
    return Group(GOLD, tuple(tried(q, prompt=p) for q, p in zip(HOP_1, prompts, strict=True)))


def candidate(value, *, query=None, state=None, prompt="bare", sample=0, temperature=0.0, hits=None, **fields):
    """A candidate of a given average precision, return and reward."""
    query = query if query is not None else f"{prompt}-{sample}-{value:g}"
    state = state or SearchState("q")
    hits = (f"x-{query}",) if hits is None else tuple(hits)
    fields = {"reward": value, "ap": value, "recall": 0.0} | fields
    return Candidate(state, prompt, sample, temperature, query, hits, (1.0,) * len(hits), **fields)


def group(*values, gold=(("g",),), **fields):
    """A group of candidates with these returns, one a sample."""
    return Group(gold, tuple(candidate(v, sample=i, **fields) for i, v in enumerate(values)))
