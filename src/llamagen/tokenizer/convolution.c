// What takes the time of an image tokenizer on a CPU: 3x3 convolutions, and GroupNorm with SiLU.
//
// Images lie as (images, rows, columns, channels), in float32 or bfloat16. Everything is computed
// in float32 and rounded once, where it is stored.
//
// A convolution goes by Winograd's minimal filtering. A tile of 4x4 pixels of an output takes 36
// products for each input channel, where sums of products take 144: patches of 6x6 pixels of the
// input and the weights are transformed to 36 "frequencies", a matrix product is done for each, and
// the inverse transform makes pixels of the result. Sums are reordered by that, so results differ
// in the last bits. Tiles of 6x6 pixels take 64 products instead of 324, but lose two more bits:
// they are for bfloat16, which has not got those.

#include <math.h>
#include <stddef.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#ifdef _OPENMP
#include <omp.h>
#define THREAD omp_get_thread_num()
#else
#define THREAD 0
#endif

#include "vectors.h"

#define MOST 64  // frequencies of the larger tile
#define TAPS 9
// A product makes ROWS tiles of PANEL outputs at a time: as many as there are registers. There are
// half as many without AVX-512, and a compiler that splits v16 in two leaves none of it in them.
#if defined(__AVX512F__)
typedef v16 wide;
#define ROWS 12
#else
typedef float wide __attribute__((vector_size(32)));
#define ROWS 6
#endif
#define PANEL (2 * (int)(sizeof(wide) / sizeof(float)))
// A thread transforms so many tiles, multiplies them, and transforms them back.
#define TILES 12
// Between frequencies: without it, all of them would share one set of a cache's lines.
#define GAP LANES
// Pixels whose numbers are summed in float32; such sums are added in float64.
#define CHUNK 256
#define LARGE_PAGE ((size_t)1 << 21)

typedef struct {
  int32_t images, height, width;  // of the output
  int32_t inputs, outputs;        // channels: multiples of 16 and 32
  int32_t half;                   // bfloat16, not float32
  int32_t upsampled;              // the input has half the height and width, and is repeated
  int32_t threads;
  int64_t per_output, per_input, per_tap;  // strides of the weights, in numbers
  const void *x, *weight, *bias;
  const void *shortcut;  // added to the output; or NULL
  void *y;
  float *scratch;        // of convolution_scratch() bytes
} Convolution;

typedef struct {
  int32_t images, pixels, channels, groups;  // channels: a multiple of 16
  int32_t half;
  int32_t threads;
  float eps;
  const void *x, *weight, *bias;
  void *y;         // may be x
  float *scratch;  // of normalisation_scratch() bytes
} Normalisation;

// Sides of a tile of the output, and of the patch of the input that it depends on. Larger tiles
// have larger transformed weights, for which a map must be large too.
INLINE int tile_of(const Convolution *c) {
  return c->half && (int64_t)c->height * c->width >= (int64_t)c->inputs * c->outputs ? 6 : 4;
}

INLINE int patch_of(const Convolution *c) { return tile_of(c) + 2; }

// Numbers from one frequency to the next: of transformed weights, of transformed patches with their
// inputs, and of tiles with their outputs.
INLINE size_t weight_stride(const Convolution *c) { return (size_t)c->outputs * c->inputs + GAP; }

INLINE size_t input_stride(const Convolution *c) { return (size_t)TILES * c->inputs + GAP; }

INLINE size_t output_stride(const Convolution *c) { return (size_t)TILES * c->outputs + GAP; }

INLINE v16 get(const void *from, size_t at, int half) {
  return half ? load_bf16((const bf16 *)from + at) : load_f32((const float *)from + at);
}

INLINE void put(void *to, size_t at, int half, v16 x) {
  if (half)
    store_bf16((bf16 *)to + at, x);
  else
    store_f32((float *)to + at, x);
}

