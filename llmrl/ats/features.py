"""What a head is fitted on, computed once: hidden states, and the log-sum-exp curve that replaces the logits.

For each scored token the base model gives the hidden state h that enters the output embedding and a row of logits z. Kept
are h, how far the largest logit m lies above the target's and above their mean, whether the target has it, and the curve
of `llmrl_kernels.lse_curve`: about 0.5 kB a token beside h, whatever the vocabulary. `llmrl.ats.extract` computes them.

The hidden states are by far the largest part, so there is one table of them, `states`, that every selection of tokens
shares, and each token knows its row. A head that reads whole windows finds the states of window w between `offsets[w]`
and `offsets[w + 1]`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, fields, replace

import torch
from torch import Tensor

from llmrl.ats.output_layer import LogitsChunk, OutputLayer, logits_chunks


@dataclass(frozen=True)
class TokenFeatures:
    """Per scored token, N in all, in the order of windows and text.

    Of several answer letters to choose from (`choice` >= 0), "vocabulary" means those letters: gaps, curve and `correct`
    are about the logits of these alone.

    Shapes:
        states: `[M, H]` in the model's dtype: of the scored tokens (M = N), or of every position of the windows that a
            scored token can see.
        offsets: `[W + 1]` int64, where each window's states begin; `[0]` if only those of scored tokens are kept.
        row: `[N]` int64, the state that predicts the token.
        window: `[N]` int64, the window the token stands in.
        target: `[N]` int64, its id.
        gap: `[N]` float32 >= 0, m - z_target.
        mean_gap: `[N]` float32, m minus the mean logit.
        top_gap: `[N]` float32, m minus the mean of the 5 largest logits.
        correct: `[N]` bool: the target has the largest logit, or, in a graded answer, the answer was graded right.
        graded: `[N]` bool: the token is part of a graded answer.
        choice: `[N]` int64, row of `choices`, -1 for the whole vocabulary.
        choices: `[C, K]` int64 token ids, filled up with -1.
        curve, slope: `[N, knots]` float32.
        question: `[W]` int64, of each window of the whole data set a number that graded answers to one question share; `[0]`
            where every window stands for itself.
        unscored: `[W]` int64, how many tokens of each window are predicted and do not count (the prompt's); `[0]` for none.
    """

    states: Tensor
    offsets: Tensor
    row: Tensor
    window: Tensor
    target: Tensor
    gap: Tensor
    mean_gap: Tensor
    top_gap: Tensor
    correct: Tensor
    graded: Tensor
    choice: Tensor
    choices: Tensor
    curve: Tensor
    slope: Tensor
    question: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.long))
    unscored: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.long))

    def __len__(self) -> int:
        return self.gap.shape[0]

    @property
    def hidden(self) -> Tensor:
        """The hidden state of each token, `[N, H]`, copied."""
        return self.states[self.row]

    @property
    def has_sequences(self) -> bool:
        """Whether the states of whole windows are there."""
        return len(self.offsets) > 0

    @property
    def confidence_gap(self) -> Tensor:
        """m minus the logit of the token whose probability is the confidence, `[N]`: the likeliest, or the one said."""
        return torch.where(self.graded, self.gap, 0.0)

    def select(self, keep: Tensor) -> TokenFeatures:
        """Return the tokens at the indices (or where the mask) `keep`; the states stay where they are."""
        return replace(self, **{name: getattr(self, name)[keep] for name in PER_TOKEN})

    def of_windows(self, windows: list[int]) -> TokenFeatures:
        """Return the tokens of the given windows."""
        return self.select(torch.isin(self.window, torch.tensor(windows)))

    def logits(self, layer: OutputLayer, tokens: Tensor | None = None) -> Iterator[LogitsChunk]:
        """Yield the logits of the tokens at the indices `tokens` (None: of all), recomputed a chunk at a time."""
        part = self if tokens is None else self.select(tokens)
        yield from logits_chunks(layer, part.states, part.row, part.target, part.choice, part.choices)


_SHARED = ("states", "offsets", "choices", "question", "unscored")
PER_TOKEN = tuple(f.name for f in fields(TokenFeatures) if f.name not in _SHARED)


def exact_lse(layer: OutputLayer, features: TokenFeatures, log_scales: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return L(s) of every token from its logits, not from the curve, for several methods in one sweep.

    Args:
        layer: the base's output layer.
        features: N tokens.
        log_scales: name -> `[N]` log s.

    Returns:
        name -> `[N]` float32 L(s) = log sum_i exp(s (z_i - max z)).
    """
    results = {name: torch.empty(len(features)) for name in log_scales}
    with torch.inference_mode():
        for chunk in features.logits(layer):
            z = chunk.logits - chunk.logits.amax(-1, keepdim=True)
            for name, log_scale in log_scales.items():
                scale = log_scale[chunk.tokens].exp().to(z.device)[:, None]
                results[name][chunk.tokens] = (z * scale).logsumexp(-1).cpu()
    return results
