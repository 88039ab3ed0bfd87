"""The files of a labelling session: labels that are on the disk as soon as they are given, and what a session needs beside.

    LABELS.jsonl          the labels in the order they were given, trl's columns, as `llmrl hyre adapt --pairs` reads them. It
                          is what counts. A label is appended and synced before the next question; undo cuts it off again.
    LABELS.session.json   the ensemble, the pairs that were skipped, and those whose label was taken back

Both are about texts, so a session can be gone on with on a pool that has grown.
"""

from __future__ import annotations

import fcntl
import glob
import hashlib
import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from llmrl.errors import DataError, HeadMismatchError, LlmrlError, OutputError, UsageError
from llmrl.files import write_json
from llmrl.hyre.pairs import Pair, read_pair, read_pairs
from llmrl.hyre.query_options import QueryConfig
from llmrl.hyre.run import refuse_inputs

FORMAT = 1


def pair_key(pair: Pair) -> str:
    """Return a hash of a pair that does not say which answer won."""
    text = json.dumps([pair.prompt, sorted((pair.chosen, pair.rejected))])
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def label_row(pair: Pair) -> dict[str, Any]:
    """Return a label in trl's columns: texts where the prompt is one message of a user, else lists of messages."""
    if pair.prompt == () or (len(pair.prompt) == 1 and pair.prompt[0][0] == "user" and pair.prompt[0][1]):
        prompt = pair.prompt[0][1] if pair.prompt else ""
        return {"prompt": prompt, "chosen": pair.chosen, "rejected": pair.rejected}
    return {
        "prompt": [{"role": role, "content": content} for role, content in pair.prompt],
        "chosen": [{"role": "assistant", "content": pair.chosen}],
        "rejected": [{"role": "assistant", "content": pair.rejected}],
    }


