"""The model of recipes/leret_policy.py: a stock decoder whose first weights can already copy.

A small transformer learns to copy late, and to copy some words and skip others later still. Here the weights begin as the
circuits for both instead of noise; the architecture is untouched and everything is trained. The residual stream has parts:

    name     64  the token, a random direction
    before   35  the two tokens before it: P name(t-1) + .8 M P name(t-2), M orthogonal
    start    32  first token of its word
    kept     32  first token of the last word before it that counts
    out      64  what is read by the output matrix, which holds the same directions as `name`
    free     29  flags, see FLAGS

Words that count are the capitalised words of a text that have not occurred before, and words of a question that are neither
function words nor in a title.

Layer 0  Biases on the fast pairs of RoPE make two heads look 1 and 2 tokens back whatever stands there: `before`. One looks
         at the last mark ("Question:", "[2]", "|", an instruction), which tells the part of the prompt; one at the same token
         anywhere before. The MLP finds words that count.
Layer 1  Two heads look for the token, and for the one before, in a title; one at the first token of the word; one carries on
         that the token before counts. The MLP takes away what is in a title.
Layer 2  Two induction heads (Olsson et al. 2022): keys are `before`, queries the same of the next token, on the slow pairs of
         RoPE, which hardly turn within a prompt. They find what followed the same tokens and write it to `out`. A third head
         looks at the last word that counts: `kept`. The fourth looks at the last mark other than "|".
Layer 3  Two heads with keys `kept` and queries `start`: the word that counts after the one just written.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from llmrl.leret.rules import FUNCTION_WORDS

if TYPE_CHECKING:
    from torch import Tensor

HEADS = 4
ROPE_THETA = 1e8
WIDTHS = {"name": 64, "before": 35, "start": 32, "kept": 32, "out": 64, "free": 29}
LEXICAL_FLAGS = ("word", "capital", "function", "mark", "part", "title", "text", "question", "first", "one", "plain")
FLAGS = (*LEXICAL_FLAGS, "new", "counts", "counts before", "covered", "covered before", "target", "after", "starts")
_WRITTEN = 62  # dimensions of `name` that are copied to `out`
_FAST, _SLOW = 8, 11  # pairs below _FAST tell neighbours apart; pairs from _SLOW on turn by less than 1/2 in 300 tokens


def build_model(
    tokenizer: Any, marks: dict[str, list[int]], *, layers: int, inner: int, max_length: int, plain: bool = False
) -> Any:
    """Return a Qwen2ForCausalLM in float32.

    Args:
        tokenizer: its length is the vocabulary; its end and padding ids are recorded.
        marks: ids of the tokens that begin a part of the prompt: "first" (the prompt), "text", "title", "question",
            "style question" and "style text" (instructions, by where the query begins), "plain" (those that skip nothing).
        layers: at least 4 unless `plain`.
        inner: width of the MLP.
        max_length: longest prompt that is recorded as supported.
        plain: leave the usual random weights.
    """
    from transformers import Qwen2Config, Qwen2ForCausalLM

    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=len(tokenizer),
            hidden_size=sum(WIDTHS.values()),
            intermediate_size=inner,
            num_hidden_layers=layers,
            num_attention_heads=HEADS,
            num_key_value_heads=HEADS,
            max_position_embeddings=max_length,
            rope_parameters={"rope_type": "default", "rope_theta": ROPE_THETA},
            tie_word_embeddings=False,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    if not plain:
        _Circuit(model, tokenizer, marks).write()
    return model


def as_llama(model: Any) -> Any:
    """Return the same function as a LlamaForCausalLM with attention biases, that of the output projection zero.

    AutoTokenizer gives every folder of a Qwen2 its own normalizer and splits (transformers 5), and would break this one.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = model.config.to_dict()
    names = (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "rms_norm_eps",
    )
    names += ("num_key_value_heads", "max_position_embeddings", "rope_parameters", "tie_word_embeddings", "hidden_act")
    names += ("bos_token_id", "eos_token_id", "pad_token_id")
    llama = LlamaForCausalLM(LlamaConfig(**{name: config[name] for name in names}, attention_bias=True))
    with torch.no_grad():
        weights = dict(model.named_parameters())
        for name, parameter in llama.named_parameters():
            parameter.copy_(weights[name]) if name in weights else parameter.zero_()
    return llama


