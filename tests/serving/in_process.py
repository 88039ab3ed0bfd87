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
# a step takes fewer tokens than a prompt has; prefixes are kept in blocks of 32
PAGED = SMALL | {"block_size": 32, "max_num_batched_tokens": 24, "enable_prefix_caching": True}


def outputs_of(llm, prompts, new_tokens, **options):
    sampling = SamplingParams(temperature=0.0, max_tokens=new_tokens, ignore_eos=True, **options)
    return llm.generate([TokensPrompt(prompt_token_ids=ids) for ids in prompts], sampling, use_tqdm=False)


def generate(llm, prompts, new_tokens, prompt_logprobs=0):
    outputs = outputs_of(llm, prompts, new_tokens, prompt_logprobs=prompt_logprobs, logprobs=0)
    return [
        {
            "ids": list(o.outputs[0].token_ids),
            "prompt_logprobs": [
                s[t].logprob for t, s in zip(ids[1:], (o.prompt_logprobs or [])[1:], strict=prompt_logprobs is not None)
            ],
            "logprobs": [s[t].logprob for t, s in zip(o.outputs[0].token_ids, o.outputs[0].logprobs, strict=True)],
            "cached": o.num_cached_tokens,
        }
        for ids, o in zip(prompts, outputs, strict=True)
    ]


def parity(task):
    llm = LLM(task["folder"], **SMALL)
    answers = generate(llm, task["prompts"], task["new_tokens"])
    return {"answers": answers, "attention": [*llm.llm_engine.vllm_config.compilation_config.static_forward_context]}


def steered(task):
    """The distribution of the next token after each prompt, `[choices, prompts, V]`, with beta and support chosen at load."""
    found = []
    for beta, support in task["choices"]:
        overrides = {"llmrl_beta": beta, "llmrl_support": support}
        llm = LLM(task["folder"], hf_overrides=overrides, max_logprobs=512, **SMALL)
        outputs = outputs_of(llm, task["prompts"], 1, logprobs=512)
        tokens = [o.outputs[0].logprobs[0] for o in outputs]
        found.append([[row[t].logprob if t in row else None for t in range(512)] for row in tokens])
        found[-1] = [[None if p is None or p == float("-inf") else p for p in row] for row in found[-1]]
        del llm
        gc.collect()
    return found


def paging(task):
    """Prompts in chunks, out of the prefix cache, and with too few blocks for all of them; every step as scheduled."""
    llm = LLM(task["folder"], num_gpu_blocks_override=task["blocks"], **PAGED)
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    long, branch, *_ = task["prompts"]
    answers, steps = {}, []

    def run(name, prompts, **options):
        with patch.object(scheduler, "schedule", recorded(scheduler.schedule, steps)):
            found = generate(llm, prompts, task["new_tokens"], **options)
        scheduled = [list(step.num_scheduled_tokens.values()) for step in steps]
        preempted = sum(len(step.preempted_req_ids or ()) for step in steps)
        answers[name] = {"answers": found, "scheduled": scheduled, "preempted": preempted}
        steps.clear()

    run("chunked", [long])
    llm.reset_prefix_cache()
    # a request for prompt logprobs does not read the prefix cache
    run("first", [long], prompt_logprobs=None)
    run("again", [long], prompt_logprobs=None)
    run("branch", [branch], prompt_logprobs=None)
    llm.reset_prefix_cache()
    run("crowded", task["prompts"])
    llm.reset_prefix_cache()
    run("crowded_without_prompt_logprobs", task["prompts"], prompt_logprobs=None)
    return answers


def recorded(function, results):
    def record(*args, **kwargs):
        results.append(function(*args, **kwargs))
        return results[-1]

    return record


def bfloat16(task):
    """Answers, and of each prompt: the base's last hidden states and tau of the new tokens, as the logprobs show it."""
    llm = LLM(task["folder"], **PAGED | {"dtype": "bfloat16"})
    model = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner.model
    answers = {"answers": generate(llm, task["prompts"], task["new_tokens"]), "hidden": [], "tau": []}
    for ids in task["prompts"]:
        hidden, logits = [], []
        llm.reset_prefix_cache()
        with (
            patch.object(model.model, "forward", recorded(model.model.forward, hidden)),
            patch.object(model.logits_processor, "forward", recorded(model.logits_processor.forward, logits)),
        ):
            (output,) = outputs_of(llm, [ids], task["new_tokens"], logprobs=20)
        of_new_tokens = zip(logits[-task["new_tokens"] :], output.outputs[0].logprobs, strict=True)
        answers["tau"].append([log_scale(row[0], found) for row, found in of_new_tokens])
        answers["hidden"].append(torch.cat(hidden).tolist())
    return answers


def routes(task):
    """The gates `[T, E]` of each prompt in bfloat16, as the first step leaves them in the buffer that all layers read."""
    llm = LLM(task["folder"], **SMALL | {"dtype": "bfloat16"})
    model = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner.model
    methods = (getattr(module, "quant_method", None) for module in model.modules())
    gates = next(method.gates for method in methods if hasattr(method, "gates"))
    answers = []
    for ids in task["prompts"]:
        llm.reset_prefix_cache()
        outputs_of(llm, [ids], 1)
        answers.append(gates[: len(ids), : task["experts"]].tolist())
    return answers


def log_scale(logits, found):
    """Return log of what the base's logits were multiplied by, from the two farthest of vLLM's top logprobs."""
    low, *_, high = sorted(found, key=lambda token: found[token].logprob)
    return ((found[high].logprob - found[low].logprob) / (logits[high].float() - logits[low].float())).log().item()


def reward(task):
    llm = LLM(task["folder"], runner="pooling", **SMALL)
    outputs = llm.classify([TokensPrompt(prompt_token_ids=ids) for ids in task["prompts"]], use_tqdm=False)
    return [list(output.outputs.probs) for output in outputs]


def ensemble(task):
    """Scores of a reward ensemble behind our client; what classification gives when it is asked for nothing in particular."""
    from llmrl.hyre.served import ServedEnsemble
    from llmrl.rollout.vllm_rewards import VllmRewards

    client = VllmRewards(task["folder"], kv_cache_memory_bytes=64 << 20, max_model_len=256, max_num_seqs=8)
    served = ServedEnsemble(client, task["folder"])
    prompts = [tuple(map(tuple, prompt)) for prompt in task["prompts"]]
    texts = [served.text(prompt, answer) for prompt, answer in zip(prompts, task["answers"], strict=True)]
    plain = client._llm.classify(texts, use_tqdm=False)
    answer = {"scores": served.scores(prompts, task["answers"]).tolist(), "plain": [o.outputs.probs for o in plain]}
    client.close()
    return answer


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
