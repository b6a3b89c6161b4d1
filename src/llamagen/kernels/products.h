// Products of a weight matrix with the rows of a batch, sixteen outputs at a time.
//
// A matrix is read as it lies in the model, (outputs, inputs) row by row, so nothing is packed and
// no second copy is kept. Few rows ("skinny") are dot products along the inputs: the weights
// stream through once, and memory is the limit. More rows ("wide") stand in the lanes of a vector,
// activations transposed to (inputs, rows), and each weight is broadcast to them.

#ifndef LLAMAGEN_PRODUCTS_H
#define LLAMAGEN_PRODUCTS_H

#include "vectors.h"

#if PAIRS && defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(__AMX_INT8__) && \
    defined(__linux__)
#define TILES 1
#else
#define TILES 0
#endif

enum { F32 = 0, BF16 = 1, I8 = 2, I4 = 3 };

#define OUTPUTS 16      // of one piece of work
#define SKINNY 8        // rows up to which products are dot products

// A weight is a number times, where they are whole numbers, the scale of its output; in I4 also
// times a small whole number that GROUP inputs share, so that the product fits eight bits.
#define GROUP 32

typedef struct {
  const void *data;       // (outputs, inputs); for I4 two numbers a byte, the first in the low half
  const float *scales;    // (outputs,)
  const uint8_t *factors; // I4: (outputs, inputs / GROUP), from 1 to 15
  int32_t kind, outputs, inputs;
} Matrix;

// Activations of all rows. Skinny: (rows, size). Wide: (size, padded) or, in pairs,
// (size / 2, padded, 2), where padded is rows up to the next multiple of sixteen.
//
// For products of whole numbers they are floats, wide, and then once more whole numbers of sixteen
// bits: their upper halves, and behind them their lower halves, (size / 4, 2 padded, 4).
typedef struct {
  void *data;
  int8_t *halves;
  float *scales;        // (padded,) of the whole numbers
  int size;
} Activations;

typedef struct {
  int rows, padded;
  int wide;
  int pairs;            // activations are pairs of bfloat16, not floats
  int tiles;
  int whole;            // weights and activations are whole numbers
} Layout;

INLINE void put(const Layout *l, Activations a, int row, int index, float x) {
  if (!l->pairs)
    ((float *)a.data)[l->wide ? (size_t)index * l->padded + row : (size_t)row * a.size + index] = x;
  else
    ((bf16 *)a.data)[l->wide ? ((size_t)(index / 2) * l->padded + row) * 2 + (index & 1)
                             : (size_t)row * a.size + index] = bf16_of(x);
}

// Two neighbouring inputs of sixteen rows, wide.
INLINE void put_two(const Layout *l, Activations a, int lane, int index, v16 x, v16 y) {
  if (!l->pairs) {
    float *into = (float *)a.data + (size_t)index * l->padded + lane;
    store_f32(into, x);
    store_f32(into + l->padded, y);
  } else {
    uint32_t *into = (uint32_t *)a.data + (size_t)(index / 2) * l->padded + lane;
    u16x32 both = round_bf16(x) | (round_bf16(y) << 16);
    memcpy(into, &both, sizeof both);
  }
}

// 4-bit numbers stand for -8..7, offset by 8.
INLINE v16 load_i4(const uint8_t *p) {
  v16 x;
  for (int i = 0; i < LANES; i++) x[i] = (float)((i & 1 ? p[i / 2] >> 4 : p[i / 2] & 15) - 8);
  return x;
}

#if PAIRS
// Thirty-two numbers from sixteen bytes, by a table.
INLINE p32 load_i4_pairs(const uint8_t *p) {
  __m256i wide = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i *)p));
  __m512i words = _mm512_cvtepu16_epi32(wide);
  __m512i index = _mm512_or_si512(_mm512_and_si512(words, _mm512_set1_epi32(15)),
                                  _mm512_slli_epi32(_mm512_srli_epi32(words, 4), 16));
  static const bf16 table[32] = {0xc100, 0xc0e0, 0xc0c0, 0xc0a0, 0xc080, 0xc040, 0xc000, 0xbf80,
                                 0x0000, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0};
  return (p32)_mm512_permutexvar_epi16(index, _mm512_loadu_si512(table));
}

