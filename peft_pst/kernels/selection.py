"""Exact selection of the lowest scores on all multiprocessors, without a word to the host.

Scores are compared as integers in the same order (`_ordered`), so that every step is exact and deterministic: what
programs add up in no fixed order are integers.

1. One program finds in a sample two keys that almost surely enclose the cut (`_bracket`).
2. One pass over the scores counts what lies below, at and between these keys, every key between in a bin of its own
   (`_count`), and one program reads the cut off the bins (`_find`).
3. If the keys do not enclose the cut, or lie too far apart for so many bins, two more such rounds end the search, over
   all keys at worst; otherwise they return at once.
4. If only some of the scores that tie with the cut are pruned, one pass counts the ties of each program's share
   (`_count_ties`).
5. One pass writes the mask (`_settle`).

The sample thus decides the speed alone: two passes over the scores where it does its duty, five at most.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

CHUNK = 1024  # scores that a program holds in registers at a time
SAMPLE = 16384
PROGRAMS_PER_MULTIPROCESSOR = 8
_DEVIATIONS = 4.5  # of the sample's rank, to either side: the cut lies outside once in a hundred thousand times
_MOST_BINS = 22  # in bits
_LATER_BINS = 17  # in bits: enough for all 2^32 keys in two rounds, 2^16 bins each and one to spare
_ROUNDS = 3

_INFINITY = tl.constexpr(0x7F800000)  # the highest key; its negative is the lowest
_GROUP = tl.constexpr(2048)  # bins that are added up, so that one program finds its way in two looks at 2048 counts

# Where things lie in the state, an array of 32-bit integers.
_LOW = tl.constexpr(0)  # the keys that enclose the cut
_HIGH = tl.constexpr(1)
_SHIFT = tl.constexpr(2)  # a bin holds 2^shift keys
_FOUND = tl.constexpr(3)  # 1 once the cut is known
_CUT = tl.constexpr(4)
_PRUNED_TIES = tl.constexpr(5)  # of the scores equal to the cut, how many are pruned, and how many there are
_TIES = tl.constexpr(6)
_COUNTS = tl.constexpr(8)  # for each round: how many lie below the low key, up to it, and up to the high key
_BINS = tl.constexpr(2048)  # the bins of one round after another


def select_packed_mask(scores: Tensor, count: int) -> Tensor:
    """`pack_mask(select_mask(scores, count))`, with NaN kept as the highest score.

    Args:
        scores: any shape, on a CUDA device, float32, bfloat16 or float16, fewer than 2^31 - 2^24 entries.
        count: number of entries to prune, in [1, scores.numel()].

    Returns:
        uint8, (ceil(scores.numel() / 8),).
    """
    scores = scores.detach().contiguous()
    numel, device = scores.numel(), scores.device
    chunks = triton.cdiv(numel, CHUNK)
    each = triton.cdiv(chunks, PROGRAMS_PER_MULTIPROCESSOR * _multiprocessors(device))
    programs = triton.cdiv(chunks, each)
    bins = min(_MOST_BINS, max(_LATER_BINS, numel.bit_length() - 4))
    state_size = _BINS.value + (1 << bins) + (_ROUNDS - 1) * (1 << _LATER_BINS)
    state = torch.zeros(state_size, dtype=torch.int32, device=device)
    ties = torch.empty(programs, dtype=torch.int32, device=device)
    packed = torch.empty((numel + 7) // 8, dtype=torch.uint8, device=device)
    with torch.cuda.device_of(scores):
        _bracket[(1,)](scores, numel, *_sample_ranks(numel, count), state, bins, SAMPLE=SAMPLE, num_warps=16)
        start = _BINS.value
        for turn in range(_ROUNDS):
            _count[(programs,)](scores, numel, each, state, start, turn, CHUNK=CHUNK, num_warps=4)
            stop = start + (1 << (bins if turn == 0 else _LATER_BINS))
            groups = state[start:stop].view(-1, _GROUP.value).sum(1, dtype=torch.int32)
            _find[(1,)](state, groups, count, start, groups.numel(), turn, num_warps=4)
            start = stop
        _count_ties[(programs,)](scores, numel, each, state, ties, CHUNK=CHUNK, num_warps=4)
        power = triton.next_power_of_2(programs)
        _settle[(programs,)](scores, numel, each, state, ties, packed, PROGRAMS=power, CHUNK=CHUNK, num_warps=4)
    return packed


def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def _sample_ranks(numel: int, count: int) -> tuple[int, int]:
    """Ranks in the sample that enclose the cut; -1 and SAMPLE stand for no bound."""
    share = (count - 0.5) / numel
    margin = _DEVIATIONS * math.sqrt(SAMPLE * share * (1 - share)) + 1
    return max(-1, math.floor(SAMPLE * share - margin)), min(SAMPLE, math.ceil(SAMPLE * share + margin))


@triton.jit
def _ordered(scores):
    """Integers in the order of the scores: both zeros are 0, and NaN is infinity.

    A float is a sign and a magnitude. In integer arithmetic, which no compiler option can change.
    """
    bits = scores.to(tl.float32).to(tl.int32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    key = tl.where(bits < 0, -magnitude, magnitude)
    return tl.where(magnitude > _INFINITY, _INFINITY, key)


@triton.jit
def _keys(scores, numel, position):
    """The keys at some positions; beyond the end, that of infinity."""
    return _ordered(tl.load(scores + position, mask=position < numel, other=float("inf")))


@triton.jit
def _shift(low, high, bins):
    """How many low bits of the distance between two keys to drop so that it has at most so many bits."""
    distance = (high - low).to(tl.uint32, bitcast=True)
    length = tl.sum((distance >> tl.arange(0, 32).to(tl.uint32) != 0).to(tl.int32), 0)
    return tl.maximum(length - bins, 0)


@triton.jit(do_not_specialize=["low_rank", "high_rank"])
def _bracket(scores, numel, low_rank, high_rank, state, bins, SAMPLE: tl.constexpr):
    """Store the keys of two ranks of a sample, found bit by bit from the highest."""
    # Multiplications by odd constants, modulo 2^32, and shifts scatter the positions over rows and columns alike.
    spread = tl.arange(0, SAMPLE).to(tl.uint32) * 2654435769
    spread = (spread ^ (spread >> 15)) * 2246822519
    spread = spread ^ (spread >> 13)
    position = (spread.to(tl.int64) * numel) >> 32
    # Built as unsigned integers; inverting the first bit makes them comparable with the signed keys.
    inverted = tl.full((), -(2**31), tl.int32)
    one = tl.full((), 1, tl.int32)
    keys = _ordered(tl.load(scores + position))
    low = one - 1
    high = one - 1
    for step in range(32):
        bit = one << (31 - step)
        below_low = (keys < ((low | bit) ^ inverted)).to(tl.int32)
        below_high = (keys < ((high | bit) ^ inverted)).to(tl.int32)
        # Two counts of at most 2^14 in one sum, since each sum waits for all threads.
        counts = tl.sum(below_low + (below_high << 16), 0)
        low = tl.where((counts & 0xFFFF) <= low_rank, low | bit, low)
        high = tl.where((counts >> 16) <= high_rank, high | bit, high)
    low = tl.where(low_rank < 0, -_INFINITY, low ^ inverted)
    high = tl.where(high_rank >= SAMPLE, _INFINITY, high ^ inverted)
    tl.store(state + _LOW, low)
    tl.store(state + _HIGH, high)
    tl.store(state + _SHIFT, _shift(low, high, bins))


# One score a thread at a time, as the scattered additions have it anyway, spares an exchange between threads; so the
# compiler must not know that four could be loaded at once.
@triton.jit(do_not_specialize=["start", "turn"], do_not_specialize_on_alignment=["scores"])
def _count(scores, numel, each, state, start, turn, CHUNK: tl.constexpr):
    """Count the keys below `low`, up to it, up to `high`, and in each bin between, where both ends are left out.

    The ends are left out of the bins because a key that very many scores share tends to be one, and many additions to
    one address take turns. What lies beyond the end may be counted as infinite: it comes last, and is never pruned.
    """
    if tl.load(state + _FOUND) == 0:
        low = tl.load(state + _LOW)
        high = tl.load(state + _HIGH)
        shift = tl.load(state + _SHIFT).to(tl.uint32)
        below = tl.zeros((CHUNK,), tl.int32)
        up_to_low = tl.zeros((CHUNK,), tl.int32)
        up_to_high = tl.zeros((CHUNK,), tl.int32)
        for step in range(each):
            position = (tl.program_id(0) * each + step) * CHUNK + tl.arange(0, CHUNK)
            key = _keys(scores, numel, position)
            below += (key < low).to(tl.int32)
            up_to_low += (key <= low).to(tl.int32)
            up_to_high += (key <= high).to(tl.int32)
            bin = ((key - low).to(tl.uint32, bitcast=True) >> shift).to(tl.int32)
            tl.atomic_add(state + start + bin, 1, mask=(key > low) & (key < high), sem="relaxed")
        counts = state + _COUNTS + 4 * turn
        tl.atomic_add(counts, tl.sum(below, 0), sem="relaxed")
        tl.atomic_add(counts + 1, tl.sum(up_to_low, 0), sem="relaxed")
        tl.atomic_add(counts + 2, tl.sum(up_to_high, 0), sem="relaxed")


@triton.jit
def _reach(counts, wanted):
    """Where the sum of the counts reaches `wanted`: the index, how many are still wanted there, and its count."""
    short = (tl.cumsum(counts, 0) < wanted).to(tl.int32)
    index = tl.sum(short, 0)
    left = wanted - tl.sum(counts * short, 0)
    here = tl.sum(tl.where(tl.arange(0, _GROUP) == index, counts, 0), 0)
    return index, left, here


@triton.jit(do_not_specialize=["count", "start", "num_groups", "turn"])
def _find(state, group_counts, count, start, num_groups, turn):
    """Read the cut off the counts, the `count`-th lowest key; or set the keys and the bins of the next round."""
    if tl.load(state + _FOUND) == 0:
        low = tl.load(state + _LOW)
        high = tl.load(state + _HIGH)
        shift = tl.load(state + _SHIFT)
        below = tl.load(state + _COUNTS + 4 * turn)
        up_to_low = tl.load(state + _COUNTS + 4 * turn + 1)
        up_to_high = tl.load(state + _COUNTS + 4 * turn + 2)
        groups = tl.load(group_counts + tl.arange(0, _GROUP), mask=tl.arange(0, _GROUP) < num_groups, other=0)
        below_high = up_to_low + tl.sum(groups, 0)
        at_low = (below < count) & (count <= up_to_low)
        between = (up_to_low < count) & (count <= below_high)
        at_high = (below_high < count) & (count <= up_to_high)
        group, left, here = _reach(groups, count - up_to_low)
        # Outside `between` the group may be one past the last, whose bins are some other counts, never used.
        group = tl.where(between, group, 0)
        bin, left, here = _reach(tl.load(state + start + group * _GROUP + tl.arange(0, _GROUP)), left)
        first = low + ((group * _GROUP + bin) << shift)  # the lowest key of the bin

        tl.store(state + _FOUND, (at_low | at_high | (between & (shift == 0))).to(tl.int32))
        tl.store(state + _CUT, tl.where(at_low, low, tl.where(at_high, high, first)))
        pruned = tl.where(at_low, count - below, tl.where(at_high, count - below_high, left))
        tl.store(state + _PRUNED_TIES, pruned)
        ties = tl.where(at_low, up_to_low - below, tl.where(at_high, up_to_high - below_high, here))
        tl.store(state + _TIES, ties)

        # The next round looks into the bin, or, if the cut lay outside, at all keys in bins of 2^16.
        one = tl.full((), 1, tl.int32)
        low = tl.where(between, first - 1, -_INFINITY)
        high = tl.where(between, tl.minimum(first + (one << shift), high), _INFINITY)
        tl.store(state + _LOW, low)
        tl.store(state + _HIGH, high)
        tl.store(state + _SHIFT, tl.where(between, 0, 16))


@triton.jit
def _count_ties(scores, numel, each, state, ties, CHUNK: tl.constexpr):
    """How many scores equal the cut in each program's share, where that matters."""
    if tl.load(state + _PRUNED_TIES) < tl.load(state + _TIES):
        cut = tl.load(state + _CUT)
        equal = tl.zeros((CHUNK,), tl.int32)
        for step in range(each):
            position = (tl.program_id(0) * each + step) * CHUNK + tl.arange(0, CHUNK)
            equal += (_keys(scores, numel, position) == cut).to(tl.int32)
        tl.store(ties + tl.program_id(0), tl.sum(equal, 0))