// Asks for large pages under what is about to be written. The system hands fresh memory out page by
// page, and for small ones that takes a third of a convolution's time.
static void expect(void *to, size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  size_t first = ((size_t)to + LARGE_PAGE - 1) / LARGE_PAGE * LARGE_PAGE;
  size_t last = ((size_t)to + bytes) / LARGE_PAGE * LARGE_PAGE;
  if (first < last) madvise((void *)first, last - first, MADV_HUGEPAGE);
#else
  (void)to, (void)bytes;
#endif
}

// One dimension of the three transforms; `s` and `t` are strides of `x` and `y`. Polynomials are
// taken at 0, 1, -1, 2, -2, (1/2, -1/2,) and infinity.

INLINE void transform_input(const v16 *x, int s, v16 *y, int t, int tile) {
  v16 x0 = x[0], x1 = x[s], x2 = x[2 * s], x3 = x[3 * s], x4 = x[4 * s], x5 = x[5 * s];
  if (tile == 4) {
    v16 a = x4 - 4.0f * x2, b = x3 - 4.0f * x1, c = x4 - x2, d = 2.0f * (x3 - x1);
    y[0] = 4.0f * x0 - 5.0f * x2 + x4;
    y[t] = a + b, y[2 * t] = a - b;
    y[3 * t] = c + d, y[4 * t] = c - d;
    y[5 * t] = 4.0f * x1 - 5.0f * x3 + x5;
    return;
  }
  v16 x6 = x[6 * s], x7 = x[7 * s];
  v16 a = x2 - 4.25f * x4 + x6, b = x1 - 4.25f * x3 + x5;
  v16 c = 0.25f * x2 - 1.25f * x4 + x6, d = 0.5f * x1 - 2.5f * x3 + 2.0f * x5;
  v16 e = 4.0f * x2 - 5.0f * x4 + x6, f = 2.0f * x1 - 2.5f * x3 + 0.5f * x5;
  y[0] = x0 - x6 + 5.25f * (x4 - x2);
  y[t] = a + b, y[2 * t] = a - b;
  y[3 * t] = c + d, y[4 * t] = c - d;
  y[5 * t] = e + f, y[6 * t] = e - f;
  y[7 * t] = x7 - x1 + 5.25f * (x3 - x5);
}

INLINE void transform_taps(const v16 *x, int s, v16 *y, int t, int tile) {
  v16 x0 = x[0], x1 = x[s], x2 = x[2 * s], even = x0 + x2;
  if (tile == 4) {
    v16 a = x0 * (1.0f / 24) + x2 * (1.0f / 6), b = x1 * (1.0f / 12);
    y[0] = x0 * 0.25f;
    y[t] = (even + x1) * (-1.0f / 6), y[2 * t] = (even - x1) * (-1.0f / 6);
    y[3 * t] = a + b, y[4 * t] = a - b;
    y[5 * t] = x2;
    return;
  }
  v16 a = x0 * (1.0f / 90) + x2 * (2.0f / 45), b = x1 * (1.0f / 45);
  v16 c = x0 * (32.0f / 45) + x2 * (8.0f / 45), d = x1 * (16.0f / 45);
  y[0] = x0;
  y[t] = (even + x1) * (-2.0f / 9), y[2 * t] = (even - x1) * (-2.0f / 9);
  y[3 * t] = a + b, y[4 * t] = a - b;
  y[5 * t] = c + d, y[6 * t] = c - d;
  y[7 * t] = x2;
}

INLINE void transform_output(const v16 *x, int s, v16 *y, int t, int tile) {
  v16 a = x[s] + x[2 * s], b = x[s] - x[2 * s];
  v16 c = x[3 * s] + x[4 * s], d = x[3 * s] - x[4 * s];
  if (tile == 4) {
    y[0] = x[0] + a + c;
    y[t] = b + 2.0f * d;
    y[2 * t] = a + 4.0f * c;
    y[3 * t] = b + 8.0f * d + x[5 * s];
    return;
  }
  v16 e = x[5 * s] + x[6 * s], f = x[5 * s] - x[6 * s];
  y[0] = x[0] + a + c + e;
  y[t] = b + 2.0f * d + 0.5f * f;
  y[2 * t] = a + 4.0f * c + 0.25f * e;
  y[3 * t] = b + 8.0f * d + 0.125f * f;
  y[4 * t] = a + 16.0f * c + 0.0625f * e;
  y[5 * t] = b + 32.0f * d + 0.03125f * f + x[7 * s];
}

