// The AVX-512 and AMX intrinsics that the kernels use, in plain C: so their code for AVX512_BF16,
// AVX512_VNNI and AMX is tested on processors without. Compiled with EMULATE_AVX512 and this folder in front of the
// compiler's own.

#ifndef LLAMAGEN_EMULATED_IMMINTRIN_H
#define LLAMAGEN_EMULATED_IMMINTRIN_H

#include <math.h>
#include <stdint.h>
#include <string.h>

typedef float __m512 __attribute__((vector_size(64)));
typedef long long __m512i __attribute__((vector_size(64)));
typedef long long __m256i __attribute__((vector_size(32)));
typedef long long __m128i __attribute__((vector_size(16)));
typedef uint16_t __m512bh __attribute__((vector_size(64)));
typedef uint16_t __m256bh __attribute__((vector_size(32)));
typedef uint16_t __mmask16;

typedef int32_t emulated_i32 __attribute__((vector_size(64)));
typedef uint32_t emulated_u32 __attribute__((vector_size(64)));
typedef union {
  __m512i vector;
  int8_t i8[64];
  uint8_t u8[64];
  int16_t i16[32];
  int32_t i32[16];
  uint32_t u32[16];
} emulated_512i;

#define EMULATED static inline __attribute__((always_inline, unused))

EMULATED void _mm_pause(void) {}

EMULATED __m512i _mm512_setzero_si512(void) { return (__m512i){0}; }

EMULATED __m512i _mm512_set1_epi32(int x) {
  emulated_512i y;
  for (int i = 0; i < 16; i++) y.i32[i] = x;
  return y.vector;
}

EMULATED __m512i _mm512_srli_epi32(__m512i x, unsigned bits) {
  return (__m512i)((emulated_u32)x >> bits);
}

EMULATED __m512 _mm512_cvtepi32_ps(__m512i x) {
  return __builtin_convertvector((emulated_i32)x, __m512);
}

EMULATED __m512i _mm512_cvtps_epi32(__m512 x) {
  emulated_512i y;
  for (int i = 0; i < 16; i++) y.i32[i] = (int32_t)rintf(x[i]);
  return y.vector;
}

EMULATED __m128i _mm512_cvtepi32_epi8(__m512i x) {
  emulated_512i y = {x};
  uint8_t bytes[16];
  for (int i = 0; i < 16; i++) bytes[i] = (uint8_t)y.u32[i];
  __m128i z;
  memcpy(&z, bytes, sizeof z);
  return z;
}

EMULATED __m512i _mm512_cvtepi8_epi16(__m256i x) {
  int8_t bytes[32];
  memcpy(bytes, &x, sizeof x);
  emulated_512i y;
  for (int i = 0; i < 32; i++) y.i16[i] = bytes[i];
  return y.vector;
}

EMULATED __m256i _mm256_loadu_si256(const __m256i *p) {
  __m256i x;
  memcpy(&x, p, sizeof x);
  return x;
}

EMULATED __m512i _mm512_loadu_si512(const void *p) {
  __m512i x;
  memcpy(&x, p, sizeof x);
  return x;
}

EMULATED __m512 _mm512_maskz_loadu_ps(__mmask16 mask, const float *p) {
  __m512 x = {0};
  for (int i = 0; i < 16; i++)
    if (mask >> i & 1) x[i] = p[i];
  return x;
}

EMULATED void _mm_storeu_si128(__m128i *p, __m128i x) { memcpy(p, &x, sizeof x); }

// Interleaves the lower or upper halves of each quarter: `size` bytes are an element.
EMULATED __m512i emulated_unpack(__m512i a, __m512i b, int size, int high) {
  emulated_512i x = {a}, y = {b}, z;
  for (int quarter = 0; quarter < 64; quarter += 16)
    for (int i = 0; i < 8; i += size) {
      memcpy(z.u8 + quarter + 2 * i, x.u8 + quarter + 8 * high + i, size);
      memcpy(z.u8 + quarter + 2 * i + size, y.u8 + quarter + 8 * high + i, size);
    }
  return z.vector;
}

