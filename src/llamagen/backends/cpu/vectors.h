// Vectors of sixteen floats, in the compiler's own vector types, so that one source serves every
// processor. Where a processor has dot products of bfloat16 (AVX512_BF16) or of integers
// (AVX512_VNNI), matrix products use those instead.

#ifndef LLAMAGEN_VECTORS_H
#define LLAMAGEN_VECTORS_H

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

#if defined(__AVX512BF16__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#define HAS_AVX512_BF16 1
#else
#define HAS_AVX512_BF16 0
#endif

#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
#define HAS_AVX512_VNNI 1
#else
#define HAS_AVX512_VNNI 0
#endif

#define INLINE static inline __attribute__((always_inline))
#define LANES 16
// For loops over arrays of vectors, which are kept in registers only if the loop is unrolled.
#define UNROLL _Pragma("GCC unroll 32")
#define UNROLL4 _Pragma("GCC unroll 4")

typedef float v16 __attribute__((vector_size(64)));  // the f32x16 that all is computed in
typedef float v8 __attribute__((vector_size(32)));
typedef float v4 __attribute__((vector_size(16)));
typedef uint32_t u32x16 __attribute__((vector_size(64)));
typedef int32_t i32x16 __attribute__((vector_size(64)));
typedef uint16_t u16x16 __attribute__((vector_size(32)));
typedef int8_t i8x16 __attribute__((vector_size(16)));
typedef int16_t i16x16 __attribute__((vector_size(32)));
typedef uint16_t bf16;

// Types of numbers in memory: of those that are not quantised, whether they are bfloat16.
enum { F32 = 0, BF16 = 1, INT8 = 2 };

INLINE size_t bytes_of(int type, size_t count) {
  return type == F32 ? count * 4 : type == BF16 ? count * 2 : count;
}

#if defined(__clang__)
#define SHUFFLE(x, ...) __builtin_shufflevector(x, x, __VA_ARGS__)
#define SHUFFLE2(x, y, ...) __builtin_shufflevector(x, y, __VA_ARGS__)
#else
#define SHUFFLE(x, ...) __builtin_shuffle(x, (i32x16){__VA_ARGS__})
#define SHUFFLE2(x, y, ...) __builtin_shuffle(x, y, (i32x16){__VA_ARGS__})
#endif

INLINE int min_int(int a, int b) { return a < b ? a : b; }
INLINE int max_int(int a, int b) { return a > b ? a : b; }
INLINE size_t align_up(size_t bytes) { return (bytes + 63) / 64 * 64; }

INLINE v16 splat(float x) { return (v16){x, x, x, x, x, x, x, x, x, x, x, x, x, x, x, x}; }

INLINE v16 load_f32(const float *p) {
  v16 x;
  memcpy(&x, p, sizeof x);
  return x;
}

INLINE void store_f32(float *p, v16 x) { memcpy(p, &x, sizeof x); }

INLINE v16 load_bf16(const bf16 *p) {
#if defined(__AVX512F__)
  __m256i x = _mm256_loadu_si256((const __m256i *)p);
  return (v16)_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16);
#else
  u16x16 x;
  memcpy(&x, p, sizeof x);
  return (v16)(__builtin_convertvector(x, u32x16) << 16);
#endif
}

// Rounds to nearest, ties to even, as torch does. AVX512_BF16's instruction would lose denormals.
#define ROUND_BF16(bits) (((bits) + 0x7fffu + (((bits) >> 16) & 1u)) >> 16)
INLINE u32x16 round_bf16(v16 x) { return ROUND_BF16((u32x16)x); }

INLINE void store_bf16(bf16 *p, v16 x) {
  u16x16 rounded = __builtin_convertvector(round_bf16(x), u16x16);
  memcpy(p, &rounded, sizeof rounded);
}

INLINE v16 load_int8(const int8_t *p) {
  i8x16 x;
  memcpy(&x, p, sizeof x);
  return __builtin_convertvector(x, v16);
}

// Sixteen numbers from index `at` on.
INLINE v16 load(int type, const void *p, size_t at) {
  if (type == INT8) return load_int8((const int8_t *)p + at);
  return type == BF16 ? load_bf16((const bf16 *)p + at) : load_f32((const float *)p + at);
}

INLINE void store(int type, void *p, size_t at, v16 x) {
  if (type == BF16) store_bf16((bf16 *)p + at, x);
  else store_f32((float *)p + at, x);
}

INLINE uint32_t bits_of(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}