// Weights of a panel of outputs, to u (frequencies, panels, inputs, PANEL).
INLINE void transform_weights(const Convolution *c, int half, int tile, int panel, float *u) {
  const int patch = tile + 2;
  for (int input = 0; input < c->inputs; input++)
    for (int lanes = 0; lanes < PANEL; lanes += LANES) {
      float taps[TAPS][LANES];
      for (int lane = 0; lane < LANES; lane++) {
        int64_t at = (panel * PANEL + lanes + lane) * c->per_output + input * c->per_input;
        for (int tap = 0; tap < TAPS; tap++, at += c->per_tap)
          taps[tap][lane] =
              half ? f32_of(((const bf16 *)c->weight)[at]) : ((const float *)c->weight)[at];
      }
      v16 x[TAPS], part[8 * 3], y[MOST];
      UNROLL for (int tap = 0; tap < TAPS; tap++) x[tap] = load_f32(taps[tap]);
      UNROLL for (int j = 0; j < 3; j++) transform_taps(x + j, 3, part + j, 3, tile);
      UNROLL for (int i = 0; i < patch; i++)
        transform_taps(part + 3 * i, 1, y + patch * i, 1, tile);
      float *to = u + ((size_t)panel * c->inputs + input) * PANEL + lanes;
      for (int f = 0; f < patch * patch; f++) store_f32(to + f * weight_stride(c), y[f]);
    }
}

typedef struct {
  int image, row, column;  // of the first pixel
} Place;

INLINE Place place_of(const Convolution *c, int tile, int64_t number) {
  int across = (c->width + tile - 1) / tile, down = (c->height + tile - 1) / tile;
  return (Place){.image = (int)(number / ((int64_t)across * down)),
                 .row = (int)(number / across % down) * tile,
                 .column = (int)(number % across) * tile};
}

// The patch of one tile, to v (frequencies, TILES, inputs); `zeros` stand for what is outside.
INLINE void transform_patch(const Convolution *c, int half, int tile, Place p, const void *zeros,
                            float *v) {
  const int patch = tile + 2;
  int height = c->height >> c->upsampled, width = c->width >> c->upsampled;
  const char *from[MOST];
  for (int i = 0; i < patch; i++)
    for (int j = 0; j < patch; j++) {
      int row = p.row + i - 1, column = p.column + j - 1;
      int outside = row < 0 || row >= c->height || column < 0 || column >= c->width;
      size_t pixel = outside ? 0 : (size_t)p.image * height + (row >> c->upsampled);
      pixel = outside ? 0 : pixel * width + (column >> c->upsampled);
      const char *inside = (const char *)c->x + pixel * c->inputs * (half ? 2 : 4);
      from[i * patch + j] = outside ? zeros : inside;
    }
  for (int input = 0; input < c->inputs; input += LANES) {
    v16 x[MOST], y[MOST];
    UNROLL for (int j = 0; j < patch; j++) {
      UNROLL for (int i = 0; i < patch; i++)
        x[i * patch + j] = get(from[i * patch + j], input, half);
      transform_input(x + j, patch, y + j, patch, tile);
    }
    UNROLL for (int i = 0; i < patch; i++) {
      transform_input(y + patch * i, 1, x + patch * i, 1, tile);
      UNROLL for (int j = 0; j < patch; j++)
        store_f32(v + (i * patch + j) * input_stride(c) + input, x[i * patch + j]);
    }
  }
}

