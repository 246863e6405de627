"""From decisions to lists: the pairs that are kept under capacity, the rows of each expert, the rows of each token.

Nothing is sorted. ``select`` finds, per expert, the rank and the score of its last served pair by two searches over
integers. ``place`` numbers the served pairs of each expert and writes their rows. ``by_token`` writes each token's
rows, ordered by expert. All counts stay on the device.
"""

from __future__ import annotations

import triton
import triton.language as tl

NOT_CHOSEN = tl.constexpr(1 << 62)


@triton.jit
def _priority(rank_GT, score_GT, column, token, num_tokens):
    """int64 keys, of which a smaller one is served earlier; NOT_CHOSEN where the token does not want the expert."""
    is_token = token < num_tokens
    rank = tl.load(rank_GT + column + token, mask=is_token, other=-1)
    score = tl.load(score_GT + column + token, mask=is_token, other=0.0)
    score = tl.where(score == score, score, 0.0)
    key = (rank.to(tl.int64) << 31) | (2147483647 - score.to(tl.int32, bitcast=True)).to(tl.int64)
    return tl.where(rank >= 0, key, NOT_CHOSEN)


@triton.jit
def _compared(rank_GT, score_GT, column, token, num_tokens, rank, BY_RANK: tl.constexpr):
    """int32 values to search: ranks, or 2^31 - 1 - bits of the scores of one ``rank``; 2^31 - 1 for the other pairs."""
    is_token = token < num_tokens
    own = tl.load(rank_GT + column + token, mask=is_token, other=-1)
    if BY_RANK:
        return tl.where(own >= 0, own, 2147483647)
    else:
        score = tl.load(score_GT + column + token, mask=is_token, other=0.0)
        score = tl.where(score == score, score, 0.0)
        return tl.where(own == rank, 2147483647 - score.to(tl.int32, bitcast=True), 2147483647)


@triton.jit
def _count(
    rank_GT, score_GT, column, num_tokens, rank, limit,
    BY_RANK: tl.constexpr, BLOCK_T: tl.constexpr, NUM_BLOCKS: tl.constexpr,
):  # fmt: skip
    """The number of values that are at most ``limit``."""
    total = 0
    for start in range(NUM_BLOCKS):
        token = start * BLOCK_T + tl.arange(0, BLOCK_T)
        value = _compared(rank_GT, score_GT, column, token, num_tokens, rank, BY_RANK)
        total += tl.sum((value <= limit).to(tl.int32), axis=0)
    return total


@triton.jit
def _search(
    rank_GT, score_GT, column, num_tokens, rank, low, high, target,
    BY_RANK: tl.constexpr, BLOCK_T: tl.constexpr, NUM_BLOCKS: tl.constexpr,
):  # fmt: skip
    """The least limit in [low, high] that ``target`` values do not exceed."""
    value = _compared(rank_GT, score_GT, column, tl.arange(0, BLOCK_T), num_tokens, rank, BY_RANK)
    if NUM_BLOCKS == 1:
        # values lie close together: the range shrinks to theirs before it is halved, unless a score of 0 is needed,
        # whose value is that of the other pairs
        largest = tl.max(tl.where(value == 2147483647, -1, value), axis=0)
        is_within = tl.sum((value <= largest).to(tl.int32), axis=0) >= target
        low = tl.where(is_within, tl.maximum(low, tl.min(value, axis=0)), high)
        high = tl.where(is_within, tl.minimum(high, largest), high)
    while low < high:
        middle = low + ((high - low) >> 1)
        if NUM_BLOCKS == 1:
            up_to = tl.sum((value <= middle).to(tl.int32), axis=0)
        else:
            up_to = _count(rank_GT, score_GT, column, num_tokens, rank, middle, BY_RANK, BLOCK_T, NUM_BLOCKS)
        enough = up_to >= target
        high = tl.where(enough, middle, high)
        low = tl.where(enough, low, middle + 1)
    return high


