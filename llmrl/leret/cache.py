"""Answers of a retriever kept on disk, so that a query is asked once in the life of an index.

One SQLite file for any number of retrievers, keyed by (fingerprint of the retriever, k, query). Threads and processes may
share it on one machine; on a network file system its locks may not hold.
"""

from __future__ import annotations

import json
import os
import sqlite3
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from llmrl.errors import DataError, OutputError
from llmrl.leret.corpus import Corpus
from llmrl.leret.retriever import Hit, Retriever, RetrieverError, check_query_batch

_APPLICATION = 0x4C655265  # "LeRe", in the file's header
_VERSION = 1
_WAIT = 60.0
_AT_ONCE = 500
_ASKED_AT_ONCE = 256


class CachedRetriever:
    """A retriever whose answers are kept in a file. An empty answer is not: it may be a server's fault of the day.

    Args:
        retriever: what is asked when the file does not know.
        path: the file; made when it is not there.
        corpus: the passages by id, of which the file keeps ids and scores only; other hits are kept with their text.

    Attributes:
        hits: queries answered from the file, or by an equal query of the same batch.
        misses: queries that were asked.

    Raises:
        OutputError: the file cannot be made or written.
        DataError: the file is no such cache, of another version, or damaged.
    """

    def __init__(self, retriever: Retriever, path: Path | str, corpus: Corpus) -> None:
        self.hits = self.misses = 0
        self.path = Path(path).expanduser()
        self._retriever, self._passages = retriever, corpus.by_id
        self._connection: sqlite3.Connection | None = None
        self._lock, self._owner = threading.Lock(), 0
        self._inherited: list[sqlite3.Connection] = []
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(f"cannot make the folder of the retrieval cache {self.path}: {error.strerror}") from error
        with self._database():
            pass

    @property
    def name(self) -> str:
        """Name of the retriever that is asked."""
        return self._retriever.name

    @property
    def fingerprint(self) -> str:
        """Fingerprint of the retriever that is asked: a cache changes no answer."""
        return self._retriever.fingerprint

    def search(self, queries: Sequence[str], k: int) -> list[list[Hit]]:
        """Return kept answers, and ask the retriever once for each distinct query that has none. See `Retriever`.

        It is asked for some hundred queries at a time and their answers are kept before the next, so that what a server
        found before it failed is not searched for again.
        """
        queries = check_query_batch(queries, k)
        known = self._read(list(dict.fromkeys(queries)), k)
        unknown = [query for query in dict.fromkeys(queries) if query not in known]
        for start in range(0, len(unknown), _ASKED_AT_ONCE):
            asked = unknown[start : start + _ASKED_AT_ONCE]
            found = self._retriever.search(asked, k)  # outside of the lock: other threads go on
            if len(found) != len(asked):
                raise RetrieverError(
                    f"retriever {self.name}: expected a list of hits for each of {len(asked)} queries (the first: "
                    f"{asked[0]!r:.100}), got {len(found)} lists"
                )
            answers = dict(zip(asked, found, strict=True))
            self._write(answers, k)
            known.update(answers)
        with self._lock:
            self.misses += len(unknown)
            self.hits += len(queries) - len(unknown)
        return [list(known[query]) for query in queries]

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            if self._connection is not None and self._owner == os.getpid():
                self._connection.close()
            self._connection = None

    def _read(self, queries: list[str], k: int) -> dict[str, list[Hit]]:
        known = {}
        with self._database() as database:
            for start in range(0, len(queries), _AT_ONCE):
                part = {_key(query): query for query in queries[start : start + _AT_ONCE]}
                marks = ",".join("?" * len(part))
                rows = database.execute(
                    f"SELECT query, hits FROM answers WHERE fingerprint = ? AND k = ? AND query IN ({marks})",
                    (self.fingerprint, k, *part),
                )
                for key, text in rows:
                    known[part[key]] = self._unpack(text)
        return known

    def _write(self, answers: dict[str, list[Hit]], k: int) -> None:
        rows = [(self.fingerprint, k, _key(query), self._pack(hits)) for query, hits in answers.items() if hits]
        with self._database() as database:
            database.execute("BEGIN IMMEDIATE")
            # another process may have been faster; its answer is the same
            database.executemany("INSERT OR IGNORE INTO answers VALUES (?, ?, ?, ?)", rows)
            database.execute("COMMIT")

    def _pack(self, hits: list[Hit]) -> str:
        rows = [
            [hit.id, hit.score] if self._is_passage(hit) else [hit.id, hit.score, hit.title, hit.text] for hit in hits
        ]
        return json.dumps(rows, separators=(",", ":"))

    def _is_passage(self, hit: Hit) -> bool:
        passage = self._passages.get(hit.id)
        return passage is not None and (passage.title, passage.text) == (hit.title, hit.text)

    def _unpack(self, text: str) -> list[Hit]:
        try:
            hits = []
            for name, score, *texts in json.loads(text):
                title, body = texts or (self._passages[name].title, self._passages[name].text)
                hits.append(Hit(name, title, body, float(score)))
            return hits
        except (ValueError, TypeError, KeyError) as error:
            raise self._damaged(f"an entry that cannot be read, {text[:60]!r}") from error

    @contextmanager
    def _database(self) -> Iterator[sqlite3.Connection]:
        """Yield the connection under the lock; what SQLite says becomes an error that names the file."""
        with self._lock:
            try:
                if self._connection is not None and self._owner != os.getpid():
                    self._inherited.append(self._connection)  # over a fork neither used nor closed, as SQLite asks
                    self._connection = None
                if self._connection is None:
                    self._connection, self._owner = self._open(), os.getpid()
                yield self._connection
            except sqlite3.OperationalError as error:
                if self._connection is not None and self._connection.in_transaction:
                    with suppress(sqlite3.Error):
                        self._connection.execute("ROLLBACK")
                raise OutputError(f"cannot use the retrieval cache {self.path}: {error}; name another file") from error
            except sqlite3.DatabaseError as error:
                raise self._damaged(str(error)) from error

    def _open(self) -> sqlite3.Connection:
        given_up = time.monotonic() + _WAIT
        while True:
            database = sqlite3.connect(self.path, timeout=_WAIT, check_same_thread=False, isolation_level=None)
            try:
                self._prepare(database)
            except BaseException as error:
                database.close()
                # the switch to WAL does not wait for another process that does it at the same moment
                if not isinstance(error, sqlite3.OperationalError) or "locked" not in str(error):
                    raise
                if time.monotonic() > given_up:
                    raise
                time.sleep(0.05)
            else:
                return database

    def _prepare(self, database: sqlite3.Connection) -> None:
        database.execute("BEGIN")  # one view of all three, for another process may be making the file
        application = database.execute("PRAGMA application_id").fetchone()[0]
        version = database.execute("PRAGMA user_version").fetchone()[0]
        tables = database.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
        database.execute("COMMIT")
        if application == 0 and tables == 0:
            # outside of a transaction, and once for the life of the file
            database.execute("PRAGMA journal_mode = WAL")
            database.execute("BEGIN IMMEDIATE")
            database.execute(
                "CREATE TABLE IF NOT EXISTS answers (fingerprint TEXT NOT NULL, k INTEGER NOT NULL, query BLOB NOT NULL, "
                "hits TEXT NOT NULL, PRIMARY KEY (fingerprint, k, query)) WITHOUT ROWID"
            )
            database.execute(f"PRAGMA application_id = {_APPLICATION}")
            database.execute(f"PRAGMA user_version = {_VERSION}")
            database.execute("COMMIT")
        elif application != _APPLICATION:
            raise self._damaged("it is a database of something else")
        elif version != _VERSION:
            raise self._damaged(f"its version is {version}, this llmrl writes {_VERSION}")
        database.execute("PRAGMA synchronous = NORMAL")

    def _damaged(self, reason: str) -> DataError:
        return DataError(f"{self.path} is not a usable retrieval cache: {reason}; delete it or name another file")


def _key(query: str) -> bytes:
    return query.encode("utf-8", "surrogatepass")
