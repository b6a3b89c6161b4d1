// From logits to a sampled code, one row at a time: guidance, temperature, top-k, top-p, min-p and
// an inverse CDF. The same order as generation/sampling.py, without sorting the vocabulary.

#ifndef LLAMAGEN_SAMPLING_H
#define LLAMAGEN_SAMPLING_H

#include <math.h>
#include <stdlib.h>

#include "threads.h"
#include "vectors.h"

#define MAX_CODES (1 << 20)
#define GREEDY_TEMPERATURE 1e-6f  // below it the largest logit is taken
#define BUCKETS 2048              // of a histogram over the upper bits of floats that are not negative
#define CDF_BLOCK 256

typedef struct {
  const float *conditional;    // (codes,) logits
  const float *unconditional;  // (codes,), or NULL without guidance
  float guidance_scale, temperature, top_p, min_p;  // a top_p of 1 and a min_p of 0 keep all codes
  int32_t top_k;   // 0 keeps all codes
  double uniform;  // in [0, 1)
  int64_t code;    // out
  int32_t finite;  // out: 0 if a logit was not
} SamplingRow;

typedef struct {
  float probability;  // not normalised
  int32_t code;
} Candidate;

// Unsigned integers in the order of the floats that they stand for.
INLINE uint32_t ordered_bits(float x) {
  uint32_t bits = bits_of(x);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

INLINE float float_of_ordered_bits(uint32_t bits) {
  return float_of(bits & 0x80000000u ? bits & 0x7fffffffu : ~bits);
}

INLINE int count_at_least(const float *x, int count, float threshold) {
  i32x16 found = {0};
  for (int i = 0; i < count; i += LANES) found -= (i32x16)(load_f32(x + i) >= threshold);
  int total = 0;
  for (int i = 0; i < LANES; i++) total += found[i];
  return total;
}

// The smallest of those numbers that are at least `threshold`.
INLINE float min_at_least(const float *x, int count, float threshold) {
  v16 smallest = splat(INFINITY);
  for (int i = 0; i < count; i += LANES) {
    v16 own = load_f32(x + i);
    smallest = where((own >= threshold) & (own < smallest), own, smallest);
  }
  return -reduce_max(-smallest);
}

// The k-th largest of count numbers, 1 <= k <= count, of which the largest is `max`: bisects the interval
// of floats that it is in until exactly k numbers lie above.
static float kth_largest(const float *x, int count, int k, float max) {
  uint32_t low = ordered_bits(-INFINITY), high = ordered_bits(max) + 1;
  while (high - low > 1) {
    uint32_t middle = low + (high - low) / 2;
    float threshold = float_of_ordered_bits(middle);
    int above = count_at_least(x, count, threshold);
    if (above == k) return min_at_least(x, count, threshold);
    if (above > k) low = middle;
    else high = middle;
  }
  return float_of_ordered_bits(low);
}

static int compare_candidates(const void *a, const void *b) {
  const Candidate *x = a, *y = b;
  if (x->probability != y->probability) return x->probability < y->probability ? 1 : -1;
  return x->code - y->code;
}

// Zeroes probabilities behind the code, from the most likely down, at which their sum exceeds the
// share `top_p` of `total`.
static void apply_top_p(float *probabilities, int count, double total, double top_p,
                        Candidate *candidates) {
  double mass[BUCKETS] = {0};
  for (int i = 0; i < count; i++) mass[bits_of(probabilities[i]) >> 20] += probabilities[i];
  double goal = top_p * total, reached = 0;
  int bucket = BUCKETS - 1;
  while (bucket > 0 && reached + mass[bucket] <= goal) reached += mass[bucket--];
  // Only the bucket in which the goal is reached has to be sorted.
  int found = 0;
  for (int i = 0; i < count; i++) {
    int own = (int)(bits_of(probabilities[i]) >> 20);
    if (own == bucket && probabilities[i] > 0)
      candidates[found++] = (Candidate){probabilities[i], i};
    else if (own < bucket)
      probabilities[i] = 0;
  }
  qsort(candidates, found, sizeof *candidates, compare_candidates);
  int kept = 0;
  while (kept < found && reached <= goal) reached += candidates[kept++].probability;
  for (int i = kept; i < found; i++) probabilities[candidates[i].code] = 0;
}

// Zeroes probabilities below `threshold`.
static void apply_min_p(float *probabilities, int count, float threshold) {
  for (int i = 0; i < count; i += LANES) {
    v16 own = load_f32(probabilities + i);
    store_f32(probabilities + i, (v16)((own >= threshold) & (i32x16)own));
  }
}

INLINE double sum_f64(const float *x, int count) {
  double part[8] = {0};
  for (int i = 0; i < count; i += 8)
    for (int j = 0; j < 8; j++) part[j] += x[i + j];
  return ((part[0] + part[1]) + (part[2] + part[3])) + ((part[4] + part[5]) + (part[6] + part[7]));
}

// Probabilities (count,), not normalised; the largest is 1. Returns 0 if a logit was not finite.
static int softmax_filtered(const SamplingRow *row, int count, float *x, Candidate *candidates) {
  const float *c = row->conditional, *u = row->unconditional;
  v16 not_finite = splat(0), maxima = splat(-INFINITY);
  for (int i = 0; i < count; i += LANES) {
    v16 own = load_f32(c + i);
    if (u) own = load_f32(u + i) + row->guidance_scale * (own - load_f32(u + i));
    not_finite += own * 0.0f;  // stays 0 unless a number is infinite or NaN
    maxima = max_f32(own, maxima);
    store_f32(x + i, own);
  }
  if (reduce_sum(not_finite) != 0) return 0;
  float max = reduce_max(maxima), temperature = row->temperature;
  // Logits that the temperature makes infinite are far enough apart, too.
  if (temperature < GREEDY_TEMPERATURE || !isfinite(max / temperature)) {
    int first = 0;
    while (x[first] != max) first++;
    memset(x, 0, count * sizeof *x);
    x[first] = 1;
    return 1;
  }
  if (temperature != 1) {
    for (int i = 0; i < count; i += LANES) store_f32(x + i, load_f32(x + i) / temperature);
    max /= temperature;
  }
  float threshold = -INFINITY;
  if (row->top_k > 0 && row->top_k < count) threshold = kth_largest(x, count, row->top_k, max);
  for (int i = 0; i < count; i += LANES) {
    v16 own = load_f32(x + i);
    i32x16 kept = own >= threshold;
    store_f32(x + i, (v16)(kept & (i32x16)exp_f32(own - max)));
  }
  if (row->top_p < 1) apply_top_p(x, count, sum_f64(x, count), row->top_p, candidates);
  if (row->min_p > 0) apply_min_p(x, count, row->min_p);
  return 1;
}

// The first code whose cumulative probability exceeds the share `uniform` of all: never one of
// probability 0.
static int sample_from_cdf(const float *probabilities, int count, double uniform) {
  double blocks[MAX_CODES / CDF_BLOCK], total = 0, reached = 0;
  for (int b = 0; b * CDF_BLOCK < count; b++) {
    blocks[b] = sum_f64(probabilities + b * CDF_BLOCK, min_int(count - b * CDF_BLOCK, CDF_BLOCK));
    total += blocks[b];
  }
  double target = uniform * total;
  int b = 0;
  while ((b + 1) * CDF_BLOCK < count && reached + blocks[b] <= target) reached += blocks[b++];
  int last = -1, start = b * CDF_BLOCK;
  for (int i = start; i < count; i++) {
    if (probabilities[i] <= 0) continue;
    last = i;
    reached += probabilities[i];
    if (reached > target) break;
  }
  // Sums in another order may miss the target by rounding: then it is the last code above 0.
  while (last < 0 && start > 0)
    if (probabilities[--start] > 0) last = start;
  return last < 0 ? 0 : last;
}

static void sample_row(SamplingRow *row, int count, float *probabilities, Candidate *candidates) {
  row->code = 0;
  row->finite = softmax_filtered(row, count, probabilities, candidates);
  if (row->finite) row->code = sample_from_cdf(probabilities, count, row->uniform);
}

static size_t sampling_scratch_of_thread(int codes) {
  return align_up((size_t)codes * (sizeof(float) + sizeof(Candidate)));
}

// Bytes of scratch that sample_codes() needs.
size_t sampling_scratch(int32_t codes, int32_t threads) {
  return threads * sampling_scratch_of_thread(codes) + 64;
}

// Samples a code of each row.
void sample_codes(SamplingRow *rows, int32_t count, int32_t codes, int32_t threads, void *scratch) {
  char *start = (char *)align_up((size_t)scratch);
#pragma omp parallel for num_threads(threads) schedule(dynamic)
  for (int i = 0; i < count; i++) {
    float *probabilities = (float *)(start + THREAD * sampling_scratch_of_thread(codes));
    sample_row(&rows[i], codes, probabilities, (Candidate *)(probabilities + codes));
  }
}

#endif