@triton.jit(do_not_specialize=["num_tokens", "numerator", "denominator", "least"])
def select(
    rank_GT, score_GT, prob_GT, padding, entropy_T, log_mass_T,
    count_E, wanted_E, cut_E, ties_E, load_G, coefficient_G, prob_sum_G, totals, real_count,
    num_tokens, num_gates, num_experts, numerator, denominator, least,
    LIMITED: tl.constexpr, LOAD_OF_ALL: tl.constexpr, HAS_PROB: tl.constexpr, HAS_PADDING: tl.constexpr,
    BLOCK_T: tl.constexpr, NUM_BLOCKS: tl.constexpr,
):  # fmt: skip
    """Find the last served pair of a gate: one program per gate, and one more for sums over tokens.

    Args:
        numerator, denominator, least: C = ceil(numerator * T / (denominator * E)), at least ``least``, at most T, the
            real tokens (LIMITED).
        count_E, wanted_E: int64 out. cut_E: int64 out, key (rank, 2^31 - 1 - bits of the score) of the last served
            pair. ties_E: int32 out, the number of served pairs of that key.
        load_G, prob_sum_G: float32 out. LOAD_OF_ALL: the load counts all choices instead of first ones.
        coefficient_G: float32 out, load * G / tokens^2: the balance loss is its inner product with prob_sum_G.
        totals: float32 out: real tokens, mean of entropy_T, mean of log_mass_T^2. real_count: int64 out, real tokens.
    """
    # one function: a kernel in the order of its questions
    gate = tl.program_id(0)
    block = tl.arange(0, BLOCK_T)
    num_real = num_tokens
    if HAS_PADDING:
        num_real = 0
        for start in range(NUM_BLOCKS):
            token = start * BLOCK_T + block
            flags = tl.load(padding + token, mask=token < num_tokens, other=1) == 0
            num_real += tl.sum(flags.to(tl.int32), axis=0)
    if gate == num_gates:
        _mean_over_tokens(
            entropy_T, log_mass_T, totals, real_count, num_real, num_tokens, HAS_PROB, BLOCK_T, NUM_BLOCKS
        )
        return
    column = gate.to(tl.int64) * num_tokens
    wanted = _sums_of_gate(
        rank_GT, prob_GT, load_G, coefficient_G, prob_sum_G, gate, num_real, num_tokens, num_gates,
        LOAD_OF_ALL, HAS_PROB, BLOCK_T, NUM_BLOCKS,
    )  # fmt: skip
    if gate >= num_experts:
        return
    served = wanted
    if LIMITED:
        share = denominator.to(tl.int64) * num_experts
        capacity = (numerator.to(tl.int64) * num_real + share - 1) // share
        capacity = tl.minimum(tl.maximum(capacity, least), num_real)
        served = tl.minimum(wanted.to(tl.int64), capacity).to(tl.int32)
    tl.store(count_E + gate, served.to(tl.int64))
    tl.store(wanted_E + gate, wanted.to(tl.int64))
    if served == wanted:
        tl.store(cut_E + gate, tl.zeros((), tl.int64) + (NOT_CHOSEN - 1))
        tl.store(ties_E + gate, 0)
        return
    top = tl.zeros((), tl.int32)
    last = _search(
        rank_GT, score_GT, column, num_tokens, 0, top, top + (num_gates - 1), served, True, BLOCK_T, NUM_BLOCKS
    )
    missing = served - _count(rank_GT, score_GT, column, num_tokens, 0, last - 1, True, BLOCK_T, NUM_BLOCKS)
    bits = _search(
        rank_GT, score_GT, column, num_tokens, last, top, top + 2147483647, missing, False, BLOCK_T, NUM_BLOCKS
    )
    below = _count(rank_GT, score_GT, column, num_tokens, last, bits - 1, False, BLOCK_T, NUM_BLOCKS)
    tl.store(cut_E + gate, (last.to(tl.int64) << 31) | bits.to(tl.int64))
    tl.store(ties_E + gate, missing - below)


