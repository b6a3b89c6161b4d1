// The image tokenizer's operations on a CPU: 3x3 convolutions, and GroupNorm with SiLU.
//
// Images are (images, rows, columns, channels), in float32 or bfloat16. Everything is computed in
// float32 and rounded once, where it is stored.
//
// A convolution uses Winograd's minimal filtering. A tile of 4x4 pixels of an output takes 36
// products for each input channel, where sums of products take 144: patches of 6x6 pixels of the
// input and the weights are transformed to 36 "frequencies", a matrix product is done for each, and
// the inverse transform makes pixels of the result. Sums are reordered by that, so results differ
// in the last bits. Tiles of 6x6 pixels take 64 products instead of 324, but lose two more bits:
// they are for bfloat16, which does not have those.
//
// No bit of an image depends on the number of threads or on the other images: a sum's order is that
// of the inputs, however the work is divided.

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "normalization.h"
#include "threads.h"

#define MAX_PATCH 8  // of the larger patch
#define MAX_FREQUENCIES (MAX_PATCH * MAX_PATCH)
#define TAPS 9
// A product makes ROWS tiles of PANEL outputs at a time: as many as there are registers. There are
// half as many without AVX-512, and a compiler that splits v16 in two leaves none of it in them.
#if defined(__AVX512F__)
typedef v16 wide;
#define ROWS 12
#else
typedef v8 wide;
#define ROWS 6
#endif
#define ROW_STEP (ROWS / 3)  // the last tiles are filled up to a multiple of it
#define PANEL (2 * (int)(sizeof(wide) / sizeof(float)))
// Inputs whose weights are transformed at a time, where all of them are not kept.
#define DEPTH 64
// Between frequencies: without it, all of them would share one set of a cache's lines.
#define GAP LANES
#define LARGE_PAGE ((size_t)1 << 21)

typedef struct {
  int32_t images, height, width;  // of the output
  int32_t inputs, outputs;        // channels: multiples of 16 and 32
  int32_t is_bf16;                // bfloat16, not float32
  int32_t upsampled;              // the input has half the height and width and is repeated
  int32_t threads;
  const void *x, *weight, *bias;
  const void *residual;  // added to the output; or NULL
  void *y;
  float *scratch;        // of convolve_scratch() bytes
} Convolution;

// How a convolution is divided.
typedef struct {
  int tile, frequencies;  // a side of a tile of the output; numbers in the transform of one
  int across, down;       // tiles of an image
  int64_t tiles;          // of all images
  int weights_first;      // whether all weights are transformed first, or all patches
  int tiles_at_once;      // tiles that are multiplied together
  int depth;              // inputs whose patches are contiguous
  int width;              // outputs whose sums are contiguous
  int splits;             // threads that divide the tiles of a panel of outputs
  // Numbers from one frequency to the next, and in all: of transformed weights (u), of transformed
  // patches (v) and of sums of their products (m).
  size_t u_step, v_step, m_step, u_size, v_size, m_size;
} Plan;

static int64_t products(const Convolution *c, int tile) {
  int across = (c->width + tile - 1) / tile, down = (c->height + tile - 1) / tile;
  return (int64_t)across * down * (tile + 2) * (tile + 2);
}

static Plan plan_of(const Convolution *c) {
  Plan p = {.tile = c->is_bf16 && products(c, 6) < products(c, 4) ? 6 : 4};
  p.frequencies = (p.tile + 2) * (p.tile + 2);
  p.across = (c->width + p.tile - 1) / p.tile, p.down = (c->height + p.tile - 1) / p.tile;
  p.tiles = (int64_t)c->images * p.across * p.down;
  // What comes first goes to memory and is read again and again; the rest stays in a cache.
  p.weights_first = (int64_t)c->inputs * c->outputs < p.tiles * (c->inputs + c->outputs);
  if (p.weights_first) {
    p.tiles_at_once = ROWS, p.depth = c->inputs, p.width = c->outputs;
    p.u_step = (size_t)c->inputs * c->outputs + GAP;
    p.v_step = (size_t)ROWS * c->inputs + GAP;
  } else {
    int panels = c->outputs / PANEL, blocks = (int)(p.tiles + ROWS - 1) / ROWS;
    int splits = (c->threads + panels - 1) / panels, each = (blocks + splits - 1) / splits;
    p.splits = (blocks + each - 1) / each;
    p.tiles_at_once = each * ROWS, p.depth = DEPTH, p.width = PANEL;
    p.u_step = (size_t)DEPTH * PANEL + GAP;
    p.v_step = (size_t)p.splits * p.tiles_at_once * DEPTH + GAP;
  }
  p.m_step = (size_t)p.tiles_at_once * p.width + GAP;
  p.u_size = p.frequencies * p.u_step;
  p.v_size = p.frequencies * p.v_step * ((c->inputs + p.depth - 1) / p.depth);
  p.m_size = p.frequencies * p.m_step;
  return p;
}