// Whether a frequency of the input is zero: along a side of a patch, pixels that were repeated are
// a, b, b, c, c, d, and at -1 each cancels itself.
INLINE int vanishes(const Convolution *c, int patch, int f) {
  return c->upsampled && (f / patch == 2 || f % patch == 2);
}

// m (ROWS, PANEL of outputs) = v (ROWS, inputs) u (inputs, PANEL).
static __attribute__((noinline)) void multiply(const float *restrict v, const float *restrict u,
                                               int inputs, float *restrict m, size_t outputs) {
  wide total[ROWS][2];
  UNROLL for (int i = 0; i < ROWS; i++)
    UNROLL for (int j = 0; j < 2; j++) total[i][j] = (wide){0};
  for (int k = 0; k < inputs; k++) {
    wide weight[2];
    UNROLL for (int j = 0; j < 2; j++)
      memcpy(&weight[j], u + (size_t)k * PANEL + j * (PANEL / 2), sizeof(wide));
    UNROLL for (int i = 0; i < ROWS; i++) {
      float x = v[(size_t)i * inputs + k];
      UNROLL for (int j = 0; j < 2; j++) total[i][j] += x * weight[j];
    }
  }
  UNROLL for (int i = 0; i < ROWS; i++)
    UNROLL for (int j = 0; j < 2; j++)
      memcpy(m + i * outputs + j * (PANEL / 2), &total[i][j], sizeof(wide));
}

// One tile of the output, from m (frequencies, TILES, outputs).
INLINE void finish_tile(const Convolution *c, int half, int tile, Place p, const float *m) {
  const int patch = tile + 2;
  int rows = c->height - p.row, columns = c->width - p.column;
  for (int output = 0; output < c->outputs; output += LANES) {
    v16 x[MOST], part[MOST], y[MOST], bias = get(c->bias, output, half);
    UNROLL for (int j = 0; j < patch; j++) {
      UNROLL for (int i = 0; i < patch; i++) {
        int f = i * patch + j;
        x[f] = vanishes(c, patch, f) ? splat(0) : load_f32(m + f * output_stride(c) + output);
      }
      transform_output(x + j, patch, part + j, patch, tile);
    }
    UNROLL for (int i = 0; i < tile; i++) {
      transform_output(part + patch * i, 1, y + tile * i, 1, tile);
      UNROLL for (int j = 0; j < tile; j++) {
        if (i >= rows || j >= columns) continue;
        size_t pixel = ((size_t)p.image * c->height + p.row + i) * c->width + p.column + j;
        size_t at = pixel * c->outputs + output;
        v16 sum = y[i * tile + j] + bias;
        put(c->y, at, half, c->shortcut ? sum + get(c->shortcut, at, half) : sum);
      }
    }
  }
}

static size_t own_room(const Convolution *c) {
  return patch_of(c) * patch_of(c) * (input_stride(c) + output_stride(c));
}

static size_t shared_room(const Convolution *c) {
  return patch_of(c) * patch_of(c) * weight_stride(c) + c->inputs;
}

// Bytes of scratch that a convolution needs.
size_t convolution_scratch(const Convolution *c) {
  return (shared_room(c) + c->threads * own_room(c)) * sizeof(float) + 64;
}

