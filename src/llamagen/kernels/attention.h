// Attention of one new position per sequence to those before it, each as far as it has come.

#ifndef LLAMAGEN_ATTENTION_H
#define LLAMAGEN_ATTENTION_H

#include <math.h>

#include "products.h"

#define WIDEST_HEAD 256
// A processor's own prefetching ends with a page of 4 KB; keys and values go on.
#define AHEAD 4096

// Fetches what will be read AHEAD bytes behind `at` of a stretch of memory; where the stretch
// ends, `then` follows, if anything does.
INLINE void fetch_ahead(const char *from, size_t at, size_t size, size_t end, const char *then) {
  at += AHEAD;
  const char *source = at < end ? from + at : then ? then + (at - end) : NULL;
  if (source)
    for (size_t i = 0; i < size; i += 64) __builtin_prefetch(source + i, 0, 2);
}

// Turns the interleaved pairs of x (size,) by cosines and sines (size / 2, 2).
INLINE void turn(float *x, const float *rope, int size) {
  const v16 sign = {-1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1};
  int i = 0;
  for (; i + LANES <= size; i += LANES) {
    v16 own = load_f32(x + i), both = load_f32(rope + i);
    v16 cosines = SHUFFLE(both, 0, 0, 2, 2, 4, 4, 6, 6, 8, 8, 10, 10, 12, 12, 14, 14);
    v16 sines = SHUFFLE(both, 1, 1, 3, 3, 5, 5, 7, 7, 9, 9, 11, 11, 13, 13, 15, 15);
    v16 swapped = SHUFFLE(own, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14);
    store_f32(x + i, own * cosines + swapped * (sines * sign));
  }
  for (; i < size; i += 2) {
    float even = x[i], odd = x[i + 1], c = rope[i], s = rope[i + 1];
    x[i] = even * c - odd * s;
    x[i + 1] = odd * c + even * s;
  }
}

INLINE void keep(void *cache, int half, size_t at, const float *x, int size) {
  if (!half) {
    memcpy((float *)cache + at, x, size * sizeof(float));
    return;
  }
  for (int i = 0; i < size; i++) ((bf16 *)cache + at)[i] = bf16_of(x[i]);
}

// The scores of sixteen positions from `keys` on, in the lanes of a vector.
INLINE v16 score_sixteen(const void *keys, int half, int pairs, const float *query,
                         const bf16 *rounded, int size, int count) {
  int whole = size / (pairs ? 32 : LANES) * (pairs ? 32 : LANES);
  (void)rounded;
  v16 part[LANES];
  float rest[LANES] = {0};
  UNROLL for (int j = 0; j < LANES; j++) {
    part[j] = splat(0);
    if (j >= count) continue;
    size_t at = (size_t)j * size;
    if (pairs) {
#if PAIRS
      const bf16 *key = (const bf16 *)keys + at;
      UNROLL for (int i = 0; i < whole; i += 32)
        part[j] = add_pairs(part[j], load_pairs(key + i), load_pairs(rounded + i));
      for (int i = whole; i < size; i++) rest[j] += f32_of(key[i]) * f32_of(rounded[i]);
#endif
    } else if (half) {
      const bf16 *key = (const bf16 *)keys + at;
      UNROLL for (int i = 0; i < whole; i += LANES)
        part[j] += load_bf16(key + i) * load_f32(query + i);
      for (int i = whole; i < size; i++) rest[j] += f32_of(key[i]) * query[i];
    } else {
      const float *key = (const float *)keys + at;
      UNROLL for (int i = 0; i < whole; i += LANES)
        part[j] += load_f32(key + i) * load_f32(query + i);
      for (int i = whole; i < size; i++) rest[j] += key[i] * query[i];
    }
  }
  v16 found = sums(part, LANES);
  return whole == size ? found : found + load_f32(rest);
}