// Asks for large pages under what is about to be written. The system hands fresh memory out page by
// page, and for small ones that takes a third of a convolution's time.
static void advise_large_pages(void *to, size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  size_t first = ((size_t)to + LARGE_PAGE - 1) / LARGE_PAGE * LARGE_PAGE;
  size_t last = ((size_t)to + bytes) / LARGE_PAGE * LARGE_PAGE;
  if (first < last) madvise((void *)first, last - first, MADV_HUGEPAGE);
#else
  (void)to, (void)bytes;
#endif
}

// One dimension of the three transforms. Polynomials are taken at 0, 1, -1, 2, -2, (1/2, -1/2,) and
// infinity.

INLINE void transform_input(const v16 *x, v16 *y, int tile) {
  v16 x0 = x[0], x1 = x[1], x2 = x[2], x3 = x[3], x4 = x[4], x5 = x[5];
  if (tile == 4) {
    v16 a = x4 - 4.0f * x2, b = x3 - 4.0f * x1, c = x4 - x2, d = 2.0f * (x3 - x1);
    y[0] = 4.0f * x0 - 5.0f * x2 + x4;
    y[1] = a + b, y[2] = a - b;
    y[3] = c + d, y[4] = c - d;
    y[5] = 4.0f * x1 - 5.0f * x3 + x5;
    return;
  }
  v16 x6 = x[6], x7 = x[7];
  v16 a = x2 - 4.25f * x4 + x6, b = x1 - 4.25f * x3 + x5;
  v16 c = 0.25f * x2 - 1.25f * x4 + x6, d = 0.5f * x1 - 2.5f * x3 + 2.0f * x5;
  v16 e = 4.0f * x2 - 5.0f * x4 + x6, f = 2.0f * x1 - 2.5f * x3 + 0.5f * x5;
  y[0] = x0 - x6 + 5.25f * (x4 - x2);
  y[1] = a + b, y[2] = a - b;
  y[3] = c + d, y[4] = c - d;
  y[5] = e + f, y[6] = e - f;
  y[7] = x7 - x1 + 5.25f * (x3 - x5);
}

INLINE void transform_taps(const v16 *x, v16 *y, int tile) {
  v16 x0 = x[0], x1 = x[1], x2 = x[2], even = x0 + x2;
  if (tile == 4) {
    v16 a = x0 * (1.0f / 24) + x2 * (1.0f / 6), b = x1 * (1.0f / 12);
    y[0] = x0 * 0.25f;
    y[1] = (even + x1) * (-1.0f / 6), y[2] = (even - x1) * (-1.0f / 6);
    y[3] = a + b, y[4] = a - b;
    y[5] = x2;
    return;
  }
  v16 a = x0 * (1.0f / 90) + x2 * (2.0f / 45), b = x1 * (1.0f / 45);
  v16 c = x0 * (32.0f / 45) + x2 * (8.0f / 45), d = x1 * (16.0f / 45);
  y[0] = x0;
  y[1] = (even + x1) * (-2.0f / 9), y[2] = (even - x1) * (-2.0f / 9);
  y[3] = a + b, y[4] = a - b;
  y[5] = c + d, y[6] = c - d;
  y[7] = x2;
}

