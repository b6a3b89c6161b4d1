// Products of a weight matrix with the rows of a batch, sixteen outputs at a time.
//
// A matrix is read where it is in the model, (outputs, inputs) row by row: nothing is repacked, and
// there is no second copy. Products are dot products along the inputs, and each output of each row
// is summed in the lanes of vectors of its own, in an order of its own: the number of rows changes no
// bit of any of them. With AMX rows are the columns of tiles instead, and the same holds.

#ifndef LLAMAGEN_MATMUL_H
#define LLAMAGEN_MATMUL_H

#include "amx.h"

#define BLOCK_OUTPUTS 16  // a block of outputs is computed at a time
#define BLOCK_INPUTS 32   // inputs of a row that are contiguous
#define MAX_BLOCKS 2      // blocks of outputs that a thread takes at once
// Sums that stay in registers. Where a processor's vectors are narrower than ours, fewer do.
#if defined(__AVX512F__)
#define ACCUMULATORS 16
#define MAX_ROWS 8  // of one pass over the weights
#else
#define ACCUMULATORS 4
#define MAX_ROWS 2
#endif

// Products of int16 and int8 that one int32 lane of sixteen can sum without overflow.
#define VNNI_MAX_INPUTS 8192
// Activations are quantised to int16 of at most this size: their upper bytes, rounded, fit int8.
#define INT16_LIMIT 32512.0f

typedef struct {
  const void *data;     // (outputs, inputs)
  const float *scales;  // (outputs,) of int8 weights
  int32_t type, outputs, inputs;
} Matrix;

// Activations of all rows, in groups of rows that one pass over the weights takes. A group is stored
// as it is read: (size / BLOCK_INPUTS, rows of the group, BLOCK_INPUTS). For AMX: (size, padded), or
// of bfloat16 (size / 2, padded, 2), where padded is rows up to the next multiple of sixteen.
//
// For int8 weights they are quantised: int16, in the same groups. For AMX these are split into two
// int8: the upper halves, and behind them the lower halves, (size / 4, 2 padded, 4).
typedef struct {
  void *data;
  void *quantized;
  float *scales;  // (padded,) of the quantised rows
  int size;
} Activations;

typedef struct {
  int rows, padded;
  int use_amx;
  int use_bf16;  // activations are bfloat16, not float32
  int use_int;   // products are of int8 weights and quantised activations
} Layout;

// Rows of the group that begins with `row`: the largest power of two that fits.
INLINE int rows_of_group(int rows, int row) {
  int size = MAX_ROWS;
  while (size > rows - row) size /= 2;
  return size;
}

// Where an activation of a row is, without AMX.
INLINE size_t activation_offset(const Layout *l, Activations a, int row, int index) {
  int start = row / MAX_ROWS * MAX_ROWS, size = rows_of_group(l->rows, start);
  while (row >= start + size) {
    start += size;
    size = rows_of_group(l->rows, start);
  }
  size_t block = (size_t)(index / BLOCK_INPUTS) * size + row - start;
  return (size_t)start * a.size + block * BLOCK_INPUTS + index % BLOCK_INPUTS;
}

// Without AMX: up to sixteen neighbouring activations of a row.
INLINE void store_activations(const Layout *l, Activations a, int row, int index, v16 x,
                              int count) {
  if (index % BLOCK_INPUTS + count > BLOCK_INPUTS) {
    for (int i = 0; i < count; i++)
      store_one(l->use_bf16, a.data, activation_offset(l, a, row, index + i), x[i]);
    return;
  }
  size_t at = activation_offset(l, a, row, index);
  char rounded[LANES * sizeof(float)];
  store(l->use_bf16, rounded, 0, x);
  memcpy((char *)a.data + bytes_of(l->use_bf16, at), rounded, bytes_of(l->use_bf16, count));
}

// For AMX: two neighbouring activations of sixteen rows.
INLINE void store_two_amx(const Layout *l, Activations a, int lane, int index, v16 x, v16 y) {
  if (!l->use_bf16) {
    float *into = (float *)a.data + (size_t)index * l->padded + lane;
    store_f32(into, x);
    store_f32(into + l->padded, y);
  } else {
    uint32_t *into = (uint32_t *)a.data + (size_t)(index / 2) * l->padded + lane;
    u32x16 both = round_bf16(x) | (round_bf16(y) << 16);
    memcpy(into, &both, sizeof both);
  }
}

INLINE const char *weight_row(const Matrix *m, int type, int output) {
  return (const char *)m->data + bytes_of(type, (size_t)output * m->inputs);
}