class _Circuit:
    """Writes the weights. Vectors have length 8 in `name` and about that elsewhere; a layer sees them at some 10."""

    def __init__(self, model: Any, tokenizer: Any, marks: dict[str, list[int]]) -> None:
        import torch

        self.model, self.tokenizer, self.marks = model, tokenizer, marks
        self.size = model.config.hidden_size // HEADS
        self.part, start = {}, 0
        for name, width in WIDTHS.items():
            self.part[name] = slice(start, start + width)
            start += width
        free = self.part["free"]
        self.flag = {name: free.stop - 1 - i for i, name in enumerate(FLAGS)}
        self.kinds = {"near": slice(free.start, free.start + 5), "far": slice(free.start + 5, free.stop - len(FLAGS))}
        self.frequency = ROPE_THETA ** (-torch.arange(0, self.size, 2) / self.size)
        half = self.size // 2
        # the slowest pair carries flags, the other slow ones what is compared
        self.flag_rows = (half - 1, self.size - 1)
        self.slow = [*range(_SLOW, half - 1), *range(half + _SLOW, self.size - 1)]
        self.turn = _orthogonal(35, 35)
        self.to_before, self.to_start = _orthogonal(35, 64), _orthogonal(32, 64)

    def write(self) -> None:
        """Overwrite embeddings and the heads named above; all else keeps its small random weights."""
        import torch

        with torch.no_grad():
            for layer in self.model.model.layers:
                layer.mlp.down_proj.weight.mul_(0.5)
                layer.self_attn.o_proj.weight.mul_(0.5)
                for name in FLAGS:  # flags begin clean
                    layer.mlp.down_proj.weight[self.flag[name]] = 0
                    layer.self_attn.o_proj.weight[self.flag[name]] = 0
            self._embeddings()
            for back in (1, 2):
                self._look_back(back)
            self._last_mark(0, 2, "mark", "near", ("title", "text", "question", "plain"))
            self._seen()
            self._counts()
            self._in_title(0, self._select(name=self.to_before), "covered")
            self._in_title(1, self._select(before=_eye(35)), "covered before")
            self._word_start()
            self._carry_on()
            self._not_covered()
            for head in (0, 1):
                self._induction(head)
                self._next_kept(head)
            self._last_kept()
            self._last_mark(2, 3, "part", "far", ())

    def _embeddings(self) -> None:
        import torch

        embed, out = self.model.model.embed_tokens.weight, self.model.lm_head.weight
        names = torch.randn(len(embed), WIDTHS["name"])
        names[:, _WRITTEN:] = 0
        names[self.marks["first"]] = _eye(WIDTHS["name"])[-1]  # heads rest on this one, so it must write nothing
        names = torch.nn.functional.normalize(names, dim=1)
        embed[:, self.part["free"]] = 0
        embed[:, self.part["name"]] = 8.0 * names
        out[:, self.part["out"]] = 1.5 * names
        for token in range(len(embed)):
            text = self.tokenizer.decode([token])
            word = text.strip()
            embed[token, self.flag["word"]] = 2.0 * text.startswith(" ")
            embed[token, self.flag["capital"]] = 2.0 * (text.startswith(" ") and word[:1].isupper())
            # a single letter is mostly the beginning of a longer word
            function = text.startswith(" ") and (len(word) > 1 or word == "a") and word.casefold() in FUNCTION_WORDS
            embed[token, self.flag["function"]] = 2.0 * function
            embed[token, self.flag["one"]] = 2.0
        for kind, ids in self.marks.items():
            if kind == "plain":
                continue
            embed[ids, self.flag["mark"]] = {"first": 0.0, "text": 4.4}.get(kind, 4.0)
            embed[ids, self.flag["part"]] = 4.0 * (kind not in ("first", "text"))
            if kind in self.flag:
                embed[ids, self.flag[kind]] = 2.0
            embed[ids, self.flag["word"]] = 2.0
        embed[self.marks["plain"], self.flag["plain"]] = 2.0
        # an answer begins where a question or a text begins
        begin = {"question": self.marks["question"][0], "text": self.marks["text"][0]}
        for kind, mark in begin.items():
            ids = self.marks[f"style {kind}"]
            embed[ids, self.part["name"]] = 0.7 * embed[ids, self.part["name"]] + 0.7 * embed[mark, self.part["name"]]

    def _head(self, layer: int, head: int) -> tuple[Any, slice]:
        attention = self.model.model.layers[layer].self_attn
        rows = slice(head * self.size, (head + 1) * self.size)
        for projection in (attention.q_proj, attention.k_proj, attention.v_proj):
            projection.weight[rows] *= 0.3
            projection.bias[rows] = 0
        attention.o_proj.weight[:, rows] *= 0.3
        return attention, rows

    def _pairs(self, attention: Any, rows: slice, first: int, last: int, gain: float, offset: int) -> None:
        """Add a score of gain * cos(frequency * (distance - offset)), summed over pairs first to last - 1."""
        half, sign = self.size // 2, 1 if gain > 0 else -1
        scale = (abs(gain) * self.size**0.5) ** 0.5
        frequency = self.frequency[first:last]
        q, k = attention.q_proj.bias[rows], attention.k_proj.bias[rows]
        q[first:last] = scale
        k[first:last] = scale * sign * (offset * frequency).cos()
        k[half + first : half + last] = scale * sign * (offset * frequency).sin()

    def _prefer(self, attention: Any, rows: slice, flags: dict[str, float], bias: float = 0.0) -> None:
        """Add to the score of a key the weighted sum of its flags."""
        row = rows.start + self.flag_rows[0]
        attention.q_proj.weight[row], attention.q_proj.bias[row] = 0, self.size**0.5
        attention.k_proj.weight[row], attention.k_proj.bias[row] = 0, bias
        for name, weight in flags.items():
            attention.k_proj.weight[row, self.flag[name]] = weight

    def _match(self, attention: Any, rows: slice, query: Tensor, key: Tensor, score: float, norm: float) -> None:
        """Score two equal vectors of length `norm` with `score`, through one random projection of both."""
        projection = _orthogonal(len(self.slow), len(query))
        scale = (score * self.size**0.5 * max(1.0, len(query) / len(self.slow))) ** 0.5 / norm
        for target, matrix in ((attention.q_proj, query), (attention.k_proj, key)):
            weight = target.weight[rows]
            weight[self.slow] = scale * projection @ matrix

    def _write(
        self,
        attention: Any,
        rows: slice,
        part: str,
        moved: Tensor,
        flags: dict[str, tuple[str, float]],
        source: str = "name",
    ) -> None:
        """Let the head carry `moved` of a part, and single flags, into parts of the residual stream."""
        value, out = attention.v_proj.weight[rows], attention.o_proj.weight[:, rows]
        width = len(moved)
        value[:width], out[:, :width] = 0, 0
        value[:width, self.part[source]] = moved
        start = (self.kinds[part] if part in self.kinds else self.part[part]).start
        out[start : start + width, :width] = _eye(width)
        for i, (flag, (target, weight)) in enumerate(flags.items()):
            row = self.size - 1 - i
            value[row], out[:, row] = 0, 0
            value[row, self.flag[flag]] = 1.0
            out[self.flag[target], row] = weight

    def _look_back(self, back: int) -> None:
        import torch

        attention, rows = self._head(0, back - 1)
        self._pairs(attention, rows, 0, _FAST, 10.0, back)
        moved = torch.linalg.matrix_power(self.turn, back - 1) @ self.to_before
        self._write(attention, rows, "before", 0.6 * 0.8 ** (back - 1) * moved, {})

    def _last_mark(self, layer: int, head: int, flag: str, target: str, carried: tuple[str, ...]) -> None:
        """Score marks above all else, the nearest first: pairs from 4 on fall with distance up to some 300 tokens."""
        import torch

        attention, rows = self._head(layer, head)
        first, last = 4, _SLOW + 2
        attention.q_proj.bias[rows][first:last] = 8.0
        attention.k_proj.weight[rows][first:last, self.flag[flag]] = 2.5
        place = self.kinds[target]
        values = torch.randn(place.stop - place.start, WIDTHS["name"]) * WIDTHS["name"] ** -0.5
        self._write(attention, rows, target, values, {name: (name, 0.6) for name in carried})

    def _seen(self) -> None:
        """The same token anywhere before, or else the first token of the prompt, which means that it is new."""
        attention, rows = self._head(0, 3)
        name = self._select(name=_eye(WIDTHS["name"]))
        self._match(attention, rows, name, name, 17.0, 15.0)
        self._pairs(attention, rows, 0, 6, -1.5, 0)
        self._prefer(attention, rows, {"first": 3.2})
        self._write(attention, rows, "out", _eye(64)[:1] * 0, {"first": ("new", 0.6)})

    def _in_title(self, head: int, query: Tensor, flag: str) -> None:
        attention, rows = self._head(1, head)
        self._match(attention, rows, query, self._select(name=self.to_before), 14.0, 9.0 * (35 / 64) ** 0.5)
        self._prefer(attention, rows, {"title": 1.2, "mark": -3.0})
        self._write(attention, rows, "out", _eye(64)[:1] * 0, {"title": (flag, 1.0)})

    def _word_start(self) -> None:
        attention, rows = self._head(1, 2)
        self._pairs(attention, rows, 0, _FAST, 6.0, 0)
        self._prefer(attention, rows, {"word": 16.0})
        self._write(attention, rows, "start", 0.7 * self.to_start, {})

    def _carry_on(self) -> None:
        attention, rows = self._head(1, 3)
        self._pairs(attention, rows, 0, _FAST, 10.0, 1)
        self._write(attention, rows, "kept", 0.2 * self.to_start, {"counts": ("counts before", 0.85)})

    def _steps(self, layer: int, kinds: tuple[tuple[dict[str, float], float, str], ...]) -> None:
        """Write conditions: (weights of flags, threshold, flag that becomes 2 where their sum, in flags, is above it).

        Two neurons each, the second one later and taken away: from 0 to a constant.
        """
        mlp = self.model.model.layers[layer].mlp
        for number, (weights, threshold, target) in enumerate(kinds):
            for row, shift, sign in ((2 * number, 0.0, 1.0), (2 * number + 1, 0.4, -1.0)):
                for matrix in (mlp.gate_proj.weight[row], mlp.up_proj.weight[row], mlp.down_proj.weight[:, row]):
                    matrix.zero_()
                for name, weight in weights.items():
                    mlp.gate_proj.weight[row, self.flag[name]] = 4 * weight
                mlp.gate_proj.weight[row, self.flag["one"]] = -4 * (threshold + shift)
                mlp.up_proj.weight[row, self.flag["one"]] = 0.5
                mlp.down_proj.weight[self.flag[target], row] = 0.45 * sign

    def _counts(self) -> None:
        self._steps(
            0,
            (
                ({"text": 1.0, "capital": 1.0, "new": 1.0, "function": -1.0, "mark": -1.0}, 2.5, "counts"),
                ({"question": 1.0, "word": 1.0, "function": -1.5, "mark": -1.0}, 1.5, "counts"),
                ({"question": 1.0, "text": 1.0, "mark": 1.0}, 2.5, "counts"),
            ),
        )

    def _not_covered(self) -> None:
        self._steps(
            1,
            (
                ({"counts": 1.0, "question": 1.0, "covered": -1.0}, 1.6, "target"),
                ({"counts": 1.0, "text": 1.0}, 1.6, "target"),
                ({"counts before": 1.0, "question": 1.0, "covered before": -1.0}, 1.6, "after"),
                ({"counts before": 1.0, "text": 1.0}, 1.6, "after"),
            ),
        )

    def _induction(self, head: int) -> None:
        attention, rows = self._head(2, head)
        query = self._select(name=self.to_before, before=self.turn)
        self._match(attention, rows, query, self._select(before=_eye(35)), 9.0, 7.0)
        self._write(attention, rows, "out", 0.5 * _eye(64)[:_WRITTEN], {"word": ("starts", 0.7)})

    def _last_kept(self) -> None:
        attention, rows = self._head(2, 2)
        self._pairs(attention, rows, 2, _FAST + 4, 6.0, 0)
        self._prefer(attention, rows, {"after": 16.0})
        self._write(attention, rows, "kept", 3.0 * _eye(32), {}, source="kept")

    def _next_kept(self, head: int) -> None:
        attention, rows = self._head(3, head)
        self._match(attention, rows, self._select(start=_eye(32)), self._select(kept=_eye(32)), 16.0, 5.0)
        self._prefer(attention, rows, {"target": 6.0})
        row = (
            rows.start + self.flag_rows[1]
        )  # within a word: look at the first token of the prompt, which writes little
        attention.q_proj.weight[row], attention.k_proj.weight[row] = 0, 0
        attention.q_proj.weight[row, self.flag["starts"]], attention.q_proj.bias[row] = -6.0, 12.0
        attention.q_proj.weight[row, self.flag["plain"]] = 12.0
        attention.k_proj.weight[row, self.flag["first"]] = 10.0
        self._write(attention, rows, "out", 1.2 * _eye(64)[:_WRITTEN], {})

    def _select(self, **blocks: Tensor) -> Tensor:
        import torch

        matrix = torch.zeros(len(next(iter(blocks.values()))), sum(WIDTHS.values()))
        for name, block in blocks.items():
            matrix[:, self.part[name]] = block
        return matrix


def _orthogonal(rows: int, columns: int) -> Tensor:
    """Return a random matrix whose rows (or columns, if these are fewer) are orthonormal."""
    import torch

    matrix = torch.linalg.qr(torch.randn(max(rows, columns), min(rows, columns)))[0]
    return matrix if rows >= columns else matrix.T


def _eye(size: int) -> Tensor:
    import torch

    return torch.eye(size)
