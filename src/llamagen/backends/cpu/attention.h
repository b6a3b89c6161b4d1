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

// Keys or values of one head of a sequence, position after position.
typedef struct {
  char *data;     // (positions, size)
  float *scales;  // (positions,) of whole numbers of eight bits; NULL where they are floats
} Kept;

// Bytes of a number that is kept.
INLINE int kept_bytes(int half, int whole) { return whole ? 1 : half ? 2 : 4; }

// A position's key or value joins those that are kept.
INLINE void keep(Kept kept, int half, int place, const float *x, int size) {
  size_t at = (size_t)place * size;
  if (kept.scales) {
    float most = most_of(x, size), factor = 127.0f / most;
    kept.scales[place] = most * (1.0f / 127.0f);
    for (int i = 0; i < size; i++) ((int8_t *)kept.data)[at + i] = (int8_t)rintf(x[i] * factor);
  } else if (half) {
    for (int i = 0; i < size; i++) ((bf16 *)kept.data)[at + i] = bf16_of(x[i]);
  } else {
    memcpy((float *)kept.data + at, x, size * sizeof(float));
  }
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
      UNROLL_FEW for (int i = 0; i < whole; i += 32)
        part[j] = add_pairs(part[j], load_pairs(key + i), load_pairs(rounded + i));
      for (int i = whole; i < size; i++) rest[j] += f32_of(key[i]) * f32_of(rounded[i]);
#endif
    } else if (half) {
      const bf16 *key = (const bf16 *)keys + at;
      UNROLL_FEW for (int i = 0; i < whole; i += LANES)
        part[j] += load_bf16(key + i) * load_f32(query + i);
      for (int i = whole; i < size; i++) rest[j] += f32_of(key[i]) * query[i];
    } else {
      const float *key = (const float *)keys + at;
      UNROLL_FEW for (int i = 0; i < whole; i += LANES)
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

#if WORDS
// Products with whole numbers that are kept take heads of whole vectors.
INLINE int has_whole_heads(int size) { return size % 64 == 0; }

// The scores of sixteen positions from `keys` on; behind the `count`th, it is read again: nothing
// may be read behind the memory's end.
INLINE v16 score_sixteen_whole(const int8_t *keys, const int16_t *query, int size, int count) {
  v16 part[LANES];
  UNROLL for (int j = 0; j < LANES; j++) {
    const int8_t *key = keys + (size_t)(j < count ? j : count - 1) * size;
    __m512i sum = _mm512_setzero_si512();
    UNROLL_FEW for (int i = 0; i < size; i += 32)
      sum = add_words(sum, _mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i *)(key + i))),
                      _mm512_loadu_si512(query + i));
    part[j] = (v16)_mm512_cvtepi32_ps(sum);
  }
  return sums(part, LANES);
}

// Sixteen scales; those behind the `count`th are 0.
INLINE v16 some_scales(const float *scales, int count) {
  return (v16)_mm512_maskz_loadu_ps((__mmask16)((1u << count) - 1), scales);
}

// As score_all, of whole numbers: those of the query have sixteen bits.
INLINE void score_whole(Kept keys, const float *query, int size, int first, int last, float scale,
                        float *scores, const char *then) {
  int16_t whole[WIDEST_HEAD];
  float most = most_of(query, size), factor = 32512.0f / most;
  for (int i = 0; i < size; i++) whole[i] = (int16_t)rintf(query[i] * factor);
  scale *= most * (1.0f / 32512.0f);
  size_t end = (size_t)(last + 1) * size;
  for (int start = first; start <= last; start += LANES) {
    const int8_t *own = (const int8_t *)keys.data + (size_t)start * size;
    int count = last + 1 - start;
    fetch_ahead(keys.data, (size_t)start * size, LANES * size, end, then);
    v16 found, factors;
    if (count >= LANES) {
      found = score_sixteen_whole(own, whole, size, LANES);
      factors = load_f32(keys.scales + start);
    } else {
      found = score_sixteen_whole(own, whole, size, count);
      factors = some_scales(keys.scales + start, count);
    }
    store_f32(scores + start - first, found * factors * scale);
  }
}

