"""Latency and throughput of the variants of a model, taking turns, and whether zeros pay."""

from __future__ import annotations

import inspect
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..inference import InferenceReport
from ..kernel_timing import time_in_turns
from ..tables import draw_table
from .errors import UserError
from .variants import Variant, is_causal

_LEAST_GAIN = 1.05  # less is within what two runs differ by


@dataclass(frozen=True)
class Row:
    """One variant at one setting.

    Attributes:
        variant: its name.
        is_dense: whether it takes no advantage of zeros.
        seconds: of one call, the median.
        per_second: sequences a second; new tokens a second where one token is generated.
        difference: of its outputs from float32's, at most, over the largest of those.
        sparse_layers: pruned layers that a sparse kernel computes, and all pruned layers; None where none may.
    """

    variant: str
    is_dense: bool
    seconds: float
    per_second: float
    difference: float
    sparse_layers: tuple[int, int] | None = None

    @property
    def uses_zeros(self) -> bool:
        """Whether some zeros are not multiplied."""
        return self.sparse_layers[0] > 0 if self.sparse_layers else self.variant.startswith("shrunk")


@dataclass(frozen=True)
class Measurement:
    """All variants at one batch size, length and phase.

    Attributes:
        batch_size: sequences.
        tokens: of each.
        phase: "forward", or "prompt" and "token" of models that continue texts: reading all tokens at once, and
            generating one more after them.
        rows: one a variant.
        choice: what each layer of the sparse float32 variant is computed by.
    """

    batch_size: int
    tokens: int
    phase: str
    rows: tuple[Row, ...]
    choice: InferenceReport | None

    @property
    def best_dense(self) -> Row:
        return min((row for row in self.rows if row.is_dense), key=lambda row: row.seconds)

    def over_best_dense(self, row: Row) -> float:
        """How many times faster than the best dense choice."""
        return self.best_dense.seconds / row.seconds

    @property
    def title(self) -> str:
        return f"{self.batch_size} x {self.tokens} tokens, {self.phase}"

    def verdict(self) -> str:
        """Whether zeros pay, in a sentence."""
        candidates, dense = [row for row in self.rows if row.uses_zeros], self.best_dense
        if not candidates:
            return f"{self.title}: sparsity does not pay. No sparse kernel beats the best dense one in any layer."
        best = min(candidates, key=lambda row: row.seconds)
        gain = self.over_best_dense(best)
        if gain >= _LEAST_GAIN:
            return (
                f"{self.title}: sparsity pays. {best.variant} is {gain:.2f} times as fast as {dense.variant}, the best "
                "dense choice."
            )
        return (
            f"{self.title}: sparsity does not pay. The best dense choice, {dense.variant}, takes "
            f"{1e3 * dense.seconds:.3g} ms; {best.variant} takes {1e3 * best.seconds:.3g} ms."
        )

    def to_table(self) -> str:
        """A table for the terminal."""
        header = ("variant", "ms", _unit(self.phase), "over best dense", "difference")
        *rows, last = [self._cells(row) for row in self.rows]
        lines = draw_table(header, rows, last)
        del lines[-2]  # the last row is one like the others
        return "\n".join([self.title, "", *lines])

    def to_markdown(self) -> str:
        """The same as a Markdown table."""
        lines = [f"| {self.title} | ms | {_unit(self.phase)} | over best dense | difference |", "|---|---|---|---|---|"]
        return "\n".join([*lines, *("| " + " | ".join(self._cells(row)) + " |" for row in self.rows)])

    def _cells(self, row: Row) -> tuple[str, ...]:
        remark = " (best dense)" if row == self.best_dense else ""
        if row.sparse_layers:
            remark = " ({} of {} layers)".format(*row.sparse_layers)
        return (
            row.variant + remark,
            f"{1e3 * row.seconds:,.2f}",
            f"{row.per_second:,.1f}",
            f"{self.over_best_dense(row):.2f}",
            f"{row.difference:.0e}" if row.difference else "0",
        )

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain JSON values."""
        return {
            "batch_size": self.batch_size,
            "tokens": self.tokens,
            "phase": self.phase,
            "best_dense": self.best_dense.variant,
            "verdict": self.verdict(),
            "rows": [{**vars(row), "over_best_dense": self.over_best_dense(row)} for row in self.rows],
            "choice": self.choice.to_dict() if self.choice else None,
        }


def measure(variants: Sequence[Variant], batch_size: int, tokens: int, repeats: int, device: str) -> list[Measurement]:
    """Measure all variants with the same random tokens, in every phase that the model has.

    Raises:
        UserError: if the model takes fewer tokens.
    """
    first = variants[0].model
    limit = getattr(first.config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and tokens >= limit:
        raise UserError(f"--tokens {tokens}: the model reads fewer than {limit}; pass less.")
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(first.config.get_text_config().vocab_size, (batch_size, tokens), generator=generator).to(device)
    phases = {"prompt": _prompt, "token": _token} if is_causal(first) else {"forward": _forward}
    return [_measure_phase(variants, ids, phase, make, repeats) for phase, make in phases.items()]


Call = Callable[[], Tensor]


def _measure_phase(
    variants: Sequence[Variant], ids: Tensor, phase: str, make: Callable[[Any, Tensor], Call], repeats: int
) -> Measurement:
    batch_size, tokens = ids.shape
    sample = {"input_ids": ids[:, :1] if phase == "token" else ids}
    choices = {variant.name: variant.choose(sample) for variant in variants}
    with torch.inference_mode():
        calls = {variant.name: make(variant.model, ids) for variant in variants}
        outputs = {name: call().float() for name, call in calls.items()}
    seconds = time_in_turns(calls, repeats=repeats, device=ids.device)
    exact, rows = outputs[variants[0].name], []
    for variant in variants:
        took, choice = seconds[variant.name], choices[variant.name]
        difference = float((outputs[variant.name] - exact).abs().max() / exact.abs().max())
        layers = (len(choice.sparse), len(choice.layers)) if choice else None
        rows.append(Row(variant.name, variant.is_dense, took, batch_size / took, difference, layers))
    return Measurement(batch_size, tokens, phase, tuple(rows), choices.get("sparse float32"))


def _forward(model: Any, ids: Tensor) -> Call:
    mask = torch.ones_like(ids)
    return lambda: model(input_ids=ids, attention_mask=mask)[0]


def _prompt(model: Any, ids: Tensor) -> Call:
    """As generating does it: the logits of the last token alone, where the model can leave out the others."""
    plain = model.get_base_model() if hasattr(model, "get_base_model") else model
    last = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(plain.forward).parameters else {}
    return lambda: model(input_ids=ids, use_cache=True, **last).logits[:, -1]


def _token(model: Any, ids: Tensor) -> Call:
    """One more token after `ids`, whose keys and values are there already."""
    cache = model(input_ids=ids, use_cache=True).past_key_values

    def call() -> Tensor:
        logits = model(input_ids=ids[:, -1:], past_key_values=cache, use_cache=True).logits[:, -1]
        cache.crop(-1)
        return logits

    return call


def _unit(phase: str) -> str:
    return "tokens/s" if phase == "token" else "sequences/s"


def processor_name() -> str:
    """What computes here, as far as the system tells."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