@triton.jit
def _sums_of_gate(
    rank_GT, prob_GT, load_G, coefficient_G, prob_sum_G, gate, num_real, num_tokens, num_gates,
    LOAD_OF_ALL: tl.constexpr, HAS_PROB: tl.constexpr, BLOCK_T: tl.constexpr, NUM_BLOCKS: tl.constexpr,
):  # fmt: skip
    """The number of tokens that want a gate; HAS_PROB: what the balance loss needs of it is stored."""
    column = gate.to(tl.int64) * num_tokens
    wanted = tl.zeros((), tl.int32)
    load, prob_sum = tl.zeros((), tl.int32), 0.0
    for start in range(NUM_BLOCKS):
        token = start * BLOCK_T + tl.arange(0, BLOCK_T)
        rank = tl.load(rank_GT + column + token, mask=token < num_tokens, other=-1)
        wanted += tl.sum((rank >= 0).to(tl.int32), axis=0)
        load += tl.sum((rank == 0).to(tl.int32), axis=0)
        if HAS_PROB:
            prob_sum += tl.sum(tl.load(prob_GT + column + token, mask=token < num_tokens, other=0.0), axis=0)
    if HAS_PROB:
        counted = (wanted if LOAD_OF_ALL else load).to(tl.float32)
        tokens = tl.maximum(num_real.to(tl.float32), 1.0)
        tl.store(load_G + gate, counted)
        tl.store(coefficient_G + gate, counted * (num_gates / (tokens * tokens)))
        tl.store(prob_sum_G + gate, prob_sum)
    return wanted


@triton.jit
def _mean_over_tokens(
    entropy_T, log_mass_T, totals, real_count, num_real, num_tokens,
    HAS_PROB: tl.constexpr, BLOCK_T: tl.constexpr, NUM_BLOCKS: tl.constexpr,
):  # fmt: skip
    """Means of entropy and squared log mass, which are 0 at padding and therefore summed over all tokens."""
    entropy, square = 0.0, 0.0
    if HAS_PROB:
        for start in range(NUM_BLOCKS):
            token = start * BLOCK_T + tl.arange(0, BLOCK_T)
            entropy += tl.sum(tl.load(entropy_T + token, mask=token < num_tokens, other=0.0), axis=0)
            log_mass = tl.load(log_mass_T + token, mask=token < num_tokens, other=0.0)
            square += tl.sum(log_mass * log_mass, axis=0)
    tokens = num_real.to(tl.float32)
    tl.store(real_count, num_real.to(tl.int64))
    tl.store(totals, tokens)
    tl.store(totals + 1, entropy / tl.maximum(tokens, 1.0))
    tl.store(totals + 2, square / tl.maximum(tokens, 1.0))


