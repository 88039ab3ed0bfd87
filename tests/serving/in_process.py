"""Everything that needs vLLM inside a process, in one process of its own: JSON tasks in, JSON answers out.

A task that fails answers with its error, so that one failure does not hide the others.
"""

import gc
import json
import sys
import traceback
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import torch
from safetensors.torch import load_file
from vllm import LLM, ModelRegistry, SamplingParams, TokensPrompt
from vllm.model_executor.models import registry

# an inspection subprocess an architecture costs five seconds; the HTTP tests go through the real one
registry._run_in_subprocess = lambda function: function()

SMALL = {
    "dtype": "float32",
    "enforce_eager": True,
    "kv_cache_memory_bytes": 64 << 20,
    "max_model_len": 128,
    "max_num_seqs": 8,
    "disable_log_stats": True,
}


def generate(llm, prompts, new_tokens):
    sampling = SamplingParams(temperature=0.0, max_tokens=new_tokens, prompt_logprobs=0, logprobs=0, ignore_eos=True)
    outputs = llm.generate([TokensPrompt(prompt_token_ids=ids) for ids in prompts], sampling, use_tqdm=False)
    return [
        {
            "ids": list(o.outputs[0].token_ids),
            "prompt_logprobs": [s[t].logprob for t, s in zip(ids[1:], o.prompt_logprobs[1:], strict=True)],
            "logprobs": [s[t].logprob for t, s in zip(o.outputs[0].token_ids, o.outputs[0].logprobs, strict=True)],
        }
        for ids, o in zip(prompts, outputs, strict=True)
    ]


def parity(task):
    llm = LLM(task["folder"], **SMALL)
    answers = generate(llm, task["prompts"], task["new_tokens"])
    return {"answers": answers, "attention": [*llm.llm_engine.vllm_config.compilation_config.static_forward_context]}


def reward(task):
    llm = LLM(task["folder"], runner="pooling", **SMALL)
    outputs = llm.classify([TokensPrompt(prompt_token_ids=ids) for ids in task["prompts"]], use_tqdm=False)
    return [list(output.outputs.probs) for output in outputs]


def speculative(task):
    settings = {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 2}
    LLM(task["folder"], speculative_config=settings, **SMALL)
    return "started"


def reload(task):
    """Weights pushed into a running engine: all of them with another head; the base alone; from disk again."""
    llm = LLM(task["folder"], **SMALL)
    base = load_file(task["base"] + "/model.safetensors")
    answers = {"start": generate(llm, task["prompts"], task["new_tokens"])}

    def push(name, **kwargs):
        with torch.no_grad():
            llm.collective_rpc("reload_weights", kwargs=kwargs)
        llm.reset_prefix_cache()
        answers[name] = generate(llm, task["prompts"], task["new_tokens"])

    push("new_head", weights_iterator=iter((base | load_file(task["new_head"])).items()))
    push("base_alone", weights_iterator=iter(base.items()))
    push("from_disk")
    return answers


def classes(task):
    """What the generated class does where one CPU process cannot go: ranks without logits, sharded sampling."""
    import llmrl.serving.models as models
    from llmrl.heads import HeadSpec, build_head

    made = models.LlmrlLlamaForCausalLM
    base = made.__mro__[2]
    model = made.__new__(made)
    torch.nn.Module.__init__(model)
    head = build_head(HeadSpec("temperature", "scalar", 4))
    with torch.no_grad():
        head.bias.fill_(0.5)
    model.llmrl_heads = torch.nn.ModuleDict({"temperature": head})
    model._sequence = models._SequenceHeads(torch.nn.ModuleDict(), None, "")
    hidden, logits = torch.zeros(2, 4), torch.ones(2, 3)
    answers = {"base": base.__name__, "name": made.__name__, "same_class": made is models.LlmrlLlamaForCausalLM}
    for method in ("compute_logits", "compute_logits_local"):
        with patch.object(base, method, lambda self, hidden: logits):
            answers[method] = float(getattr(model, method)(hidden)[0, 0])
    with patch.object(base, "compute_logits", lambda self, hidden: None):
        answers["no_logits"] = model.compute_logits(hidden)
    tau = torch.linspace(-3, 2.3, 1001)[:, None]
    packed = {dtype: models.pack_tau(tau, dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16)}
    answers["pack_columns"] = {str(d): [str(p.dtype), list(p.shape)] for d, p in packed.items()}
    answers["pack_error"] = max(float((models.unpack_tau(p) - tau).abs().max()) for p in packed.values())
    block = HeadSpec("temperature", "transformer", 4, 1, 4, 2, 1, 32)
    config = SimpleNamespace(parallel_config=SimpleNamespace(tensor_parallel_size=2))
    try:
        models._SequenceHeads(torch.nn.ModuleDict({"temperature": build_head(block)}), config, "")
    except ValueError as error:
        answers["two_gpus"] = str(error)
    vector = build_head(HeadSpec("vector", "vector", 4, 6))  # 6 entries, of which this rank holds 3
    model.llmrl_heads = torch.nn.ModuleDict({"vector": vector})
    try:
        with patch.object(base, "compute_logits_local", lambda self, hidden: logits):
            model.compute_logits_local(hidden)
    except ValueError as error:
        answers["part_of_the_vocabulary"] = str(error)
    with_local = [n for n in task["architectures"] if hasattr(ModelRegistry.models[n].load_model_cls(), method)]
    answers["without_local_override"] = [n for n in with_local if method not in vars(getattr(models, "Llmrl" + n))]
    answers["with_local"] = with_local
    return answers


def main():
    tasks = json.loads(Path(sys.argv[1]).read_text())
    answers = {}
    for name, task in tasks.items():
        try:
            answers[name] = {"answer": globals()[task["kind"]](task)}
        except Exception as error:
            answers[name] = {"error": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()}
        gc.collect()
        Path(sys.argv[2]).write_text(json.dumps(answers))


if __name__ == "__main__":
    main()