// Adds the values of four positions from `values` on, in their 64 numbers, times weights of eight
// bits, twice. Behind the `count`th, whose weights are 0, it is read again.
INLINE void gather_four(const int8_t *values, int size, int count, __m512i high, __m512i low,
                        __m512i *upper, __m512i *lower) {
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

// As gather_values, of whole numbers: weights, times the values' scales, have sixteen bits, in two
// times eight. Weights are overwritten.
INLINE void gather_whole(Kept values, float *weights, int size, int first, int last, float *out,
                         const char *then) {
  int count = last - first + 1;
  v16 top = splat(LEAST);
  for (int i = 0; i < count; i += LANES) {
    const float *scales = values.scales + first + i;
    int rest = count - i;
    v16 own = load_f32(weights + i) * (rest < LANES ? some_scales(scales, rest) : load_f32(scales));
    store_f32(weights + i, own);
    top = larger(top, own);
  }
  float most = largest(top), factor = 65280.0f / most;
  size_t end = (size_t)(last + 1) * size;
  for (int index = 0; index < size; index += 64) {
    __m512i upper[4], lower[4];
    UNROLL for (int i = 0; i < 4; i++) upper[i] = lower[i] = _mm512_setzero_si512();
    for (int start = 0; start < count; start += LANES) {
      __m512i numbers = _mm512_cvtps_epi32((__m512)(load_f32(weights + start) * factor));
      uint32_t uppers[4], lowers[4];
      _mm_storeu_si128((__m128i *)uppers, _mm512_cvtepi32_epi8(_mm512_srli_epi32(numbers, 8)));
      _mm_storeu_si128((__m128i *)lowers, _mm512_cvtepi32_epi8(numbers));
      size_t at = (size_t)(first + start) * size;
      const int8_t *own = (const int8_t *)values.data + at + index;
      if (index == 0) fetch_ahead(values.data, at, LANES * size, end, then);
      UNROLL for (int four = 0; four < 4; four++, own += 4 * size) {
        int rest = count - start - 4 * four;
        if (rest <= 0) break;
        __m512i high = _mm512_set1_epi32((int)uppers[four]);
        __m512i low = _mm512_set1_epi32((int)lowers[four]);
        if (rest >= 4) gather_four(own, size, 4, high, low, upper, lower);
        else gather_four(own, size, rest, high, low, upper, lower);
      }
    }
    // Numbers lie side by side in quarters of a vector.
    UNROLL for (int i = 0; i < 4; i++) {
      v16 both = (v16)_mm512_cvtepi32_ps(upper[i]) * 256.0f + (v16)_mm512_cvtepi32_ps(lower[i]);
      float found[LANES];
      store_f32(found, both * (most * (1.0f / 65280.0f)));
      for (int lane = 0; lane < 4; lane++)
        memcpy(out + index + lane * LANES + i * 4, found + lane * 4, 4 * sizeof(float));
    }
  }
}
#else
INLINE int has_whole_heads(int size) {
  (void)size;
  return 0;
}
#endif

// Whole numbers that are kept, with floats.
INLINE void score_scaled(Kept keys, const float *query, int size, int first, int last, float scale,
                         float *scores) {
  for (int j = first; j <= last; j++) {
    const int8_t *key = (const int8_t *)keys.data + (size_t)j * size;
    v16 total = splat(0);
    int i = 0;
    for (; i + LANES <= size; i += LANES) total += load_i8(key + i) * load_f32(query + i);
    float found = sum(total);
    for (; i < size; i++) found += key[i] * query[i];
    scores[j - first] = found * keys.scales[j] * scale;
  }
}

INLINE void gather_scaled(Kept values, const float *weights, int size, int first, int last,
                          float *out) {
  for (int i = 0; i < size; i++) out[i] = 0;
  for (int j = first; j <= last; j++) {
    const int8_t *value = (const int8_t *)values.data + (size_t)j * size;
    float weight = weights[j - first] * values.scales[j];
    int i = 0;
    for (; i + LANES <= size; i += LANES)
      store_f32(out + i, load_f32(out + i) + load_i8(value + i) * weight);
    for (; i < size; i++) out[i] += value[i] * weight;
  }
}

// One query's attention to positions of a head.
typedef struct {
  Kept keys, values;
  const float *query;  // (size,)
  int size;
  int first, last;     // positions attended to
  float *scores;       // room for those, up to a multiple of sixteen
  float *out;          // (size,)
  const char *then;    // what is read next
} Attention;

INLINE void attend_floats(const Attention *a, int half, int pairs, int size) {
  const char *keys = a->keys.data, *values = a->values.data;
  score_all(keys, half, pairs, a->query, size, a->first, a->last, 1.0f / sqrtf(size), a->scores,
            values);
  softmax(a->scores, a->last - a->first + 1);
  gather_values(values, half, a->scores, size, a->first, a->last, a->out, a->then);
}

INLINE void attend_whole(const Attention *a, int size) {
  float scale = 1.0f / sqrtf(size);
  int count = a->last - a->first + 1;
#if WORDS
  if (has_whole_heads(size)) {
    score_whole(a->keys, a->query, size, a->first, a->last, scale, a->scores, a->values.data);
    softmax(a->scores, count);
    gather_whole(a->values, a->scores, size, a->first, a->last, a->out, a->then);
    return;
  }
#endif
  score_scaled(a->keys, a->query, size, a->first, a->last, scale, a->scores);
  softmax(a->scores, count);
  gather_scaled(a->values, a->scores, size, a->first, a->last, a->out);
}

// Each way is a function of its own: in one, they take a compiler three times as long. Heads of 64
// are those of every preset but the largest.
#define WAY(name, work) \
  static __attribute__((noinline)) void name(const Attention *a) { work; }
WAY(attend_whole_64, attend_whole(a, 64))
WAY(attend_whole_any, attend_whole(a, a->size))
WAY(attend_half_64, attend_floats(a, 1, PAIRS, 64))
WAY(attend_half_any, attend_floats(a, 1, PAIRS, a->size))
WAY(attend_full_any, attend_floats(a, 0, 0, a->size))
#undef WAY

static void attend_query(const Attention *a, int half) {
  if (a->keys.scales) (a->size == 64 ? attend_whole_64 : attend_whole_any)(a);
  else if (half) (a->size == 64 ? attend_half_64 : attend_half_any)(a);
  else attend_full_any(a);
}

#endif