INLINE void transform_output(const v16 *x, v16 *y, int tile) {
  v16 a = x[1] + x[2], b = x[1] - x[2];
  v16 c = x[3] + x[4], d = x[3] - x[4];
  if (tile == 4) {
    y[0] = x[0] + a + c;
    y[1] = b + 2.0f * d;
    y[2] = a + 4.0f * c;
    y[3] = b + 8.0f * d + x[5];
    return;
  }
  v16 e = x[5] + x[6], f = x[5] - x[6];
  y[0] = x[0] + a + c + e;
  y[1] = b + 2.0f * d + 0.5f * f;
  y[2] = a + 4.0f * c + 0.25f * e;
  y[3] = b + 8.0f * d + 0.125f * f;
  y[4] = a + 16.0f * c + 0.0625f * e;
  y[5] = b + 32.0f * d + 0.03125f * f + x[7];
}

// Weights of sixteen inputs and outputs, to taps (inputs, TAPS, outputs).
INLINE void gather_taps(const Convolution *c, int is_bf16, int input, int output, float *taps) {
  const size_t row = (size_t)c->inputs * TAPS, start = (size_t)input * TAPS;
  for (int i = 0; i < TAPS; i++) {
    v16 x[LANES];
    UNROLL for (int lane = 0; lane < LANES; lane++)
      x[lane] = load(is_bf16, c->weight, (output + lane) * row + start + i * LANES);
    transpose(x);
    UNROLL for (int lane = 0; lane < LANES; lane++)
      store_f32(taps + (i * LANES + lane) * LANES, x[lane]);
  }
}

// Weights of a panel of outputs and of `count` inputs, to u (frequencies, inputs, PANEL).
INLINE void transform_weights(const Convolution *c, const Plan *p, int is_bf16, int tile, int panel,
                              int first, int count, float *u) {
  const int patch = tile + 2;
  float taps[LANES * TAPS * LANES] __attribute__((aligned(64)));
  for (int lanes = 0; lanes < PANEL; lanes += LANES)
    for (int input = 0; input < count; input++) {
      if (input % LANES == 0) gather_taps(c, is_bf16, first + input, panel * PANEL + lanes, taps);
      const float *from = taps + input % LANES * TAPS * LANES;
      v16 part[MAX_PATCH * 3];
      for (int j = 0; j < 3; j++) {
        v16 x[3], y[MAX_PATCH];
        UNROLL for (int i = 0; i < 3; i++) x[i] = load_f32(from + (3 * i + j) * LANES);
        transform_taps(x, y, tile);
        UNROLL for (int i = 0; i < patch; i++) part[3 * i + j] = y[i];
      }
      float *to = u + (size_t)input * PANEL + lanes;
      for (int i = 0; i < patch; i++) {
        v16 y[MAX_PATCH];
        transform_taps(part + 3 * i, y, tile);
        UNROLL for (int j = 0; j < patch; j++, to += p->u_step) store_f32(to, y[j]);
      }
    }
}

typedef struct {
  int image, row, column;  // of the first pixel
} TileStart;

INLINE TileStart start_of(const Plan *p, int64_t number) {
  return (TileStart){.image = (int)(number / ((int64_t)p->across * p->down)),
                     .row = (int)(number / p->across % p->down) * p->tile,
                     .column = (int)(number % p->across) * p->tile};
}

// The patch of one tile, to v (parts of `depth` inputs, frequencies, tiles, depth); `zeros` stand
// for what is outside.
INLINE void transform_patch(const Convolution *c, const Plan *p, int is_bf16, int tile,
                            TileStart start, const void *zeros, float *v) {
  const int patch = tile + 2, size = is_bf16 ? 2 : 4;
  int height = c->height >> c->upsampled, width = c->width >> c->upsampled;
  const char *from[MAX_FREQUENCIES];
  for (int i = 0; i < patch; i++)
    for (int j = 0; j < patch; j++) {
      int row = start.row + i - 1, column = start.column + j - 1;
      int outside = row < 0 || row >= c->height || column < 0 || column >= c->width;
      size_t pixel = outside ? 0 : (size_t)start.image * height + (row >> c->upsampled);
      pixel = outside ? 0 : pixel * width + (column >> c->upsampled);
      const char *inside = (const char *)c->x + pixel * c->inputs * size;
      from[i * patch + j] = outside ? zeros : inside;
    }
  size_t next = (size_t)(tile >> c->upsampled) * c->inputs * size;
  for (int input = 0; input < c->inputs; input += LANES) {
    v16 part[MAX_FREQUENCIES];
    for (int j = 0; j < patch; j++) {
      v16 x[MAX_PATCH], y[MAX_PATCH];
      UNROLL for (int i = 0; i < patch; i++) {
        x[i] = load(is_bf16, from[i * patch + j], input);
        // No processor foresees the rows of the tile to the right.
        __builtin_prefetch(from[i * patch + j] + input * size + next, 0, 2);
      }
      transform_input(x, y, tile);
      UNROLL for (int i = 0; i < patch; i++) part[i * patch + j] = y[i];
    }
    float *to = v + input / p->depth * p->frequencies * p->v_step + input % p->depth;
    for (int i = 0; i < patch; i++) {
      v16 y[MAX_PATCH];
      transform_input(part + i * patch, y, tile);
      UNROLL for (int j = 0; j < patch; j++, to += p->v_step) store_f32(to, y[j]);
    }
  }
}