class SessionFiles:
    """Where a session keeps what it is told.

    Attributes:
        user: the user's file, which follows from the labels.
        labels: the JSONL file of labels.
        session: the JSON file beside it.
        skipped: keys of the pairs not to be asked again.
        undone: keys of the pairs whose label was taken back, in order; a record for people, nothing follows from it.
    """

    def __init__(self, config: QueryConfig) -> None:
        self.user = Path(config.output).expanduser()
        self.labels = Path(config.labels or self.user.with_name(f"{self.user.stem}.labels.jsonl")).expanduser()
        self.session = self.labels.with_suffix(".session.json")
        self.overwrite, self.inputs = config.overwrite, [*config.pairs, config.model]
        self.skipped: list[str] = []
        self.undone: list[str] = []
        self._ensemble, self._fd, self._begun = "", -1, False

    def check(self) -> None:
        """Refuse paths that cannot be used, before anything is loaded.

        Raises:
            UsageError: two of the files are one.
            OutputError: one is a folder or the pool, or holds something that the session to go on with did not write.
        """
        for path in (self.user, self.labels, self.session):
            refuse_inputs(path, self.inputs)
        if len({path.absolute() for path in (self.user, self.labels, self.session)}) < 3:
            raise UsageError(
                f"--output {self.user} is also the file of the labels or of the session: name another file"
            )
        for path in (self.user, self.labels, self.session):
            if path.is_dir():
                raise OutputError(f"{path} is a folder: name a file")
        if self.overwrite:
            return
        if not self.session.exists():
            for path in (self.user, self.labels):
                if path.exists() and path.stat().st_size:
                    raise OutputError(
                        f"{path} is there and belongs to no session of llmrl hyre query ({self.session.name} is missing); "
                        "name another file, or --overwrite replaces it"
                    )
        elif self.user.exists() and self._stored()["user"] != self.user.name:
            raise OutputError(
                f"--output {self.user} is there and is not the file this session writes ({self._stored()['user']}): name "
                "that one, or one that is not there"
            )

    @contextmanager
    def locked(self, fingerprint: str) -> Iterator[None]:
        """Keep other sessions out, take up what is there, and mend a torn end.

        Args:
            fingerprint: of the ensemble.

        Raises:
            OutputError: another process has the labels.
            HeadMismatchError: they were given with another ensemble.
        """
        for path in (self.user, self.labels):
            path.parent.mkdir(parents=True, exist_ok=True)
        self._fd = os.open(self.labels, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            self._lock()
            self._ensemble = fingerprint
            if self.session.exists() and not self.overwrite:
                stored = self._stored()
                if stored["ensemble"] != fingerprint:
                    raise HeadMismatchError(
                        f"{self.labels} was labelled with another ensemble ({stored['ensemble']}, this one is {fingerprint})\n"
                        "name another --output, or weigh this ensemble by those labels: llmrl hyre adapt --pairs LABELS"
                    )
                self.skipped, self.undone = stored["skipped"], stored["undone"]
                self.mend()
            yield
        finally:
            os.close(self._fd)
            self._fd = -1

    def _lock(self) -> None:
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OutputError(
                f"{self.labels} is being written by another session: end it, or name another --output"
            ) from None
        except OSError:  # some network file systems have no locks
            pass

    def begin(self) -> None:
        """Write the session's file; with --overwrite, only here do the labels go that were there before.

        What a killed session left of a file it was writing is removed.
        """
        for path in (self.user, self.session):
            for torn in path.parent.glob(f".{glob.escape(path.name)}.????????"):
                torn.unlink(missing_ok=True)
        if self.overwrite:
            os.ftruncate(self._fd, 0)
        self._begun = True
        self._write_session()

    def _stored(self) -> dict[str, Any]:
        try:
            fields = json.loads(self.session.read_text(encoding="utf-8"))
            if fields["format"] != FORMAT:
                raise DataError(
                    f"{self.session} has format {fields['format']!r}, expected {FORMAT}: install the llmrl that wrote it"
                )
            texts = [fields["ensemble"], fields["user"], *fields["skipped"], *fields["undone"]]
            if not all(isinstance(text, str) for text in texts):
                raise TypeError("expected texts")
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"{self.session} is damaged ({type(error).__name__}: {error})\n"
                f"copy {self.labels.name} to another name, for llmrl hyre adapt --pairs, and begin anew with --overwrite"
            ) from error
        return dict(fields)

    def _write_session(self) -> None:
        fields = {"format": FORMAT, "ensemble": self._ensemble, "user": self.user.name}
        write_json(self.session, {**fields, "skipped": self.skipped, "undone": self.undone})

    def mend(self) -> None:
        """Cut off a last line that a killed process or a full disk tore, and say so."""
        data = self.labels.read_bytes()
        start = data.rfind(b"\n") + 1
        if start == len(data):
            return
        with suppress(ValueError, LlmrlError):  # whole but for the end of the line: somebody's editor left it out
            row = json.loads(data[start:])
            if isinstance(row, dict) and read_pair(row, ""):
                self._append(b"\n")
                return
        os.ftruncate(self._fd, start)
        os.fsync(self._fd)
        print(
            f"{self.labels}: the last line was torn and is left out; what stands before it is kept",
            file=sys.stderr,
            flush=True,
        )

    def read_labels(self, pairs: Sequence[Pair]) -> list[tuple[int, bool]]:
        """Return (row of `pairs`, whether its `chosen` won) of each label, in order.

        Raises:
            DataError: a label of a pair that is not among them, or a pair that is labelled twice.
        """
        if (self.overwrite and not self._begun) or not self.labels.read_bytes().strip():
            return []
        place = {pair_key(pair): i for i, pair in enumerate(pairs)}
        found: dict[int, tuple[bool, str]] = {}
        for label in read_pairs(self.labels):
            i = place.get(pair_key(label))
            if i is None:
                raise DataError(
                    f"{label.where}: this pair is not in the pool: the labels were given on other --pairs\n"
                    "name the files they were given on, or another --output"
                )
            if i in found:
                raise DataError(f"{label.where} labels the pair of {found[i][1]} again: remove one of them")
            found[i] = (label.chosen == pairs[i].chosen, label.where)
        return [(i, won) for i, (won, _) in found.items()]

    def add(self, label: Pair) -> None:
        """Append a label; it is on the disk when this returns.

        Raises:
            OutputError: the disk is full; what was there before is kept.
        """
        self._append((json.dumps(label_row(label), ensure_ascii=False, allow_nan=False) + "\n").encode())

    def _append(self, data: bytes) -> None:
        before = os.fstat(self._fd).st_size
        try:
            left = memoryview(data)
            while left:  # a disk that is nearly full takes a part, and refuses the next one
                left = left[os.write(self._fd, left) :]
            os.fsync(self._fd)
        except OSError as error:
            with suppress(OSError):
                os.ftruncate(self._fd, before)
            raise OutputError(
                f"cannot write {self.labels}: {error.strerror}; what was there before is kept\n"
                "free some space and run the same command again"
            ) from error

    def undo(self, pair: Pair) -> None:
        """Cut the last label off and note whose it was."""
        os.ftruncate(self._fd, self.labels.read_bytes().rstrip().rfind(b"\n") + 1)
        os.fsync(self._fd)
        self.undone = [*self.undone, pair_key(pair)]
        self._write_session()

    def skip(self, pair: Pair) -> None:
        """Note a pair that is not to be asked again."""
        self.skipped = [*self.skipped, pair_key(pair)]
        self._write_session()

    def kept(self) -> str:
        """Return what is on the disk and how to go on."""
        if not self._begun and self.overwrite:
            return "nothing was asked yet and nothing was replaced; the same command begins again"
        data = self.labels.read_bytes() if self.labels.exists() else b""
        count = sum(1 for line in data.splitlines() if line.strip())
        if not count and not self.skipped:
            return "no label was given yet; the same command begins again"
        how = " without --overwrite" if self.overwrite else ""
        return f"{counted(count, 'label')} kept in {self.labels}; the same command{how} goes on"


def counted(number: int, thing: str) -> str:
    """Return "1 label" or "2 labels"."""
    return f"{number} {thing}{'' if number == 1 else 's'}"
