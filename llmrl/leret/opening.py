"""What every command of LeReT begins with: corpus, questions, retriever, model, the prompt it was trained with."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llmrl.errors import UsageError
from llmrl.files import resolve_reference
from llmrl.leret.ask import Asker, EngineAsker, RuleAsker
from llmrl.leret.corpus import Corpus, load_corpus
from llmrl.leret.explore import Explorer, ExploreSettings
from llmrl.leret.model_identity import check_base
from llmrl.leret.options import PRESETS, LeretConfig
from llmrl.leret.prompts import PromptFormat, PromptStyle, SearchSetup, load_setup, load_styles
from llmrl.leret.questions import QuestionSet, load_questions
from llmrl.leret.retriever import Retriever, open_retriever
from llmrl.leret.rewards import reward_named
from llmrl.leret.rules import RULES
from llmrl.leret.search import Searcher
from llmrl.leret.states import StateRule
from llmrl.training.distributed import barrier, is_main_process

Say = Callable[[str], None]


def warn(text: str) -> None:
    """Print on stderr, once for all processes and with --quiet too."""
    if is_main_process():
        print(f"llmrl: {text}", file=sys.stderr, flush=True)


@dataclass(frozen=True)
class Opened:
    """What a run works with.

    Attributes:
        config: options, with nothing left to a preset.
        corpus: the passages.
        questions: to explore, or of `eval` to evaluate.
        dev: questions that decide when rounds stop; None without a file.
        test: questions of the final report; None without a file.
        retriever: what searches.
        setup: prompt, hops, k, merge and unseen_only, as they are saved with the result.
        styles: beside the bare one.
    """

    config: LeretConfig
    corpus: Corpus
    questions: QuestionSet
    dev: QuestionSet | None
    test: QuestionSet | None
    retriever: Retriever
    setup: SearchSetup
    styles: tuple[PromptStyle, ...]

    @property
    def bare(self) -> PromptStyle:
        """The style that is trained and evaluated."""
        return self.setup.format.bare

    def searcher(self) -> Searcher:
        """Return a searcher with counts of its own."""
        return Searcher(self.retriever, self.setup.k, unseen_only=self.setup.unseen_only)

    def settings(self, seed: int) -> ExploreSettings:
        """Return how to explore, with a seed of its own."""
        c = self.config
        rule = StateRule(
            str(c.state_rule), temperature=c.state_temperature, beam=c.beam, keep_solved=bool(c.keep_solved)
        )
        return ExploreSettings(
            hops=self.setup.hops,
            merge=self.setup.merge,
            reward=reward_named(str(c.reward)),
            samples=int(c.samples or 1),
            temperatures=tuple(c.temperature or (0.0,)),
            question_first=self.setup.question_first,
            returns=str(c.returns),
            futures=c.futures,
            discount=c.discount,
            state_rule=rule,
            seed=seed,
        )

    def explorer(self, asker: Asker, seed: int) -> Explorer:
        """Return an explorer of this corpus."""
        return Explorer(asker, self.searcher(), self.corpus, self.settings(seed))

    def facts(self) -> dict[str, str]:
        """Return what every artefact carries: fingerprints of corpus and retriever, and the reward."""
        return {
            "corpus": self.corpus.fingerprint,
            "retriever": self.retriever.name,
            "retriever_fingerprint": self.retriever.fingerprint,
            "reward": str(self.config.reward),
        }


def open_data(config: LeretConfig, say: Say) -> Opened:
    """Read the files and open the retriever; say what was left out.

    Raises:
        UsageError: a file is not there; or --adapter was trained on another model than --model.
        DataError: an empty corpus, duplicate ids, no question whose gold documents are in the corpus.
    """
    if config.adapter is not None and config.model is not None:
        check_base(config.adapter, config.model)
    setup = _setup(config)
    corpus = load_corpus(config.passages)
    sets = []
    for name, files in (
        ("questions", config.questions),
        ("dev_questions", config.dev_questions),
        ("test_questions", config.test_questions),
    ):
        sets.append(load_questions(files, corpus) if files else None)
        if sets[-1] is not None:
            say(f"{name}: {sets[-1].summary()}")
    questions, dev, test = sets
    assert questions is not None
    _refuse_shared(questions, dev, test)
    retriever = open_search(config, corpus)
    say(f"corpus: {len(corpus):,} passages, {corpus.fingerprint}; retriever {retriever.name}")
    return Opened(config, corpus, questions, dev, test, retriever, setup, _styles(config, setup))


def open_search(config: LeretConfig, corpus: Corpus) -> Retriever:
    """Open the retriever that the options name, with a cache on disk where searching is slow."""
    cache_dir = Path(config.cache_dir or Path(str(config.output_dir)) / "cache")
    slow = config.retriever != "bm25"
    if slow:
        cache_dir.mkdir(parents=True, exist_ok=True)
        if not is_main_process():
            barrier()  # the main process embeds the corpus, the others read its file
    dense: dict[str, Any] = {"cache_dir": cache_dir}
    if config.retriever in ("dense", "hybrid"):
        from llmrl.encoder import default_encoder

        dense["encoder"] = config.encoder or default_encoder()
    opened = open_retriever(
        config.retriever,
        corpus,
        cache=cache_dir / "searches.sqlite" if slow else None,
        dense=dense if slow else {},
        http={"url": config.retriever_url, "name": config.retriever_name},
    )
    if slow and is_main_process():
        barrier()
    return opened


@contextmanager
def open_asker(opened: Opened, model: str | None = None, adapter: str | None = None) -> Iterator[Asker]:
    """Open the model, or another one, or the rules; the engine is closed at the end."""
    config = opened.config
    if config.policy == "rules" and model is None:
        yield RuleAsker(RULES)
        return
    from llmrl.rollout.backends import open_engine

    name = model or str(config.model)
    folder = resolve_reference(name, "model")[0]
    options: dict[str, Any] = {"server_url": config.server_url} if config.server_url else {}
    with open_engine(
        folder,
        rollout_backend=config.rollout_backend,
        dtype=config.dtype,
        max_model_len=config.max_model_len,
        adapter=adapter,
        batch_size=config.batch_size,
        **options,
    ) as engine:
        fingerprint = f"{engine.version.fingerprint} {opened.corpus.fingerprint}"
        yield EngineAsker(engine, opened.setup.format, fingerprint, quiet=config.quiet)


def _setup(config: LeretConfig) -> SearchSetup:
    """Return the model's own setup, changed by what was asked for."""
    own = load_setup(config.adapter, config.model if config.policy == "model" else None)
    own = own or SearchSetup(merge=PRESETS[config.preset]["merge"])
    prompt_format: PromptFormat = own.format
    if config.enable_thinking is not None:
        options = {**prompt_format.template_options, "enable_thinking": config.enable_thinking}
        prompt_format = replace(prompt_format, template_options=options)
    if config.max_tokens is not None:
        prompt_format = replace(prompt_format, max_tokens=config.max_tokens)
    changes = {name: getattr(config, name) for name in ("hops", "k", "merge", "unseen_only", "question_first")}
    changes = {name: value for name, value in changes.items() if value is not None}
    setup = replace(own, format=prompt_format, notes={}, **changes)
    if setup.question_first and setup.hops == 1:
        raise UsageError(
            "question_first leaves nothing to write with one hop: give --hops 2, or --question_first false"
        )
    return setup


def _styles(config: LeretConfig, setup: SearchSetup) -> tuple[PromptStyle, ...]:
    if config.policy == "rules":
        return tuple(PromptStyle(name, "") for name in RULES)
    own = () if config.prompts else setup.format.styles
    return (*own, *(load_styles(config.prompts) if config.prompts else ()))


def _refuse_shared(questions: QuestionSet, dev: QuestionSet | None, test: QuestionSet | None) -> None:
    """A question in two of the files would be trained on and then reported."""
    named = {"questions": questions, "dev_questions": dev, "test_questions": test}
    ids = {name: {q.text for q in found.questions} for name, found in named.items() if found is not None}
    names = list(ids)
    for i, one in enumerate(names):
        for other in names[i + 1 :]:
            if both := sorted(ids[one] & ids[other]):
                raise UsageError(
                    f"--{one} and --{other} share {len(both)} question(s), e.g. '{both[0]:.60}': what is trained on, or "
                    "stops the run, must not be reported"
                )