INLINE p32 load_weight_pairs(int kind, const void *row, int index) {
  if (kind == I8) return load_i8_pairs((const int8_t *)row + index);
  if (kind == I4) return load_i4_pairs((const uint8_t *)row + index / 2);
  return load_pairs((const bf16 *)row + index);
}
#endif

INLINE v16 load_weights(int kind, const void *row, int index) {
  if (kind == BF16) return load_bf16((const bf16 *)row + index);
  if (kind == I8) return load_i8((const int8_t *)row + index);
  if (kind == I4) return load_i4((const uint8_t *)row + index / 2);
  return load_f32((const float *)row + index);
}

INLINE const char *weight_row(const Matrix *m, int kind, int output) {
  size_t at = (size_t)output * m->inputs;
  size_t bytes = kind == F32 ? at * 4 : kind == BF16 ? at * 2 : kind == I8 ? at : at / 2;
  return (const char *)m->data + bytes;
}

INLINE float scale_of(const Matrix *m, int kind, int output) {
  return kind == I8 || kind == I4 ? m->scales[output] : 1.0f;
}

INLINE float factor_of(const Matrix *m, int output, int input) {
  return m->factors[(size_t)output * (m->inputs / GROUP) + input / GROUP];
}

// `some` outputs from `output` on, for `rows` rows, both known to the compiler.
INLINE void dots(const Matrix *m, int kind, int pairs, int some, int rows, const void *x, int output,
                 float *tile, int stride) {
  v16 total[16];
  const char *row[8];
  UNROLL for (int n = 0; n < some; n++) row[n] = weight_row(m, kind, output + n);
  UNROLL for (int i = 0; i < some * rows; i++) total[i] = splat(0);
  int inputs = m->inputs, group = kind == I4 ? GROUP : inputs;
  for (int start = 0; start < inputs; start += group) {
    v16 part[16];
    UNROLL for (int i = 0; i < some * rows; i++) part[i] = kind == I4 ? splat(0) : total[i];
    if (pairs) {
#if PAIRS
      for (int k = start; k < start + group; k += 32) {
        p32 weights[8];
        UNROLL for (int n = 0; n < some; n++) weights[n] = load_weight_pairs(kind, row[n], k);
        UNROLL for (int r = 0; r < rows; r++) {
          p32 own = load_pairs((const bf16 *)x + (size_t)r * inputs + k);
          UNROLL for (int n = 0; n < some; n++)
            part[n * rows + r] = add_pairs(part[n * rows + r], weights[n], own);
        }
      }
#endif
    } else {
      for (int k = start; k < start + group; k += 16) {
        v16 weights[8];
        UNROLL for (int n = 0; n < some; n++) weights[n] = load_weights(kind, row[n], k);
        UNROLL for (int r = 0; r < rows; r++) {
          v16 own = load_f32((const float *)x + (size_t)r * inputs + k);
          UNROLL for (int n = 0; n < some; n++) part[n * rows + r] += weights[n] * own;
        }
      }
    }
    UNROLL for (int n = 0; n < some; n++) {
      float factor = kind == I4 ? factor_of(m, output + n, start) : 1;
      UNROLL for (int r = 0; r < rows; r++) {
        int i = n * rows + r;
        total[i] = kind == I4 ? total[i] + part[i] * factor : part[i];
      }
    }
  }
  UNROLL for (int n = 0; n < some; n++)
    UNROLL for (int r = 0; r < rows; r++)
      tile[n * stride + r] = sum(total[n * rows + r]) * scale_of(m, kind, output + n);
}

INLINE void skinny_rows(const Matrix *m, int kind, int pairs, int rows, const void *x, int output,
                        float *tile, int stride) {
  int some = rows <= 2 ? 8 : rows <= 4 ? 4 : 2;
  for (int n = 0; n < OUTPUTS; n += some)
    dots(m, kind, pairs, some, rows, x, output + n, tile + n * stride, stride);
}

