// Products of a weight matrix with the rows of a batch, sixteen outputs at a time.
//
// A matrix is read as it lies in the model, (outputs, inputs) row by row, so nothing is packed and
// no second copy is kept. Products are dot products along the inputs, in whose lanes each output of
// each row is summed in an order of its own: how many rows there are changes no bit of any of
// them. Where the processor has tiles, rows stand in their columns instead, and the same holds.

#ifndef LLAMAGEN_PRODUCTS_H
#define LLAMAGEN_PRODUCTS_H

#include <stddef.h>

#include "tiles.h"

enum { F32 = 0, BF16 = 1, I8 = 2 };

#define OUTPUTS 16  // of one piece of work
#define BLOCK 32    // inputs of a row that lie side by side
#define MOST_PIECES 2  // of work that a thread may take at once
// Sums that stay in registers. Where vectors of the processor are narrower than ours, fewer do.
#if defined(__AVX512F__)
#define SUMS 16
#define MOST_ROWS 8  // of one pass over the weights
#else
#define SUMS 4
#define MOST_ROWS 2
#endif

// Products of whole numbers of 16 and 8 bits that one of sixteen 32-bit lanes can sum.
#define STRETCH 8192

typedef struct {
  const void *data;     // (outputs, inputs)
  const float *scales;  // (outputs,) of int8 weights
  int32_t kind, outputs, inputs;
} Matrix;

// Activations of all rows, in groups of rows that one pass over the weights takes. A group lies as
// it is read: (size / BLOCK, rows of the group, BLOCK). For tiles: (size, padded) or, in pairs,
// (size / 2, padded, 2), where padded is rows up to the next multiple of sixteen.
//
// For products of whole numbers they are floats, and then once more whole numbers of sixteen
// bits, in groups alike. For tiles these are in two: their upper halves, and behind them their
// lower halves, (size / 4, 2 padded, 4).
typedef struct {
  void *data;
  void *whole;
  float *scales;  // (padded,) of the whole numbers
  int size;
} Activations;

typedef struct {
  int rows, padded;
  int tiles;
  int pairs;  // activations are pairs of bfloat16, not floats
  int whole;  // weights and activations are whole numbers
} Layout;

// Rows of the group that begins with `row`: as many as can be, in powers of two.
INLINE int group_size(int rows, int row) {
  int size = MOST_ROWS;
  while (size > rows - row) size /= 2;
  return size;
}

// Where a number of a row lies, without tiles.
INLINE size_t place_of(const Layout *l, Activations a, int row, int index) {
  int start = row / MOST_ROWS * MOST_ROWS, size = group_size(l->rows, start);
  while (row >= start + size) {
    start += size;
    size = group_size(l->rows, start);
  }
  return (size_t)start * a.size + (size_t)(index / BLOCK * size + row - start) * BLOCK +
         index % BLOCK;
}

// Without tiles: neighbouring numbers of a row, sixteen or fewer.
INLINE void put(const Layout *l, Activations a, int row, int index, v16 x, int count) {
  if (index % BLOCK + count <= BLOCK) {
    size_t at = place_of(l, a, row, index);
    if (l->pairs) {
      bf16 rounded[LANES];
      store_bf16(rounded, x);
      memcpy((bf16 *)a.data + at, rounded, count * sizeof(bf16));
    } else {
      memcpy((float *)a.data + at, &x, count * sizeof(float));
    }
    return;
  }
  for (int i = index; i < index + count; i++) {
    size_t at = place_of(l, a, row, i);
    if (l->pairs) ((bf16 *)a.data)[at] = bf16_of(x[i - index]);
    else ((float *)a.data)[at] = x[i - index];
  }
}

// For tiles: two neighbouring numbers of sixteen rows.
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

// Bytes of so many weights.
INLINE size_t weight_bytes(int kind, size_t count) {
  return kind == F32 ? count * 4 : kind == BF16 ? count * 2 : count;
}

INLINE const char *weight_row(const Matrix *m, int kind, int output) {
  return (const char *)m->data + weight_bytes(kind, (size_t)output * m->inputs);
}

// Sixteen weights without the scale of their output.
INLINE v16 load_weights(int kind, const void *row, int index) {
  if (kind == BF16) return load_bf16((const bf16 *)row + index);
  if (kind == I8) return load_i8((const int8_t *)row + index);
  return load_f32((const float *)row + index);
}

