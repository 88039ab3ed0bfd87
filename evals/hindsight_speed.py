"""What values cost beside supervised training: `python evals/hindsight_speed.py --output_dir evals/results`.

One model of random weights with a vocabulary of 150,000, one batch of made-up dialogues; steps of cloning and of ILQL (shared
trunk, low-rank heads) alternate, so that both meet the same machine. Memory is that of weights, gradients, AdamW's states and
slow copies.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from llmrl.config import option, parse_config
from llmrl.errors import EXIT_DONE, UsageError, run_command
from llmrl.files import write_json
from llmrl.heads import HeadSpec
from llmrl.hindsight.batches import DialogueCollator, examples_of
from llmrl.hindsight.encode import Encoded
from llmrl.hindsight.model import DialogueModel
from llmrl.hindsight.objective import Objective, sums_of
from llmrl.hindsight.targets import Span
from llmrl.training.run import environment
from llmrl.value_heads import ValueHead, initialise_values


@dataclass
class SpeedConfig:
    """Options of the measurement."""

    output_dir: str | None = option(None, help="where hindsight-speed.json goes")
    vocabulary: int = option(150_000, help="tokens")
    width: int = option(896, help="of the model")
    layers: int = option(12, help="of the model")
    rank: int = option(64, help="of the value heads")
    length: int = option(256, help="tokens of a dialogue, a half of them the agent's")
    batch: int = option(4, help="dialogues a step")
    repetitions: int = option(9, help="steps of each")


def main(argv: list[str]) -> int:
    """Measure and write."""
    config = parse_config(SpeedConfig, argv, prog="evals/hindsight_speed.py", description=str(__doc__).splitlines()[0])
    if config.output_dir is None:
        raise UsageError("missing --output_dir")
    cases = {name: Case(config, name) for name in ("bc", "ilql")}
    times: dict[str, list[float]] = {name: [] for name in cases}
    for case in cases.values():
        case.step()  # makes the optimizer's states
    for _ in range(config.repetitions):
        for name, case in cases.items():
            begun = time.perf_counter()
            case.step()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            times[name].append(time.perf_counter() - begun)
    ratios = np.array(times["ilql"]) / np.array(times["bc"])
    memory = {name: case.memory() for name, case in cases.items()}
    found: dict[str, Any] = {
        "environment": environment(),
        "threads": torch.get_num_threads(),
        **{key: value for key, value in vars(config).items() if key != "output_dir"},
        "parameters": cases["bc"].size,
        "seconds": {name: float(np.median(of)) for name, of in times.items()},
        "ratio": {"median": float(np.median(ratios)), "least": float(ratios.min()), "most": float(ratios.max())},
        "bytes": memory,
        "memory_ratio": memory["ilql"] / memory["bc"],
    }
    folder = Path(config.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "hindsight-speed.json", found)
    print(
        f"a step costs {found['ratio']['median']:.2f} times, memory {found['memory_ratio']:.3f} times that of cloning"
    )
    return EXIT_DONE


class Case:
    """One method on one model and batch."""

    def __init__(self, config: SpeedConfig, method: str) -> None:
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.manual_seed(0)
        policy = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=config.vocabulary, hidden_size=config.width, intermediate_size=4 * config.width,
                num_hidden_layers=config.layers, num_attention_heads=8, num_key_value_heads=8, tie_word_embeddings=True,
            )
        )  # fmt: skip
        self.size = sum(p.numel() for p in policy.parameters())
        head = None
        if method == "ilql":
            head = ValueHead(HeadSpec("value", "low_rank", config.width, config.vocabulary, config.rank))
            initialise_values(head, torch.Generator().manual_seed(0))
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model = DialogueModel(policy, head).to(device)
        self.objective = Objective(method)
        self.optimizer = torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad], lr=1e-5)
        draw = torch.Generator().manual_seed(1)
        quarter = config.length // 4
        spans = (Span(quarter, 2 * quarter, 0.0), Span(3 * quarter, 4 * quarter - 1, 1.0))
        rows = [
            Encoded(
                str(i),
                tuple(torch.randint(config.vocabulary, (config.length,), generator=draw).tolist()),
                spans,
                True,
                1.0,
            )
            for i in range(config.batch)
        ]
        batch = DialogueCollator()(examples_of(rows, "turn", 1.0, "turn"))
        self.batch = {key: value.to(device) for key, value in batch.items()}

    def step(self) -> None:
        """Take one update."""
        self.optimizer.zero_grad()
        found = sums_of(self.model, self.model, self.batch, self.objective)
        (
            (found.policy + found.q) / len(self.batch["position"]) + found.v / len(self.batch["value_position"])
        ).backward()
        self.optimizer.step()
        self.model.move_target(0.1)

    def memory(self) -> int:
        """Return bytes of weights, gradients, optimizer states and slow copies."""
        held = list(self.model.parameters())
        held += [p.grad for p in held if p.grad is not None]
        held += [v for state in self.optimizer.state.values() for v in state.values() if torch.is_tensor(v)]
        return sum(tensor.numel() * tensor.element_size() for tensor in held)


if __name__ == "__main__":
    sys.exit(run_command(lambda: main(sys.argv[1:])))