#if HAS_AVX512_VNNI
// Adds the products of pairs of int16 to sixteen int32 sums. In assembly, and all of one type, because
// GCC otherwise copies the sums from register to register.
INLINE v16 dot_int16(v16 total, v16 a, v16 b) {
#if defined(EMULATE_AVX512)
  return (v16)_mm512_dpwssd_epi32((__m512i)total, (__m512i)a, (__m512i)b);
#else
  __asm__("vpdpwssd %2, %1, %0" : "+v"(total) : "v"(a), "v"(b));
  return total;
#endif
}

// Thirty-two int8 as int16.
INLINE v16 load_int8x32(const int8_t *p) {
  return (v16)_mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i *)p));
}
#endif

enum { DOT_F32, DOT_BF16, DOT_INT16 };

// One vector of weights or activations: sixteen floats, or 32 bfloat16 or int16.
INLINE v16 load_operand(int dot, int type, const void *p, size_t at) {
  if (dot == DOT_F32) return load(type, p, at);
#if HAS_AVX512_VNNI
  if (type == INT8) return load_int8x32((const int8_t *)p + at);
#endif
  return load_f32((const float *)((const bf16 *)p + at));
}

INLINE v16 multiply_add(int dot, v16 total, v16 a, v16 b) {
#if HAS_AVX512_VNNI
  if (dot == DOT_INT16) return dot_int16(total, a, b);
#endif
#if HAS_AVX512_BF16
  if (dot == DOT_BF16) return dot_bf16(total, (bf16x32)a, (bf16x32)b);
#endif
  (void)dot;
  return total + a * b;
}

// Adds products of the inputs from `start` to `stop` to sums of some outputs of a group of rows.
INLINE void dot_range(int start, int stop, size_t row_bytes, int type, int dot, int outputs, int rows,
                      const char *weights, const char *x, v16 *total, int prefetch,
                      ptrdiff_t distance) {
  int item = dot == DOT_F32 ? 4 : 2, step = 64 / item;
  x += (size_t)start * rows * item;
  for (int block = start; block < stop; block += BLOCK_INPUTS, x += rows * BLOCK_INPUTS * item)
    for (int i = 0; i < BLOCK_INPUTS; i += step) {
      v16 w[ACCUMULATORS];
      UNROLL for (int n = 0; n < outputs; n++) {
        const char *row = weights + n * row_bytes;
        w[n] = load_operand(dot, type, row, block + i);
        if (prefetch) __builtin_prefetch(row + bytes_of(type, block + i) + distance, 0, 2);
      }
      UNROLL for (int r = 0; r < rows; r++) {
        v16 lanes = load_f32((const float *)(x + (r * BLOCK_INPUTS + i) * item));
        UNROLL for (int n = 0; n < outputs; n++)
          total[r * outputs + n] = multiply_add(dot, total[r * outputs + n], w[n], lanes);
      }
    }
}

// Some outputs of a group of rows, into out (rows, BLOCK_OUTPUTS). All but the addresses is known at
// compile time. With `prefetch`, the memory `distance` bytes behind the weights is prefetched. Weights
// stay in registers and activations are streamed: the other way round, compilers load these again for
// each output, which takes longer than multiplying.
INLINE void dot_block(int inputs, int type, int dot, int outputs, int rows, const char *weights,
                      const void *x, float *out, int prefetch, ptrdiff_t distance) {
  size_t bytes = bytes_of(type, inputs);
  v16 total[ACCUMULATORS];
  UNROLL for (int i = 0; i < outputs * rows; i++) total[i] = splat(0);
  if (dot == DOT_INT16) {
#if HAS_AVX512_VNNI
    for (int start = 0; start < inputs; start += VNNI_MAX_INPUTS) {
      int stop = min_int(inputs, start + VNNI_MAX_INPUTS);
      v16 part[ACCUMULATORS];
      UNROLL for (int i = 0; i < outputs * rows; i++) part[i] = splat(0);
      dot_range(start, stop, bytes, type, dot, outputs, rows, weights, x, part, prefetch, distance);
      UNROLL for (int i = 0; i < outputs * rows; i++)
        total[i] += (v16)_mm512_cvtepi32_ps((__m512i)part[i]);
    }
#endif
  } else {
    dot_range(0, inputs, bytes, type, dot, outputs, rows, weights, x, total, prefetch, distance);
  }
  float found[LANES];
  store_f32(found, reduce_sums(total, outputs * rows));
  UNROLL for (int r = 0; r < rows; r++)
    memcpy(out + r * BLOCK_OUTPUTS, found + r * outputs, outputs * sizeof(float));
}