#if WORDS
// Adds 16 sums of two products each. By hand, for GCC copies the sums of the intrinsic around.
INLINE __m512i add_words(__m512i total, __m512i a, __m512i b) {
  __asm__("vpdpwssd %2, %1, %0" : "+v"(total) : "v"(a), "v"(b));
  return total;
}

// Thirty-two whole numbers of sixteen bits.
INLINE __m512i load_words(const int8_t *p) {
  return _mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i *)p));
}
#endif

enum { FLOATS, PAIRED, WHOLE };

// `some` outputs of a group of `rows` rows, all known to the compiler but the addresses: into
// tile (rows, OUTPUTS). If `fetch`, what lies `ahead` bytes behind the weights is fetched meanwhile.
// Weights stay in registers and activations pass by: the other way round, compilers read these
// again for each output, and reading takes longer than multiplying.
INLINE void dots(int inputs, int kind, int numbers, int some, int rows, const char *weights,
                 const void *x, float *tile, int fetch, ptrdiff_t ahead) {
  size_t bytes = weight_bytes(kind, inputs);
  v16 total[SUMS];
  UNROLL for (int i = 0; i < some * rows; i++) total[i] = splat(0);
  if (numbers == WHOLE) {
#if WORDS
    const int16_t *own = x;
    for (int start = 0; start < inputs; start += STRETCH) {
      int stop = inputs - start < STRETCH ? inputs : start + STRETCH;
      __m512i part[SUMS];
      UNROLL for (int i = 0; i < some * rows; i++) part[i] = _mm512_setzero_si512();
      for (int k = start; k < stop; k += BLOCK, own += rows * BLOCK) {
        __m512i w[SUMS];
        UNROLL for (int n = 0; n < some; n++) {
          const char *row = weights + n * bytes;
          w[n] = load_words((const int8_t *)row + k);
          if (fetch) __builtin_prefetch(row + weight_bytes(kind, k) + ahead, 0, 2);
        }
        UNROLL for (int r = 0; r < rows; r++) {
          __m512i lanes = _mm512_loadu_si512(own + r * BLOCK);
          UNROLL for (int n = 0; n < some; n++)
            part[r * some + n] = add_words(part[r * some + n], w[n], lanes);
        }
      }
      UNROLL for (int i = 0; i < some * rows; i++)
        total[i] += (v16)_mm512_cvtepi32_ps(part[i]);
    }
#endif
  } else if (numbers == PAIRED) {
#if PAIRS
    const bf16 *own = x;
    for (int k = 0; k < inputs; k += BLOCK, own += rows * BLOCK) {
      p32 w[SUMS];
      UNROLL for (int n = 0; n < some; n++) {
        const char *at = weights + n * bytes + k * 2;
        w[n] = load_pairs((const bf16 *)at);
        if (fetch) __builtin_prefetch(at + ahead, 0, 2);
      }
      UNROLL for (int r = 0; r < rows; r++) {
        p32 lanes = load_pairs(own + r * BLOCK);
        UNROLL for (int n = 0; n < some; n++)
          total[r * some + n] = add_pairs(total[r * some + n], w[n], lanes);
      }
    }
#endif
  } else {
    const float *own = x;
    for (int block = 0; block < inputs; block += BLOCK, own += rows * BLOCK)
      for (int k = 0; k < BLOCK; k += LANES) {
        v16 w[SUMS];
        UNROLL for (int n = 0; n < some; n++) {
          const char *row = weights + n * bytes;
          w[n] = load_weights(kind, row, block + k);
          if (fetch) __builtin_prefetch(row + weight_bytes(kind, block + k) + ahead, 0, 2);
        }
        UNROLL for (int r = 0; r < rows; r++) {
          v16 lanes = load_f32(own + r * BLOCK + k);
          UNROLL for (int n = 0; n < some; n++) total[r * some + n] += w[n] * lanes;
        }
      }
  }
  float found[LANES];
  store_f32(found, sums(total, some * rows));
  UNROLL for (int r = 0; r < rows; r++)
    memcpy(tile + r * OUTPUTS, found + r * some, some * sizeof(float));
}

INLINE void dots_of_group(int inputs, int kind, int numbers, int rows, const char *weights,
                          const void *x, float *tile, ptrdiff_t ahead) {
  int some = SUMS / (rows > 1 ? rows : 2);  // more weights than eight would not stay in registers
  for (int n = 0; n < OUTPUTS; n += some) {
    const char *own = weights + n * weight_bytes(kind, inputs);
    if (ahead)
      dots(inputs, kind, numbers, some, rows, own, x, tile + n, 1, ahead);
    else
      dots(inputs, kind, numbers, some, rows, own, x, tile + n, 0, 0);
  }
}

