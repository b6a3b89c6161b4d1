// One step of a transformer on a CPU: tokens of several sequences in, logits out.
//
// The whole step is one call. Its threads share the chunks of each phase (a block of outputs of a
// product, a head of a sequence) and meet at a barrier behind it. Statistics, sums, the residual
// stream and softmax are in float32; what is multiplied is rounded to bfloat16 where weights are.

#include <stdlib.h>
#include <time.h>

#include "attention.h"
#include "sampling.h"
#include "threads.h"

typedef struct {
  const float *attention_norm, *ffn_norm;  // (width,)
  const float *q_norm, *k_norm;            // (head_dim,); NULL without QK-norm
  Matrix qkv, out, gate, up, down;
} Layer;

typedef struct {
  int32_t layers, width, hidden, heads, kv_heads, head_dim, codes;
  int32_t is_bf16;  // activations and cache are bfloat16, not float32
  float eps;
  const Layer *layer;
  const float *norm;
  Matrix output;
} Model;

// Rows are tokens. Those of a sequence are neighbours.
typedef struct {
  int32_t rows, sequences, threads;
  int32_t outputs;                // rows whose logits are wanted; at most all
  const void *const *embeddings;  // (rows,) of (width,) each, in the precision of the model
  const int32_t *positions;       // (rows,) in the cache; a row attends to all up to its own
  const int32_t *cells;           // (rows,) row of `rope` whose angles apply
  const int32_t *starts;          // (sequences + 1,) first row of each sequence; then `rows`
  const int32_t *slots;           // (sequences,) number of each sequence in the cache
  const int32_t *wanted;          // (outputs,) rows whose logits are wanted; NULL for all of them
  const float *rope;              // (cells, head_dim / 2, 2) cosines and sines
  void *const *keys;              // per layer (slots, kv_heads, positions, head_dim)
  void *const *values;
  float *const *key_scales;       // per layer (slots, kv_heads, positions) of int8 keys; or NULL
  float *const *value_scales;
  int64_t slot_stride, head_stride;  // of keys and values, in elements
  float *logits;                     // (outputs, codes)
  void *scratch;                     // of step_scratch() bytes
  double *seconds;  // (3,) to which the time of products, attention and the rest is added; or NULL
} Step;

// What the threads share; all of it is in `scratch`.
typedef struct {
  Layout layout;
  float *residual;        // (rows, width), for AMX (width, padded)
  float *selected;        // the same of the rows whose logits are wanted, if those are not all
  Activations normed;     // width
  float *qkv;             // (rows, heads of queries, keys and values)
  Activations attended;   // heads * head_dim
  float *attended_rows;   // for AMX: the same before it is packed, (rows, heads * head_dim)
  Activations activated;  // hidden: the gated activations of the feed-forward layer
  float *absmaxes;        // for AMX (threads, padded): the largest absolute values of these
} Workspace;

static Layout layout_of(const Model *m, int rows) {
  Layout l = {.rows = rows, .padded = rows};
  int is_int8 = m->layer[0].qkv.type == INT8;
  l.use_amx = m->is_bf16 && has_amx() && !(is_int8 && (m->width % 64 || m->hidden % 64));
  l.use_int = m->is_bf16 && is_int8 && (HAS_AVX512_VNNI || l.use_amx);
  l.use_bf16 = m->is_bf16 && !is_int8 && (HAS_AVX512_BF16 || l.use_amx);
  // A tile takes sixteen rows in the time of one.
  if (l.use_amx) l.padded = (rows + LANES - 1) / LANES * LANES;
  return l;
}

