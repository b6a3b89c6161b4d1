// GroupNorm with SiLU of images (images, pixels, channels), in float32 or bfloat16. Statistics are
// summed in an order that depends neither on the number of threads nor on the other images.

#ifndef LLAMAGEN_NORMALIZATION_H
#define LLAMAGEN_NORMALIZATION_H

#include <math.h>

#include "vectors.h"

// Pixels whose numbers are summed in float32; such sums are added in float64.
#define CHUNK 256

typedef struct {
  int32_t images, pixels, channels, groups;  // channels: a multiple of 16
  int32_t is_bf16;
  int32_t threads;
  float eps;
  const void *x, *weight, *bias;
  void *y;         // may be x
  float *scratch;  // of norm_silu_scratch() bytes
} Normalization;

static int chunks_of(const Normalization *n) { return (n->pixels + CHUNK - 1) / CHUNK; }

// Bytes of scratch that a normalization needs.
size_t norm_silu_scratch(const Normalization *n) {
  return (size_t)n->images * (chunks_of(n) + 1) * 2 * n->channels * sizeof(float) + 64;
}

// Sums of a chunk's numbers and their squares, of some channels, to sums (2, channels). Numbers are
// taken relative to the image's first pixel: squares of large numbers would lose what they differ
// by.
INLINE void sum_channels(const Normalization *n, int is_bf16, int vectors, int image, int from, int to,
                         int channel, float *sums) {
  size_t start = (size_t)image * n->pixels * n->channels + channel;
  v16 pivot[4], total[4], squares[4];
  UNROLL for (int i = 0; i < vectors; i++) {
    pivot[i] = load(is_bf16, n->x, start + i * LANES);
    total[i] = squares[i] = splat(0);
  }
  for (int pixel = from; pixel < to; pixel++)
    UNROLL for (int i = 0; i < vectors; i++) {
      v16 x = load(is_bf16, n->x, start + (size_t)pixel * n->channels + i * LANES) - pivot[i];
      total[i] += x;
      squares[i] += x * x;
    }
  UNROLL for (int i = 0; i < vectors; i++) {
    store_f32(sums + channel + i * LANES, total[i]);
    store_f32(sums + n->channels + channel + i * LANES, squares[i]);
  }
}

INLINE void sum_chunk(const Normalization *n, int is_bf16, int image, int chunk, float *sums) {
  int from = chunk * CHUNK, to = min_int(from + CHUNK, n->pixels), channel = 0;
  for (; channel + 4 * LANES <= n->channels; channel += 4 * LANES)
    sum_channels(n, is_bf16, 4, image, from, to, channel, sums);
  for (; channel < n->channels; channel += LANES)
    sum_channels(n, is_bf16, 1, image, from, to, channel, sums);
}

// Factor and summand of each channel of an image, to affine (2, channels).
INLINE void find_affine(const Normalization *n, int is_bf16, int image, const float *sums,
                        float *affine) {
  int per_group = n->channels / n->groups, chunks = chunks_of(n);
  size_t start = (size_t)image * n->pixels * n->channels;
  for (int group = 0; group < n->groups; group++) {
    double total = 0, squares = 0, count = (double)n->pixels * per_group;
    for (int channel = group * per_group; channel < (group + 1) * per_group; channel++) {
      double own = 0, own_squares = 0, pivot = load_one(is_bf16, n->x, start + channel);
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
      double weight = load_one(is_bf16, n->weight, channel), bias = load_one(is_bf16, n->bias, channel);
      affine[channel] = (float)(factor * weight);
      affine[n->channels + channel] = (float)(bias - mean * factor * weight);
    }
  }
}

// x / (1 + e^-x), with a relative error below 1e-6; below 2e-4 for bfloat16, which keeps less.
INLINE v16 silu(v16 x, int is_bf16) {
  v16 power = x * -1.44269504f;
#if defined(__AVX512DQ__)
  v16 rest = (v16)_mm512_reduce_ps((__m512)power, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  v16 whole = power - rest;
#else
  power = max_f32(-max_f32(-power, splat(-126.0f)), splat(-126.0f));
  const v16 shift = splat(ROUNDING_SHIFT);
  v16 whole = (power + shift) - shift, rest = power - whole;
#endif
  v16 y = splat(is_bf16 ? 9.6181291e-3f : 1.5403530e-4f);
  if (!is_bf16) {
    y = y * rest + 1.3333558e-3f;
    y = y * rest + 9.6181291e-3f;
  }
  y = y * rest + 5.5504109e-2f;
  y = y * rest + 2.4022651e-1f;
  y = y * rest + 6.9314718e-1f;
  y = y * rest + 1.0f;
#if defined(__AVX512DQ__)
  y = 1.0f + (v16)_mm512_scalef_ps((__m512)y, (__m512)whole);
  return is_bf16 ? x * (v16)_mm512_rcp14_ps((__m512)y) : x / y;
#else
  y *= (v16)((__builtin_convertvector(whole, i32x16) + 127) << 23);
  return x / (1.0f + y);
#endif
}

INLINE void activate_chunk(const Normalization *n, int is_bf16, int image, int chunk,
                           const float *affine) {
  size_t start = (size_t)image * n->pixels * n->channels;
  int from = chunk * CHUNK, to = min_int(from + CHUNK, n->pixels);
  for (int pixel = from; pixel < to; pixel++)
    for (int channel = 0; channel < n->channels; channel += LANES) {
      size_t at = start + (size_t)pixel * n->channels + channel;
      v16 x = load(is_bf16, n->x, at) * load_f32(affine + channel) +
              load_f32(affine + n->channels + channel);
      store(is_bf16, n->y, at, silu(x, is_bf16));
    }
}

INLINE void normalize(const Normalization *n, int is_bf16) {
  int chunks = chunks_of(n), all = n->images * chunks;
  size_t per_chunk = (size_t)2 * n->channels;
  float *sums = (float *)align_up((size_t)n->scratch), *affine = sums + all * per_chunk;
#pragma omp parallel num_threads(n->threads)
  {
#pragma omp for schedule(static)
    for (int i = 0; i < all; i++)
      sum_chunk(n, is_bf16, i / chunks, i % chunks, sums + i * per_chunk);
#pragma omp for schedule(static)
    for (int image = 0; image < n->images; image++)
      find_affine(n, is_bf16, image, sums + image * chunks * per_chunk, affine + image * per_chunk);
#pragma omp for schedule(static)
    for (int i = 0; i < all; i++)
      activate_chunk(n, is_bf16, i / chunks, i % chunks, affine + i / chunks * per_chunk);
  }
}

#endif