INLINE void skinny_kind(const Matrix *m, int kind, int pairs, int rows, const void *x, int output,
                        float *tile, int stride) {
  switch (rows) {
    case 1: skinny_rows(m, kind, pairs, 1, x, output, tile, stride); break;
    case 2: skinny_rows(m, kind, pairs, 2, x, output, tile, stride); break;
    case 3: skinny_rows(m, kind, pairs, 3, x, output, tile, stride); break;
    case 4: skinny_rows(m, kind, pairs, 4, x, output, tile, stride); break;
    case 5: skinny_rows(m, kind, pairs, 5, x, output, tile, stride); break;
    case 6: skinny_rows(m, kind, pairs, 6, x, output, tile, stride); break;
    case 7: skinny_rows(m, kind, pairs, 7, x, output, tile, stride); break;
    default: skinny_rows(m, kind, pairs, 8, x, output, tile, stride); break;
  }
}

static __attribute__((noinline)) void skinny_product(const Matrix *m, const Layout *l, const void *x,
                                                     int output, float *tile) {
  int stride = l->padded;
#if PAIRS
  if (l->pairs) {
    if (m->kind == BF16) skinny_kind(m, BF16, 1, l->rows, x, output, tile, stride);
    else if (m->kind == I8) skinny_kind(m, I8, 1, l->rows, x, output, tile, stride);
    else skinny_kind(m, I4, 1, l->rows, x, output, tile, stride);
    return;
  }
#endif
  if (m->kind == F32) skinny_kind(m, F32, 0, l->rows, x, output, tile, stride);
  else if (m->kind == BF16) skinny_kind(m, BF16, 0, l->rows, x, output, tile, stride);
  else if (m->kind == I8) skinny_kind(m, I8, 0, l->rows, x, output, tile, stride);
  else skinny_kind(m, I4, 0, l->rows, x, output, tile, stride);
}

// Sixteen rows of quantised weights without their scales, as the wide products take them.
INLINE void unpack_kind(const Matrix *m, int kind, int pairs, int output, void *into) {
  int inputs = m->inputs;
  for (int n = 0; n < OUTPUTS; n++) {
    const char *row = weight_row(m, kind, output + n);
    for (int k = 0; k < inputs; k += LANES) {
      v16 x = load_weights(kind, row, k);
      if (kind == I4) x = x * factor_of(m, output + n, k);
      size_t at = (size_t)n * inputs + k;
      if (pairs) store_bf16((bf16 *)into + at, x);  // exact: they have eight bits
      else store_f32((float *)into + at, x);
    }
  }
}

static void unpack(const Matrix *m, const Layout *l, int output, void *into) {
  if (m->kind == I8) unpack_kind(m, I8, l->pairs, output, into);
  else if (m->kind == I4) unpack_kind(m, I4, l->pairs, output, into);
  else unpack_kind(m, BF16, l->pairs, output, into);  // where there are no products of pairs
}

// `some` rows of weights times `vectors` vectors of batch rows, both known to the compiler.
INLINE void outer(int pairs, int some, int vectors, const void *weights, int inputs, const void *x,
                  int padded, float *tile) {
  v16 total[24];
  UNROLL for (int i = 0; i < some * vectors; i++) total[i] = splat(0);
  if (pairs) {
#if PAIRS
    const bf16 *w = weights;
    const bf16 *own = x;
    for (int k = 0; k < inputs; k += 2) {
      p32 lanes[4];
      UNROLL for (int v = 0; v < vectors; v++)
        lanes[v] = load_pairs(own + ((size_t)(k / 2) * padded + v * LANES) * 2);
      UNROLL for (int n = 0; n < some; n++) {
        p32 weight = splat_pair(w + (size_t)n * inputs + k);
        UNROLL for (int v = 0; v < vectors; v++)
          total[n * vectors + v] = add_pairs(total[n * vectors + v], weight, lanes[v]);
      }
    }
#endif
  } else {
    const float *w = weights;
    const float *own = x;
    for (int k = 0; k < inputs; k++) {
      v16 lanes[4];
      UNROLL for (int v = 0; v < vectors; v++) lanes[v] = load_f32(own + (size_t)k * padded + v * LANES);
      UNROLL for (int n = 0; n < some; n++) {
        v16 weight = splat(w[(size_t)n * inputs + k]);
        UNROLL for (int v = 0; v < vectors; v++) total[n * vectors + v] += weight * lanes[v];
      }
    }
  }
  UNROLL for (int n = 0; n < some; n++)
    UNROLL for (int v = 0; v < vectors; v++)
      store_f32(tile + (size_t)n * padded + v * LANES, total[n * vectors + v]);
}