INLINE void run(const Convolution *c, int half, int tile) {
  const int patch = tile + 2, frequencies = patch * patch;
  float *u = (float *)(((size_t)c->scratch + 63) / 64 * 64);
  float *zeros = u + frequencies * weight_stride(c), *rooms = u + shared_room(c);
  memset(zeros, 0, c->inputs * sizeof(float));
  int across = (c->width + tile - 1) / tile, down = (c->height + tile - 1) / tile;
  int64_t tiles = (int64_t)c->images * across * down;
#pragma omp parallel num_threads(c->threads)
  {
#pragma omp for schedule(dynamic)
    for (int panel = 0; panel < c->outputs / PANEL; panel++)
      transform_weights(c, half, tile, panel, u);
    float *v = rooms + THREAD * own_room(c), *m = v + frequencies * input_stride(c);
    // The last tiles may be few, and are multiplied together with what is here.
    memset(v, 0, frequencies * input_stride(c) * sizeof(float));
#pragma omp for schedule(dynamic)
    for (int64_t first = 0; first < tiles; first += TILES) {
      int count = tiles - first < TILES ? (int)(tiles - first) : TILES;
      for (int t = 0; t < count; t++)
        transform_patch(c, half, tile, place_of(c, tile, first + t), zeros,
                        v + (size_t)t * c->inputs);
      for (int f = 0; f < frequencies; f++) {
        if (vanishes(c, patch, f)) continue;
        for (int output = 0; output < c->outputs; output += PANEL)
          for (int t = 0; t < count; t += ROWS)
            multiply(v + f * input_stride(c) + (size_t)t * c->inputs,
                     u + f * weight_stride(c) + (size_t)output * c->inputs, c->inputs,
                     m + f * output_stride(c) + (size_t)t * c->outputs + output, c->outputs);
      }
      for (int t = 0; t < count; t++)
        finish_tile(c, half, tile, place_of(c, tile, first + t), m + (size_t)t * c->outputs);
    }
  }
}

// y = x * weights + bias (+ shortcut), with one pixel of zeros around x.
void convolve(const Convolution *c) {
  expect(c->scratch, convolution_scratch(c));
  expect(c->y, (size_t)c->images * c->height * c->width * c->outputs * (c->half ? 2 : 4));
  if (tile_of(c) == 6)
    run(c, 1, 6);
  else if (c->half)
    run(c, 1, 4);
  else
    run(c, 0, 4);
}

static int chunks_of(const Normalisation *n) { return (n->pixels + CHUNK - 1) / CHUNK; }

// Bytes of scratch that a normalisation needs.
size_t normalisation_scratch(const Normalisation *n) {
  return (size_t)n->images * (chunks_of(n) + 1) * 2 * n->channels * sizeof(float) + 64;
}

// Sums of a chunk's numbers and their squares, to sums (2, channels). Numbers are taken relative
// to the image's first pixel: squares of large numbers would lose what they differ by.
INLINE void sum_chunk(const Normalisation *n, int half, int image, int chunk, float *sums) {
  size_t start = (size_t)image * n->pixels * n->channels;
  int from = chunk * CHUNK, to = from + CHUNK < n->pixels ? from + CHUNK : n->pixels;
  for (int channel = 0; channel < n->channels; channel += LANES) {
    v16 pivot = get(n->x, start + channel, half), total = splat(0), squares = splat(0);
    for (int pixel = from; pixel < to; pixel++) {
      v16 x = get(n->x, start + (size_t)pixel * n->channels + channel, half) - pivot;
      total += x;
      squares += x * x;
    }
    store_f32(sums + channel, total);
    store_f32(sums + n->channels + channel, squares);
  }
}

// Factor and summand of each channel of an image, to affine (2, channels).
INLINE void find_affine(const Normalisation *n, int half, int image, const float *sums,
                        float *affine) {
  int per_group = n->channels / n->groups, chunks = chunks_of(n);
  size_t start = (size_t)image * n->pixels * n->channels;
#define NUMBER(from, at) \
  (half ? f32_of(((const bf16 *)(from))[at]) : ((const float *)(from))[at])
  for (int group = 0; group < n->groups; group++) {
    double total = 0, squares = 0, count = (double)n->pixels * per_group;
    for (int channel = group * per_group; channel < (group + 1) * per_group; channel++) {
      double own = 0, own_squares = 0, pivot = NUMBER(n->x, start + channel);
      for (int chunk = 0; chunk < chunks; chunk++) {
        const float *at = sums + (size_t)chunk * 2 * n->channels + channel;
        own += at[0];
        own_squares += at[n->channels];
      }
      total += own + n->pixels * pivot;
      squares += own_squares + 2 * pivot * own + n->pixels * pivot * pivot;
    }
    double mean = total / count, variance = squares / count - mean * mean;
    double factor = 1 / sqrt((variance > 0 ? variance : 0) + n->eps);
    for (int channel = group * per_group; channel < (group + 1) * per_group; channel++) {
      double weight = NUMBER(n->weight, channel), bias = NUMBER(n->bias, channel);
      affine[channel] = (float)(factor * weight);
      affine[n->channels + channel] = (float)(bias - mean * factor * weight);
    }
  }
#undef NUMBER
}