INLINE void dot_group(int inputs, int type, int dot, int rows, const char *weights, const void *x,
                      float *out, ptrdiff_t distance) {
  // More than eight weights would not stay in registers.
  int outputs = ACCUMULATORS / (rows > 1 ? rows : 2);
  for (int n = 0; n < BLOCK_OUTPUTS; n += outputs) {
    const char *own = weights + n * bytes_of(type, inputs);
    if (distance)
      dot_block(inputs, type, dot, outputs, rows, own, x, out + n, 1, distance);
    else
      dot_block(inputs, type, dot, outputs, rows, own, x, out + n, 0, 0);
  }
}

// A block of outputs of all rows, into out (rows, BLOCK_OUTPUTS). `next` is read next, or NULL.
INLINE void dot_rows(int inputs, const Layout *l, int type, int dot, const char *weights,
                     const void *x, float *out, const char *next) {
  ptrdiff_t distance = next ? next - weights : 0;
  size_t bytes = (size_t)inputs * (dot == DOT_F32 ? 4 : 2);
  for (int row = 0, size; row < l->rows; row += size) {
    const char *own = (const char *)x + row * bytes;
    float *to = out + row * BLOCK_OUTPUTS;
    size = rows_of_group(l->rows, row);
    switch (size) {
      case 1: dot_group(inputs, type, dot, 1, weights, own, to, distance); break;
      case 2: dot_group(inputs, type, dot, 2, weights, own, to, distance); break;
#if MAX_ROWS == 8
      case 4: dot_group(inputs, type, dot, 4, weights, own, to, distance); break;
      default: dot_group(inputs, type, dot, 8, weights, own, to, distance); break;
#endif
    }
    distance = 0;  // prefetched once
  }
}

// The weights of a block of outputs as floats, without the scales of their outputs.
static void widen_block(const Matrix *m, int output, float *into) {
  int inputs = m->inputs;
  for (int n = 0; n < BLOCK_OUTPUTS; n++) {
    const char *row = weight_row(m, m->type, output + n);
    for (int k = 0; k < inputs; k += LANES)
      store_f32(into + (size_t)n * inputs + k, load(m->type, row, k));
  }
}

// The nearest integers: the low bits of a float from ROUNDING_SHIFT on are an integer.
INLINE i32x16 round_to_int32(v16 x) {
  const v16 shift = splat(ROUNDING_SHIFT);
  return (i32x16)(x + shift) - (i32x16)shift;
}

// Where the two halves of quantised activations of sixteen rows are stored for AMX.
typedef struct {
  int32_t *upper, *lower;
  int stride;
} SplitInt16;

INLINE SplitInt16 split_int16_of(const Layout *l, Activations a, int lane) {
  int32_t *at = (int32_t *)a.quantized + lane;
  return (SplitInt16){at, at + l->padded, 2 * l->padded};
}

// Stores four neighbouring integers of sixteen rows, each as 256 upper + lower.
INLINE void store_four_amx(SplitInt16 *to, const i32x16 *integers) {
  i32x16 upper = {0}, lower = {0};
  UNROLL for (int j = 0; j < 4; j++) {
    i32x16 up = (integers[j] + 128) >> 8;
    upper |= (up & 255) << (8 * j);
    lower |= ((integers[j] - (up << 8)) & 255) << (8 * j);
  }
  memcpy(to->upper, &upper, sizeof upper);
  memcpy(to->lower, &lower, sizeof lower);
  to->upper += to->stride, to->lower += to->stride;
}

// Quantises a row of activations to int16.
static void quantize_row(const Layout *l, Activations a, int row) {
  const float *x = a.data;
  v16 maxima = splat(MIN_ABSMAX);
  for (int k = 0; k < a.size; k += LANES)
    maxima = max_f32(maxima, abs_f32(load_f32(x + activation_offset(l, a, row, k))));
  float max = reduce_max(maxima), factor = INT16_LIMIT / max;
  a.scales[row] = max * (1.0f / INT16_LIMIT);
  for (int k = 0; k < a.size; k += LANES) {
    size_t at = activation_offset(l, a, row, k);
    i16x16 integers = __builtin_convertvector(round_to_int32(load_f32(x + at) * factor), i16x16);
    memcpy((int16_t *)a.quantized + at, &integers, sizeof integers);
  }
}

