"""What tests of folders with heads share: loading, logits, and the multiplier of a linear head by hand."""

import json

import torch
from transformers import AutoModelForCausalLM

IDS = torch.randint(3, 500, (2, 14), generator=torch.Generator().manual_seed(1))


def load(folder, **kwargs):
    return AutoModelForCausalLM.from_pretrained(folder, **kwargs).eval()


def bare(folder, **kwargs):
    """The base, attending as its heads' model does: eagerly where attention logits are capped."""
    capped = json.loads((folder / "config.json").read_text()).get("attn_logit_softcapping")
    return load(folder, **({"attn_implementation": "eager"} if capped else {}), **kwargs)


def logits_of(model, ids=IDS, **kwargs):
    with torch.inference_mode():
        return model(input_ids=ids, **kwargs).logits


def multiplier(base, head, ids=IDS, **kwargs):
    """exp(clip(w.h + b)) in float64 from the base's own last hidden states."""
    with torch.inference_mode():
        hidden = base(input_ids=ids, output_hidden_states=True, **kwargs).hidden_states[-1].double()
    tau = hidden @ head.weight[0].double() + head.bias.double()
    return tau.clamp(-3.0, 2.302585092994046).exp()[..., None]