INLINE void outer_all(int pairs, int vectors, const void *weights, int inputs, const void *x,
                      int padded, float *tile) {
  // Where vectors of the processor are narrower than ours, sixteen registers hold less.
#if defined(__AVX512F__)
  int some = vectors == 1 ? 16 : vectors == 2 ? 8 : 4;
#else
  int some = vectors == 1 ? 4 : vectors == 2 ? 2 : 1;
#endif
  size_t bytes = pairs ? 2 : 4;
  for (int n = 0; n < OUTPUTS; n += some)
    outer(pairs, some, vectors, (const char *)weights + (size_t)n * inputs * bytes, inputs, x, padded,
          tile + (size_t)n * padded);
}

INLINE void outer_vectors(int pairs, int vectors, const void *weights, int inputs, const void *x,
                          int padded, float *tile) {
  switch (vectors) {
    case 1: outer_all(pairs, 1, weights, inputs, x, padded, tile); break;
    case 2: outer_all(pairs, 2, weights, inputs, x, padded, tile); break;
    case 3: outer_all(pairs, 3, weights, inputs, x, padded, tile); break;
    default: outer_all(pairs, 4, weights, inputs, x, padded, tile); break;
  }
}

#if TILES
typedef struct {
  uint8_t palette, start;
  uint8_t reserved[14];
  uint16_t bytes[16];
  uint8_t rows[16];
} TileShapes;

static void tiles_begin(void) {
  TileShapes shapes = {.palette = 1};
  for (int i = 0; i < 8; i++) {
    shapes.bytes[i] = 64;
    shapes.rows[i] = 16;
  }
  _tile_loadconfig(&shapes);
}

static void tiles_end(void) { _tile_release(); }

#define TILE_ADD(sums, other)                \
  do {                                       \
    if (whole) _tile_dpbssd(sums, 4, other); \
    else _tile_dpbf16ps(sums, 4, other);     \
  } while (0)

// Sixteen outputs of up to four vectors of columns, of whole numbers or of pairs: a tile of weights
// lies in memory as it is needed. All in bytes: `row` from one output's weights to the next one's,
// `step` from one row of the activations' tiles, and of the sums, to the next.
INLINE void tile_product(int whole, int vectors, const char *w, size_t row, const char *x,
                         size_t step, char *sums, const char *ahead) {
  _tile_zero(0);
  if (vectors > 1) _tile_zero(1);
  if (vectors > 2) _tile_zero(2);
  if (vectors > 3) _tile_zero(3);
  for (size_t at = 0; at < row; at += 64) {
    const char *own = x + at / 64 * 16 * step;
    if (ahead)
      for (int i = 0; i < 16; i++) _mm_prefetch(ahead + at * 16 + i * 64, _MM_HINT_T1);
    _tile_loadd(4, w + at, row);
    _tile_loadd(5, own, step);
    TILE_ADD(0, 5);
    if (vectors > 1) {
      _tile_loadd(6, own + 64, step);
      TILE_ADD(1, 6);
    }
    if (vectors > 2) {
      _tile_loadd(7, own + 128, step);
      TILE_ADD(2, 7);
    }
    if (vectors > 3) {
      _tile_loadd(5, own + 192, step);
      TILE_ADD(3, 5);
    }
  }
  _tile_stored(0, sums, step);
  if (vectors > 1) _tile_stored(1, sums + 64, step);
  if (vectors > 2) _tile_stored(2, sums + 128, step);
  if (vectors > 3) _tile_stored(3, sums + 192, step);
}

