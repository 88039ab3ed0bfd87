"""What a temperature head costs in vLLM: tokens/s with it over tokens/s of the plain model, measured in one run.

    python evals/head_throughput.py --output_dir evals/results

One engine for the plain model and one for each kind of head, in one process, on the same seeded requests; they take turns, in
an order that rotates, so that a busy machine slows all of them. Medians over the rounds. The heads are not fitted: their speed
does not depend on their numbers.
"""

from __future__ import annotations

import contextlib
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmrl.config import option, parse_config, to_flat
from llmrl.errors import EXIT_DONE, UsageError, run_command
from llmrl.types import SamplingConfig

PLAIN = "plain"
HEADS = ("linear", "mlp", "transformer")


@dataclass
class HeadThroughputConfig:
    """Options of the bench."""

    model: str = option("examples/tiny_lm", help="a folder, or a hub name")
    output_dir: str = option("evals/results", help="where head-throughput.json and .png go")
    rounds: int = option(9, help="times that each is measured, after one that is not counted")
    requests: int = option(64, help="requests of a measurement")
    prompt_tokens: int = option(64, help="tokens of a prompt")
    max_tokens: int = option(64, help="tokens of an answer")
    quiet: bool = option(False, help="print errors only")

    def __post_init__(self) -> None:
        if self.rounds < 3 or self.requests < 1 or self.prompt_tokens < 2 or self.max_tokens < 1:
            raise UsageError("expected at least 3 rounds, 1 request, 2 tokens of prompt and 1 of answer")


def write_heads(model: str, folder: Path) -> dict[str, Path]:
    """Write one folder a kind of head, sized by the model's configuration; return them by name, the plain model first."""
    import torch
    from torch import nn

    from llmrl.ats.head_spec import spec_for
    from llmrl.base_model import load_base
    from llmrl.heads import HeadsConfig, build_head
    from llmrl.logits_heads import initialise
    from llmrl.modeling import save_heads_folder

    base = load_base(model, device="cpu")
    folders = {PLAIN: base.folder}
    for kind in HEADS:
        spec = spec_for(base.model.config, kind)
        head = build_head(spec)
        initialise(head, torch.Generator().manual_seed(0))
        described = HeadsConfig(
            {"temperature": spec}, base.reference, base.model.config.model_type, base.architecture, method=f"ats-{kind}"
        )
        folders[kind] = folder / kind
        folders[kind].mkdir()
        heads = nn.ModuleDict({"temperature": head})
        save_heads_folder(folders[kind], heads, described, base.tokenizer, base.folder)
    return folders


def measure(config: HeadThroughputConfig, folders: dict[str, Path]) -> dict[str, Any]:
    """Return tokens/s of every round and their ratio to the plain model's, by kind of head."""
    from llmrl.rollout.vllm_engine import VllmEngine

    speeds: dict[str, list[float]] = {name: [] for name in folders}
    with contextlib.ExitStack() as stack:
        engines = {name: stack.enter_context(VllmEngine(str(folder))) for name, folder in folders.items()}
        vocabulary = engines[PLAIN].vocab_size
        prompts = [
            [(i * 7919 + k * 104729) % (vocabulary - 16) + 16 for k in range(config.prompt_tokens)]
            for i in range(config.requests)
        ]
        sampling = [
            SamplingConfig(temperature=1.0, max_tokens=config.max_tokens, seed=i) for i in range(config.requests)
        ]
        names = list(engines)
        for turn in range(config.rounds + 1):
            for name in names[turn % len(names) :] + names[: turn % len(names)]:
                engines[name]._llm.reset_prefix_cache()
                started = time.perf_counter()
                rows = engines[name].generate(prompts, sampling)
                tokens = sum(len(sample.token_ids) for row in rows for sample in row)
                if turn:
                    speeds[name].append(tokens / (time.perf_counter() - started))
    plain = statistics.median(speeds[PLAIN])
    return {
        name: {
            "tokens_per_s": values,
            "median": statistics.median(values),
            "ratio": statistics.median(values) / plain,
            "ratio_of_rounds": [a / b for a, b in zip(values, speeds[PLAIN], strict=True)],
        }
        for name, values in speeds.items()
    }


def plot(results: dict[str, Any], path: Path) -> None:
    """Draw the ratio of every round and the medians."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 2.8))
    names = [name for name in results if name != PLAIN]
    for row, name in enumerate(names):
        ratios = results[name]["ratio_of_rounds"]
        axes.plot(ratios, [row] * len(ratios), "o", color="tab:blue", alpha=0.35, markersize=5)
        axes.plot([results[name]["ratio"]], [row], "|", color="black", markersize=20, markeredgewidth=2.5)
        axes.annotate(
            f"{results[name]['ratio']:.3f}",
            (results[name]["ratio"], row),
            (0, 12),
            textcoords="offset points",
            ha="center",
        )
    axes.axvline(1.0, color="grey", linewidth=0.8)
    axes.set_yticks(range(len(names)), [f"{name} head" for name in names])
    axes.set_ylim(-0.6, len(names) - 0.3)
    axes.set_xlabel("tokens/s over the plain model's (dots: rounds; black: of the medians)")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main(argv: list[str]) -> int:
    """Measure, print a table, write JSON and plot; return the exit code."""
    config = parse_config(
        HeadThroughputConfig, argv, prog="evals/head_throughput.py", description="what a temperature head costs in vLLM"
    )
    from llmrl.commands import quiet_libraries
    from llmrl.files import write_json
    from llmrl.training.run import environment

    quiet_libraries(config.quiet)
    with tempfile.TemporaryDirectory(prefix="llmrl-heads-") as scratch:
        results = measure(config, write_heads(config.model, Path(scratch)))
    output = Path(config.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    write_json(
        output / "head-throughput.json",
        {"options": {**to_flat(config), "output_dir": None}, "results": results, "environment": environment()},
    )
    plot(results, output / "head-throughput.png")
    if not config.quiet:
        for name, result in results.items():
            print(f"{name:<12} {result['median']:10,.0f} tokens/s   {result['ratio']:.3f} of the plain model")
        print(f"wrote {output / 'head-throughput.json'}")
    return EXIT_DONE


if __name__ == "__main__":
    sys.exit(run_command(lambda: main(sys.argv[1:])))
