"""How fast the rollout engine is, as ratios measured in one run.

    python evals/rollout_throughput.py --output_dir evals/results

Four questions, each with two ways that alternate, so that a busy machine slows both; medians over the rounds:
    engine / bare vLLM                the same requests through the engine and through `vllm.LLM.generate`
    one slow environment in sixteen   tokens/s of multi-turn episodes with it over without it
    vLLM / transformers               the two backends on the same requests
    shared prompt / separate prompts  n samples of one long prompt against n prompts of the same length
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llmrl.config import option, parse_config, to_flat
from llmrl.errors import EXIT_DONE, UsageError, run_command
from llmrl.types import Message, SamplingConfig


@dataclass
class ThroughputConfig:
    """Options of the bench."""

    model: str = option("examples/tiny_lm", help="a folder, or a hub name, with a chat template")
    output_dir: str = option("evals/results", help="where rollout-throughput.json and .png go")
    rounds: int = option(9, help="times that each pair is measured, after one that is not counted")
    requests: int = option(96, help="requests of a measurement")
    max_tokens: int = option(64, help="tokens of an answer")
    slow_seconds: float = option(0.3, help="what a slow environment adds to each of its steps")
    quiet: bool = option(False, help="print errors only")

    def __post_init__(self) -> None:
        if self.rounds < 3 or self.requests < 16:
            raise UsageError("expected at least 3 rounds and 16 requests")


class Chat:
    """An environment of three turns that asks on; a slow one takes its time to answer."""

    tools: Sequence[Mapping[str, Any]] = ()

    def __init__(self, row: Mapping[str, Any]) -> None:
        self.row, self.turns = row, 0

    def observe(self) -> list[Message]:
        """Open the talk."""
        return [Message("user", f"Tell me about number {self.row['id']}.")]

    def step(self, answer: Message) -> Any:
        """Ask for more, twice."""
        from llmrl.rollout.environment import Step

        self.turns += 1
        time.sleep(self.row["seconds"])
        return Step((Message("user", "Go on."),), done=self.turns == 3)


def compare(first: Callable[[], int], second: Callable[[], int], rounds: int) -> dict[str, Any]:
    """Run two ways in turn; each returns the tokens it made. The first round warms up and is not counted.

    Returns:
        Tokens/s of every round of both, their medians, and the ratio of each round, first over second.
    """
    speeds: tuple[list[float], list[float]] = ([], [])
    for turn in range(rounds + 1):
        order = (0, 1) if turn % 2 else (1, 0)
        for which in order:
            started = time.perf_counter()
            tokens = (first, second)[which]()
            seconds = time.perf_counter() - started
            if turn:
                speeds[which].append(tokens / seconds)
    ratios = sorted(a / b for a, b in zip(*speeds, strict=True))
    return {
        "first_tokens_per_s": speeds[0],
        "second_tokens_per_s": speeds[1],
        "first_median": statistics.median(speeds[0]),
        "second_median": statistics.median(speeds[1]),
        "ratio": statistics.median(speeds[0]) / statistics.median(speeds[1]),
        "ratio_of_rounds": ratios,
    }


def measure(config: ThroughputConfig) -> dict[str, Any]:
    """Return the four comparisons."""
    from llmrl.rollout.transformers_engine import TransformersEngine
    from llmrl.rollout.vllm_engine import VllmEngine

    results: dict[str, Any] = {}
    with VllmEngine(config.model) as engine:
        prompts = [
            list(engine.tokenizer(f"The {word} of number {i}")["input_ids"]) for i, word in _words(config.requests)
        ]
        sampling = [
            SamplingConfig(temperature=1.0, max_tokens=config.max_tokens, seed=i) for i in range(config.requests)
        ]
        results["engine / bare vLLM"] = compare(
            lambda: _through_engine(engine, prompts, sampling), lambda: _bare(engine, prompts, sampling), config.rounds
        )
        results["one slow environment in sixteen"] = compare(
            lambda: _episodes(engine, config, slow=config.slow_seconds),
            lambda: _episodes(engine, config, slow=0.0),
            config.rounds,
        )
        long = [derived_prompt(engine, i) for i in range(33)]
        short = SamplingConfig(temperature=1.0, max_tokens=8, n=32, seed=0)
        results["shared prompt / separate prompts"] = compare(
            lambda: _count(_fresh(engine).generate(long[:1], short)),
            lambda: _count(_fresh(engine).generate(long[1:], replace(short, n=1))),
            config.rounds,
        )
        with TransformersEngine(config.model, batch_size=config.requests) as plain:
            results["vLLM / transformers"] = compare(
                lambda: _through_engine(engine, prompts, sampling),
                lambda: _count(plain.generate(prompts, sampling)),
                config.rounds,
            )
    return results


def _words(count: int) -> list[tuple[int, str]]:
    words = ("sea", "house", "river", "school", "music", "day", "friend", "town")
    return [(i, words[i % len(words)]) for i in range(count)]


def derived_prompt(engine: Any, i: int, length: int = 384) -> list[int]:
    """Return ids that share no beginning with those of another `i`."""
    text = " ".join(f"{(i * 7919 + k * 104729) % 9973}" for k in range(length))
    return list(engine.tokenizer(f"{i} {text}")["input_ids"])[:length]


def _fresh(engine: Any) -> Any:
    engine._llm.reset_prefix_cache()  # what an earlier round left there would be measured otherwise
    return engine


def _count(rows: Any) -> int:
    return sum(len(sample.token_ids) for row in rows for sample in row)


def _through_engine(engine: Any, prompts: list[list[int]], sampling: list[SamplingConfig]) -> int:
    return _count(_fresh(engine).generate(prompts, sampling))


def _bare(engine: Any, prompts: list[list[int]], sampling: list[SamplingConfig]) -> int:
    """Use vLLM as its users do: `LLM.generate` with ids in, ids, logprobs and text out; same seeds and end tokens."""
    from vllm import SamplingParams, TokensPrompt

    llm = _fresh(engine)._llm
    params = [
        SamplingParams(
            temperature=one.temperature,
            max_tokens=one.max_tokens,
            seed=one.seed,
            logprobs=0,
            stop_token_ids=sorted(engine.end_ids),
            ignore_eos=True,
        )
        for one in sampling
    ]
    outputs = llm.generate([TokensPrompt(prompt_token_ids=ids) for ids in prompts], params, use_tqdm=False)
    return sum(len(output.outputs[0].token_ids) for output in outputs)


def _episodes(engine: Any, config: ThroughputConfig, *, slow: float) -> int:
    from llmrl.rollout.episodes import run_episodes

    rows = [{"id": str(i), "seconds": slow if i % 16 == 7 else 0.0} for i in range(2 * config.requests)]
    _fresh(engine)
    with tempfile.TemporaryDirectory(prefix="llmrl-bench-") as output:
        summary = run_episodes(
            engine,
            rows,
            lambda row, seed: Chat(row),
            SamplingConfig(temperature=1.0, max_tokens=config.max_tokens // 2),
            output=output,
            concurrency=64,
            progress=False,
        )
    return summary.sampled_tokens


def plot(results: dict[str, Any], path: Path) -> None:
    """Draw the ratio of every round and the medians."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    targets = {"engine / bare vLLM": 0.97, "one slow environment in sixteen": 0.9}
    figure, axes = pyplot.subplots(figsize=(8, 3.6))
    for row, (name, result) in enumerate(results.items()):
        ratios = result["ratio_of_rounds"]
        axes.plot(ratios, [row] * len(ratios), "o", color="tab:blue", alpha=0.35, markersize=5)
        axes.plot([result["ratio"]], [row], "|", color="black", markersize=22, markeredgewidth=2.5)
        axes.annotate(
            f"{result['ratio']:.2f}", (result["ratio"], row), (0, 13), textcoords="offset points", ha="center"
        )
        if name in targets:
            axes.plot([targets[name]], [row], "|", color="tab:red", markersize=22, markeredgewidth=2)
    axes.axvline(1.0, color="grey", linewidth=0.8)
    axes.set_xscale("log")
    axes.set_yticks(range(len(results)), list(results))
    axes.set_ylim(-0.6, len(results) - 0.3)
    axes.set_xticks([0.8, 1, 1.5, 2, 3, 5, 8], ["0.8", "1", "1.5", "2", "3", "5", "8"])
    axes.minorticks_off()
    axes.set_xlabel("ratio of tokens/s (dots: rounds; black: of the medians; red: target)")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main(argv: list[str]) -> int:
    """Measure, print a table, write JSON and plot; return the exit code."""
    config = parse_config(
        ThroughputConfig, argv, prog="evals/rollout_throughput.py", description="speed of the rollout engine, as ratios"
    )
    from llmrl.commands import quiet_libraries
    from llmrl.files import write_json
    from llmrl.training.run import environment

    quiet_libraries(config.quiet)
    results = measure(config)
    output = Path(config.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    write_json(
        output / "rollout-throughput.json",
        {"options": {**to_flat(config), "output_dir": None}, "results": results, "environment": environment()},
    )
    plot(results, output / "rollout-throughput.png")
    if not config.quiet:
        for name, result in results.items():
            first, second = result["first_median"], result["second_median"]
            print(f"{name:<34} {result['ratio']:6.3f}   ({first:,.0f} against {second:,.0f} tokens/s)")
        print(f"wrote {output / 'rollout-throughput.json'}")
    return EXIT_DONE


if __name__ == "__main__":
    sys.exit(run_command(lambda: main(sys.argv[1:])))