// The same for AMX: sixteen rows of floats, whose largest absolute values are `maxima`.
static void quantize_lanes(const Layout *l, Activations a, int lane, v16 maxima) {
  const float *x = (const float *)a.data + lane;
  v16 factor = INT16_LIMIT / maxima;
  store_f32(a.scales + lane, maxima * (1.0f / INT16_LIMIT));
  SplitInt16 to = split_int16_of(l, a, lane);
  for (int k = 0; k < a.size; k += 4) {
    i32x16 integers[4];
    UNROLL for (int j = 0; j < 4; j++)
      integers[j] = round_to_int32(load_f32(x + (size_t)(k + j) * l->padded) * factor);
    store_four_amx(&to, integers);
  }
}

// Packs sixteen rows of activations (rows, size) for AMX.
static void pack_amx(const Layout *l, const float *rows, Activations a, int chunk) {
  int lane = chunk * LANES, count = min_int(l->rows - lane, LANES);
  v16 factors = splat(0);
  rows += (size_t)lane * a.size;
  for (int row = 0; row < count && l->use_int; row++) {
    float max = absmax(rows + (size_t)row * a.size, a.size);
    factors[row] = INT16_LIMIT / max;
    a.scales[lane + row] = max * (1.0f / INT16_LIMIT);
  }
  SplitInt16 to = l->use_int ? split_int16_of(l, a, lane) : (SplitInt16){0};
  for (int k = 0; k < a.size; k += LANES) {
    v16 x[LANES];
    for (int row = 0; row < LANES; row++)
      x[row] = row < count ? load_f32(rows + (size_t)row * a.size + k) : splat(0);
    transpose(x);
    for (int i = 0; i < LANES && !l->use_int; i += 2)
      store_two_amx(l, a, lane, k + i, x[i], x[i + 1]);
    for (int i = 0; i < LANES && l->use_int; i += 4) {
      i32x16 integers[4];
      UNROLL for (int j = 0; j < 4; j++) integers[j] = round_to_int32(x[i + j] * factors);
      store_four_amx(&to, integers);
    }
  }
}

#if HAS_AMX
// Memory that is prefetched meanwhile, some cache lines of 64 bytes at a time.
typedef struct {
  const char *next, *end;
  int lines;
} Prefetch;

INLINE void prefetch_some(Prefetch *p) {
  for (int i = 0; i < p->lines && p->next < p->end; i++, p->next += 64)
    __builtin_prefetch(p->next, 0, 2);
}

// One or two blocks of outputs of one or two vectors of columns, of int8 or bfloat16: a tile of
// weights is in memory as it is needed. All in bytes: `row` is from the weights of one output to those
// of the next, `stride` from one row of the tiles of activations, and of the sums, to the next.
INLINE void amx_block(int int8, int blocks, int vectors, const char *w, size_t row, const char *x,
                      size_t stride, char *out, Prefetch *prefetch) {
  const char *below = w + BLOCK_OUTPUTS * row;
  _tile_zero(0);
  if (vectors > 1) _tile_zero(1);
  if (blocks > 1) _tile_zero(2);
  if (blocks > 1 && vectors > 1) _tile_zero(3);
  for (size_t at = 0; at < row; at += 64, x += 16 * stride) {
    prefetch_some(prefetch);
    _tile_loadd(4, w + at, row);
    _tile_loadd(6, x, stride);
    TILE_DOT(int8, 0, 4, 6);
    if (vectors > 1) {
      _tile_loadd(7, x + 64, stride);
      TILE_DOT(int8, 1, 4, 7);
    }
    if (blocks > 1) {
      _tile_loadd(5, below + at, row);
      TILE_DOT(int8, 2, 5, 6);
      if (vectors > 1) TILE_DOT(int8, 3, 5, 7);
    }
  }
  _tile_stored(0, out, stride);
  if (vectors > 1) _tile_stored(1, out + 64, stride);
  if (blocks > 1) _tile_stored(2, out + BLOCK_OUTPUTS * stride, stride);
  if (blocks > 1 && vectors > 1) _tile_stored(3, out + BLOCK_OUTPUTS * stride + 64, stride);
}