// Scores of positions first..last of keys (positions, size), into scores[0..last - first].
// `then` is what is read next.
INLINE void score_all(const void *keys, int half, int pairs, const float *query, int size, int first,
                      int last, float scale, float *scores, const char *then) {
  bf16 rounded[WIDEST_HEAD];
  if (pairs)
    for (int i = 0; i < size; i++) rounded[i] = bf16_of(query[i]);
  size_t position = (size_t)size * (half ? 2 : 4);
  const char *own = (const char *)keys + first * position;
  int start = first;
  for (; start + LANES <= last + 1; start += LANES, own += LANES * position) {
    fetch_ahead(keys, start * position, LANES * position, (last + 1) * position, then);
    v16 found = score_sixteen(own, half, pairs, query, rounded, size, LANES);
    store_f32(scores + start - first, found * scale);
  }
  if (start <= last) {
    fetch_ahead(keys, start * position, LANES * position, (last + 1) * position, then);
    v16 found = score_sixteen(own, half, pairs, query, rounded, size, last + 1 - start);
    store_f32(scores + start - first, found * scale);
  }
}

// Softmax over count scores; what follows up to a multiple of sixteen is overwritten.
INLINE void softmax(float *scores, int count) {
  for (int i = count; i % LANES; i++) scores[i] = -INFINITY;
  v16 most = splat(-INFINITY);
  for (int i = 0; i < count; i += LANES) most = larger(load_f32(scores + i), most);
  float top = largest(most);
  v16 total = splat(0);
  for (int i = 0; i < count; i += LANES) {
    v16 e = exponential(load_f32(scores + i) - top);
    store_f32(scores + i, e);
    total += e;
  }
  float factor = 1.0f / sum(total);
  for (int i = 0; i < count; i += LANES) store_f32(scores + i, load_f32(scores + i) * factor);
}

// Thirty-two numbers in two vectors. Of bfloat16 one has the even ones and one the odd ones, which
// is less work; gather_values() puts them back into order.
INLINE void load_two(const void *p, int half, v16 *x, v16 *y) {
  if (half) {
    u16x32 both;
    memcpy(&both, p, sizeof both);
    *x = (v16)(both << 16);
    *y = (v16)(both & 0xffff0000u);
  } else {
    *x = load_f32(p);
    *y = load_f32((const float *)p + LANES);
  }
}

// The sum of values (positions, size) of positions first..last, weighted. `then` is what is read
// next.
INLINE void gather_values(const void *values, int half, const float *weights, int size, int first,
                          int last, float *out, const char *then) {
  int count = last - first + 1, index = 0;
  size_t item = half ? 2 : 4, position = size * item, end = (last + 1) * position;
  // Four vectors of the head at a time stay in registers over all positions.
  for (; index + 4 * LANES <= size; index += 4 * LANES) {
    v16 total[4] = {splat(0), splat(0), splat(0), splat(0)};
    const char *own = (const char *)values + first * position + index * item;
    for (int j = 0; j < count; j++, own += position) {
      fetch_ahead(values, own - (const char *)values, 4 * LANES * item, end, then);
      v16 weight = splat(weights[j]), x[4];
      load_two(own, half, &x[0], &x[1]);
      load_two(own + 2 * LANES * item, half, &x[2], &x[3]);
      UNROLL for (int i = 0; i < 4; i++) total[i] += weight * x[i];
    }
    UNROLL for (int i = 0; i < 4; i++)
      for (int k = 0; k < LANES; k++) {
        int place = half ? i / 2 * 2 * LANES + 2 * k + (i & 1) : i * LANES + k;
        out[index + place] = total[i][k];
      }
  }
  for (; index + LANES <= size; index += LANES) {
    v16 total = splat(0);
    for (int j = 0; j < count; j++) {
      size_t at = (size_t)(first + j) * size + index;
      total += splat(weights[j]) * (half ? load_bf16((const bf16 *)values + at)
                                         : load_f32((const float *)values + at));
    }
    store_f32(out + index, total);
  }
  for (; index < size; index++) {
    float total = 0;
    for (int j = 0; j < count; j++) {
      size_t at = (size_t)(first + j) * size + index;
      total += weights[j] * (half ? f32_of(((const bf16 *)values)[at]) : ((const float *)values)[at]);
    }
    out[index] = total;
  }
}

// One query's attention to positions first..last, in a head of a size that the compiler may know.
INLINE void attend_head(const void *keys, const void *values, int half, int pairs,
                        const float *query, int size, int first, int last, float *scores,
                        float *out, const char *then) {
  score_all(keys, half, pairs, query, size, first, last, 1.0f / sqrtf(size), scores, values);
  softmax(scores, last - first + 1);
  gather_values(values, half, scores, size, first, last, out, then);
}

#endif