// Whether a frequency of the input is zero: along a side of a patch, pixels that were repeated are
// a, b, b, c, c, d, and at -1 each cancels itself.
INLINE int is_zero_frequency(const Convolution *c, const Plan *p, int f) {
  int patch = p->tile + 2;
  return c->upsampled && (f / patch == 2 || f % patch == 2);
}

// m (rows, outputs) = v (rows, depth) u (depth, PANEL), or m += that with `accumulate`. Of v, `count`
// numbers of a row are taken.
INLINE void multiply(int rows, const float *restrict v, int depth, const float *restrict u,
                     int count, float *restrict m, size_t outputs, int accumulate) {
  wide total[ROWS][2];
  UNROLL for (int i = 0; i < rows; i++)
    UNROLL for (int j = 0; j < 2; j++) {
      total[i][j] = (wide){0};
      if (accumulate) memcpy(&total[i][j], m + i * outputs + j * (PANEL / 2), sizeof(wide));
    }
  for (int k = 0; k < count; k++) {
    wide weight[2];
    UNROLL for (int j = 0; j < 2; j++)
      memcpy(&weight[j], u + (size_t)k * PANEL + j * (PANEL / 2), sizeof(wide));
    UNROLL for (int i = 0; i < rows; i++) {
      float x = v[(size_t)i * depth + k];
      UNROLL for (int j = 0; j < 2; j++) total[i][j] += x * weight[j];
    }
  }
  UNROLL for (int i = 0; i < rows; i++)
    UNROLL for (int j = 0; j < 2; j++)
      memcpy(m + i * outputs + j * (PANEL / 2), &total[i][j], sizeof(wide));
}

// The same for any number of rows; up to a multiple of ROW_STEP, what is there is multiplied too.
static __attribute__((noinline)) void multiply_all(int rows, const float *v, int depth,
                                                   const float *u, int count, float *m,
                                                   size_t outputs, int accumulate) {
  for (; rows > 2 * ROW_STEP; rows -= ROWS, v += (size_t)ROWS * depth, m += ROWS * outputs)
    multiply(ROWS, v, depth, u, count, m, outputs, accumulate);
  if (rows > ROW_STEP)
    multiply(2 * ROW_STEP, v, depth, u, count, m, outputs, accumulate);
  else if (rows > 0)
    multiply(ROW_STEP, v, depth, u, count, m, outputs, accumulate);
}

