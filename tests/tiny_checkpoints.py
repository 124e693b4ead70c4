"""Tiny base models with a tokenizer, saved to disk as a user would have them."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

WORDS = (
    "the",
    "a",
    "film",
    "plot",
    "cast",
    "was",
    "is",
    "very",
    "not",
    "good",
    "great",
    "fine",
    "bad",
    "dull",
    "poor",
    "red",
    "green",
    "blue",
)
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[EOS]")


def save_tokenizer(folder: Path, **special: str) -> PreTrainedTokenizerFast:
    """A tokenizer of whole words; `special` names the special tokens that it admits to."""
    vocabulary = {word: index for index, word in enumerate((*SPECIAL, *WORDS))}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    if "cls_token" in special:
        tokenizer.post_processor = TemplateProcessing(
            single="[CLS] $A [SEP]",
            pair="[CLS] $A [SEP] $B:1 [SEP]:1",
            special_tokens=[("[CLS]", vocabulary["[CLS]"]), ("[SEP]", vocabulary["[SEP]"])],
        )
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", **special)
    wrapped.save_pretrained(folder)
    return wrapped


def save_bert(folder: Path, model_class: type[PreTrainedModel] = BertModel, **overrides: int) -> str:
    """A BERT of two blocks without a head, or of another class."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    config = BertConfig(vocab_size=len(SPECIAL) + len(WORDS), max_position_embeddings=32, **{**sizes, **overrides})
    model_class(config).save_pretrained(folder)
    save_tokenizer(folder, pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]")
    return str(folder)


def save_masked_bert(folder: Path) -> str:
    """The same as it comes from masked language modelling: without a pooler."""
    return save_bert(folder, BertForMaskedLM)


def save_gpt2(folder: Path) -> str:
    """A GPT-2 of two blocks; like the real one it has no pad token."""
    torch.manual_seed(0)
    end = SPECIAL.index("[EOS]")
    config = GPT2Config(
        vocab_size=len(SPECIAL) + len(WORDS),
        n_positions=32,
        n_embd=16,
        n_layer=2,
        n_head=2,
        bos_token_id=end,
        eos_token_id=end,
    )
    GPT2LMHeadModel(config).save_pretrained(folder)
    save_tokenizer(folder, eos_token="[EOS]")
    return str(folder)
