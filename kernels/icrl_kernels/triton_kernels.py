"""The Triton kernels of the head. Inputs and outputs are float32; docs/KERNEL.md has the mathematics.

Logits z are unscaled here and 1/T is applied to differences, where it costs no precision. The statistics of a row (a
token) over a set of columns are four numbers, which can be merged over sets (blocks, splits or ranks):

    top = max z,   total = sum e,   slope = sum e (z - top),   target's z          e = exp((z - top) / T)

Lengths, temperature, bounds and coefficients are runtime values: changing them compiles nothing. FLOOR is the maximum
of an empty set of columns. It is finite, so that a difference of two of them is 0 and not NaN, and so low that its
exponential is 0 relative to any real logit.

Under TRITON_INTERPRET=1 the kernels run on CPU tensors. This does not detect out-of-bounds accesses and races.
"""

from __future__ import annotations

import os

import triton
import triton.language as tl

FLOOR = tl.constexpr(-3.0e38)
LOG2E = tl.constexpr(1.4426950408889634)
# The interpreter truncates float32 to bfloat16; hardware rounds to nearest even.
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET", "0") == "1")


# `columns` is specialized: it is fixed per model, and if it is a multiple of 16, masked loads can be vectorized.
@triton.jit(do_not_specialize=["rows", "first_column", "splits"])
def split_statistics(
    logits_ptr, targets_ptr, partials_ptr, rows, columns, stride, first_column, splits, per_nat, BLOCK: tl.constexpr
):
    """partials[split, 4, rows] of logits[rows, columns]; a program processes one split of a row at a time.

    Each lane keeps statistics of its columns, with one exponential per element: of e^(z - top) and e^(top - z), one
    is 1. `per_nat` is log2(e) / T. The row index has 64 bits because rows * stride may exceed 2^31.
    """
    span = tl.cdiv(tl.cdiv(columns, splits), BLOCK) * BLOCK
    for item in range(tl.program_id(0).to(tl.int64), rows * splits, tl.num_programs(0)):
        row = item // splits
        part = item % splits
        begin = part * span
        end = tl.minimum(begin + span, columns)
        row_ptr = logits_ptr + row * stride
        top = tl.full([BLOCK], FLOOR, tl.float32)
        total = tl.zeros([BLOCK], tl.float32)
        slope = tl.zeros([BLOCK], tl.float32)
        for column in range(begin, end, BLOCK):
            at = column + tl.arange(0, BLOCK)
            z = tl.load(row_ptr + at, mask=at < columns, other=FLOOR).to(tl.float32)
            gap = z - top
            e = tl.exp2(-tl.abs(gap) * per_nat)
            slope = tl.where(gap > 0, e * (slope - gap * total), slope + e * gap)
            total = tl.where(gap > 0, total * e + 1.0, total + e)
            top = tl.maximum(top, z)
        highest = tl.max(top, 0)
        gap = top - highest
        e = tl.exp2(gap * per_nat)
        local = tl.load(targets_ptr + row) - first_column
        owned = (local >= begin) & (local < end)
        target = tl.load(row_ptr + local, mask=owned, other=float("-inf")).to(tl.float32)
        out_ptr = partials_ptr + part * 4 * rows + row
        tl.store(out_ptr, highest)
        tl.store(out_ptr + rows, tl.sum(e * total, 0))
        tl.store(out_ptr + 2 * rows, tl.sum(e * (slope + gap * total), 0))
        tl.store(out_ptr + 3 * rows, target)