// Sixteen outputs of all rows: tile (rows, OUTPUTS). `ahead` is what is read next, or NULL.
INLINE void dot_products(int inputs, const Layout *l, int kind, int numbers, const char *weights,
                         const void *x, float *tile, const char *ahead) {
  ptrdiff_t distance = ahead ? ahead - weights : 0;
  size_t bytes = (size_t)inputs * (numbers == FLOATS ? 4 : 2);
  for (int row = 0, size; row < l->rows; row += size) {
    const char *own = (const char *)x + row * bytes;
    float *into = tile + row * OUTPUTS;
    size = group_size(l->rows, row);
    switch (size) {
      case 1: dots_of_group(inputs, kind, numbers, 1, weights, own, into, distance); break;
      case 2: dots_of_group(inputs, kind, numbers, 2, weights, own, into, distance); break;
#if MOST_ROWS == 8
      case 4: dots_of_group(inputs, kind, numbers, 4, weights, own, into, distance); break;
      default: dots_of_group(inputs, kind, numbers, 8, weights, own, into, distance); break;
#endif
    }
    distance = 0;  // once is enough
  }
}

// Sixteen rows of weights as floats, without the scales of their outputs.
static void widen(const Matrix *m, int output, float *into) {
  int inputs = m->inputs;
  for (int n = 0; n < OUTPUTS; n++) {
    const char *row = weight_row(m, m->kind, output + n);
    for (int k = 0; k < inputs; k += LANES)
      store_f32(into + (size_t)n * inputs + k, load_weights(m->kind, row, k));
  }
}

// A factor of whole numbers of sixteen bits; their scale is its reciprocal.
#define WHOLE_MOST 32512.0f

// Whole numbers: the low bits of a float of 1.5 * 2^23 and more are one, offset.
INLINE i32x16 nearest(v16 x) {
  const v16 shift = splat(12582912.0f);
  return (i32x16)(x + shift) - (i32x16)shift;
}

// Where sixteen lanes' halves of whole numbers begin, in tiles.
typedef struct {
  int32_t *upper, *lower;
  int step;
} Halves;

INLINE Halves halves_of(const Layout *l, Activations a, int lane) {
  int32_t *at = (int32_t *)a.whole + lane;
  return (Halves){at, at + l->padded, 2 * l->padded};
}

// Four neighbouring whole numbers of sixteen lanes, each 256 upper + lower, join the others.
INLINE void put_four(Halves *to, const i32x16 *numbers) {
  i32x16 upper = {0}, lower = {0};
  UNROLL for (int j = 0; j < 4; j++) {
    i32x16 up = (numbers[j] + 128) >> 8;
    upper |= (up & 255) << (8 * j);
    lower |= ((numbers[j] - (up << 8)) & 255) << (8 * j);
  }
  memcpy(to->upper, &upper, sizeof upper);
  memcpy(to->lower, &lower, sizeof lower);
  to->upper += to->step, to->lower += to->step;
}

// A row of activations as whole numbers, times a scale.
static void row_to_whole(const Layout *l, Activations a, int row) {
  const float *x = a.data;
  v16 top = splat(LEAST);
  for (int k = 0; k < a.size; k += LANES)
    top = larger(top, size_of(load_f32(x + place_of(l, a, row, k))));
  float most = largest(top), factor = WHOLE_MOST / most;
  a.scales[row] = most * (1.0f / WHOLE_MOST);
  for (int k = 0; k < a.size; k += LANES) {
    size_t at = place_of(l, a, row, k);
    i16x16 narrow = __builtin_convertvector(nearest(load_f32(x + at) * factor), i16x16);
    memcpy((int16_t *)a.whole + at, &narrow, sizeof narrow);
  }
}

// The same for tiles: sixteen lanes of floats, whose largest sizes are `top`.
static void lanes_to_whole(const Layout *l, Activations a, int lane, v16 top) {
  const float *x = (const float *)a.data + lane;
  v16 factor = WHOLE_MOST / top;
  store_f32(a.scales + lane, top * (1.0f / WHOLE_MOST));
  Halves to = halves_of(l, a, lane);
  for (int k = 0; k < a.size; k += 4) {
    i32x16 numbers[4];
    UNROLL for (int j = 0; j < 4; j++)
      numbers[j] = nearest(load_f32(x + (size_t)(k + j) * l->padded) * factor);
    put_four(&to, numbers);
  }
}