// Divides `scratch` (or measures, if it is NULL); returns the bytes that are used. The scratch of
// each thread is behind them.
static size_t carve_scratch(const Model *m, int rows, int threads, char *scratch, Workspace *s) {
  s->layout = layout_of(m, rows);
  int padded = s->layout.padded, heads = m->heads + 2 * m->kv_heads;
  size_t item = s->layout.use_bf16 ? 2 : 4, used = 0;
#define TAKE(into, bytes) \
  (into = scratch ? (void *)(scratch + used) : NULL, used += align_up(bytes))
#define TAKE_ACTIVATIONS(into, width)                                \
  do {                                                               \
    into.size = (width);                                             \
    TAKE(into.data, (size_t)padded * into.size * item);              \
    if (s->layout.use_int) {                                         \
      TAKE(into.quantized, (size_t)padded * into.size * 2);          \
      TAKE(into.scales, (size_t)padded * 4);                         \
    }                                                                \
  } while (0)
  TAKE(s->residual, (size_t)padded * m->width * 4);
  TAKE(s->selected, (size_t)padded * m->width * 4);
  TAKE(s->qkv, (size_t)rows * heads * m->head_dim * 4);
  TAKE(s->attended_rows, s->layout.use_amx ? (size_t)rows * m->heads * m->head_dim * 4 : 0);
  TAKE_ACTIVATIONS(s->normed, m->width);
  TAKE_ACTIVATIONS(s->attended, m->heads * m->head_dim);
  TAKE_ACTIVATIONS(s->activated, m->hidden);
  TAKE(s->absmaxes, (size_t)threads * padded * 4);
#undef TAKE_ACTIVATIONS
#undef TAKE
  return used;
}

// Bytes of the results of the products that a thread takes at once.
static size_t block_bytes(int padded) {
  return align_up((size_t)2 * MAX_BLOCKS * BLOCK_OUTPUTS * padded * 4);
}

static size_t thread_scratch(const Model *m, int rows, int positions) {
  int padded = (rows + LANES - 1) / LANES * LANES;
  size_t inputs = max_int(m->hidden, m->width);
  // Scores of attention, or weights as floats, or sums of AMX.
  size_t scores = (size_t)(positions + LANES) * 4, weights = BLOCK_OUTPUTS * inputs * 4;
  size_t sums = (size_t)MAX_BLOCKS * BLOCK_OUTPUTS * 2 * padded * 4;
  if (weights > scores) scores = weights;
  return block_bytes(padded) + align_up(sums > scores ? sums : scores);
}

// Bytes of scratch that a step needs for `rows` tokens of sequences of up to `positions` positions.
size_t step_scratch(const Model *m, int32_t rows, int32_t positions, int32_t threads) {
  Workspace s;
  size_t shared = carve_scratch(m, rows, threads, NULL, &s);
  return shared + threads * thread_scratch(m, rows, positions) + 64;
}

// Chunks of this and of the other elementwise phases are one row, or sixteen for AMX.
static void embed(const Model *m, const Step *step, const Workspace *s, int chunk) {
  const Layout *l = &s->layout;
  if (!l->use_amx) {
    for (int i = 0; i < m->width; i += LANES)
      store_f32(s->residual + (size_t)chunk * m->width + i,
                load(m->is_bf16, step->embeddings[chunk], i));
    return;
  }
  int first = chunk * LANES;
  for (int i = 0; i < m->width; i += LANES) {
    v16 x[LANES];
    for (int j = 0; j < LANES; j++)
      x[j] = first + j < l->rows ? load(m->is_bf16, step->embeddings[first + j], i) : splat(0);
    transpose(x);
    for (int j = 0; j < LANES; j++)
      store_f32(s->residual + (size_t)(i + j) * l->padded + first, x[j]);
  }
}

static void rms_norm_amx(const Model *m, const Workspace *s, const float *weight, int lane) {
  const Layout *l = &s->layout;
  const float *x = s->residual + lane;
  v16 total = splat(0), maxima = splat(MIN_ABSMAX), factor;
  for (int i = 0; i < m->width; i++) {
    v16 own = load_f32(x + (size_t)i * l->padded);
    total += own * own;
    if (l->use_int) maxima = max_f32(maxima, abs_f32(own * weight[i]));
  }
  for (int i = 0; i < LANES; i++) factor[i] = 1.0f / sqrtf(total[i] / m->width + m->eps);
  if (!l->use_int) {
    for (int i = 0; i < m->width; i += 2)
      store_two_amx(l, s->normed, lane, i, load_f32(x + (size_t)i * l->padded) * factor * weight[i],
                    load_f32(x + (size_t)(i + 1) * l->padded) * factor * weight[i + 1]);
    return;
  }
  // The factor of a row changes its scale only, and none of its integers.
  store_f32(s->normed.scales + lane, maxima * factor * (1.0f / INT16_LIMIT));
  v16 quantizer = INT16_LIMIT / maxima;
  SplitInt16 to = split_int16_of(l, s->normed, lane);
  for (int i = 0; i < m->width; i += 4) {
    i32x16 integers[4];
    UNROLL for (int j = 0; j < 4; j++)
      integers[j] =
          round_to_int32(load_f32(x + (size_t)(i + j) * l->padded) * weight[i + j] * quantizer);
    store_four_amx(&to, integers);
  }
}

