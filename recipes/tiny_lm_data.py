"""Documents for recipes/tiny_lm.py.

`--data_dir DIR` holds one folder for each set, with the file names of `SETS`: JSON lines or text, gzip. A set that is not
there is left out. Every document has keys (its id, and those of the passages it quotes); a fixed hash of the keys puts
about one document in a hundred aside, so no passage or dialogue that is held out is quoted on the training side. A made-up
chat has one key, its questions together: each of them may stand in another chat.
"""

from __future__ import annotations

import gzip
import hashlib
import html
import json
import random
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmrl.errors import DataError

Messages = list[dict[str, str]]


@dataclass(frozen=True)
class Document:
    """A plain text or a chat, with the keys that decide on which side of the split it is."""

    source: str
    keys: tuple[str, ...]
    content: str | Messages


def plain_text(document: Document) -> str:
    """Return the text of a document without marks of turns."""
    if isinstance(document.content, str):
        return document.content
    return "\n".join(message["content"] for message in document.content)


@dataclass(frozen=True)
class DataSet:
    """Where documents come from, and under which licence; `name` is their source, `folder` that of the files."""

    name: str
    folder: str
    files: tuple[str, ...]
    read: Callable[[Path], Iterator[Document]]
    origin: str
    license: str


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the objects of a gzipped JSON lines file; a missing file has none.

    Raises:
        DataError: a line is no JSON object.
    """
    if not path.is_file():
        return
    with gzip.open(path, "rt", encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            try:
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise ValueError("not an object")
            except ValueError as error:
                raise DataError(f"{path} line {number}: expected a JSON object, got {line[:60]!r}") from error
            yield row


def held_out(keys: Iterable[str]) -> bool:
    """Tell whether a document with these keys is kept for validation: when any of them hashes into 1 of 100."""
    return any(_hash(key) % 100 == 0 for key in keys)


def _hash(key: str) -> int:
    return int(hashlib.sha256(key.encode()).hexdigest()[:8], 16)


# --- plain text ---


def _long_text(source: str, name: str, characters: int = 8000) -> Callable[[Path], Iterator[Document]]:
    """Read one long text in sections of some `characters`, cut at line ends."""

    def read(folder: Path) -> Iterator[Document]:
        path = folder / name
        if not path.is_file():
            return
        lines = gzip.decompress(path.read_bytes()).decode("utf-8").splitlines(keepends=True)
        section, number = "", 0
        for line in [*lines, None]:
            if line is None or len(section) >= characters:
                if section.strip():
                    yield Document(source, (f"{source}:{number}",), section.strip())
                section, number = "", number + 1
            section += line or ""

    return read


def _c4(folder: Path) -> Iterator[Document]:
    for row in read_rows(folder / "c4_demo.jsonl.gz"):
        yield Document("c4", (f"c4:{row['text'][:200]}",), row["text"])


def _passages(source: str) -> Callable[[Path], Iterator[Document]]:
    def read(folder: Path) -> Iterator[Document]:
        for row in read_rows(folder / "passages.jsonl.gz"):
            title, text = html.unescape(row["title"]), row["text"].strip()
            key = _passage_key(title)
            yield Document(source, (key,), f"{title}\n{text}")
            # a part of them also as an answer and as the result of a tool, so that chats have facts to copy
            kind, first = _hash(f"kind {key}") % 8, _first_sentence(text)
            if kind == 0:
                yield Document(source, (key,), _chat(user=f"Tell me about {title}.", assistant=first))
            elif kind == 1:
                call = json.dumps({"name": "search", "arguments": {"query": title}}, ensure_ascii=False)
                turns = [("user", f"Look up {title}."), ("assistant", f"<tool_call>{call}</tool_call>")]
                turns += [("tool", f"{title}\n{text}"), ("assistant", first)]
                yield Document(source, (key,), _messages([("system", "You may call the tool search."), *turns]))
        yield from _reading(source, folder)

    return read


def _reading(source: str, folder: Path) -> Iterator[Document]:
    passages = {row["id"]: row for row in read_rows(folder / "passages.jsonl.gz")}
    for row in read_rows(folder / "questions_train.jsonl.gz"):
        gold = [passages[i] for i in dict.fromkeys(row["gold_ids"]) if i in passages]
        text = "\n\n".join(f"{html.unescape(p['title'])}\n{p['text'].strip()}" for p in gold)
        keys = (f"{source} question:{row['id']}", *(_passage_key(html.unescape(p["title"])) for p in gold))
        yield Document(source, keys, _chat(user=f"{text}\n\nQuestion: {row['question']}", assistant=row["answer"]))


def _passage_key(title: str) -> str:
    # one Wikipedia article is in several of the pools
    return f"passage:{title.lower()}"


def _first_sentence(text: str) -> str:
    end = re.search(r"[a-z0-9)\"][.!?] (?=[A-Z\"])", text)
    return text[: end.end() - 1] if end else text


# --- chats ---


def _messages(turns: Iterable[tuple[str, str]]) -> Messages:
    """Return messages with neighbours of the same role joined and empty turns left out."""
    messages: Messages = []
    for role, text in turns:
        if not text.strip():
            continue
        if messages and messages[-1]["role"] == role and role != "system":
            messages[-1]["content"] += "\n" + text.strip()
        else:
            messages.append({"role": role, "content": text.strip()})
    return messages


def _chat(user: str, assistant: str) -> Messages:
    return _messages([("user", user), ("assistant", assistant)])


def _both_sides(key: str, source: str, turns: list[tuple[str, str]], prompts: dict[str, str]) -> Iterator[Document]:
    """Yield a dialogue once with each speaker as the assistant; `prompts` has the system turn of each."""
    for speaker, prompt in prompts.items():
        mapped = [("assistant" if who == speaker else "user", text) for who, text in turns]
        messages = _messages([("system", prompt), *mapped])
        if any(m["role"] == "assistant" for m in messages):
            yield Document(source, (key,), messages)


def _persuasion(folder: Path) -> Iterator[Document]:
    prompts = {
        "persuader": "You ask the user to donate to the charity Save the Children.",
        "persuadee": "You talk with a user who may ask you for a donation.",
    }
    for row in read_rows(folder / "dialogues.jsonl.gz"):
        turns = [(turn["role"], turn["text"]) for turn in row["turns"]]
        yield from _both_sides(f"persuasionforgood:{row['id']}", "persuasionforgood", turns, prompts)


def _casino(folder: Path) -> Iterator[Document]:
    for row in read_rows(folder / "train.jsonl.gz"):
        prompts = {}
        for agent, facts in row["participants"].items():
            wants = " ".join(
                f"{level} priority: {facts['value2issue'][level]} ({facts['value2reason'][level].strip()})"
                for level in ("High", "Medium", "Low")
            )
            prompts[agent] = f"You share 3 packages each of food, water and firewood with the user. {wants}"
        turns = [(turn["role"], _casino_turn(turn)) for turn in row["turns"]]
        yield from _both_sides(f"casino:{row['id']}", "casino", turns, prompts)


def _casino_turn(turn: dict[str, Any]) -> str:
    deal = turn.get("task_data") or {}
    if "issue2youget" not in deal:
        return str(turn["text"])
    shares = [
        ", ".join(f"{deal[side].get(issue, 0)} {issue}" for issue in ("Food", "Water", "Firewood"))
        for side in ("issue2youget", "issue2theyget")
    ]
    return f"{turn['text']}: I get {shares[0]}; you get {shares[1]}"


def _craigslist(folder: Path) -> Iterator[Document]:
    for row in read_rows(folder / "dialogues.jsonl.gz"):
        prompts = {
            "seller": f"You sell this for ${row['seller_price']}: {row['seller_item_description']}",
            "buyer": f"You would like to buy this for ${row['buyer_price']}: {row['buyer_item_description']}",
        }
        turns = [(turn["role"], turn["text"]) for turn in row["turns"]]
        yield from _both_sides(f"craigslistbargain:{row['id']}", "craigslistbargain", turns, prompts)


def _guess_my_city(folder: Path) -> Iterator[Document]:
    for row in read_rows(folder / "dialogues.jsonl.gz"):
        turns: list[tuple[str, str]] = []
        for text in row["turns"]:
            question, mark, answer = text.partition("? ")
            if not mark:  # question and answer cannot be told apart
                break
            turns += [("asks", question + "?"), ("answers", answer)]
        city = ", ".join(part.strip().title() for part in row["word"].split(","))
        prompts = {
            "asks": "Guess the city where the user lives. Ask one question at a time.",
            "answers": f"You live in {city}. Answer the questions without naming the city.",
        }
        key = f"guess_my_city:{row['id']}"
        side = sorted(prompts)[_hash(f"side {key}") % 2]  # the games are long and alike: one side of each is enough
        yield from _both_sides(key, "guess_my_city", turns, {side: prompts[side]})


def _gsm8k(folder: Path) -> Iterator[Document]:
    for row in read_rows(folder / "train.jsonl.gz"):
        solution = re.sub(r"<<[^>]*>>", "", row["solution"])  # notes for a calculator
        yield Document("gsm8k", (f"gsm8k:{row['question']}",), _chat(user=row["question"], assistant=solution))


def _triviaqa(folder: Path) -> Iterator[Document]:
    for row in read_rows(folder / "questions.jsonl.gz"):
        key = f"triviaqa:{row['id']}"
        yield Document("triviaqa", (key,), _chat(user=row["question"], assistant=row["answers"][0]))


# --- made-up instructions with one right answer, so that a rule can reward it ---

_WORD_LIST = """
apple bread chair dance eagle flame grass horse island jacket kitten lemon mountain night orange pencil queen river
stone tiger umbrella village window yellow zebra bottle candle doctor engine farmer garden hammer insect jungle king
letter market needle ocean paper rabbit school table uncle valley water yard animal bridge cloud dream earth forest
glass house idea juice knife light music number open plant question road silver train unit voice winter box year cat
dog sun moon star tree book door fish bird milk salt rain snow wind fire ship boat car bus hat coat shoe hand foot
"""
_WORDS = _WORD_LIST.split()
_LISTS = {
    "colours": "red blue green yellow black white orange purple brown pink",
    "animals": "dog cat horse cow sheep lion tiger bear rabbit mouse",
    "fruits": "apple banana orange lemon grape pear peach plum cherry mango",
    "cities": "London Paris Rome Berlin Madrid Tokyo Cairo Moscow Boston Vienna",
    "numbers": "one two three four five six seven eight nine ten",
    "days": "Monday Tuesday Wednesday Thursday Friday Saturday Sunday",
}
_OPPOSITES = "hot cold,big small,up down,day night,wet dry,fast slow,old new,open closed,full empty,good bad,left right"


def _task(rng: random.Random) -> tuple[str, str]:
    """Return a question and its answer."""
    word, few = rng.choice(_WORDS), rng.randint(2, 5)
    a, b = (rng.randint(0, 9 if rng.random() < 0.4 else 99) for _ in range(2))
    kind = rng.choice(
        ["sum"] * 5 + ["difference"] * 3 + ["say"] * 2 + ["repeat"] * 3 + ["count"] * 2 + ["spell"] * 2 + ["list"] * 2
        + ["product", "times", "larger", "next", "first", "last", "capitals", "even", "opposite", "day", "hello"]
    )  # fmt: skip
    if kind == "sum":
        return rng.choice(("What is {} plus {}?", "{} + {} =", "Add {} and {}.")).format(a, b), str(a + b)
    if kind == "difference":
        question = rng.choice(("What is {} minus {}?", "{} - {} ="))
        return question.format(max(a, b), min(a, b)), str(abs(a - b))
    if kind == "product":
        a, b = a % 10, b % 10
        return rng.choice(("What is {} times {}?", "{} * {} =")).format(a, b), str(a * b)
    if kind == "say":
        return rng.choice(("Say the word {}.", "Say {}.", "Please say {}.")).format(word), word
    if kind == "repeat":
        words = " ".join(rng.choice(_WORDS) for _ in range(few))
        return f"Repeat: {words}", words
    if kind == "count":
        start = 1 if rng.random() < 0.7 else rng.randint(2, 30)
        stop = start + rng.randint(1, 14)
        question = f"Count to {stop}." if start == 1 else f"Count from {start} to {stop}."
        return question, ", ".join(map(str, range(start, stop + 1)))
    if kind == "spell":
        return f"Spell {word}.", "-".join(word)
    if kind == "list":
        name = rng.choice(list(_LISTS))
        numbers = ("two", "three", "four", "five")
        return f"List {numbers[few - 2]} {name}.", ", ".join(rng.sample(_LISTS[name].split(), few))
    if kind == "times":
        return f"Say {word} {few} times.", " ".join([word] * few)
    if kind == "larger":
        return f"Which number is larger, {a} or {b}?", str(max(a, b))
    if kind == "next":
        return f"Which number comes after {a}?", str(a + 1)
    if kind in ("first", "last"):
        return f"What is the {kind} letter of {word}?", word[0 if kind == "first" else -1]
    if kind == "capitals":
        return f"Write {word} in capitals.", word.upper()
    if kind == "even":
        return f"Is {a} an even number?", "Yes." if a % 2 == 0 else "No."
    if kind == "opposite":
        pair = rng.choice(_OPPOSITES.split(",")).split()
        rng.shuffle(pair)
        return f"What is the opposite of {pair[0]}?", pair[1]
    if kind == "day":
        days = _LISTS["days"].split()
        i = rng.randrange(7)
        return f"Which day comes after {days[i]}?", days[(i + 1) % 7]
    greeting = rng.choice(("Hello", "Hi", "Good morning", "Good evening", "Hey"))
    return greeting + rng.choice(("!", ".", "")), f"{greeting}! How can I help you?"


def synthetic_chats(seed: int, count: int) -> Iterator[Document]:
    """Yield `count` chats of one to three made-up tasks; some have a system turn, some call a calculator."""
    rng = random.Random(f"tiny_lm {seed}")
    for _ in range(count):
        turns: list[tuple[str, str]] = []
        if rng.random() < 0.08:
            a, b, sign = rng.randint(10, 999), rng.randint(10, 999), rng.choice("+-*")
            call = json.dumps({"name": "calculator", "arguments": {"expression": f"{a} {sign} {b}"}})
            result = str({"+": a + b, "-": a - b, "*": a * b}[sign])
            turns = [("system", "You may call the tool calculator."), ("user", f"Calculate {a} {sign} {b}.")]
            turns += [("assistant", f"<tool_call>{call}</tool_call>"), ("tool", result), ("assistant", result)]
        else:
            if rng.random() < 0.25:
                turns.append(("system", rng.choice(("Answer briefly.", "You are a helpful assistant."))))
            for _ in range(rng.choice((1, 1, 1, 2, 3))):
                question, answer = _task(rng)
                turns += [("user", question), ("assistant", answer)]
        questions = "\n".join(text for role, text in turns if role == "user")
        yield Document("synthetic", (f"synthetic:{questions}",), _messages(turns))


SETS = (
    DataSet("hotpotqa", "hotpotqa", ("passages.jsonl.gz", "questions_train.jsonl.gz"), _passages("hotpotqa"),
            "HotpotQA (Yang et al., 2018): Wikipedia paragraphs, 500 questions", "CC BY-SA 4.0"),
    DataSet("twowiki", "twowiki", ("passages.jsonl.gz", "questions_train.jsonl.gz"), _passages("twowiki"),
            "2WikiMultihopQA (Ho et al., 2020): Wikipedia paragraphs, 500 questions", "Apache 2.0; paragraphs CC BY-SA"),
    DataSet("musique", "musique", ("passages.jsonl.gz",), _passages("musique"),
            "MuSiQue (Trivedi et al., 2022): Wikipedia paragraphs, no questions", "CC BY 4.0; paragraphs CC BY-SA"),
    DataSet("tinyshakespeare", "text", ("tinyshakespeare.txt.gz",), _long_text("tinyshakespeare", "tinyshakespeare.txt.gz"),
            "plays of Shakespeare, selected by karpathy/char-rnn", "public domain"),
    DataSet("wizard_of_oz", "text", ("wizard_of_oz.txt.gz",), _long_text("wizard_of_oz", "wizard_of_oz.txt.gz"),
            "The Wonderful Wizard of Oz (Baum, 1900)", "public domain"),
    DataSet("wiki_demo", "text", ("wiki_demo.txt.gz",), _long_text("wiki_demo", "wiki_demo.txt.gz"),
            "Wikipedia articles, from hiyouga/LLaMA-Factory", "CC BY-SA 4.0"),
    DataSet("c4", "text", ("c4_demo.jsonl.gz",), _c4,
            "300 documents of C4 (Raffel et al., 2020), from hiyouga/LLaMA-Factory", "ODC-BY 1.0"),
    DataSet("persuasionforgood", "persuasionforgood", ("dialogues.jsonl.gz",), _persuasion,
            "PersuasionForGood (Wang et al., 2019): 1,017 dialogues", "Apache 2.0"),
    DataSet("casino", "casino", ("train.jsonl.gz",), _casino,
            "CaSiNo (Chawla et al., 2021): the 900 negotiations of its train split", "CC BY 4.0"),
    DataSet("craigslistbargain", "craigslistbargain", ("dialogues.jsonl.gz",), _craigslist,
            "CraigslistBargain (He et al., 2018): 376 dialogues", "MIT"),
    DataSet("guess_my_city", "guess_my_city", ("dialogues.jsonl.gz",), _guess_my_city,
            "Guess My City (LMRL-Gym, Abdulhai et al., 2023; ArCHer): 950 games written by a model", "MIT"),
    DataSet("gsm8k", "gsm8k", ("train.jsonl.gz",), _gsm8k,
            "GSM8K (Cobbe et al., 2021): 2,000 problems of its train split", "MIT"),
    DataSet("triviaqa", "triviaqa", ("questions.jsonl.gz",), _triviaqa,
            "TriviaQA (Joshi et al., 2017): 2,000 questions with a short answer", "Apache 2.0"),
)  # fmt: skip


def read_documents(data_dir: Path, *, seed: int, synthetic_rows: int) -> list[Document]:
    """Read every set of `data_dir` and make the synthetic chats; equal documents are kept once.

    Raises:
        DataError: no set is there, or a row cannot be read.
    """
    if not data_dir.is_dir():
        raise DataError(f"not found: {data_dir} (--data_dir)")
    documents: dict[str, Document] = {}
    for data_set in SETS:
        try:
            for document in data_set.read(data_dir / data_set.folder):
                documents.setdefault(json.dumps(document.content), document)
        except (KeyError, TypeError, OSError, EOFError) as error:
            raise DataError(f"{data_dir / data_set.folder}: cannot be read as {data_set.name}: {error!r}") from error
    if not documents:
        raise DataError(f"{data_dir} (--data_dir) has none of {', '.join(dict.fromkeys(s.folder for s in SETS))}")
    for document in synthetic_chats(seed, synthetic_rows):
        documents.setdefault(json.dumps(document.content), document)
    return list(documents.values())
