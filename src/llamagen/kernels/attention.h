// Attention of one new position per sequence to those before it, each as far as it has come.

#ifndef LLAMAGEN_ATTENTION_H
#define LLAMAGEN_ATTENTION_H

#include <math.h>

#include "products.h"

#define WIDEST_HEAD 256
// A processor's own prefetching ends with a page of 4 KB; keys and values go on.
#define AHEAD 4096

INLINE void prefetch(const void *from, size_t bytes) {
  for (size_t i = 0; i < bytes; i += 64) __builtin_prefetch((const char *)from + i);
}

// Turns the interleaved pairs of x (size,) by cosines and sines (size / 2, 2).
INLINE void turn(float *x, const float *rope, int size) {
  for (int i = 0; i < size; i += 2) {
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

// Scores of positions first..last of keys (positions, size), into scores[0..last - first].
INLINE void score_all(const void *keys, int half, int pairs, const float *query, int size, int first,
                      int last, float scale, float *scores) {
  int whole = size / LANES * LANES;
#if PAIRS
  bf16 rounded[WIDEST_HEAD];
  if (pairs) {
    for (int i = 0; i < size; i++) rounded[i] = bf16_of(query[i]);
    whole = size / 32 * 32;
  }
#endif
  for (int start = first; start <= last; start += LANES) {
    v16 part[LANES];
    float rest[LANES] = {0};
    int count = last - start + 1 < LANES ? last - start + 1 : LANES;
    size_t item = half ? 2 : 4;
    prefetch((const char *)keys + (size_t)start * size * item + AHEAD, LANES * size * item);
    for (int j = 0; j < LANES; j++) {
      part[j] = splat(0);
      if (j >= count) continue;
      size_t at = (size_t)(start + j) * size;
      if (pairs) {
#if PAIRS
        const bf16 *key = (const bf16 *)keys + at;
        for (int i = 0; i < whole; i += 32)
          part[j] = add_pairs(part[j], load_pairs(key + i), load_pairs(rounded + i));
        for (int i = whole; i < size; i++) rest[j] += f32_of(key[i]) * f32_of(rounded[i]);
#endif
      } else if (half) {
        const bf16 *key = (const bf16 *)keys + at;
        for (int i = 0; i < whole; i += LANES) part[j] += load_bf16(key + i) * load_f32(query + i);
        for (int i = whole; i < size; i++) rest[j] += f32_of(key[i]) * query[i];
      } else {
        const float *key = (const float *)keys + at;
        for (int i = 0; i < whole; i += LANES) part[j] += load_f32(key + i) * load_f32(query + i);
        for (int i = whole; i < size; i++) rest[j] += key[i] * query[i];
      }
    }
    store_f32(scores + start - first, (sums(part) + load_f32(rest)) * scale);
  }
}

// Softmax over count scores; what follows up to a multiple of sixteen is overwritten.
INLINE void softmax(float *scores, int count) {
  float top = -INFINITY;
  for (int i = 0; i < count; i++) top = scores[i] > top ? scores[i] : top;
  for (int i = count; i % LANES; i++) scores[i] = -INFINITY;
  v16 total = splat(0);
  for (int i = 0; i < count; i += LANES) {
    v16 e = exponential(load_f32(scores + i) - top);
    store_f32(scores + i, e);
    total += e;
  }
  float factor = 1.0f / sum(total);
  for (int i = 0; i < count; i += LANES) store_f32(scores + i, load_f32(scores + i) * factor);
}

// The sum of values (positions, size) of positions first..last, weighted.
INLINE void gather_values(const void *values, int half, const float *weights, int size, int first,
                          int last, float *out) {
  int count = last - first + 1;
  int index = 0;
  // Four vectors of the head at a time stay in registers over all positions.
  for (; index + 4 * LANES <= size; index += 4 * LANES) {
    v16 total[4] = {splat(0), splat(0), splat(0), splat(0)};
    for (int j = 0; j < count; j++) {
      size_t at = (size_t)(first + j) * size + index, item = half ? 2 : 4;
      prefetch((const char *)values + at * item + AHEAD, 4 * LANES * item);
      v16 weight = splat(weights[j]);
      for (int i = 0; i < 4; i++)
        total[i] += weight * (half ? load_bf16((const bf16 *)values + at + i * LANES)
                                   : load_f32((const float *)values + at + i * LANES));
    }
    for (int i = 0; i < 4; i++) store_f32(out + index + i * LANES, total[i]);
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

#endif