// Sixteen rows of activations, of (rows, size) floats, as tiles have them.
static void into_tiles(const Layout *l, const float *rows, Activations a, int piece) {
  int lane = piece * LANES, count = l->rows - lane < LANES ? l->rows - lane : LANES;
  int some = l->whole ? 4 : 2;  // numbers of a row that lie side by side
  float factors[LANES];
  rows += (size_t)lane * a.size;
  for (int row = 0; row < count && l->whole; row++) {
    float most = most_of(rows + (size_t)row * a.size, a.size);
    factors[row] = WHOLE_MOST / most;
    a.scales[lane + row] = most * (1.0f / WHOLE_MOST);
  }
  Halves to = halves_of(l, a, lane);
  uint32_t *pairs = (uint32_t *)a.data + lane;
  for (int k = 0; k < a.size; k += some * LANES) {
    v16 x[LANES], y[LANES];
    UNROLL for (int row = 0; row < LANES; row++) x[row] = y[row] = splat(0);
    for (int row = 0; row < count; row++) {
      const float *own = rows + (size_t)row * a.size + k;
      if (l->whole) {
        for (int i = 0; i < 4; i++) {
          i32x16 number = nearest(load_f32(own + i * LANES) * factors[row]);
          i32x16 up = (number + 128) >> 8;
          i8x16 upper = __builtin_convertvector(up, i8x16);
          i8x16 lower = __builtin_convertvector(number - (up << 8), i8x16);
          memcpy((int8_t *)&x[row] + i * LANES, &upper, sizeof upper);
          memcpy((int8_t *)&y[row] + i * LANES, &lower, sizeof lower);
        }
      } else {
        store_bf16((bf16 *)&x[row], load_f32(own));
        store_bf16((bf16 *)&x[row] + LANES, load_f32(own + LANES));
      }
    }
    transpose(x);
    if (l->whole) transpose(y);
    for (int i = 0; i < LANES; i++) {
      if (l->whole) {
        memcpy(to.upper, &x[i], sizeof x[i]);
        memcpy(to.lower, &y[i], sizeof y[i]);
        to.upper += to.step, to.lower += to.step;
      } else {
        memcpy(pairs, &x[i], sizeof x[i]);
        pairs += l->padded;
      }
    }
  }
}

#if TILES
// What is fetched while something else is computed, some lines of 64 bytes at a time.
typedef struct {
  const char *next, *end;
  int lines;
} Fetch;

INLINE void fetch_some(Fetch *f) {
  for (int i = 0; i < f->lines && f->next < f->end; i++, f->next += 64)
    __builtin_prefetch(f->next, 0, 2);
}

// One or two times sixteen outputs of one or two vectors of columns, of whole numbers or of pairs: a
// tile of weights lies in memory as it is needed. All in bytes: `row` from one output's weights to
// the next one's, `step` from one row of the activations' tiles, and of the sums, to the next.
INLINE void tile_block(int whole, int pieces, int vectors, const char *w, size_t row, const char *x,
                       size_t step, char *sums, Fetch *fetch) {
  const char *below = w + OUTPUTS * row;
  TILE_ZERO(0);
  if (vectors > 1) TILE_ZERO(1);
  if (pieces > 1) TILE_ZERO(2);
  if (pieces > 1 && vectors > 1) TILE_ZERO(3);
  for (size_t at = 0; at < row; at += 64, x += 16 * step) {
    fetch_some(fetch);
    TILE_LOAD(4, w + at, row);
    TILE_LOAD(6, x, step);
    TILE_ADD(whole, 0, 4, 6);
    if (vectors > 1) {
      TILE_LOAD(7, x + 64, step);
      TILE_ADD(whole, 1, 4, 7);
    }
    if (pieces > 1) {
      TILE_LOAD(5, below + at, row);
      TILE_ADD(whole, 2, 5, 6);
      if (vectors > 1) TILE_ADD(whole, 3, 5, 7);
    }
  }
  TILE_STORE(0, sums, step);
  if (vectors > 1) TILE_STORE(1, sums + 64, step);
  if (pieces > 1) TILE_STORE(2, sums + OUTPUTS * step, step);
  if (pieces > 1 && vectors > 1) TILE_STORE(3, sums + OUTPUTS * step + 64, step);
}