EMULATED __m512i _mm512_unpacklo_epi8(__m512i a, __m512i b) { return emulated_unpack(a, b, 1, 0); }
EMULATED __m512i _mm512_unpackhi_epi8(__m512i a, __m512i b) { return emulated_unpack(a, b, 1, 1); }
EMULATED __m512i _mm512_unpacklo_epi16(__m512i a, __m512i b) { return emulated_unpack(a, b, 2, 0); }
EMULATED __m512i _mm512_unpackhi_epi16(__m512i a, __m512i b) { return emulated_unpack(a, b, 2, 1); }

EMULATED __m512i _mm512_dpwssd_epi32(__m512i sum, __m512i a, __m512i b) {
  emulated_512i x = {a}, y = {b}, z = {sum};
  for (int i = 0; i < 32; i++) z.i32[i / 2] += x.i16[i] * y.i16[i];
  return z.vector;
}

EMULATED __m512i _mm512_dpbusd_epi32(__m512i sum, __m512i a, __m512i b) {
  emulated_512i x = {a}, y = {b}, z = {sum};
  for (int i = 0; i < 64; i++) z.i32[i / 4] += x.u8[i] * y.i8[i];
  return z.vector;
}

EMULATED __m512 _mm512_dpbf16_ps(__m512 sum, __m512bh a, __m512bh b) {
  for (int odd = 1; odd >= 0; odd--)
    for (int i = 0; i < 16; i++) {
      uint32_t x = (uint32_t)a[2 * i + odd] << 16, y = (uint32_t)b[2 * i + odd] << 16;
      float p, q;
      memcpy(&p, &x, sizeof p);
      memcpy(&q, &y, sizeof q);
      sum[i] += p * q;
    }
  return sum;
}

EMULATED __m512i _mm512_slli_epi32(__m512i x, unsigned bits) {
  return (__m512i)((emulated_u32)x << bits);
}

EMULATED __m512i _mm512_cvtepu16_epi32(__m256i x) {
  return (__m512i)__builtin_convertvector((__m256bh)x, emulated_u32);
}

typedef union {
  float f32[16][16];
  int32_t i32[16][16];
  uint16_t bf16[16][32];
  int8_t i8[16][64];
} emulated_tile;

static _Thread_local emulated_tile emulated_tiles[8];

EMULATED void _tile_loadconfig(const void *config) { (void)config; }
EMULATED void _tile_release(void) {}
EMULATED void _tile_zero(int to) { memset(&emulated_tiles[to], 0, sizeof(emulated_tile)); }

EMULATED void _tile_loadd(int to, const void *from, size_t step) {
  for (int i = 0; i < 16; i++)
    memcpy(emulated_tiles[to].i8[i], (const char *)from + i * step, 64);
}

EMULATED void _tile_stored(int from, void *to, size_t step) {
  for (int i = 0; i < 16; i++) memcpy((char *)to + i * step, emulated_tiles[from].i8[i], 64);
}

EMULATED float emulated_widen(uint16_t x) {
  uint32_t bits = (uint32_t)x << 16;
  float y;
  memcpy(&y, &bits, sizeof y);
  return y;
}

static void _tile_dpbssd(int to, int left, int right) {
  emulated_tile *t = &emulated_tiles[to];
  const emulated_tile *a = &emulated_tiles[left], *b = &emulated_tiles[right];
  for (int i = 0; i < 16; i++)
    for (int k = 0; k < 64; k++)
      for (int j = 0; j < 16; j++) t->i32[i][j] += a->i8[i][k] * b->i8[k / 4][4 * j + k % 4];
}

static void _tile_dpbf16ps(int to, int left, int right) {
  emulated_tile *t = &emulated_tiles[to];
  const emulated_tile *a = &emulated_tiles[left], *b = &emulated_tiles[right];
  for (int i = 0; i < 16; i++)
    for (int k = 0; k < 32; k++)
      for (int j = 0; j < 16; j++)
        t->f32[i][j] +=
            emulated_widen(a->bf16[i][k]) * emulated_widen(b->bf16[k / 2][2 * j + k % 2]);
}

#endif