@triton.jit
def _merged(partials_ptr, parts, rows, row, inside, per_nat, ROWS: tl.constexpr):
    """(top, total, slope, target) of `parts` partial statistics, for a block of rows."""
    top = tl.full([ROWS], FLOOR, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    slope = tl.zeros([ROWS], tl.float32)
    target = tl.full([ROWS], float("-inf"), tl.float32)
    for part in range(parts):
        at = partials_ptr + part * 4 * rows + row
        their_top = tl.load(at, mask=inside, other=0.0)
        their_total = tl.load(at + rows, mask=inside, other=1.0)
        their_slope = tl.load(at + 2 * rows, mask=inside, other=0.0)
        target = tl.maximum(target, tl.load(at + 3 * rows, mask=inside, other=0.0))
        highest = tl.maximum(top, their_top)
        mine = tl.exp2((top - highest) * per_nat)
        theirs = tl.exp2((their_top - highest) * per_nat)
        slope = mine * (slope + (top - highest) * total)
        slope += theirs * (their_slope + (their_top - highest) * their_total)
        total = mine * total + theirs * their_total
        top = highest
    return top, total, slope, target


@triton.jit(do_not_specialize=["parts", "rows"])
def merge_statistics(partials_ptr, merged_ptr, parts, rows, per_nat, ROWS: tl.constexpr):
    """merged[4, rows] of partials[parts, 4, rows]; a program processes ROWS rows."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    top, total, slope, target = _merged(partials_ptr, parts, rows, row, inside, per_nat, ROWS)
    tl.store(merged_ptr + row, top, mask=inside)
    tl.store(merged_ptr + rows + row, total, mask=inside)
    tl.store(merged_ptr + 2 * rows + row, slope, mask=inside)
    tl.store(merged_ptr + 3 * rows + row, target, mask=inside)


@triton.jit
def _scores(top, total, slope, target, inverse_temperature):
    """(log p of the target, entropy, log of the sum), in nats."""
    log_total = tl.log(total)
    return (
        (target - top) * inverse_temperature - log_total,
        log_total - slope * inverse_temperature / total,
        log_total,
    )


@triton.jit(do_not_specialize=["parts", "rows"])
def score_tokens(
    partials_ptr, logprobs_ptr, entropy_ptr, parts, rows, inverse_temperature, per_nat, ROWS: tl.constexpr
):
    """Log-probs and entropies [rows] of partials[parts, 4, rows], for passes without gradients."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    top, total, slope, target = _merged(partials_ptr, parts, rows, row, inside, per_nat, ROWS)
    logprob, entropy, _ = _scores(top, total, slope, target, inverse_temperature)
    tl.store(logprobs_ptr + row, logprob, mask=inside)
    tl.store(entropy_ptr + row, entropy, mask=inside)


@triton.jit
def _k3(gap):
    """exp(gap) - 1 - gap, as a series where the difference would cancel."""
    series = 1.0 + gap / 5.0 * (1.0 + gap / 6.0 * (1.0 + gap / 7.0 * (1.0 + gap / 8.0 * (1.0 + gap / 9.0))))
    series = 0.5 * gap * gap * (1.0 + gap / 3.0 * (1.0 + gap / 4.0 * series))
    return tl.where(tl.abs(gap) < 0.5, series, tl.exp(gap) - 1.0 - gap)


@triton.jit(do_not_specialize=["parts", "rows"])
def token_objective(
    partials_ptr,  # [parts, 4, rows]
    coefficients_ptr,
    advantages_ptr,
    old_ptr,
    behaviour_ptr,
    calibrated_ptr,  # uint8
    reference_ptr,
    loss_ptr,
    logprobs_ptr,
    entropy_ptr,
    ratio_ptr,
    weight_ptr,
    clipped_low_ptr,  # uint8
    clipped_high_ptr,  # uint8
    finite_ptr,  # uint8
    slopes_ptr,  # [4, rows]: top, log of the sum, dloss/dlogprob, dloss/dentropy
    parts,
    rows,
    inverse_temperature,
    per_nat,
    low,
    high,
    w_max,
    kl_coef,
    entropy_coef,
    shaping_gamma,  # 0: calibrated tokens are weighted and clipped
    HAS_OLD: tl.constexpr,
    HAS_BEHAVIOUR: tl.constexpr,
    HAS_REFERENCE: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Eq. 6 of arXiv 2605.15224 and its derivatives by log-prob and entropy; the kernel of `objective.token_objective`.

    A token with coefficient 0 has loss and slopes 0, ratio and weight 1, whatever its other inputs.
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    top, total, slope, target = _merged(partials_ptr, parts, rows, row, inside, per_nat, ROWS)
    seen_logprob, seen_entropy, log_total = _scores(top, total, slope, target, inverse_temperature)
    coefficient = tl.load(coefficients_ptr + row, mask=inside, other=0.0)
    live = coefficient != 0
    logprob = tl.where(live, seen_logprob, 0.0)
    entropy = tl.where(live, seen_entropy, 0.0)
    advantage = tl.load(advantages_ptr + row, mask=inside & live, other=0.0)
    old = logprob
    if HAS_OLD:
        old = tl.load(old_ptr + row, mask=inside & live, other=0.0)
    ratio = tl.exp(logprob - old)
    clipped_low = (advantage < 0) & (ratio < low)
    clipped_high = (advantage > 0) & (ratio > high)
    weight = tl.full([ROWS], 1.0, tl.float32)
    shaped = row < 0
    if HAS_BEHAVIOUR:
        behaviour = tl.load(behaviour_ptr + row, mask=inside & live, other=0.0)
        calibrated = tl.load(calibrated_ptr + row, mask=inside & live, other=0) != 0
        proposed = tl.exp(old - behaviour)
        # Not a minimum: NaN must propagate.
        weight = tl.where(calibrated, tl.where(proposed > w_max, w_max, proposed), 1.0)
        shaped = calibrated & (shaping_gamma > 0)
        likely = tl.exp(logprob)
        weight = tl.where(shaped, likely / (likely + shaping_gamma), weight)
        clipped_low = clipped_low & (shaped == 0)
        clipped_high = clipped_high & (shaped == 0)
    clipped = clipped_low | clipped_high
    bound = tl.where(clipped_low, low, high)
    used_ratio = tl.where(shaped, 1.0, tl.where(clipped, bound, ratio))
    loss = -weight * used_ratio * advantage
    # df/dlogprob = f (1 - f), where f replaces weight and ratio.
    steep = tl.where(shaped, 1.0 - weight, ratio)
    logprob_slope = tl.where(clipped, 0.0, -weight * steep * advantage)
    if HAS_REFERENCE:
        gap = tl.load(reference_ptr + row, mask=inside & live, other=0.0) - logprob
        k3 = _k3(gap)
        loss += kl_coef * k3
        logprob_slope -= kl_coef * (k3 + gap)
    loss -= entropy_coef * entropy
    loss *= coefficient
    finite = tl.abs(seen_logprob + seen_entropy + loss) < float("inf")
    tl.store(loss_ptr + row, loss, mask=inside)
    tl.store(logprobs_ptr + row, seen_logprob, mask=inside)
    tl.store(entropy_ptr + row, seen_entropy, mask=inside)
    tl.store(ratio_ptr + row, ratio, mask=inside)
    tl.store(weight_ptr + row, weight, mask=inside)
    tl.store(clipped_low_ptr + row, clipped_low.to(tl.uint8), mask=inside)
    tl.store(clipped_high_ptr + row, clipped_high.to(tl.uint8), mask=inside)
    tl.store(finite_ptr + row, finite.to(tl.uint8), mask=inside)
    tl.store(slopes_ptr + row, top, mask=inside)
    tl.store(slopes_ptr + rows + row, log_total, mask=inside)
    tl.store(slopes_ptr + 2 * rows + row, logprob_slope * coefficient, mask=inside)
    tl.store(slopes_ptr + 3 * rows + row, tl.where(live, -entropy_coef * coefficient, 0.0), mask=inside)


@triton.jit
def _rounded(x, dtype: tl.constexpr):
    """float32 to `dtype`, rounded to nearest even."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        bits += 0x7FFF + ((bits >> 16) & 1)
        return (bits >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    return x.to(dtype)


@triton.jit(do_not_specialize=["rows", "first_column", "splits"])
def logit_gradients(
    logits_ptr,
    gradients_ptr,
    targets_ptr,
    entropy_ptr,
    slopes_ptr,
    rows,
    columns,
    stride,
    gradient_stride,
    first_column,
    splits,
    inverse_temperature,
    per_nat,
    HAS_ENTROPY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Writes dloss/dz into the logits' memory: dz_v = (g (1[v = target] - p_v) - s p_v (log p_v + H)) / T,
    with g = dloss/dlogprob and s = dloss/dentropy.

    Gradients may be narrower than logits. Block j of a row is then written below the start of block j, so a row belongs
    to one program (`splits` 1) that processes it in ascending order, and only the first block overlaps with itself: it
    is read completely before it is written. A row whose slopes are 0 is not read.
    """
    span = tl.cdiv(tl.cdiv(columns, splits), BLOCK) * BLOCK
    for item in range(tl.program_id(0).to(tl.int64), rows * splits, tl.num_programs(0)):
        row = item // splits
        begin = (item % splits) * span
        end = tl.minimum(begin + span, columns)
        row_ptr = logits_ptr + row * stride
        out_ptr = gradients_ptr + row * gradient_stride
        top = tl.load(slopes_ptr + row)
        log_total = tl.load(slopes_ptr + rows + row)
        g = tl.load(slopes_ptr + 2 * rows + row) * inverse_temperature
        s = tl.load(slopes_ptr + 3 * rows + row) * inverse_temperature
        entropy = tl.load(entropy_ptr + row)
        local = tl.load(targets_ptr + row) - first_column
        silent = (g == 0) & (s == 0)
        for column in range(begin, end, BLOCK):
            at = column + tl.arange(0, BLOCK)
            inside = at < columns
            z = tl.load(row_ptr + at, mask=inside & (silent == 0), other=0.0).to(tl.float32)
            tl.debug_barrier()
            p = tl.exp2((z - top) * per_nat - log_total * LOG2E)
            dz = -g * p
            if HAS_ENTROPY:
                log_p = (z - top) * inverse_temperature - log_total
                dz -= s * p * (log_p + entropy)
            dz = tl.where(silent, 0.0, tl.where(at == local, dz + g, dz))
            tl.store(out_ptr + at, _rounded(dz, gradients_ptr.dtype.element_ty), mask=inside)