// As above for any number of columns: sums (pieces * OUTPUTS, columns). What lies `ahead` is fetched
// meanwhile, as much as there are weights.
INLINE void tile_products(int whole, int columns, int pieces, const char *w, size_t row,
                          const char *x, char *sums, const char *ahead) {
  size_t step = (size_t)columns * 4;
  int passes = (columns + 2 * LANES - 1) / (2 * LANES);
  Fetch fetch = {ahead, ahead ? ahead + pieces * OUTPUTS * row : NULL,
                 (OUTPUTS * pieces + passes - 1) / passes};
  TILES_READ();
  for (int column = 0; column < columns; column += 2 * LANES) {
    const char *own = x + column * 4;
    char *to = sums + column * 4;
    if (columns - column > LANES) {
      if (pieces > 1) tile_block(whole, 2, 2, w, row, own, step, to, &fetch);
      else tile_block(whole, 1, 2, w, row, own, step, to, &fetch);
    } else {
      if (pieces > 1) tile_block(whole, 2, 1, w, row, own, step, to, &fetch);
      else tile_block(whole, 1, 1, w, row, own, step, to, &fetch);
    }
  }
}

// `pieces` times sixteen outputs of all rows, in tiles: (pieces * OUTPUTS, padded).
static __attribute__((noinline)) void tiled_product(const Matrix *m, const Layout *l, Activations x,
                                                    int output, int pieces, float *tile, void *room,
                                                    const char *ahead) {
  if (!l->whole) {
    tile_products(0, l->padded, pieces, weight_row(m, BF16, output),
                  (size_t)m->inputs * 2, x.data, (char *)tile, ahead);
    return;
  }
  int columns = 2 * l->padded;
  int32_t *sums = room;
  const char *weights = weight_row(m, m->kind, output);
  tile_products(1, columns, pieces, weights, m->inputs, x.whole, (char *)sums, ahead);
  for (int n = 0; n < pieces * OUTPUTS; n++)
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

static __attribute__((noinline)) void plain_product(const Matrix *m, const Layout *l, Activations x,
                                                    int output, float *tile, void *room,
                                                    const char *ahead) {
  const char *weights = weight_row(m, m->kind, output);
  int kind = m->kind;
  int inputs = m->inputs;
  if (l->whole) {
    dot_products(inputs, l, I8, WHOLE, weights, x.whole, tile, ahead);
  } else if (l->pairs) {
    dot_products(inputs, l, BF16, PAIRED, weights, x.data, tile, ahead);
  } else if (kind == F32) {
    dot_products(inputs, l, F32, FLOATS, weights, x.data, tile, ahead);
  } else if (kind == BF16 && l->rows <= MOST_ROWS) {
    dot_products(inputs, l, BF16, FLOATS, weights, x.data, tile, ahead);
  } else {
    widen(m, output, room);
    dot_products(inputs, l, F32, FLOATS, room, x.data, tile, NULL);
  }
  if (kind == I8)
    for (int row = 0; row < l->rows; row++) {
      float *at = tile + row * OUTPUTS, scale = l->whole ? x.scales[row] : 1.0f;
      store_f32(at, load_f32(at) * scale * load_f32(m->scales + output));
    }
}

// Pieces of sixteen outputs that a thread takes at once: in tiles two, which share what they read of
// many activations, as long as every thread gets enough to do.
INLINE int pieces_at_once(const Matrix *m, const Layout *l, int threads) {
  int enough = m->outputs / (2 * OUTPUTS) >= 4 * threads && m->outputs % (2 * OUTPUTS) == 0;
  return l->tiles && l->padded > 2 * LANES && enough ? 2 : 1;
}

// `pieces` times sixteen outputs of all rows, the `number`th so many: tile (rows, OUTPUTS), in
// tiles (pieces * OUTPUTS, padded).
INLINE void product(const Matrix *m, const Layout *l, Activations x, int number, int pieces,
                    float *tile, void *room, int next) {
  int outputs = pieces * OUTPUTS, output = number * outputs;
  const char *ahead = next * outputs < m->outputs ? weight_row(m, m->kind, next * outputs) : NULL;
#if TILES
  if (l->tiles) {
    tiled_product(m, l, x, output, pieces, tile, room, ahead);
    return;
  }
#endif
  plain_product(m, l, x, output, tile, room, ahead);
}

#endif
