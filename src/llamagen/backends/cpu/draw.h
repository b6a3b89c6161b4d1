// From logits to a drawn code, one image at a time: guidance, temperature, top-k, top-p, draw.
// The same ladder as generation/filters.py, without sorting the vocabulary.

#ifndef LLAMAGEN_DRAW_H
#define LLAMAGEN_DRAW_H

#include <math.h>
#include <stdlib.h>

#include "vectors.h"

#define BUCKETS 2048
#define STRIP 256

// Whole numbers in the order of the floats they stand for.
INLINE uint32_t in_order(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

INLINE float back_from_order(uint32_t bits) {
  bits = bits & 0x80000000u ? bits & 0x7fffffffu : ~bits;
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

// How many of count numbers are no less than `least`.
INLINE int count_from(const float *x, int count, float least) {
  i32x16 found = {0};
  for (int i = 0; i < count; i += LANES) found -= (i32x16)(load_f32(x + i) >= least);
  int total = 0;
  for (int i = 0; i < LANES; i++) total += found[i];
  return total;
}

// The least of those numbers that are no less than `bound`.
INLINE float least_from(const float *x, int count, float bound) {
  v16 least = splat(INFINITY);
  for (int i = 0; i < count; i += LANES) {
    v16 own = load_f32(x + i);
    i32x16 less = (own >= bound) & (own < least);
    least = (v16)((less & (i32x16)own) | (~less & (i32x16)least));
  }
  return -largest(-least);
}

// The k-th largest of count numbers, 1 <= k <= count, up to `peak`: the interval of floats
// that it is in is halved until just k numbers lie above.
static float kth_largest(const float *x, int count, int k, float peak) {
  uint32_t low = in_order(-INFINITY), high = in_order(peak) + 1;
  while (high - low > 1) {
    uint32_t middle = low + (high - low) / 2;
    int above = count_from(x, count, back_from_order(middle));
    if (above == k) return least_from(x, count, back_from_order(middle));
    if (above > k) low = middle;
    else high = middle;
  }
  return back_from_order(low);
}

typedef struct {
  float weight;
  int32_t index;
} Candidate;

static int more_likely(const void *a, const void *b) {
  const Candidate *x = a, *y = b;
  if (x->weight != y->weight) return x->weight < y->weight ? 1 : -1;
  return x->index - y->index;
}

// Sets weights (not negative) behind the code at which they exceed `share` of their sum to zero.
static void keep_share(float *weights, int count, double total, double share, Candidate *room) {
  double mass[BUCKETS] = {0};
  for (int i = 0; i < count; i++) {
    uint32_t bits;
    memcpy(&bits, &weights[i], sizeof bits);
    mass[bits >> 20] += weights[i];
  }
  double goal = share * total, before = 0;
  int bucket = BUCKETS - 1;
  while (bucket > 0 && before + mass[bucket] <= goal) before += mass[bucket--];
  int found = 0;
  for (int i = 0; i < count; i++) {
    uint32_t bits;
    memcpy(&bits, &weights[i], sizeof bits);
    if ((int)(bits >> 20) == bucket && weights[i] > 0)
      room[found++] = (Candidate){weights[i], i};
    else if ((int)(bits >> 20) < bucket)
      weights[i] = 0;
  }
  qsort(room, found, sizeof *room, more_likely);
  int kept = 0;
  while (kept < found && before <= goal) before += room[kept++].weight;
  for (int i = kept; i < found; i++) weights[room[i].index] = 0;
}

// What decides the probabilities of an image's next code.
typedef struct {
  const float *conditional;    // (codes,)
  const float *unconditional;  // (codes,), or NULL without guidance
  float scale, temperature, top_p;
  int32_t top_k;               // 0 keeps all
} Weighing;

INLINE double add_up(const float *x, int count) {
  double part[8] = {0};
  for (int i = 0; i < count; i += 8)
    for (int j = 0; j < 8; j++) part[j] += x[i + j];
  return ((part[0] + part[1]) + (part[2] + part[3])) + ((part[4] + part[5]) + (part[6] + part[7]));
}

// Weights (count,) in proportion to the probabilities; 0 if a logit was not finite, else 1.
static int weigh(const Weighing *w, int count, float *x, Candidate *candidates) {
  const float *c = w->conditional, *u = w->unconditional;
  v16 wrong = splat(0), top = splat(-INFINITY);
  for (int i = 0; i < count; i += LANES) {
    v16 own = load_f32(c + i);
    if (u) own = load_f32(u + i) + w->scale * (own - load_f32(u + i));
    wrong += own * 0.0f;  // stays 0 unless something is infinite or not a number
    i32x16 more = own > top;
    top = (v16)((more & (i32x16)own) | (~more & (i32x16)top));
    store_f32(x + i, own);
  }
  if (sum(wrong) != 0) return 0;
  float peak = largest(top);
  if (w->temperature == 0) {
    int first = 0;
    while (x[first] != peak) first++;
    memset(x, 0, count * sizeof *x);
    x[first] = 1;
    return 1;
  }
  if (w->temperature != 1) {
    for (int i = 0; i < count; i += LANES) store_f32(x + i, load_f32(x + i) / w->temperature);
    peak /= w->temperature;
  }
  float least = w->top_k > 0 && w->top_k < count ? kth_largest(x, count, w->top_k, peak) : -INFINITY;
  for (int i = 0; i < count; i += LANES) {
    v16 own = load_f32(x + i);
    i32x16 kept = own >= least;
    store_f32(x + i, (v16)(kept & (i32x16)exponential(own - peak)));
  }
  if (w->top_p < 1) keep_share(x, count, add_up(x, count), w->top_p, candidates);
  return 1;
}

// The first code whose cumulative weight exceeds the share `uniform` of all: never one of weight 0.
static int pick(const float *x, int count, double uniform) {
  double blocks[(1 << 20) / STRIP], total = 0, reached = 0;
  for (int b = 0; b * STRIP < count; b++) {
    int size = count - b * STRIP < STRIP ? count - b * STRIP : STRIP;
    blocks[b] = add_up(x + b * STRIP, size);
    total += blocks[b];
  }
  double target = uniform * total;
  int b = 0;
  while ((b + 1) * STRIP < count && reached + blocks[b] <= target) reached += blocks[b++];
  int last = -1, start = b * STRIP;
  for (int i = start; i < count; i++) {
    if (x[i] <= 0) continue;
    last = i;
    reached += x[i];
    if (reached > target) break;
  }
  // Sums in another order may fall short of the target by rounding: the last one that counts.
  while (last < 0)
    if (x[--start] > 0) last = start;
  return last;
}

typedef struct {
  Weighing weighing;
  double uniform;  // in [0, 1)
  int64_t code;    // out
  int32_t finite;  // out: 0 if a logit was not
} Draw;

static void draw_one(Draw *d, int count, float *x, Candidate *candidates) {
  d->code = 0;
  d->finite = weigh(&d->weighing, count, x, candidates);
  if (d->finite) d->code = pick(x, count, d->uniform);
}

#endif