// `width` outputs, from `first` on, of one tile; from m (frequencies, tiles, width).
INLINE void finish_tile(const Convolution *c, const Plan *p, int is_bf16, int tile,
                        TileStart start, int first, const float *m) {
  const int patch = tile + 2, size = is_bf16 ? 2 : 4;
  int rows = min_int(c->height - start.row, tile), columns = min_int(c->width - start.column, tile);
  size_t pixel = ((size_t)start.image * c->height + start.row) * c->width + start.column;
  size_t next = (size_t)tile * c->outputs * size;
  for (int output = 0; output < p->width; output += LANES) {
    int new_line = output * size % 64 == 0;
    v16 part[MAX_FREQUENCIES], bias = load(is_bf16, c->bias, first + output);
    for (int j = 0; j < patch; j++) {
      v16 x[MAX_PATCH], y[MAX_PATCH];
      UNROLL for (int i = 0; i < patch; i++)
        x[i] = load_f32(m + (i * patch + j) * p->m_step + output);
      transform_output(x, y, tile);
      UNROLL for (int i = 0; i < tile; i++) part[i * patch + j] = y[i];
    }
    for (int i = 0; i < rows; i++) {
      v16 y[MAX_PATCH];
      transform_output(part + i * patch, y, tile);
      size_t at = (pixel + (size_t)i * c->width) * c->outputs + first + output;
      UNROLL for (int j = 0; j < tile; j++, at += c->outputs) {
        if (j >= columns) break;
        v16 sum = y[j] + bias;
        if (new_line) __builtin_prefetch((char *)c->y + at * size + next, 0, 2);
        if (c->residual) {
          if (new_line) __builtin_prefetch((char *)c->residual + at * size + next, 0, 2);
          sum += load(is_bf16, c->residual, at);
        }
        store(is_bf16, c->y, at, sum);
      }
    }
  }
}

// Clears the sums of products that are not done.
static void clear_zero_frequencies(const Convolution *c, const Plan *p, float *m) {
  for (int f = 0; f < p->frequencies; f++)
    if (is_zero_frequency(c, p, f)) memset(m + f * p->m_step, 0, p->m_step * sizeof(float));
}

// The stages that depend on the precision and the tile. Each is compiled once and called by address:
// compilers do not round every copy of an inlined function in the same way.
typedef struct {
  void (*transform_weights)(const Convolution *, const Plan *, int, int, int, float *);
  void (*transform_patch)(const Convolution *, const Plan *, int64_t, const void *, float *);
  void (*finish_tile)(const Convolution *, const Plan *, int64_t, int, const float *);
} Stages;