INLINE float float_of(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

INLINE float bf16_to_f32(bf16 x) { return float_of((uint32_t)x << 16); }

INLINE bf16 f32_to_bf16(float x) { return (bf16)ROUND_BF16(bits_of(x)); }

// One number.
INLINE float load_one(int type, const void *p, size_t at) {
  if (type == INT8) return ((const int8_t *)p)[at];
  return type == BF16 ? bf16_to_f32(((const bf16 *)p)[at]) : ((const float *)p)[at];
}

INLINE void store_one(int type, void *p, size_t at, float x) {
  if (type == BF16) ((bf16 *)p)[at] = f32_to_bf16(x);
  else ((float *)p)[at] = x;
}

INLINE float reduce_sum(v16 x) {
  v8 half[2];
  v4 quarter[2];
  memcpy(half, &x, sizeof x);
  half[0] += half[1];
  memcpy(quarter, half, sizeof quarter);
  quarter[0] += quarter[1];
  return (quarter[0][0] + quarter[0][2]) + (quarter[0][1] + quarter[0][3]);
}

INLINE float reduce_max(v16 x) {
  UNROLL for (int half = LANES / 2; half; half /= 2)
    UNROLL for (int i = 0; i < half; i++) x[i] = x[i + half] > x[i] ? x[i + half] : x[i];
  return x[0];
}

INLINE v16 abs_f32(v16 x) { return (v16)((i32x16)x & 0x7fffffff); }

INLINE v16 where(i32x16 mask, v16 x, v16 y) {
  return (v16)((mask & (i32x16)x) | (~mask & (i32x16)y));
}

INLINE v16 max_f32(v16 x, v16 y) { return where(x > y, x, y); }

// Adding and subtracting 1.5 * 2^23 rounds to the nearest integer.
#define ROUNDING_SHIFT 12582912.0f

#define MIN_ABSMAX 1e-30f  // so that it can be divided by

// The largest absolute value, at least MIN_ABSMAX.
INLINE float absmax(const float *x, int size) {
  v16 maxima = splat(MIN_ABSMAX);
  int i = 0;
  for (; i + LANES <= size; i += LANES) maxima = max_f32(maxima, abs_f32(load_f32(x + i)));
  float max = reduce_max(maxima);
  for (; i < size; i++) max = fabsf(x[i]) > max ? fabsf(x[i]) : max;
  return max;
}

// Lanes of two vectors of which those that differ in bit n are to meet.
#define LANES_OF(lane, n)                                                                        \
  lane(0, n), lane(1, n), lane(2, n), lane(3, n), lane(4, n), lane(5, n), lane(6, n), lane(7, n), \
      lane(8, n), lane(9, n), lane(10, n), lane(11, n), lane(12, n), lane(13, n), lane(14, n),    \
      lane(15, n)
#define LOW(i, n) ((i) & (n) ? (i) - (n) + LANES : (i))
#define HIGH(i, n) ((i) & (n) ? (i) + LANES : (i) + (n))
#define MEET(n, store)                                                                   \
  UNROLL for (int i = 0; i < LANES; i++) if (!(i & n)) {                                 \
    v16 low = SHUFFLE2(x[i], x[i + n], LANES_OF(LOW, n));                                \
    v16 high = SHUFFLE2(x[i], x[i + n], LANES_OF(HIGH, n));                              \
    store;                                                                               \
  }

// Transposes the 16x16 matrix of sixteen vectors: in turn the blocks of 8, 4, 2 and 1 columns.
#define EXCHANGE(n) MEET(n, (x[i] = low, x[i + n] = high))
INLINE void transpose(v16 *x) { EXCHANGE(8) EXCHANGE(4) EXCHANGE(2) EXCHANGE(1) }

// The sums of up to sixteen vectors, as one vector; each is summed in the same order.
INLINE v16 reduce_sums(const v16 *vectors, int count) {
#if defined(__AVX512F__)
#define FOLD(n) MEET(n, x[i] = low + high)
  v16 x[LANES];
  UNROLL for (int i = 0; i < LANES; i++) x[i] = i < count ? vectors[i] : splat(0);
  FOLD(2) FOLD(1) FOLD(4) FOLD(8)
  return x[0];
#undef FOLD
#else
  float part[LANES] = {0};
  for (int i = 0; i < count; i++) part[i] = reduce_sum(vectors[i]);
  return load_f32(part);
#endif
}
#undef EXCHANGE
#undef MEET
#undef HIGH
#undef LOW
#undef LANES_OF

// e^x with a relative error below 2e-7; 0 below -87, and NaN stays NaN.
INLINE v16 exp_f32(v16 x) {
  const v16 low = splat(-87.0f), high = splat(88.0f);
  i32x16 tiny = x < low;
  x = where(tiny, low, x);
  x = where(x > high, high, x);
  const v16 shift = splat(ROUNDING_SHIFT);
  v16 exponent = (x * 1.44269504f + shift) - shift;
  v16 rest = x - exponent * 0.693359375f + exponent * 2.12194440e-4f;
  v16 y = splat(1.0f / 5040);
  y = y * rest + 1.0f / 720;
  y = y * rest + 1.0f / 120;
  y = y * rest + 1.0f / 24;
  y = y * rest + 1.0f / 6;
  y = y * rest + 0.5f;
  y = y * rest + 1.0f;
  y = y * rest + 1.0f;
  i32x16 power = (__builtin_convertvector(exponent, i32x16) + 127) << 23;
  y = y * (v16)power;
  return (v16)(~tiny & (i32x16)y);
}

#if HAS_AVX512_BF16
typedef __m512bh bf16x32;

INLINE bf16x32 load_bf16x32(const bf16 *p) { return (bf16x32)_mm512_loadu_si512(p); }

// Adds the products of pairs of bfloat16 to sixteen sums.
INLINE v16 dot_bf16(v16 total, bf16x32 a, bf16x32 b) {
  return (v16)_mm512_dpbf16_ps((__m512)total, a, b);
}
#endif

#endif
