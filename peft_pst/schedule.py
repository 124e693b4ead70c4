"""The sparsity schedule, a pure function of the step."""

from __future__ import annotations

from numbers import Real

WARMUP_RATIO = 0.1
COOLDOWN_RATIO = 0.3


def check_sparsity(name: str, value: float) -> None:
    """Refuse what is no sparsity, under the name that its user knows it by.

    Raises:
        ValueError: if `value` is no number, or outside [0, 1).

    Example:
        >>> check_sparsity("target_sparsity", 1.5)
        Traceback (most recent call last):
        ...
        ValueError: target_sparsity=1.5 is outside [0, 1); 0.9 means that nine of ten weights are zero.
    """
    is_number = isinstance(value, Real) and not isinstance(value, bool)
    if not is_number or not 0.0 <= value < 1.0:
        raise ValueError(f"{name}={value!r} is outside [0, 1); 0.9 means that nine of ten weights are zero.")


def cubic_sparsity(
    step: int,
    total_steps: int,
    *,
    target_sparsity: float,
    initial_sparsity: float = 0.0,
    warmup_ratio: float = WARMUP_RATIO,
    cooldown_ratio: float = COOLDOWN_RATIO,
) -> float:
    """Sparsity in force after `step` finished optimizer steps.

    It stays at `initial_sparsity` for the warm-up, rises along a cubic that starts steep and flattens out, and stays
    at `target_sparsity` for the cool-down:

        s(t) = s_f + (s_i - s_f) * (1 - (t - warmup) / (total - warmup - cooldown))^3

    Args:
        step: finished optimizer steps (not micro-batches), at least 0; beyond `total_steps` the target stays.
        total_steps: optimizer steps of the whole run, at least 1.
        target_sparsity: fraction of zeros at the end, in [0, 1).
        initial_sparsity: fraction of zeros during the warm-up, in [0, 1).
        warmup_ratio: share of the steps spent at the initial sparsity, in [0, 1].
        cooldown_ratio: share of the steps spent at the target sparsity, in [0, 1].

    Returns:
        Sparsity, in [0, 1). Exactly the initial and the target value on the two plateaus.

    Raises:
        ValueError: if `step` is negative, `total_steps` is below 1, a sparsity or ratio is out of range, or the ratios
            sum to more than 1.

    Source: Zhu & Gupta 2017 (arXiv 1710.01878), eq. 1; warm-up and cool-down as in Li et al. 2022 (arXiv 2205.11005).

    Example:
        >>> [round(cubic_sparsity(t, 100, target_sparsity=0.9), 4) for t in (0, 10, 25, 40, 70, 100)]
        [0.0, 0.0, 0.5203, 0.7875, 0.9, 0.9]
    """
    if step < 0:
        raise ValueError(f"step={step} is negative; pass the number of finished optimizer steps.")
    if total_steps < 1:
        raise ValueError(f"total_steps={total_steps} is below 1; pass the number of optimizer steps of the whole run.")
    check_sparsity("target_sparsity", target_sparsity)
    check_sparsity("initial_sparsity", initial_sparsity)
    if min(warmup_ratio, cooldown_ratio) < 0:
        raise ValueError(f"warmup_ratio={warmup_ratio} or cooldown_ratio={cooldown_ratio} is negative.")
    if warmup_ratio + cooldown_ratio > 1:
        raise ValueError(f"warmup_ratio={warmup_ratio} and cooldown_ratio={cooldown_ratio} sum to more than 1.")
    ramp_start = warmup_ratio * total_steps
    ramp_end = (1 - cooldown_ratio) * total_steps
    if step >= ramp_end:
        return target_sparsity
    if step <= ramp_start:
        return initial_sparsity
    remaining = (ramp_end - step) / (ramp_end - ramp_start)
    return target_sparsity + (initial_sparsity - target_sparsity) * remaining**3