// x / (1 + e^-x), with a relative error below 1e-6; below 1e-4 for bfloat16, which keeps less.
INLINE v16 silu(v16 x, int half) {
  v16 power = larger(-larger(x * 1.44269504f, splat(-126.0f)), splat(-126.0f));
  // Adding and taking away 1.5 * 2^23 leaves the nearest whole number.
  const v16 shift = splat(12582912.0f);
  v16 whole = (power + shift) - shift, rest = power - whole;
  v16 y = splat(half ? 9.6181291e-3f : 1.5403530e-4f);
  if (!half) {
    y = y * rest + 1.3333558e-3f;
    y = y * rest + 9.6181291e-3f;
  }
  y = y * rest + 5.5504109e-2f;
  y = y * rest + 2.4022651e-1f;
  y = y * rest + 6.9314718e-1f;
  y = y * rest + 1.0f;
  y *= (v16)((__builtin_convertvector(whole, i32x16) + 127) << 23);
  return x / (1.0f + y);
}

INLINE void activate_chunk(const Normalisation *n, int half, int image, int chunk,
                           const float *affine) {
  size_t start = (size_t)image * n->pixels * n->channels;
  int from = chunk * CHUNK, to = from + CHUNK < n->pixels ? from + CHUNK : n->pixels;
  for (int pixel = from; pixel < to; pixel++)
    for (int channel = 0; channel < n->channels; channel += LANES) {
      size_t at = start + (size_t)pixel * n->channels + channel;
      v16 x = get(n->x, at, half) * load_f32(affine + channel) +
              load_f32(affine + n->channels + channel);
      put(n->y, at, half, silu(x, half));
    }
}

INLINE void normalise(const Normalisation *n, int half) {
  int chunks = chunks_of(n), all = n->images * chunks;
  size_t per_chunk = (size_t)2 * n->channels;
  float *sums = (float *)(((size_t)n->scratch + 63) / 64 * 64), *affine = sums + all * per_chunk;
#pragma omp parallel num_threads(n->threads)
  {
#pragma omp for schedule(static)
    for (int i = 0; i < all; i++)
      sum_chunk(n, half, i / chunks, i % chunks, sums + i * per_chunk);
#pragma omp for schedule(static)
    for (int image = 0; image < n->images; image++)
      find_affine(n, half, image, sums + image * chunks * per_chunk, affine + image * per_chunk);
#pragma omp for schedule(static)
    for (int i = 0; i < all; i++)
      activate_chunk(n, half, i / chunks, i % chunks, affine + i / chunks * per_chunk);
  }
}

// y = SiLU(GroupNorm(x)).
void normalise_and_activate(const Normalisation *n) {
  if (n->y != n->x)
    expect(n->y, (size_t)n->images * n->pixels * n->channels * (n->half ? 2 : 4));
  if (n->half)
    normalise(n, 1);
  else
    normalise(n, 0);
}

// What was compiled: 1 for a processor on which this is known to be faster than torch, 2 for one
// that multiplies tiles of bfloat16 (AMX), at which sums of products are faster still.
int32_t convolution_features(void) {
  int found = 0;
#if defined(__AVX512F__) || (defined(__AVX2__) && defined(__FMA__))
  found |= 1;
#endif
#if defined(__AMX_BF16__)
  found |= 2;
#endif
  return found;
}
