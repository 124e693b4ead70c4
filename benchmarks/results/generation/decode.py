"""Texts for sources by beam search, as the paper decodes: ten beams, length penalty 0.8, no 4-gram twice."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from tqdm import tqdm
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    NoRepeatNGramLogitsProcessor,
    PreTrainedTokenizerBase,
)

from peft_pst.cli.errors import UserError

from .causal_model import evaluating, max_positions
from .tokens import encode_sources


class NoRepeatedNGram(LogitsProcessor):
    """Forbids an n-gram that the continuation already holds.

    `generate(no_repeat_ngram_size=...)` also counts the prompt of a decoder-only model, and so would forbid to copy a
    name of n tokens from the source.
    """

    def __init__(self, size: int, prompt_length: int) -> None:
        self.prompt_length = prompt_length
        self.inner = NoRepeatNGramLogitsProcessor(size)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Args: ids (rows, prompt and continuation) and scores (rows, vocabulary); returns scores."""
        return self.inner(input_ids[:, self.prompt_length :], scores)


def beam_search(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    sources: Sequence[str],
    *,
    beams: int = 10,
    length_penalty: float = 0.8,
    no_repeat_ngram: int = 4,
    max_new_tokens: int = 128,
    batch_size: int = 16,
    progress: bool = True,
) -> list[str]:
    """The best text that beam search finds for each source; nothing in it is drawn at random.

    Sources of like length share a batch, padded on the left; the model is put into eval mode for the time.

    Args:
        model: a decoder-only model that `generate`s, with or without an adapter.
        tokenizer: its tokenizer, with a pad and an end token.
        sources: texts as `Example.source` has them, without separator.
        beams: hypotheses kept at each step; 1 is greedy search.
        length_penalty: a hypothesis of log-probability p and n tokens is worth p / n ** length_penalty.
        no_repeat_ngram: no n-gram of this many tokens twice in one text; 0 allows it.
        max_new_tokens: tokens a text at most, its end included.
        batch_size: sources at a time; the model sees `beams` times as many rows.
        progress: whether to show a bar.

    Returns:
        One text a source, in order, without special tokens and outer spaces.

    Raises:
        UserError: if the tokenizer lacks a token, or source and text could be longer than the model can read.
    """
    config = _generation_config(tokenizer, beams, length_penalty, max_new_tokens)
    prompts = encode_sources(list(sources), tokenizer)
    _check_lengths(model, sources, prompts, max_new_tokens)
    order = sorted(
        range(len(prompts)), key=lambda i: -len(prompts[i])
    )  # the longest first: memory fails at once or never
    texts = [""] * len(prompts)
    with evaluating(model), tqdm(total=len(prompts), desc="Decoding", disable=not progress) as bar:
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            batch = tokenizer.pad(
                {"input_ids": [prompts[i] for i in chosen]}, padding_side="left", return_tensors="pt"
            ).to(model.device)
            length = batch["input_ids"].shape[1]
            rules = [NoRepeatedNGram(no_repeat_ngram, length)] if no_repeat_ngram else []
            ids = model.generate(**batch, generation_config=config, logits_processor=LogitsProcessorList(rules))
            for i, text in zip(chosen, tokenizer.batch_decode(ids[:, length:], skip_special_tokens=True), strict=True):
                texts[i] = text.strip()
            bar.update(len(chosen))
    return texts


def _generation_config(
    tokenizer: PreTrainedTokenizerBase, beams: int, length_penalty: float, max_new_tokens: int
) -> GenerationConfig:
    for name in ("pad", "eos"):
        if getattr(tokenizer, f"{name}_token_id") is None:
            raise UserError(f"the tokenizer has no {name} token, which decoding needs; set tokenizer.{name}_token.")
    return GenerationConfig(
        num_beams=beams,
        do_sample=False,
        length_penalty=length_penalty,
        max_new_tokens=max_new_tokens,
        repetition_penalty=1.0,  # a chat model's own settings must not leak in
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )


def _check_lengths(model: Any, sources: Sequence[str], prompts: list[list[int]], max_new_tokens: int) -> None:
    limit = max_positions(model)
    longest = max(range(len(prompts)), key=lambda i: len(prompts[i]), default=None)
    if limit is None or longest is None or len(prompts[longest]) + max_new_tokens <= limit:
        return
    raise UserError(
        f"the source {sources[longest][:60]!r} takes {len(prompts[longest])} tokens; with {max_new_tokens=} that is "
        f"more than the {limit} that the model can read; lower max_new_tokens or shorten the source."
    )