static void rms_norm(const Model *m, const Workspace *s, const float *weight, int chunk) {
  const Layout *l = &s->layout;
  if (l->use_amx) {
    rms_norm_amx(m, s, weight, chunk * LANES);
    return;
  }
  int width = m->width;
  const float *x = s->residual + (size_t)chunk * width;
  v16 total = splat(0);
  for (int i = 0; i < width; i += LANES) total += load_f32(x + i) * load_f32(x + i);
  float factor = 1.0f / sqrtf(reduce_sum(total) / width + m->eps);
  for (int i = 0; i < width; i += LANES)
    store_activations(l, s->normed, chunk, i, load_f32(x + i) * factor * load_f32(weight + i),
                      LANES);
  if (l->use_int) quantize_row(l, s->normed, chunk);
}

// Stores a block of outputs in rows of `stride` floats.
static void store_block(const Layout *l, const float *block, float *into, size_t stride,
                        int output) {
  if (!l->use_amx) {
    for (int row = 0; row < l->rows; row++)
      memcpy(into + row * stride + output, block + row * BLOCK_OUTPUTS,
             BLOCK_OUTPUTS * sizeof(float));
    return;
  }
  for (int lane = 0; lane < l->rows; lane += LANES) {
    v16 x[BLOCK_OUTPUTS];
    UNROLL for (int n = 0; n < BLOCK_OUTPUTS; n++) x[n] = load_f32(block + n * l->padded + lane);
    transpose(x);
    for (int row = lane; row < l->rows && row < lane + LANES; row++)
      store_f32(into + row * stride + output, x[row - lane]);
  }
}

static void add_to_residual(const Model *m, const Workspace *s, const float *block, int output) {
  const Layout *l = &s->layout;
  if (l->use_amx) {
    float *into = s->residual + (size_t)output * l->padded;
    for (int i = 0; i < BLOCK_OUTPUTS * l->padded; i += LANES)
      store_f32(into + i, load_f32(into + i) + load_f32(block + i));
    return;
  }
  for (int row = 0; row < l->rows; row++) {
    float *into = s->residual + (size_t)row * m->width + output;
    store_f32(into, load_f32(into) + load_f32(block + row * BLOCK_OUTPUTS));
  }
}

INLINE v16 swiglu(v16 gate, v16 up) { return gate / (1.0f + exp_f32(-gate)) * up; }

// For AMX, `absmaxes` (padded,) become the largest absolute values of each row so far.
static void store_swiglu(const Workspace *s, const float *gate, const float *up, int output,
                         float *absmaxes) {
  const Layout *l = &s->layout;
  if (l->use_amx) {
    for (int lane = 0; lane < l->padded; lane += LANES) {
      v16 maxima = load_f32(absmaxes + lane);
      for (int n = 0; n < BLOCK_OUTPUTS; n += 2) {
        size_t at = (size_t)n * l->padded + lane, next = at + l->padded;
        v16 x = swiglu(load_f32(gate + at), load_f32(up + at));
        v16 y = swiglu(load_f32(gate + next), load_f32(up + next));
        store_two_amx(l, s->activated, lane, output + n, x, y);
        maxima = max_f32(maxima, max_f32(abs_f32(x), abs_f32(y)));
      }
      store_f32(absmaxes + lane, maxima);
    }
    return;
  }
  for (int row = 0; row < l->rows; row++) {
    int at = row * BLOCK_OUTPUTS;
    store_activations(l, s->activated, row, output, swiglu(load_f32(gate + at), load_f32(up + at)),
                      BLOCK_OUTPUTS);
  }
}

