"""`llmrl hyre query`: ask a person which of two answers is better, the most telling pair first, and weigh the heads live.

It works line by line on stdin and stdout, so a pipe can answer too. Which answer is shown as A is a function of the seed and
the two texts alone: which one the file calls chosen is never looked at.

Labels and skips are on the disk as soon as they are given (`llmrl.hyre.query_files`). What is asked next, and the user's file,
follow from them alone, so a session that was killed goes on as if it had not been.
"""

from __future__ import annotations

import hashlib
import sys
import textwrap
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from llmrl.errors import DataError, Interrupted, UsageError
from llmrl.hyre.acquire import STOP_SHARE, STOP_WINDOW, choose_batch, should_stop
from llmrl.hyre.ensemble import RewardEnsemble, load_ensemble
from llmrl.hyre.pairs import Pair, read_pairs
from llmrl.hyre.posterior import HyrePosterior, label_losses, posterior_weights
from llmrl.hyre.query_files import SessionFiles, counted, pair_key
from llmrl.hyre.query_options import QueryConfig
from llmrl.hyre.user import User, adapt_margins

_KEYS = ("a", "b", "s", "u", "q")
_ASK = "better answer [a, b, s = skip, u = undo the last label, q = quit]: "


def query(config: QueryConfig, ensemble: RewardEnsemble | None = None) -> User:
    """Ask until the pool, the person or the stopping rule ends it; return the user, whose file is written.

    Args:
        config: the options.
        ensemble: one that is loaded already; `config.model` is not read then.

    Raises:
        UsageError, OutputError: the files are there and are no session's, another process has them, or the disk is full.
        DataError: a pool or labels that cannot be used, labels of another pool among them.
        HeadMismatchError: the labels were given with another ensemble.
        Interrupted: Ctrl-C, with what is kept and how to go on.
    """
    files = SessionFiles(config)
    try:
        files.check()
        pairs = pool_of(read_pairs(config.pairs), config.seed)
        ensemble = load_ensemble(config.model) if ensemble is None else ensemble
        with files.locked(ensemble.fingerprint):
            files.read_labels(pairs)  # refused before minutes of features
            pool = Pool.measure(ensemble, pairs, config)
            files.begin()
            return _ask(Session(config, files, pool))
    except Interrupted:
        raise
    except KeyboardInterrupt:
        raise Interrupted(f"interrupted: {files.kept()}") from None


def pool_of(pairs: Sequence[Pair], seed: int) -> list[Pair]:
    """Return the pairs to ask about, each once: A is its `chosen` and B its `rejected`.

    Args:
        pairs: as read; a pair that comes again, turned round or not, is left out.
        seed: of which answer is A.
    """
    found: dict[str, Pair] = {}
    for pair in pairs:
        key = pair_key(pair)
        first, second = sorted((pair.chosen, pair.rejected))
        if hashlib.sha256(f"{seed} {key}".encode()).digest()[0] & 1:
            first, second = second, first
        found.setdefault(key, Pair(pair.prompt, first, second, where=pair.where))
    return list(found.values())


@dataclass(frozen=True)
class Pool:
    """What is asked about, and what the heads say of it.

    Attributes:
        pairs: N, A as `chosen`.
        margins: `[N, K]` of A over B.
        first, second: features `[N, H]` of A and of B.
        fingerprint: of the ensemble.
        scale: of the features, see `llmrl.hyre.refine`.
    """

    pairs: list[Pair]
    margins: NDArray[np.float64]
    first: Tensor
    second: Tensor
    fingerprint: str
    scale: float

    @classmethod
    def measure(cls, ensemble: RewardEnsemble, pairs: list[Pair], config: QueryConfig) -> Pool:
        """Read the pool with the ensemble's base, once.

        Raises:
            DataError: a head gives a score that is not a number.
        """
        if ensemble.facts.get("warning"):
            print(f"warning: {ensemble.facts['warning']}", file=sys.stderr, flush=True)
        cache_dir = None if config.cache_dir is None else Path(config.cache_dir).expanduser()
        first, second = ensemble.features(pairs, cache_dir=cache_dir, quiet=config.quiet)
        margins = ensemble.margins(first, second)
        bad = np.flatnonzero(~np.isfinite(margins).all(1))
        if len(bad):
            raise DataError(
                f"{pairs[int(bad[0])].where}: a head gave a score that is not a number; check the base model and its dtype"
            )
        scale = float(ensemble.facts.get("feature_scale", 1.0))
        return cls(pairs, margins, first, second, ensemble.fingerprint, scale)