// As above for any number of columns, sixteen at a time.
INLINE void tile_products(int whole, int columns, const void *w, size_t row, const void *x,
                          void *sums, const char *ahead) {
  size_t step = (size_t)columns * 4;
  for (int column = 0; column < columns; column += 4 * LANES) {
    const char *own = (const char *)x + column * 4;
    char *to = (char *)sums + column * 4;
    switch ((columns - column) / LANES) {
      case 1: tile_product(whole, 1, w, row, own, step, to, ahead); break;
      case 2: tile_product(whole, 2, w, row, own, step, to, ahead); break;
      case 3: tile_product(whole, 3, w, row, own, step, to, ahead); break;
      default: tile_product(whole, 4, w, row, own, step, to, ahead); break;
    }
    ahead = NULL;  // once is enough
  }
}

// The products of a factor with the sixteen numbers of four bits.
#define TIMES(f) {-8 * f, -7 * f, -6 * f, -5 * f, -4 * f, -3 * f, -2 * f, -1 * f, \
                  0 * f,  1 * f,  2 * f,  3 * f,  4 * f,  5 * f,  6 * f,  7 * f}
static const int8_t products_of[16][16] = {
    TIMES(0), TIMES(1), TIMES(2),  TIMES(3),  TIMES(4),  TIMES(5),  TIMES(6),  TIMES(7),
    TIMES(8), TIMES(9), TIMES(10), TIMES(11), TIMES(12), TIMES(13), TIMES(14), TIMES(15)};

// Sixteen rows of 4-bit weights as 8-bit ones.
static void widen_i4(const Matrix *m, int output, int8_t *into) {
  const __m256i low_half = _mm256_set1_epi8(15);
  int inputs = m->inputs;
  for (int n = 0; n < OUTPUTS; n++) {
    const uint8_t *row = (const uint8_t *)weight_row(m, I4, output + n);
    const uint8_t *factors = m->factors + (size_t)(output + n) * (inputs / GROUP);
    for (int k = 0; k < inputs; k += 2 * GROUP) {
      __m256i bytes = _mm256_loadu_si256((const __m256i *)(row + k / 2));
      __m256i table = _mm256_set_m128i(
          _mm_loadu_si128((const __m128i *)products_of[factors[k / GROUP + 1] & 15]),
          _mm_loadu_si128((const __m128i *)products_of[factors[k / GROUP] & 15]));
      __m256i even = _mm256_shuffle_epi8(table, _mm256_and_si256(bytes, low_half));
      __m256i odd =
          _mm256_shuffle_epi8(table, _mm256_and_si256(_mm256_srli_epi16(bytes, 4), low_half));
      __m256i first = _mm256_unpacklo_epi8(even, odd), second = _mm256_unpackhi_epi8(even, odd);
      __m256i *to = (__m256i *)(into + (size_t)n * inputs + k);
      _mm256_storeu_si256(to, _mm256_permute2x128_si256(first, second, 0x20));
      _mm256_storeu_si256(to + 1, _mm256_permute2x128_si256(first, second, 0x31));
    }
  }
}

// Products of whole numbers: exact up to the rounding of weights and activations.
static __attribute__((noinline)) void whole_product(const Matrix *m, const Layout *l, Activations x,
                                                    int output, float *tile, void *room,
                                                    const char *ahead) {
  int columns = 2 * l->padded;
  int32_t *sums = room;
  const int8_t *weights = (const int8_t *)weight_row(m, m->kind, output);
  if (m->kind == I4) {
    int8_t *wide = (int8_t *)(sums + OUTPUTS * columns);
    widen_i4(m, output, wide);
    weights = wide;
    ahead = NULL;
  }
  tile_products(1, columns, weights, m->inputs, x.halves, sums, ahead);
  for (int n = 0; n < OUTPUTS; n++)
    for (int lane = 0; lane < l->padded; lane += LANES) {
      i32x16 upper, lower;
      memcpy(&upper, sums + (size_t)n * columns + lane, sizeof upper);
      memcpy(&lower, sums + (size_t)n * columns + l->padded + lane, sizeof lower);
      v16 both = __builtin_convertvector(upper, v16) * 256.0f + __builtin_convertvector(lower, v16);
      store_f32(tile + (size_t)n * l->padded + lane,
                both * load_f32(x.scales + lane) * m->scales[output + n]);
    }
}
#endif