static void quantize_activated(const Workspace *s, const Team *team, int chunk) {
  const Layout *l = &s->layout;
  if (!l->use_amx) {
    quantize_row(l, s->activated, chunk);
    return;
  }
  int lane = chunk * LANES;
  v16 maxima = splat(MIN_ABSMAX);
  for (int thread = 0; thread < team->threads; thread++)
    maxima = max_f32(maxima, load_f32(s->absmaxes + (size_t)thread * l->padded + lane));
  quantize_lanes(l, s->activated, lane, maxima);
}

// RMSNorm of one head, in place.
static __attribute__((noinline)) void norm_head(float *x, const float *weight, int size, float eps) {
  v16 squares = splat(0);
  float rest = 0;
  int i = 0;
  for (; i + LANES <= size; i += LANES) squares += load_f32(x + i) * load_f32(x + i);
  for (; i < size; i++) rest += x[i] * x[i];
  float factor = 1.0f / sqrtf((reduce_sum(squares) + rest) / size + eps);
  for (i = 0; i < size; i++) x[i] *= factor * weight[i];
}

// Appends the key and value of a row to those of its sequence.
static void append_kv(const Model *m, const Layer *w, const Step *step, const Workspace *s, int row,
                      int kv, KVHead keys, KVHead values) {
  int size = m->head_dim;
  float *key = s->qkv + ((size_t)row * (m->heads + 2 * m->kv_heads) + m->heads + kv) * size;
  float *value = key + (size_t)m->kv_heads * size;
  if (w->k_norm) norm_head(key, w->k_norm, size, m->eps);
  apply_rotary(key, step->rope + (size_t)step->cells[row] * size, size);
  store_kv(keys, m->is_bf16, step->positions[row], key, size);
  store_kv(values, m->is_bf16, step->positions[row], value, size);
}

// Attention of the query heads of a row that share a key head. `next` is read next.
static void attend_row(const Model *m, const Layer *w, const Step *step, const Workspace *s, int row,
                       int kv, KVHead keys, KVHead values, float *scores, const char *next) {
  int size = m->head_dim, group = m->heads / m->kv_heads, count = step->positions[row] + 1;
  const float *rope = step->rope + (size_t)step->cells[row] * size;
  float *queries = s->qkv + (size_t)row * (m->heads + 2 * m->kv_heads) * size;
  float out[MAX_HEAD_DIM + LANES];
  for (int head = kv * group; head < (kv + 1) * group; head++) {
    float *query = queries + (size_t)head * size;
    if (w->q_norm) norm_head(query, w->q_norm, size, m->eps);
    apply_rotary(query, rope, size);
    attend_query(&(Attention){keys, values, query, size, count, scores, out, next}, m->is_bf16);
    if (s->layout.use_amx)
      memcpy(s->attended_rows + ((size_t)row * m->heads + head) * size, out, size * sizeof(float));
    else
      for (int i = 0; i < size; i += LANES)
        store_activations(&s->layout, s->attended, row, head * size + i, load_f32(out + i),
                          min_int(size - i, LANES));
  }
}

// The stored keys or values of a sequence's head; chunks are heads of sequences.
INLINE KVHead kv_head_of(const Model *m, const Step *step, void *const *cache, float *const *scales,
                         int layer, int chunk) {
  int sequence = chunk / m->kv_heads, kv = chunk % m->kv_heads;
  size_t start = step->slots[sequence] * step->slot_stride + kv * step->head_stride;
  return (KVHead){(char *)cache[layer] + bytes_of(scales ? INT8 : m->is_bf16, start),
                  scales ? scales[layer] + start / m->head_dim : NULL};
}