class Session:
    """Labels and skips of one person on a pool, and what follows from them.

    Attributes:
        labels: (row of the pool, whether A won), in the order given.
        skipped: rows not to be asked again.
        user: what `llmrl hyre adapt` makes of the labels; its file is written whenever they change.
    """

    def __init__(self, config: QueryConfig, files: SessionFiles, pool: Pool) -> None:
        self.config, self.files, self.pool = config, files, pool
        self.restore()

    def restore(self) -> None:
        """Take what is on the disk, and write the user's file that follows from it."""
        self.files.mend()
        place = {pair_key(pair): i for i, pair in enumerate(self.pool.pairs)}
        self.labels = self.files.read_labels(self.pool.pairs)
        self.skipped = [place[key] for key in self.files.skipped if key in place]
        self._save()

    def answer(self, row: int, *, first: bool) -> None:
        """Take a label: A is better, or B."""
        pair = self.pool.pairs[row]
        self.files.add(pair if first else pair.turned())
        self.labels.append((row, first))
        self._save()

    def undo(self) -> None:
        """Take back the last label; its pair is open again."""
        self.files.undo(self.pool.pairs[self.labels[-1][0]])
        self.labels.pop()
        self._save()

    def skip(self, row: int) -> None:
        """Do not ask about a pair again."""
        self.files.skip(self.pool.pairs[row])
        self.skipped.append(row)

    def _save(self) -> None:
        self.user = self._adapt()
        self.user.save(self.files.user)

    def _signed(self) -> tuple[list[int], NDArray[np.float64]]:
        return [row for row, _ in self.labels], np.array([1.0 if first else -1.0 for _, first in self.labels])

    def _adapt(self) -> User:
        if not self.labels:
            return User(HyrePosterior(self.pool.margins.shape[1], ensemble=self.pool.fingerprint))
        rows, signs = self._signed()
        differences = (self.pool.first[rows] - self.pool.second[rows]).double().numpy() * signs[:, None]
        return adapt_margins(
            self.pool.margins[rows] * signs[:, None],
            ensemble=self.pool.fingerprint,
            differences=differences if self.config.refine else None,
            scale=self.pool.scale,
        )

    def history(self) -> NDArray[np.float64]:
        """Return the weights after 0, 1, ..., n labels, `[n + 1, K]`, that questions are chosen by.

        They are those of the loss nll with beta 1 and no guard. Which loss and beta suit the labels best is chosen anew for
        `user` after every label, and would make the questions jump.
        """
        rows, signs = self._signed()
        losses = np.zeros((len(rows) + 1, self.pool.margins.shape[1]))
        losses[1:] = label_losses(self.pool.margins[rows] * signs[:, None], np.ones(len(rows)))
        return posterior_weights(losses.cumsum(0))

    def next_row(self) -> int | str:
        """Return the row of the pool to ask about, or why none follows."""
        config, count, weights = self.config, len(self.labels), self.history()
        if config.most is not None and count >= config.most:
            return f"{counted(count, 'label')}, as many as --most asks for"
        if config.stop and should_stop(self.pool.margins, weights):
            return (
                f"the last {STOP_WINDOW} labels changed the side on at most {STOP_SHARE:.0%} of the pool, so more of it would "
                "change little; --stop false asks on"
            )
        taken = [*(row for row, _ in self.labels), *self.skipped]
        found = choose_batch(config.criterion, self.pool.margins, weights[-1], 1, taken=taken, seed=config.seed)
        return int(found[0]) if len(found) else "every pair of the pool was asked"

    def status(self) -> str:
        """Return one line: labels, effective heads, and what the user's weights change."""
        posterior = self.user.posterior
        mine = self.user.margins(self.pool.margins, self.pool.first, self.pool.second)
        share = float((np.sign(mine) != np.sign(self.pool.margins.mean(1))).mean())
        guarded = self.user.choice is not None and self.user.choice.guarded
        kept = "; the labels do not predict each other, so the uniform ensemble is kept" if guarded else ""
        return (
            f"{counted(len(posterior), 'label')}, {posterior.effective_heads:.1f} of {posterior.heads} heads effective, "
            f"{share:.1%} of {len(mine)} pairs decided unlike the uniform ensemble{kept}"
        )


def _ask(session: Session) -> User:
    quiet = session.config.quiet
    if not quiet:
        begun = f"{counted(len(session.labels), 'label')} and {counted(len(session.skipped), 'skip')} so far"
        _say(f"{counted(len(session.pool.pairs), 'pair')} to ask about, {begun}")
    try:
        while not isinstance(row := session.next_row(), str):
            key = _question(session.pool.pairs[row], len(session.labels) + 1)
            if key in ("q", ""):
                reason = "the answers ended" if key == "" else "quit"
                row = f"{reason}: {session.files.kept()}"
                break
            if key == "s":
                session.skip(row)
            elif key == "u" and not session.labels:
                _say("there is no label to undo")
            else:
                session.undo() if key == "u" else session.answer(row, first=key == "a")
                if not quiet:
                    _say(session.status())
    except KeyboardInterrupt:
        print(flush=True)
        session.restore()  # it may have come between a label and the user's file
        raise
    if not quiet:
        _say(f"\n{row}\n{session.files.labels}\n{session.files.user}")
    return session.user


def _question(pair: Pair, number: int) -> str:
    """Show a pair and return the key, one of _KEYS; "" at the end of the input."""
    _say(f"\n--- question {number} ---")
    for role, content in pair.prompt:
        _say(f"{role}:\n{textwrap.indent(content, '    ')}")
    _say(f"A:\n{textwrap.indent(pair.chosen, '    ')}\nB:\n{textwrap.indent(pair.rejected, '    ')}")
    while True:
        print(_ASK, end="", flush=True)
        try:
            line = sys.stdin.readline()
        except UnicodeDecodeError:
            raise UsageError("an answer was no text; the labels before it are kept, the same command goes on") from None
        if not sys.stdin.isatty():
            _say(line.rstrip("\n"))
        key = line.strip().lower()
        if not line or key in _KEYS:
            return key
        _say(f"type one of {', '.join(_KEYS)}, then Enter")


def _say(text: str) -> None:
    """Print texts of others without what would steer a terminal, and without what its encoding lacks."""
    plain = "".join(c if c in "\n\t" or unicodedata.category(c) != "Cc" else repr(c)[1:-1] for c in text)
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    print(plain.encode(encoding, "replace").decode(encoding), flush=True)