#define STAGES(name, is_bf16, tile)                                                                 \
  static void weights_##name(const Convolution *c, const Plan *p, int panel, int first,         \
                             int count, float *u) {                                             \
    transform_weights(c, p, is_bf16, tile, panel, first, count, u);                                \
  }                                                                                             \
  static void patch_##name(const Convolution *c, const Plan *p, int64_t number,                 \
                           const void *zeros, float *v) {                                       \
    transform_patch(c, p, is_bf16, tile, start_of(p, number), zeros, v);                           \
  }                                                                                             \
  static void finish_##name(const Convolution *c, const Plan *p, int64_t number, int first,     \
                            const float *m) {                                                   \
    finish_tile(c, p, is_bf16, tile, start_of(p, number), first, m);                               \
  }                                                                                             \
  static const Stages name = {weights_##name, patch_##name, finish_##name};
STAGES(of_float32, 0, 4)
STAGES(of_bfloat16, 1, 4)
STAGES(of_large_tiles, 1, 6)

// Weights are transformed once; then each thread takes a few tiles at a time from patch to pixels.
static void run_weights_first(const Convolution *c, const Plan *p, const Stages *stages, float *u,
                              const void *zeros, float *own_scratch) {
#pragma omp parallel num_threads(c->threads)
  {
#pragma omp for schedule(dynamic)
    for (int panel = 0; panel < c->outputs / PANEL; panel++)
      stages->transform_weights(c, p, panel, 0, c->inputs, u + (size_t)panel * PANEL * c->inputs);
    float *v = own_scratch + THREAD * (p->v_size + p->m_size), *m = v + p->v_size;
    // The last tiles may be few, and are multiplied together with what is here.
    memset(v, 0, p->v_size * sizeof(float));
    clear_zero_frequencies(c, p, m);
#pragma omp for schedule(dynamic)
    for (int64_t first = 0; first < p->tiles; first += ROWS) {
      int count = (int)(p->tiles - first < ROWS ? p->tiles - first : ROWS);
      for (int t = 0; t < count; t++)
        stages->transform_patch(c, p, first + t, zeros, v + (size_t)t * p->depth);
      for (int f = 0; f < p->frequencies; f++) {
        if (is_zero_frequency(c, p, f)) continue;
        for (int output = 0; output < c->outputs; output += PANEL)
          multiply_all(count, v + f * p->v_step, p->depth,
                       u + f * p->u_step + (size_t)output * c->inputs, c->inputs,
                       m + f * p->m_step + output, p->width, 0);
      }
      for (int t = 0; t < count; t++)
        stages->finish_tile(c, p, first + t, 0, m + (size_t)t * p->width);
    }
  }
}

// Patches are transformed once; then each thread takes a panel of outputs from weights to pixels.
static void run_patches_first(const Convolution *c, const Plan *p, const Stages *stages, float *v,
                              const void *zeros, float *own_scratch) {
  const int panels = c->outputs / PANEL, tiles = (int)p->tiles;
  const size_t per_part = p->frequencies * p->v_step;
#pragma omp parallel num_threads(c->threads)
  {
#pragma omp for schedule(static)
    for (int t = 0; t < p->splits * p->tiles_at_once; t++) {
      float *to = v + (size_t)t * p->depth;
      if (t < tiles) {
        stages->transform_patch(c, p, t, zeros, to);
      } else if (t < tiles + ROW_STEP) {
        for (size_t at = 0; at < p->v_size; at += p->v_step)
          memset(to + at, 0, p->depth * sizeof(float));
      }
    }
    float *u = own_scratch + THREAD * (p->u_size + p->m_size), *m = u + p->u_size;
    clear_zero_frequencies(c, p, m);
#pragma omp for schedule(dynamic)
    for (int task = 0; task < panels * p->splits; task++) {
      int panel = task / p->splits, first = task % p->splits * p->tiles_at_once;
      int rows = min_int(tiles - first, p->tiles_at_once);
      const float *own = v + (size_t)first * p->depth;
      for (int input = 0; input < c->inputs; input += p->depth, own += per_part) {
        int count = min_int(c->inputs - input, p->depth);
        stages->transform_weights(c, p, panel, input, count, u);
        for (int f = 0; f < p->frequencies; f++)
          if (!is_zero_frequency(c, p, f))
            multiply_all(rows, own + f * p->v_step, p->depth, u + f * p->u_step, count,
                         m + f * p->m_step, p->width, input > 0);
      }
      for (int t = 0; t < rows; t++)
        stages->finish_tile(c, p, first + t, panel * PANEL, m + (size_t)t * p->width);
    }
  }
}

// Bytes of scratch that a convolution needs.
size_t convolve_scratch(const Convolution *c) {
  Plan p = plan_of(c);
  size_t shared = p.weights_first ? p.u_size : p.v_size;
  size_t own = p.m_size + (p.weights_first ? p.v_size : p.u_size);
  return (shared + c->inputs + c->threads * own) * sizeof(float) + 64;
}

// y = x * weights + bias (+ residual), with one pixel of zeros around x.
void convolve(const Convolution *c) {
  Plan p = plan_of(c);
  const Stages *stages = !c->is_bf16 ? &of_float32 : p.tile == 4 ? &of_bfloat16 : &of_large_tiles;
  advise_large_pages(c->scratch, convolve_scratch(c));
  size_t size = (size_t)c->images * c->height * c->width * c->outputs;
  advise_large_pages(c->y, bytes_of(c->is_bf16, size));
  float *shared = (float *)align_up((size_t)c->scratch);
  float *zeros = shared + (p.weights_first ? p.u_size : p.v_size), *own_scratch = zeros + c->inputs;
  memset(zeros, 0, c->inputs * sizeof(float));
  (p.weights_first ? run_weights_first : run_patches_first)(c, &p, stages, shared, zeros, own_scratch);
}

// y = SiLU(GroupNorm(x)).
void norm_silu(const Normalization *n) {
  size_t size = (size_t)n->images * n->pixels * n->channels;
  if (n->y != n->x) advise_large_pages(n->y, bytes_of(n->is_bf16, size));
  if (n->is_bf16) normalize(n, 1);
  else normalize(n, 0);
}

// What was compiled: 1 for a processor on which this is known to be faster than torch, 2 for one
// that multiplies tiles of bfloat16 (AMX), at which sums of products are faster still.
int32_t convolution_features(void) {
  int found = 0;
#if defined(__AVX512F__) || (defined(__AVX2__) && defined(__FMA__))
  found = 1;
#endif
#if defined(__AMX_BF16__)
  found |= 2;
#endif
  return found;
}