// All rows of a sequence, of the query heads that share a key head. They attend to one another, too,
// so all their keys and values are stored first.
static void attend_sequence(const Model *m, const Step *step, const Workspace *s, int layer,
                            int chunk, float *scores, int next_chunk) {
  int sequence = chunk / m->kv_heads, kv = chunk % m->kv_heads;
  int start = step->starts[sequence], end = step->starts[sequence + 1];
  KVHead keys = kv_head_of(m, step, step->keys, step->key_scales, layer, chunk);
  KVHead values = kv_head_of(m, step, step->values, step->value_scales, layer, chunk);
  const char *next = NULL;
  if (next_chunk < step->sequences * m->kv_heads)
    next = kv_head_of(m, step, step->keys, step->key_scales, layer, next_chunk).data;
  const Layer *w = &m->layer[layer];
  for (int row = start; row < end; row++) append_kv(m, w, step, s, row, kv, keys, values);
  for (int row = start; row < end; row++)
    attend_row(m, w, step, s, row, kv, keys, values, scores, row + 1 < end ? keys.data : next);
}

// Gathers the residual of the rows whose logits are wanted. A chunk is one row, or for AMX sixteen
// numbers of all rows.
static void select_rows(const Model *m, const Step *step, const Workspace *s,
                        const Layout *selected, int chunk) {
  if (!selected->use_amx) {
    size_t width = m->width;
    memcpy(s->selected + chunk * width, s->residual + step->wanted[chunk] * width,
           width * sizeof(float));
    return;
  }
  for (int i = chunk * LANES; i < (chunk + 1) * LANES; i++) {
    const float *from = s->residual + (size_t)i * s->layout.padded;
    float *into = s->selected + (size_t)i * selected->padded;
    for (int row = 0; row < selected->padded; row++)
      into[row] = row < selected->rows ? from[step->wanted[row]] : 0;
  }
}

// What the time of a step is spent on.
enum { MATMUL = 0, ATTENTION = 1, REST = 2 };

static double now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec + 1e-9 * t.tv_nsec;
}

// All chunks of a phase, shared among the threads. `next_chunk` is the one that this thread does next.
#define PHASE(kind, count, work)                                                        \
  do {                                                                                  \
    for (int chunk = team_next_chunk(team), next_chunk; chunk < (count); chunk = next_chunk) { \
      next_chunk = team_next_chunk(team);                                               \
      work;                                                                             \
      (void)next_chunk;                                                                 \
    }                                                                                   \
    team_barrier(team);                                                                 \
    if (seconds) {                                                                      \
      double end = now();                                                               \
      seconds[kind] += end - begin;                                                     \
      begin = end;                                                                      \
    }                                                                                   \
  } while (0)

// The blocks of this chunk of a product.
#define MATMUL_CHUNK(matrix, x, into) \
  matmul(&(matrix), l, x, chunk, blocks, into, scratch, next_chunk)

// A phase of products with a matrix. `work` computes a chunk of blocks, and `store` stores each of
// them, with outputs from `output` on, from `block`.
#define MATMUL_PHASE(matrix, work, store)                                               \
  do {                                                                                  \
    int blocks = blocks_at_once(&(matrix), l, team->threads);                           \
    PHASE(MATMUL, (matrix).outputs / (blocks * BLOCK_OUTPUTS), {                        \
      work;                                                                             \
      for (int i = 0; i < blocks; i++) {                                                \
        int output = (chunk * blocks + i) * BLOCK_OUTPUTS;                              \
        float *block = results + i * block_size;                                        \
        store;                                                                          \
      }                                                                                 \
    });                                                                                 \
  } while (0)

// The logits of the rows that are wanted.
static void output_head(const Model *m, const Step *step, const Workspace *s, Team *team,
                        float *results, char *scratch, double *seconds) {
  Workspace head = *s;
  const Layout *l = &head.layout;
  double begin = seconds ? now() : 0;
  if (step->wanted) {
    head.layout = layout_of(m, step->outputs);
    PHASE(REST, l->use_amx ? m->width / LANES : l->rows, select_rows(m, step, s, l, chunk));
    head.residual = s->selected;
  }
  size_t block_size = (size_t)BLOCK_OUTPUTS * l->padded;
  PHASE(REST, l->use_amx ? l->padded / LANES : l->rows, rms_norm(m, &head, m->norm, chunk));
  MATMUL_PHASE(m->output, MATMUL_CHUNK(m->output, head.normed, results),
               store_block(l, block, step->logits, m->codes, output));
}

