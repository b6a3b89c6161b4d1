// Attention of one token to the positions of its sequence up to its own.

#ifndef LLAMAGEN_ATTENTION_H
#define LLAMAGEN_ATTENTION_H

#include <math.h>

#include "matmul.h"

#define MAX_HEAD_DIM 256
// A processor's own prefetching ends with a page of 4 KB; keys and values go on.
#define PREFETCH_DISTANCE 4096

// Prefetches `size` bytes at PREFETCH_DISTANCE behind offset `at` of memory that ends at `end`;
// there `next` follows, if anything does.
INLINE void prefetch_ahead(const char *from, size_t at, size_t size, size_t end, const char *next) {
  at += PREFETCH_DISTANCE;
  const char *source = at < end ? from + at : next ? next + (at - end) : NULL;
  if (source)
    for (size_t i = 0; i < size; i += 64) __builtin_prefetch(source + i, 0, 2);
}

// Rotates the interleaved pairs of x (size,) by cosines and sines (size / 2, 2).
INLINE void apply_rotary(float *x, const float *rope, int size) {
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

// Stored keys or values of one head of a sequence, position after position.
typedef struct {
  char *data;     // (positions, size)
  float *scales;  // (positions,) of int8; NULL where they are floats
} KVHead;

// Stores the key or value of a position.
INLINE void store_kv(KVHead kv, int is_bf16, int position, const float *x, int size) {
  size_t at = (size_t)position * size;
  if (kv.scales) {
    float max = absmax(x, size), factor = 127.0f / max;
    kv.scales[position] = max * (1.0f / 127.0f);
    for (int i = 0; i < size; i++) ((int8_t *)kv.data)[at + i] = (int8_t)rintf(x[i] * factor);
  } else {
    for (int i = 0; i < size; i++) store_one(is_bf16, kv.data, at + i, x[i]);
  }
}

// The scores of up to sixteen positions from `keys` on, in the lanes of a vector.
INLINE v16 score_block(const void *keys, int is_bf16, int dot, const float *query,
                       const bf16 *query_bf16, int size, int count) {
  int step = dot == DOT_BF16 ? 32 : LANES, whole = size / step * step;
  (void)query_bf16;
  v16 part[LANES];
  float rest[LANES] = {0};
  UNROLL for (int j = 0; j < LANES; j++) {
    part[j] = splat(0);
    if (j >= count) continue;
    size_t at = (size_t)j * size;
    if (dot == DOT_BF16) {
#if HAS_AVX512_BF16
      const bf16 *key = (const bf16 *)keys + at;
      UNROLL4 for (int i = 0; i < whole; i += 32)
        part[j] = dot_bf16(part[j], load_bf16x32(key + i), load_bf16x32(query_bf16 + i));
      for (int i = whole; i < size; i++) rest[j] += bf16_to_f32(key[i]) * bf16_to_f32(query_bf16[i]);
#endif
    } else {
      UNROLL4 for (int i = 0; i < whole; i += LANES)
        part[j] += load(is_bf16, keys, at + i) * load_f32(query + i);
      for (int i = whole; i < size; i++) rest[j] += load_one(is_bf16, keys, at + i) * query[i];
    }
  }
  v16 found = reduce_sums(part, LANES);
  return whole == size ? found : found + load_f32(rest);
}

// The scores of `count` positions of keys (count, size). `next` is read next.
INLINE void score_positions(const void *keys, int is_bf16, int dot, const float *query, int size,
                            int count, float scale, float *scores, const char *next) {
  bf16 query_bf16[MAX_HEAD_DIM];
  if (dot == DOT_BF16)
    for (int i = 0; i < size; i++) query_bf16[i] = f32_to_bf16(query[i]);
  size_t position = (size_t)size * (is_bf16 ? 2 : 4), end = count * position;
  const char *own = keys;
  for (int start = 0; start < count; start += LANES, own += LANES * position) {
    int rest = count - start;
    prefetch_ahead(keys, start * position, LANES * position, end, next);
    v16 found = rest >= LANES ? score_block(own, is_bf16, dot, query, query_bf16, size, LANES)
                              : score_block(own, is_bf16, dot, query, query_bf16, size, rest);
    store_f32(scores + start, found * scale);
  }
}

// Softmax over count scores; those behind, up to a multiple of sixteen, are overwritten.
INLINE void softmax(float *scores, int count) {
  for (int i = count; i % LANES; i++) scores[i] = -INFINITY;
  v16 maxima = splat(-INFINITY);
  for (int i = 0; i < count; i += LANES) maxima = max_f32(load_f32(scores + i), maxima);
  float max = reduce_max(maxima);
  v16 total = splat(0);
  for (int i = 0; i < count; i += LANES) {
    v16 e = exp_f32(load_f32(scores + i) - max);
    store_f32(scores + i, e);
    total += e;
  }
  float factor = 1.0f / reduce_sum(total);
  for (int i = 0; i < count; i += LANES) store_f32(scores + i, load_f32(scores + i) * factor);
}

// Thirty-two numbers in two vectors. Of bfloat16 one has the even ones and one the odd ones, which is
// less work; weighted_sum() restores their order.
INLINE void load_two_vectors(const void *p, int is_bf16, v16 *x, v16 *y) {
  if (is_bf16) {
    u32x16 both;
    memcpy(&both, p, sizeof both);
    *x = (v16)(both << 16);
    *y = (v16)(both & 0xffff0000u);
  } else {
    *x = load_f32(p);
    *y = load_f32((const float *)p + LANES);
  }
}

// The weighted sum of values (count, size). `next` is read next.
INLINE void weighted_sum(const void *values, int is_bf16, const float *weights, int size, int count,
                         float *out, const char *next) {
  int index = 0;
  size_t item = is_bf16 ? 2 : 4, position = size * item, end = count * position;
  // Four vectors of the head at a time stay in registers over all positions.
  for (; index + 4 * LANES <= size; index += 4 * LANES) {
    v16 total[4] = {splat(0), splat(0), splat(0), splat(0)};
    const char *own = (const char *)values + index * item;
    for (int j = 0; j < count; j++, own += position) {
      prefetch_ahead(values, own - (const char *)values, 4 * LANES * item, end, next);
      v16 weight = splat(weights[j]), x[4];
      load_two_vectors(own, is_bf16, &x[0], &x[1]);
      load_two_vectors(own + 2 * LANES * item, is_bf16, &x[2], &x[3]);
      UNROLL for (int i = 0; i < 4; i++) total[i] += weight * x[i];
    }
    UNROLL for (int i = 0; i < 4; i++)
      for (int k = 0; k < LANES; k++) {
        int to = is_bf16 ? i / 2 * 2 * LANES + 2 * k + (i & 1) : i * LANES + k;
        out[index + to] = total[i][k];
      }
  }
  for (; index + LANES <= size; index += LANES) {
    v16 total = splat(0);
    for (int j = 0; j < count; j++)
      total += splat(weights[j]) * load(is_bf16, values, (size_t)j * size + index);
    store_f32(out + index, total);
  }
  for (; index < size; index++) {
    float total = 0;
    for (int j = 0; j < count; j++)
      total += weights[j] * load_one(is_bf16, values, (size_t)j * size + index);
    out[index] = total;
  }
}

#if HAS_AVX512_VNNI
// The scores of up to sixteen positions from `keys` on. The last one stands in for those that are
// missing: nothing may be read behind the end of the memory.
INLINE v16 score_block_vnni(const int8_t *keys, const int16_t *query, int size, int count) {
  v16 part[LANES];
  UNROLL for (int j = 0; j < LANES; j++) {
    const int8_t *key = keys + (size_t)(j < count ? j : count - 1) * size;
    v16 sum = splat(0);
    UNROLL4 for (int i = 0; i < size; i += 32)
      sum = dot_int16(sum, load_int8x32(key + i), load_f32((const float *)(query + i)));
    part[j] = (v16)_mm512_cvtepi32_ps((__m512i)sum);
  }
  return reduce_sums(part, LANES);
}

// Sixteen scales; those behind the `count`th are 0.
INLINE v16 load_scales(const float *scales, int count) {
  return (v16)_mm512_maskz_loadu_ps((__mmask16)((1u << count) - 1), scales);
}

// As score_positions, of int8 keys and a query that is quantised to int16.
INLINE void score_positions_vnni(KVHead keys, const float *query, int size, int count, float scale,
                                 float *scores, const char *next) {
  int16_t quantized[MAX_HEAD_DIM];
  float max = absmax(query, size), factor = INT16_LIMIT / max;
  for (int i = 0; i < size; i++) quantized[i] = (int16_t)rintf(query[i] * factor);
  scale *= max * (1.0f / INT16_LIMIT);
  size_t end = (size_t)count * size;
  for (int start = 0; start < count; start += LANES) {
    const int8_t *own = (const int8_t *)keys.data + (size_t)start * size;
    int rest = count - start;
    prefetch_ahead(keys.data, (size_t)start * size, LANES * size, end, next);
    v16 found, factors;
    if (rest >= LANES) {
      found = score_block_vnni(own, quantized, size, LANES);
      factors = load_f32(keys.scales + start);
    } else {
      found = score_block_vnni(own, quantized, size, rest);
      factors = load_scales(keys.scales + start, rest);
    }
    store_f32(scores + start, found * factors * scale);
  }
}

// Adds 64 numbers of the values of four positions from `values` on, times weights of 16 bits whose
// upper and lower bytes are multiplied separately. The last position stands in for those behind the
// `count`th, whose weights are 0.
INLINE void add_four_values_vnni(const int8_t *values, int size, int count, __m512i high,
                                 __m512i low, __m512i *upper, __m512i *lower) {
  __m512i x[4];
  UNROLL for (int i = 0; i < 4; i++)
    x[i] = _mm512_loadu_si512(values + (size_t)(i < count ? i : count - 1) * size);
  __m512i a = _mm512_unpacklo_epi8(x[0], x[1]), b = _mm512_unpackhi_epi8(x[0], x[1]);
  __m512i c = _mm512_unpacklo_epi8(x[2], x[3]), d = _mm512_unpackhi_epi8(x[2], x[3]);
  x[0] = _mm512_unpacklo_epi16(a, c), x[1] = _mm512_unpackhi_epi16(a, c);
  x[2] = _mm512_unpacklo_epi16(b, d), x[3] = _mm512_unpackhi_epi16(b, d);
  UNROLL for (int i = 0; i < 4; i++) {
    upper[i] = _mm512_dpbusd_epi32(upper[i], high, x[i]);
    lower[i] = _mm512_dpbusd_epi32(lower[i], low, x[i]);
  }
}

// As weighted_sum, of int8 values: weights times the scales of the values are quantised to 16 bits.
// Weights are overwritten.
INLINE void weighted_sum_vnni(KVHead values, float *weights, int size, int count, float *out,
                              const char *next) {
  v16 maxima = splat(MIN_ABSMAX);
  for (int i = 0; i < count; i += LANES) {
    const float *scales = values.scales + i;
    int rest = count - i;
    v16 own = load_f32(weights + i) * (rest < LANES ? load_scales(scales, rest) : load_f32(scales));
    store_f32(weights + i, own);
    maxima = max_f32(maxima, own);
  }
  float max = reduce_max(maxima), factor = 65280.0f / max;
  size_t end = (size_t)count * size;
  for (int index = 0; index < size; index += 64) {
    __m512i upper[4], lower[4];
    UNROLL for (int i = 0; i < 4; i++) upper[i] = lower[i] = _mm512_setzero_si512();
    for (int start = 0; start < count; start += LANES) {
      __m512i integers = _mm512_cvtps_epi32((__m512)(load_f32(weights + start) * factor));
      uint32_t uppers[4], lowers[4];
      _mm_storeu_si128((__m128i *)uppers, _mm512_cvtepi32_epi8(_mm512_srli_epi32(integers, 8)));
      _mm_storeu_si128((__m128i *)lowers, _mm512_cvtepi32_epi8(integers));
      size_t at = (size_t)start * size;
      const int8_t *own = (const int8_t *)values.data + at + index;
      if (index == 0) prefetch_ahead(values.data, at, LANES * size, end, next);
      UNROLL for (int four = 0; four < 4; four++, own += 4 * size) {
        int rest = count - start - 4 * four;
        if (rest <= 0) break;
        __m512i high = _mm512_set1_epi32((int)uppers[four]);
        __m512i low = _mm512_set1_epi32((int)lowers[four]);
        if (rest >= 4) add_four_values_vnni(own, size, 4, high, low, upper, lower);
        else add_four_values_vnni(own, size, rest, high, low, upper, lower);
      }
    }
    // Numbers that belong together are in the same quarters of the four vectors.
    UNROLL for (int i = 0; i < 4; i++) {
      v16 both = (v16)_mm512_cvtepi32_ps(upper[i]) * 256.0f + (v16)_mm512_cvtepi32_ps(lower[i]);
      float found[LANES];
      store_f32(found, both * (max * (1.0f / 65280.0f)));
      for (int lane = 0; lane < 4; lane++)
        memcpy(out + index + lane * LANES + i * 4, found + lane * 4, 4 * sizeof(float));
    }
  }
}
#endif

// As score_positions and weighted_sum, of int8 keys and values that are multiplied as floats.
INLINE void score_positions_int8(KVHead keys, const float *query, int size, int count, float scale,
                                 float *scores) {
  for (int j = 0; j < count; j++) {
    const int8_t *key = (const int8_t *)keys.data + (size_t)j * size;
    v16 total = splat(0);
    int i = 0;
    for (; i + LANES <= size; i += LANES) total += load_int8(key + i) * load_f32(query + i);
    float found = reduce_sum(total);
    for (; i < size; i++) found += key[i] * query[i];
    scores[j] = found * keys.scales[j] * scale;
  }
}

INLINE void weighted_sum_int8(KVHead values, const float *weights, int size, int count, float *out) {
  for (int i = 0; i < size; i++) out[i] = 0;
  for (int j = 0; j < count; j++) {
    const int8_t *value = (const int8_t *)values.data + (size_t)j * size;
    float weight = weights[j] * values.scales[j];
    int i = 0;
    for (; i + LANES <= size; i += LANES)
      store_f32(out + i, load_f32(out + i) + load_int8(value + i) * weight);
    for (; i < size; i++) out[i] += value[i] * weight;
  }
}

// One query's attention to the positions of a head.
typedef struct {
  KVHead keys, values;
  const float *query;  // (size,)
  int size;
  int count;         // positions attended to, from the first one on
  float *scores;     // (count,) scratch, up to a multiple of sixteen
  float *out;        // (size,)
  const char *next;  // what is read next
} Attention;

INLINE void attend_floats(const Attention *a, int is_bf16, int dot, int size) {
  const char *keys = a->keys.data, *values = a->values.data;
  score_positions(keys, is_bf16, dot, a->query, size, a->count, 1.0f / sqrtf(size), a->scores,
                  values);
  softmax(a->scores, a->count);
  weighted_sum(values, is_bf16, a->scores, size, a->count, a->out, a->next);
}

INLINE void attend_int8(const Attention *a, int size) {
  float scale = 1.0f / sqrtf(size);
#if HAS_AVX512_VNNI
  if (size % 64 == 0) {
    score_positions_vnni(a->keys, a->query, size, a->count, scale, a->scores, a->values.data);
    softmax(a->scores, a->count);
    weighted_sum_vnni(a->values, a->scores, size, a->count, a->out, a->next);
    return;
  }
#endif
  score_positions_int8(a->keys, a->query, size, a->count, scale, a->scores);
  softmax(a->scores, a->count);
  weighted_sum_int8(a->values, a->scores, size, a->count, a->out);
}

// Each variant is a function of its own: in one, they take a compiler three times as long. Heads of
// 64 are those of every preset but the largest.
#define VARIANT(name, work) \
  static __attribute__((noinline)) void name(const Attention *a) { work; }
#define BF16_DOT (HAS_AVX512_BF16 ? DOT_BF16 : DOT_F32)
VARIANT(attend_int8_64, attend_int8(a, 64))
VARIANT(attend_int8_any, attend_int8(a, a->size))
VARIANT(attend_bf16_64, attend_floats(a, 1, BF16_DOT, 64))
VARIANT(attend_bf16_any, attend_floats(a, 1, BF16_DOT, a->size))
VARIANT(attend_f32_any, attend_floats(a, 0, DOT_F32, a->size))
#undef BF16_DOT
#undef VARIANT

static void attend_query(const Attention *a, int is_bf16) {
  if (a->keys.scales) (a->size == 64 ? attend_int8_64 : attend_int8_any)(a);
  else if (is_bf16) (a->size == 64 ? attend_bf16_64 : attend_bf16_any)(a);
  else attend_f32_any(a);
}

#endif