// Sixteen lanes of activations as whole numbers: x = scale * (256 upper + lower).
static void to_whole(const Layout *l, Activations a, int piece) {
  int lane = piece * LANES, columns = 2 * l->padded;
  const float *x = (const float *)a.data + lane;
  v16 top = splat(1e-30f);
  for (int k = 0; k < a.size; k++) {
    v16 own = load_f32(x + (size_t)k * l->padded);
    v16 size = (v16)((i32x16)own & 0x7fffffff);
    i32x16 more = size > top;
    top = (v16)((more & (i32x16)size) | (~more & (i32x16)top));
  }
  v16 factor = 32512.0f / top;
  store_f32(a.scales + lane, top * (1.0f / 32512.0f));
  const v16 shift = splat(12582912.0f);
  for (int k = 0; k < a.size; k += 4) {
    i32x16 upper = {0}, lower = {0};
    for (int j = 0; j < 4; j++) {
      v16 scaled = load_f32(x + (size_t)(k + j) * l->padded) * factor;
      // The low bits of a float of 1.5 * 2^23 and more are a whole number, offset.
      i32x16 number = (i32x16)(scaled + shift) - (i32x16)shift;
      i32x16 up = (number + 128) >> 8;
      upper |= (up & 255) << (8 * j);
      lower |= ((number - (up << 8)) & 255) << (8 * j);
    }
    int8_t *into = a.halves + ((size_t)(k / 4) * columns + lane) * 4;
    memcpy(into, &upper, sizeof upper);
    memcpy(into + (size_t)l->padded * 4, &lower, sizeof lower);
  }
}

static __attribute__((noinline)) void wide_product(const Matrix *m, const Layout *l, const void *x,
                                                   int output, float *tile, void *room,
                                                   const char *ahead) {
  int inputs = m->inputs;
  const void *weights = weight_row(m, m->kind, output);
  if (m->kind != (l->pairs ? BF16 : F32)) {
    unpack(m, l, output, room);
    weights = room;
  }
#if TILES
  if (l->tiles) tile_products(0, l->padded, weights, (size_t)inputs * 2, x, tile, ahead);
#endif
  for (int lane = 0; lane < l->padded && !l->tiles; lane += 4 * LANES) {
    int vectors = (l->padded - lane) / LANES < 4 ? (l->padded - lane) / LANES : 4;
    const char *own = (const char *)x + lane * 4;  // a pair, or one number, each
    if (PAIRS && l->pairs)
      outer_vectors(1, vectors, weights, inputs, own, l->padded, tile + lane);
    else
      outer_vectors(0, vectors, weights, inputs, own, l->padded, tile + lane);
  }
  (void)ahead;
  if (m->kind == I8 || m->kind == I4)
    for (int n = 0; n < OUTPUTS; n++)
      for (int lane = 0; lane < l->padded; lane += LANES) {
        float *at = tile + (size_t)n * l->padded + lane;
        store_f32(at, load_f32(at) * m->scales[output + n]);
      }
}

// Sixteen outputs from `output` on, of all rows: tile (16, padded).
INLINE void product(const Matrix *m, const Layout *l, Activations x, int output, float *tile,
                    void *room, int next) {
  const char *ahead = next * OUTPUTS < m->outputs ? weight_row(m, m->kind, next * OUTPUTS) : NULL;
#if TILES
  if (l->whole) {
    whole_product(m, l, x, output, tile, room, ahead);
    return;
  }
#endif
  if (l->wide) wide_product(m, l, x.data, output, tile, room, ahead);
  else skinny_product(m, l, x.data, output, tile);
}

#endif
