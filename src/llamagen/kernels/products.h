// Products of a weight matrix with the rows of a batch, sixteen outputs at a time.
//
// A matrix is read as it lies in the model, (outputs, inputs) row by row, so nothing is packed and
// no second copy is kept. Few rows ("skinny") are dot products along the inputs: the weights
// stream through once, and memory is the limit. More rows ("wide") stand in the lanes of a vector,
// activations transposed to (inputs, rows), and each weight is broadcast to them.

#ifndef LLAMAGEN_PRODUCTS_H
#define LLAMAGEN_PRODUCTS_H

#include "vectors.h"

#if PAIRS && defined(__AMX_BF16__) && defined(__linux__)
#define TILES 1
#else
#define TILES 0
#endif

enum { F32 = 0, BF16 = 1, I8 = 2, I4 = 3 };

#define OUTPUTS 16      // of one piece of work
#define SKINNY 8        // rows up to which products are dot products
#define WIDEST 2048     // rows of a batch

typedef struct {
  const void *data;     // (outputs, inputs); for I4 two numbers a byte, the first in the low half
  const float *scales;  // I8: (outputs,); I4: (outputs, inputs / group)
  int32_t kind, outputs, inputs, group;
} Matrix;

// Activations of all rows. Skinny: (rows, size). Wide: (size, padded) or, in pairs,
// (size / 2, padded, 2), where padded is rows up to the next multiple of sixteen.
typedef struct {
  void *data;
  int size;
} Activations;

typedef struct {
  int rows, padded;
  int wide;
  int pairs;            // activations are pairs of bfloat16, not floats
  int tiles;
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
INLINE float nibble(const uint8_t *row, int index) {
  uint8_t byte = row[index / 2];
  return (float)((index & 1 ? byte >> 4 : byte & 15) - 8);
}

INLINE v16 load_i4(const uint8_t *p) {
  v16 x;
  for (int i = 0; i < LANES; i++) x[i] = nibble(p, i);
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
  return kind == I8 ? m->scales[output] : 1.0f;
}

// `some` outputs from `output` on, for `rows` rows, both known to the compiler.
INLINE void dots(const Matrix *m, int kind, int pairs, int some, int rows, const void *x, int output,
                 float *tile, int stride) {
  v16 total[16];
  const char *row[8];
  UNROLL for (int n = 0; n < some; n++) row[n] = weight_row(m, kind, output + n);
  UNROLL for (int i = 0; i < some * rows; i++) total[i] = splat(0);
  int inputs = m->inputs, group = kind == I4 ? m->group : inputs;
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
      float scale =
          kind == I4 ? m->scales[(size_t)(output + n) * (inputs / group) + start / group] : 1;
      UNROLL for (int r = 0; r < rows; r++) {
        int i = n * rows + r;
        total[i] = kind == I4 ? total[i] + part[i] * scale : part[i];
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

// Sixteen rows of a quantised matrix, as the wide products take them.
static void unpack(const Matrix *m, const Layout *l, int output, void *into) {
  int inputs = m->inputs;
  for (int n = 0; n < OUTPUTS; n++) {
    const char *row = weight_row(m, m->kind, output + n);
    for (int k = 0; k < inputs; k += LANES) {
      v16 x = load_weights(m->kind, row, k);
      if (m->kind == I4)
        x = x * m->scales[(size_t)(output + n) * (inputs / m->group) + k / m->group];
      if (l->pairs) store_bf16((bf16 *)into + (size_t)n * inputs + k, x);
      else store_f32((float *)into + (size_t)n * inputs + k, x);
    }
  }
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

// Sixteen outputs of up to 64 batch rows: a tile of weights lies in memory as it is needed.
INLINE void tile_product(int vectors, const bf16 *w, int inputs, const bf16 *x, int padded,
                         float *tile, const char *ahead) {
  _tile_zero(0);
  if (vectors > 1) _tile_zero(1);
  if (vectors > 2) _tile_zero(2);
  if (vectors > 3) _tile_zero(3);
  size_t step = (size_t)padded * 4;
  for (int k = 0; k < inputs; k += 32) {
    const bf16 *own = x + (size_t)(k / 2) * padded * 2;
    if (ahead) {
      for (int i = 0; i < 16; i++) _mm_prefetch(ahead + (size_t)k * 32 + i * 64, _MM_HINT_T1);
    }
    _tile_loadd(4, w + k, (size_t)inputs * 2);
    _tile_loadd(5, own, step);
    _tile_dpbf16ps(0, 4, 5);
    if (vectors > 1) {
      _tile_loadd(6, own + 32, step);
      _tile_dpbf16ps(1, 4, 6);
    }
    if (vectors > 2) {
      _tile_loadd(7, own + 64, step);
      _tile_dpbf16ps(2, 4, 7);
    }
    if (vectors > 3) {
      _tile_loadd(5, own + 96, step);
      _tile_dpbf16ps(3, 4, 5);
    }
  }
  _tile_stored(0, tile, step);
  if (vectors > 1) _tile_stored(1, tile + 16, step);
  if (vectors > 2) _tile_stored(2, tile + 32, step);
  if (vectors > 3) _tile_stored(3, tile + 48, step);
}
#endif

static __attribute__((noinline)) void wide_product(const Matrix *m, const Layout *l, const void *x,
                                                   int output, float *tile, void *room, const char *ahead) {
  int inputs = m->inputs;
  const void *weights = weight_row(m, m->kind, output);
  if (m->kind != (l->pairs ? BF16 : F32)) {
    unpack(m, l, output, room);
    weights = room;
  }
  for (int lane = 0; lane < l->padded; lane += 4 * LANES) {
    int vectors = (l->padded - lane) / LANES < 4 ? (l->padded - lane) / LANES : 4;
#if TILES
    if (l->tiles) {
      const bf16 *own = (const bf16 *)x + lane * 2;
      switch (vectors) {
        case 1: tile_product(1, weights, inputs, own, l->padded, tile + lane, lane ? NULL : ahead); break;
        case 2: tile_product(2, weights, inputs, own, l->padded, tile + lane, lane ? NULL : ahead); break;
        case 3: tile_product(3, weights, inputs, own, l->padded, tile + lane, lane ? NULL : ahead); break;
        default: tile_product(4, weights, inputs, own, l->padded, tile + lane, lane ? NULL : ahead); break;
      }
      continue;
    }
#endif
#if PAIRS
    if (l->pairs) {
      outer_vectors(1, vectors, weights, inputs, (const bf16 *)x + lane * 2, l->padded, tile + lane);
      continue;
    }
#endif
    outer_vectors(0, vectors, weights, inputs, (const float *)x + lane, l->padded, tile + lane);
  }
  if (m->kind == I8)
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
  if (l->wide) wide_product(m, l, x.data, output, tile, room, ahead);
  else skinny_product(m, l, x.data, output, tile);
}

#endif