@triton.jit
def _settle(scores, numel, each, state, ties, packed, PROGRAMS: tl.constexpr, CHUNK: tl.constexpr):
    """Write the mask: keep what lies above the cut, and of what equals it all but the first."""
    program = tl.program_id(0)
    cut = tl.load(state + _CUT)
    pruned = tl.load(state + _PRUNED_TIES)
    some = pruned < tl.load(state + _TIES)
    others = tl.arange(0, PROGRAMS)
    seen = tl.sum(tl.load(ties + others, mask=others < tl.where(some, program, 0), other=0), 0)
    bit = tl.arange(0, 8)
    for step in range(each):
        byte = (program * each + step) * (CHUNK // 8) + tl.arange(0, CHUNK // 8)
        position = byte[:, None] * 8 + bit[None, :]
        key = _keys(scores, numel, position)
        kept = (key > cut).to(tl.int32)
        if some:
            tie = (key == cut).to(tl.int32)
            in_row = tl.sum(tie, 1)
            before_row = seen + tl.cumsum(in_row, 0) - in_row
            rank = before_row[:, None] + tl.cumsum(tie, 1) - tie
            kept |= tl.where(rank < pruned, 0, tie)
            seen += tl.sum(in_row, 0)
        kept = tl.where(position < numel, kept << bit[None, :], 0)
        tl.store(packed + byte, tl.sum(kept, 1).to(tl.uint8), mask=byte * 8 < numel)
