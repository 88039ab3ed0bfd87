"""The options of `llmrl rollout`, one dataclass for the command and Python."""

from __future__ import annotations

from dataclasses import dataclass

from llmrl.config import option
from llmrl.errors import ConfigError, UsageError
from llmrl.types import SamplingConfig

BACKENDS = ("auto", "transformers", "vllm", "server")
DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass
class RolloutConfig:
    """Options of `llmrl rollout`."""

    model: str | None = option(None, help="a folder, or a hub name; with server_url it gives the tokenizer")
    prompts: str | None = option(None, help="JSONL file with 'prompt' or 'messages', and optionally 'id', in each row")
    output: str | None = option(None, help="JSONL file to write; unfinished work lies beside it as .NAME.run")
    rollout_backend: str = option("auto", choices=BACKENDS, help="auto takes vLLM where it can be used")
    server_url: list[str] = option([], help="vLLM servers by URL, for the server backend")
    n: int = option(1, help="samples a prompt")
    temperature: float = option(1.0, help="0 is greedy")
    top_p: float = option(1.0, help="1 is off")
    top_k: int = option(0, help="0 is off")
    min_p: float = option(0.0, help="0 is off")
    max_tokens: int = option(256, help="most tokens of an answer")
    stop: list[str] = option(
        [], verbatim=True, help="texts that end an answer and are left out of it, each a word: --stop , END $'\\n'"
    )
    logprobs: int = option(0, help="alternatives reported beside each sampled token")
    json_schema: str | None = option(None, help="file with a JSON schema that every answer follows (vllm and server)")
    adapter: str | None = option(None, help="folder of a PEFT LoRA adapter")
    dtype: str = option("auto", choices=DTYPES, help="auto is float32 on a CPU, else as stored")
    max_model_len: int | None = option(None, help="most tokens of prompt and answer (default: the model's context)")
    batch_size: int = option(32, help="requests decoded together by the transformers backend")
    seed: int = option(0, help="of the run; each sample's own seed is a hash of it, the row's id and the sample")
    overwrite: bool = option(False, help="replace --output and start anew")
    quiet: bool = option(False, help="print errors only")

    def __post_init__(self) -> None:
        for name, what in (
            ("model", "a folder, or a hub name"),
            ("prompts", "a JSONL file with 'prompt' or 'messages'"),
            ("output", "the JSONL file to write"),
        ):
            if getattr(self, name) is None:
                raise UsageError(f"missing --{name}: {what}")
        if self.server_url and self.rollout_backend not in ("auto", "server"):
            raise UsageError(f"--server_url goes with --rollout_backend server, not with {self.rollout_backend}")
        if self.rollout_backend == "server" and not self.server_url:
            raise UsageError("missing --server_url: where the servers are, e.g. http://127.0.0.1:8000")
        if self.server_url and self.dtype != "auto":
            raise UsageError(f"--dtype {self.dtype} with --server_url: a server has its own dtype; leave --dtype out")
        if self.batch_size < 1:
            raise UsageError(f"--batch_size must be at least 1, got {self.batch_size}")
        if self.max_model_len is not None and self.max_model_len < 2:
            raise UsageError(f"--max_model_len must be at least 2, got {self.max_model_len}")
        if self.seed < 0:
            raise UsageError(f"--seed must not be negative, got {self.seed}")
        self.sampling()

    def sampling(self) -> SamplingConfig:
        """Return how each sample is drawn; one request is one sample, with a seed of its own."""
        if self.n < 1:
            raise UsageError(f"--n must be at least 1, got {self.n}")
        try:
            return SamplingConfig(
                temperature=self.temperature,
                top_p=self.top_p,
                top_k=self.top_k,
                min_p=self.min_p,
                max_tokens=self.max_tokens,
                stop=tuple(self.stop),
                logprobs=self.logprobs,
            )
        except ConfigError as error:  # the caller gave options, not fields of a record
            raise ConfigError(str(error).replace("SamplingConfig.", "--")) from None