// A thread's part of a step. `seconds` is where the first one counts its time, or NULL.
static void run_thread(const Model *m, const Step *step, const Workspace *s, Team *team, int thread,
                       char *own, double *seconds) {
  const Layout *l = &s->layout;
  size_t block_size = (size_t)BLOCK_OUTPUTS * l->padded;
  float *results = (float *)own, *up = results + MAX_BLOCKS * block_size;
  float *absmaxes = s->absmaxes + (size_t)thread * l->padded;
  char *scratch = own + block_bytes(l->padded);
  int chunks = l->use_amx ? l->padded / LANES : l->rows;  // of an elementwise phase
  size_t qkv_width = (size_t)(m->heads + 2 * m->kv_heads) * m->head_dim;
  double begin = seconds ? now() : 0;
  if (l->use_amx) amx_begin();
  PHASE(REST, chunks, embed(m, step, s, chunk));
  for (int layer = 0; layer < m->layers; layer++) {
    const Layer *w = &m->layer[layer];
    PHASE(REST, chunks, rms_norm(m, s, w->attention_norm, chunk));
    MATMUL_PHASE(w->qkv, MATMUL_CHUNK(w->qkv, s->normed, results),
                 store_block(l, block, s->qkv, qkv_width, output));
    PHASE(ATTENTION, step->sequences * m->kv_heads,
          attend_sequence(m, step, s, layer, chunk, (float *)scratch, next_chunk));
    if (l->use_amx) PHASE(REST, chunks, pack_amx(l, s->attended_rows, s->attended, chunk));
    else if (l->use_int) PHASE(REST, chunks, quantize_row(l, s->attended, chunk));
    MATMUL_PHASE(w->out, MATMUL_CHUNK(w->out, s->attended, results),
                 add_to_residual(m, s, block, output));
    PHASE(REST, chunks, rms_norm(m, s, w->ffn_norm, chunk));
    for (int i = 0; l->use_amx && i < l->padded; i++) absmaxes[i] = MIN_ABSMAX;
    MATMUL_PHASE(w->gate, {
      MATMUL_CHUNK(w->gate, s->normed, results);
      MATMUL_CHUNK(w->up, s->normed, up);
    }, store_swiglu(s, block, up + i * block_size, output, absmaxes));
    if (l->use_int) PHASE(REST, chunks, quantize_activated(s, team, chunk));
    MATMUL_PHASE(w->down, MATMUL_CHUNK(w->down, s->activated, results),
                 add_to_residual(m, s, block, output));
  }
  if (step->outputs) output_head(m, step, s, team, results, scratch, seconds);
  if (l->use_amx) amx_end();
}

void run_step(const Model *m, const Step *step) {
  Workspace shared;
  char *scratch = (char *)align_up((size_t)step->scratch);
  size_t used = carve_scratch(m, step->rows, step->threads, scratch, &shared);
  int positions = 0;
  for (int row = 0; row < step->rows; row++)
    positions = max_int(positions, step->positions[row] + 1);
  size_t own = thread_scratch(m, step->rows, positions);
  Team team = {.threads = step->threads};
#pragma omp parallel num_threads(step->threads)
  {
#ifdef _OPENMP
    // If there are fewer threads than were asked for, they must not wait for the others.
    int threads = omp_get_num_threads(), thread = omp_get_thread_num();
#pragma omp single
    team.threads = threads;
#else
    int thread = 0;
    team.threads = 1;
#endif
    run_thread(m, step, &shared, &team, thread, scratch + used + thread * own,
               thread == 0 ? step->seconds : NULL);
  }
}

// What was compiled, as bits: AVX512_BF16, AMX (if the system allows it), AVX512_VNNI and OpenMP.
int32_t cpu_features(void) {
  int found = HAS_AVX512_BF16 | has_amx() << 1 | HAS_AVX512_VNNI << 2;
#ifdef _OPENMP
  found |= 8;
#endif
  return found;
}