// The same for any number of columns, into out (blocks * BLOCK_OUTPUTS, columns). As much memory as
// the weights take is prefetched from `next` on.
INLINE void amx_columns(int int8, int columns, int blocks, const char *w, size_t row, const char *x,
                        char *out, const char *next) {
  size_t stride = (size_t)columns * 4;
  int passes = (columns + 2 * LANES - 1) / (2 * LANES);
  Prefetch prefetch = {next, next ? next + blocks * BLOCK_OUTPUTS * row : NULL,
                       (BLOCK_OUTPUTS * blocks + passes - 1) / passes};
  AMX_FENCE();
  for (int column = 0; column < columns; column += 2 * LANES) {
    const char *own = x + column * 4;
    char *to = out + column * 4;
    if (columns - column > LANES) {
      if (blocks > 1) amx_block(int8, 2, 2, w, row, own, stride, to, &prefetch);
      else amx_block(int8, 1, 2, w, row, own, stride, to, &prefetch);
    } else {
      if (blocks > 1) amx_block(int8, 2, 1, w, row, own, stride, to, &prefetch);
      else amx_block(int8, 1, 1, w, row, own, stride, to, &prefetch);
    }
  }
}

// Some blocks of outputs of all rows, transposed: out (blocks * BLOCK_OUTPUTS, padded).
static __attribute__((noinline)) void matmul_amx(const Matrix *m, const Layout *l, Activations x,
                                                 int output, int blocks, float *out, void *scratch,
                                                 const char *next) {
  if (!l->use_int) {
    amx_columns(0, l->padded, blocks, weight_row(m, BF16, output), (size_t)m->inputs * 2,
                x.data, (char *)out, next);
    return;
  }
  int columns = 2 * l->padded;
  int32_t *sums = scratch;
  const char *weights = weight_row(m, m->type, output);
  amx_columns(1, columns, blocks, weights, m->inputs, x.quantized, (char *)sums, next);
  for (int n = 0; n < blocks * BLOCK_OUTPUTS; n++)
    for (int lane = 0; lane < l->padded; lane += LANES) {
      i32x16 upper, lower;
      memcpy(&upper, sums + (size_t)n * columns + lane, sizeof upper);
      memcpy(&lower, sums + (size_t)n * columns + l->padded + lane, sizeof lower);
      v16 both = __builtin_convertvector(upper, v16) * 256.0f + __builtin_convertvector(lower, v16);
      store_f32(out + (size_t)n * l->padded + lane,
                both * load_f32(x.scales + lane) * m->scales[output + n]);
    }
}
#endif

static __attribute__((noinline)) void matmul_dot(const Matrix *m, const Layout *l, Activations x,
                                                 int output, float *out, void *scratch,
                                                 const char *next) {
  const char *weights = weight_row(m, m->type, output);
  int type = m->type, inputs = m->inputs;
  if (l->use_int) {
    dot_rows(inputs, l, INT8, DOT_INT16, weights, x.quantized, out, next);
  } else if (l->use_bf16) {
    dot_rows(inputs, l, BF16, DOT_BF16, weights, x.data, out, next);
  } else if (type == F32) {
    dot_rows(inputs, l, F32, DOT_F32, weights, x.data, out, next);
  } else if (type == BF16 && l->rows <= MAX_ROWS) {
    dot_rows(inputs, l, BF16, DOT_F32, weights, x.data, out, next);
  } else {
    widen_block(m, output, scratch);
    dot_rows(inputs, l, F32, DOT_F32, scratch, x.data, out, NULL);
  }
  if (type == INT8)
    for (int row = 0; row < l->rows; row++) {
      float *at = out + row * BLOCK_OUTPUTS, scale = l->use_int ? x.scales[row] : 1.0f;
      store_f32(at, load_f32(at) * scale * load_f32(m->scales + output));
    }
}

// Blocks of outputs that a thread takes at once: with AMX two, which share what they read of many
// activations, as long as every thread gets enough to do.
INLINE int blocks_at_once(const Matrix *m, const Layout *l, int threads) {
  int pairs = m->outputs / (2 * BLOCK_OUTPUTS), even = m->outputs % (2 * BLOCK_OUTPUTS) == 0;
  return l->use_amx && l->padded > 2 * LANES && pairs >= 4 * threads && even ? 2 : 1;
}

// The outputs of a chunk, which are some blocks, of all rows: out (rows, BLOCK_OUTPUTS), or with AMX
// (blocks * BLOCK_OUTPUTS, padded). `next_chunk` is computed next.
INLINE void matmul(const Matrix *m, const Layout *l, Activations x, int chunk, int blocks, float *out,
                   void *scratch, int next_chunk) {
  int outputs = blocks * BLOCK_OUTPUTS, output = chunk * outputs;
  int has_next = next_chunk * outputs < m->outputs;
  const char *next = has_next ? weight_row(m, m->type, next_chunk * outputs) : NULL;
#if HAS_AMX
  if (l->use_amx) {
    matmul_amx(m, l, x, output, blocks, out, scratch, next);
    return;
  }
#endif
  matmul_dot(m, l, x, output, out, scratch, next);
}

#endif