@triton.jit(do_not_specialize=["num_tokens", "max_tiles"])
def place(
    rank_GT, score_GT, weight_ET, count_E, cut_E, ties_E,
    slot_ET, token_R, weight_R, row_end_E, tile_N3,
    num_tokens, num_experts, max_tiles, weight_step_e, weight_step_t,
    TILE_ROWS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """One program per expert and block of tokens writes the rows of their pairs.

    The first block of an expert also writes its tiles of TILE_ROWS rows; one more expert marks the tiles left over.
    Rows are sorted by expert, then by token. Out:
        slot_ET: int32, the row of a pair, -1 if it is not served. token_R: int32. weight_R: float32.
        row_end_E: int32, the end of the expert's rows. tile_N3: int32, see plan.Lists.
    """
    expert, block = tl.program_id(0), tl.program_id(1)
    other = tl.arange(0, BLOCK_E)
    count = tl.load(count_E + other, mask=other < num_experts, other=0).to(tl.int32)
    row = tl.sum(tl.where(other < expert, count, 0), axis=0)
    if block == 0:
        _write_tiles(count, row, expert, row_end_E, tile_N3, num_experts, max_tiles, TILE_ROWS, BLOCK_E)
    if expert == num_experts:
        return
    cut = tl.load(cut_E + expert)
    ties = tl.load(ties_E + expert)
    column = expert.to(tl.int64) * num_tokens
    # pairs of earlier blocks are counted again here, so that no block waits for another
    ahead, ties_ahead = tl.zeros((BLOCK_T,), tl.int32), tl.zeros((BLOCK_T,), tl.int32)
    for start in range(0, block * BLOCK_T, BLOCK_T):
        key = _priority(rank_GT, score_GT, column, start + tl.arange(0, BLOCK_T), num_tokens)
        ahead += (key < cut).to(tl.int32)
        ties_ahead += (key == cut).to(tl.int32)
    served_ties = tl.minimum(tl.sum(ties_ahead, axis=0), ties)
    row += tl.sum(ahead, axis=0) + served_ties
    token = block * BLOCK_T + tl.arange(0, BLOCK_T)
    key = _priority(rank_GT, score_GT, column, token, num_tokens)
    is_tie = (key == cut).to(tl.int32)
    tie_place = tl.cumsum(is_tie, axis=0) - is_tie
    kept = (key < cut) | ((is_tie != 0) & (tie_place < ties - served_ties))
    kept_int = kept.to(tl.int32)
    slot = row + tl.cumsum(kept_int, axis=0) - kept_int
    tl.store(slot_ET + column + token, tl.where(kept, slot, -1), mask=token < num_tokens)
    tl.store(token_R + slot, token, mask=kept)
    from_weight = expert.to(tl.int64) * weight_step_e + token.to(tl.int64) * weight_step_t
    tl.store(weight_R + slot, tl.load(weight_ET + from_weight, mask=kept, other=0.0), mask=kept)


@triton.jit
def _write_tiles(
    count, row, expert, row_end_E, tile_N3, num_experts, max_tiles,
    TILE_ROWS: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """The tiles of one expert, whose rows begin at ``row``; behind the last expert: those that are left over."""
    other, same = tl.arange(0, BLOCK_E), tl.zeros((BLOCK_E,), tl.int32)
    end = row + tl.sum(tl.where(other == expert, count, 0), axis=0)
    tl.store(row_end_E + expert, end, mask=expert < num_experts)
    tiles = (count + TILE_ROWS - 1) // TILE_ROWS
    first_tile = tl.sum(tl.where(other < expert, tiles, 0), axis=0)
    num_tiles = tl.where(expert == num_experts, max_tiles - first_tile, (end - row + TILE_ROWS - 1) // TILE_ROWS)
    for start in range(0, num_tiles, BLOCK_E):
        mask = start + other < num_tiles
        tile_at = tile_N3 + 3 * (first_tile + start + other)
        tl.store(tile_at, same + expert, mask=mask)
        tl.store(tile_at + 1, tl.minimum(row + (start + other) * TILE_ROWS, end), mask=mask)
        tl.store(tile_at + 2, same + end, mask=mask)


@triton.jit(do_not_specialize=["num_tokens"])
def by_token(
    slot_ET, row_TK, count_T, num_tokens, num_experts, most,
    BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """row_TK int32 out: a token's rows, by expert, packed to the left. count_T int32 out: their number."""
    token = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    expert = tl.arange(0, BLOCK_E)
    mask = (token < num_tokens)[:, None] & (expert < num_experts)[None, :]
    slot = tl.load(slot_ET + expert.to(tl.int64)[None, :] * num_tokens + token[:, None], mask=mask, other=-1)
    kept = (slot >= 0).to(tl.int32)
    rank = tl.cumsum(kept, axis=1) - kept
    tl.store(row_TK + token.to(tl.int64)[:, None] * most + rank, slot, mask=kept != 0)
    tl.store(count_T + token, tl.sum(kept, axis=1), mask=token < num_tokens)


@triton.jit(do_not_specialize=["num_tokens"])
def weight_of_pairs(
    grad_weight_R, slot_ET, grad_TE, num_tokens, num_experts, BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr
):
    """grad_TE float32 out: the gradient of a served pair's weight, 0 elsewhere."""
    token = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    expert = tl.arange(0, BLOCK_E)
    mask = (token < num_tokens)[:, None] & (expert < num_experts)[None, :]
    slot = tl.load(slot_ET + expert.to(tl.int64)[None, :] * num_tokens + token[:, None], mask=mask, other=-1)
    grad = tl.load(grad_weight_R + slot, mask=slot >= 0, other=0.0)
    tl.store(grad_TE + token.to(tl.int64)[:, None] * num_experts + expert[None, :], grad, mask=mask)
