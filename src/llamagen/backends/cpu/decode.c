// One step of a transformer on a CPU: tokens of several sequences in, logits out.
//
// The whole step is one call. Its threads take pieces of each phase (sixteen outputs of a product,
// a head of a sequence) and meet in between. Statistics, sums, residuals and softmax are in
// float32; what is multiplied is rounded to bfloat16 where the weights are.

#include <stdlib.h>
#include <time.h>

#ifdef _OPENMP
#include <omp.h>
#endif

#include "attention.h"
#include "sampling.h"
#include "threads.h"

typedef struct {
  const float *attention_norm, *ffn_norm;  // (width,)
  Matrix qkv, out, gate, up, down;
} Layer;

typedef struct {
  int32_t layers, width, hidden, heads, kv_heads, head_dim, codes;
  int32_t half;    // activations and cache are bfloat16, not float32
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
  float *logits;                  // (outputs, codes)
  void *scratch;                  // of decode_scratch() bytes
  double *seconds;                // (3,) products, attention and the rest are added to; or NULL
} Step;

// What the threads share; all of it in `scratch`.
typedef struct {
  Layout layout;
  float *shortcut;     // (rows, width), for tiles (width, padded)
  Activations normed;  // width
  float *qkv;          // (rows, heads of queries, keys and values)
  Activations attended;
  float *mixed;        // for tiles: the same before, (rows, heads * head_dim)
  float *selected;     // shortcut of the rows whose logits are wanted, where those are not all
  Activations inner;   // hidden
  float *tops;         // for tiles (threads, padded): the largest sizes in inner
} Shared;

static size_t aligned(size_t bytes) { return (bytes + 63) / 64 * 64; }

static Layout layout_of(const Model *m, int rows) {
  Layout l = {.rows = rows, .padded = rows};
  int quantized = m->layer[0].qkv.kind >= I8;
  l.tiles = m->half && has_tiles() && !(quantized && (m->width % 64 || m->hidden % 64));
  l.whole = m->half && quantized && (WORDS || l.tiles);
  l.pairs = m->half && !quantized && (PAIRS || l.tiles);
  // A tile takes sixteen rows in the time of one.
  if (l.tiles) l.padded = (rows + LANES - 1) / LANES * LANES;
  return l;
}

// Divides `scratch` up; returns the bytes that takes. A thread's own room is what is left.
static size_t divide(const Model *m, int rows, int threads, char *scratch, Shared *s) {
  s->layout = layout_of(m, rows);
  int padded = s->layout.padded, heads = m->heads + 2 * m->kv_heads;
  size_t item = s->layout.pairs ? 2 : 4, used = 0;
#define TAKE(into, bytes) (into = (void *)(scratch + used), used += aligned(bytes))
#define TAKE_ACTIVATIONS(into, numbers)                              \
  do {                                                               \
    into.size = (numbers);                                           \
    TAKE(into.data, (size_t)padded * into.size * item);              \
    if (s->layout.whole) {                                           \
      TAKE(into.whole, (size_t)padded * into.size * 2);              \
      TAKE(into.scales, (size_t)padded * 4);                         \
    }                                                                \
  } while (0)
  TAKE(s->shortcut, (size_t)padded * m->width * 4);
  TAKE(s->qkv, (size_t)rows * heads * m->head_dim * 4);
  TAKE(s->mixed, s->layout.tiles ? (size_t)rows * m->heads * m->head_dim * 4 : 0);
  TAKE(s->selected, (size_t)padded * m->width * 4);
  TAKE_ACTIVATIONS(s->normed, m->width);
  TAKE_ACTIVATIONS(s->attended, m->heads * m->head_dim);
  TAKE_ACTIVATIONS(s->inner, m->hidden);
  TAKE(s->tops, (size_t)threads * padded * 4);
#undef TAKE_ACTIVATIONS
#undef TAKE
  return used;
}

static size_t own_room(const Model *m, int rows, int positions) {
  int padded = (rows + LANES - 1) / LANES * LANES;
  size_t tiles = aligned((size_t)2 * MOST_PIECES * OUTPUTS * padded * 4);
  size_t longest = m->hidden > m->width ? m->hidden : m->width;
  // Scores of attention, weights as floats, or sums of whole numbers in tiles.
  size_t scores = (size_t)(positions + LANES) * 4, weights = OUTPUTS * longest * 4;
  size_t sums = (size_t)MOST_PIECES * OUTPUTS * 2 * padded * 4;
  if (weights > scores) scores = weights;
  return tiles + aligned(sums > scores ? sums : scores);
}

// Bytes of scratch that a step needs for `rows` tokens of sequences of up to `positions` positions.
size_t decode_scratch(const Model *m, int32_t rows, int32_t positions, int32_t threads) {
  Shared s;
  return divide(m, rows, threads, NULL, &s) + threads * own_room(m, rows, positions) + 64;
}

// Sixteen numbers of a row's embedding.
INLINE v16 embedding_of(const Model *m, const void *embedding, int index) {
  return m->half ? load_bf16((const bf16 *)embedding + index)
                 : load_f32((const float *)embedding + index);
}

// One row, or sixteen for tiles.
static void embed(const Model *m, const Step *step, const Shared *s, int piece) {
  const Layout *l = &s->layout;
  if (!l->tiles) {
    for (int i = 0; i < m->width; i += LANES)
      store_f32(s->shortcut + (size_t)piece * m->width + i,
                embedding_of(m, step->embeddings[piece], i));
    return;
  }
  int first = piece * LANES;
  for (int i = 0; i < m->width; i += LANES) {
    v16 x[LANES];
    for (int j = 0; j < LANES; j++)
      x[j] = first + j < l->rows ? embedding_of(m, step->embeddings[first + j], i) : splat(0);
    transpose(x);
    for (int j = 0; j < LANES; j++)
      store_f32(s->shortcut + (size_t)(i + j) * l->padded + first, x[j]);
  }
}

// Root-mean-square norm of sixteen rows, for tiles.
static void normalise_lanes(const Model *m, const Shared *s, const float *weight, int lane) {
  const Layout *l = &s->layout;
  const float *x = s->shortcut + lane;
  v16 total = splat(0), top = splat(LEAST), factor;
  for (int i = 0; i < m->width; i++) {
    v16 own = load_f32(x + (size_t)i * l->padded);
    total += own * own;
    if (l->whole) top = larger(top, size_of(own * weight[i]));
  }
  for (int i = 0; i < LANES; i++) factor[i] = 1.0f / sqrtf(total[i] / m->width + m->eps);
  if (!l->whole) {
    for (int i = 0; i < m->width; i += 2)
      put_two(l, s->normed, lane, i, load_f32(x + (size_t)i * l->padded) * factor * weight[i],
              load_f32(x + (size_t)(i + 1) * l->padded) * factor * weight[i + 1]);
    return;
  }
  // Whole numbers are the same whatever they are multiplied by: only their scale has the factor.
  store_f32(s->normed.scales + lane, top * factor * (1.0f / WHOLE_MOST));
  v16 whole = WHOLE_MOST / top;
  Halves to = halves_of(l, s->normed, lane);
  for (int i = 0; i < m->width; i += 4) {
    i32x16 numbers[4];
    UNROLL for (int j = 0; j < 4; j++)
      numbers[j] = nearest(load_f32(x + (size_t)(i + j) * l->padded) * weight[i + j] * whole);
    put_four(&to, numbers);
  }
}

// The norm of one row, or of sixteen for tiles.
static void normalise(const Model *m, const Shared *s, const float *weight, int piece) {
  const Layout *l = &s->layout;
  if (l->tiles) {
    normalise_lanes(m, s, weight, piece * LANES);
    return;
  }
  int width = m->width;
  const float *x = s->shortcut + (size_t)piece * width;
  v16 total = splat(0);
  for (int i = 0; i < width; i += LANES) total += load_f32(x + i) * load_f32(x + i);
  float factor = 1.0f / sqrtf(sum(total) / width + m->eps);
  for (int i = 0; i < width; i += LANES)
    put(l, s->normed, piece, i, load_f32(x + i) * factor * load_f32(weight + i), LANES);
  if (l->whole) row_to_whole(l, s->normed, piece);
}

// A product to where each row has it in one piece.
static void spread(const Layout *l, const float *tile, float *into, size_t stride, int output) {
  if (!l->tiles) {
    for (int row = 0; row < l->rows; row++)
      memcpy(into + row * stride + output, tile + row * OUTPUTS, OUTPUTS * sizeof(float));
    return;
  }
  for (int lane = 0; lane < l->rows; lane += LANES) {
    v16 x[OUTPUTS];
    UNROLL for (int n = 0; n < OUTPUTS; n++) x[n] = load_f32(tile + n * l->padded + lane);
    transpose(x);
    for (int row = lane; row < l->rows && row < lane + LANES; row++)
      store_f32(into + row * stride + output, x[row - lane]);
  }
}

static void add_to_shortcut(const Model *m, const Shared *s, const float *tile, int output) {
  const Layout *l = &s->layout;
  if (l->tiles) {
    float *into = s->shortcut + (size_t)output * l->padded;
    for (int i = 0; i < OUTPUTS * l->padded; i += LANES)
      store_f32(into + i, load_f32(into + i) + load_f32(tile + i));
    return;
  }
  for (int row = 0; row < l->rows; row++) {
    float *into = s->shortcut + (size_t)row * m->width + output;
    store_f32(into, load_f32(into) + load_f32(tile + row * OUTPUTS));
  }
}

INLINE v16 gated(v16 gate, v16 up) { return gate / (1.0f + exponential(-gate)) * up; }

// For tiles, the largest sizes of each row's results are kept in `tops` (padded,).
static void activate(const Shared *s, const float *gate, const float *up, int output, float *tops) {
  const Layout *l = &s->layout;
  if (l->tiles) {
    for (int lane = 0; lane < l->padded; lane += LANES) {
      v16 top = load_f32(tops + lane);
      for (int n = 0; n < OUTPUTS; n += 2) {
        size_t at = (size_t)n * l->padded + lane, after = at + l->padded;
        v16 x = gated(load_f32(gate + at), load_f32(up + at));
        v16 y = gated(load_f32(gate + after), load_f32(up + after));
        put_two(l, s->inner, lane, output + n, x, y);
        top = larger(top, larger(size_of(x), size_of(y)));
      }
      store_f32(tops + lane, top);
    }
    return;
  }
  for (int row = 0; row < l->rows; row++)
    put(l, s->inner, row, output,
        gated(load_f32(gate + row * OUTPUTS), load_f32(up + row * OUTPUTS)), OUTPUTS);
}

// What was activated, as whole numbers: a row of it, or sixteen for tiles, whose largest sizes the
// threads have found.
static void inner_to_whole(const Shared *s, const Team *team, int piece) {
  const Layout *l = &s->layout;
  if (!l->tiles) {
    row_to_whole(l, s->inner, piece);
    return;
  }
  int lane = piece * LANES;
  v16 top = splat(LEAST);
  for (int thread = 0; thread < team->threads; thread++)
    top = larger(top, load_f32(s->tops + (size_t)thread * l->padded + lane));
  lanes_to_whole(l, s->inner, lane, top);
}

// One row's key and value of a head join the cache.
static void join(const Model *m, const Step *step, const Shared *s, int row, int kv, Kept keys,
                 Kept values) {
  int size = m->head_dim;
  float *key = s->qkv + ((size_t)row * (m->heads + 2 * m->kv_heads) + m->heads + kv) * size;
  float *value = key + (size_t)m->kv_heads * size;
  turn(key, step->rope + (size_t)step->cells[row] * size, size);
  keep(keys, m->half, step->positions[row], key, size);
  keep(values, m->half, step->positions[row], value, size);
}

// Attention of one row's heads that share a key; `then` is what is read next.
static void attend(const Model *m, const Step *step, const Shared *s, int row, int kv, Kept keys,
                   Kept values, float *scores, const char *then) {
  int size = m->head_dim, group = m->heads / m->kv_heads;
  int position = step->positions[row];
  const float *rope = step->rope + (size_t)step->cells[row] * size;
  float *queries = s->qkv + (size_t)row * (m->heads + 2 * m->kv_heads) * size;
  float out[WIDEST_HEAD + LANES];
  for (int head = kv * group; head < (kv + 1) * group; head++) {
    float *query = queries + (size_t)head * size;
    turn(query, rope, size);
    attend_query(&(Attention){keys, values, query, size, 0, position, scores, out, then}, m->half);
    if (s->layout.tiles)
      memcpy(s->mixed + ((size_t)row * m->heads + head) * size, out, size * sizeof(float));
    else
      for (int i = 0; i < size; i += LANES)
        put(&s->layout, s->attended, row, head * size + i, load_f32(out + i),
            size - i < LANES ? size - i : LANES);
  }
}

// A sequence's keys or values of one head.
INLINE Kept head_of(const Model *m, const Step *step, void *const *cache, float *const *scales,
                    int layer, int piece) {
  int sequence = piece / m->kv_heads, kv = piece % m->kv_heads;
  size_t start = step->slots[sequence] * step->slot_stride + kv * step->head_stride;
  return (Kept){(char *)cache[layer] + start * kept_bytes(m->half, scales != NULL),
                scales ? scales[layer] + start / m->head_dim : NULL};
}

// A sequence's rows, of the heads that share a key: each sees those before it too.
static void attend_all(const Model *m, const Step *step, const Shared *s, int layer, int piece,
                       float *scores, int ahead) {
  int sequence = piece / m->kv_heads, kv = piece % m->kv_heads;
  int from = step->starts[sequence], to = step->starts[sequence + 1];
  Kept keys = head_of(m, step, step->keys, step->key_scales, layer, piece);
  Kept values = head_of(m, step, step->values, step->value_scales, layer, piece);
  int more = ahead < step->sequences * m->kv_heads;
  const char *next = more ? head_of(m, step, step->keys, step->key_scales, layer, ahead).data : NULL;
  for (int row = from; row < to; row++) join(m, step, s, row, kv, keys, values);
  for (int row = from; row < to; row++)
    attend(m, step, s, row, kv, keys, values, scores, row + 1 < to ? keys.data : next);
}

// The shortcuts of the rows whose logits are wanted come together: one row, or for tiles sixteen
// numbers of all rows.
static void select_rows(const Model *m, const Step *step, const Shared *s, const Layout *selected,
                        int piece) {
  if (!selected->tiles) {
    size_t width = m->width;
    memcpy(s->selected + piece * width, s->shortcut + step->wanted[piece] * width,
           width * sizeof(float));
    return;
  }
  for (int i = piece * LANES; i < (piece + 1) * LANES; i++) {
    const float *from = s->shortcut + (size_t)i * s->layout.padded;
    float *into = s->selected + (size_t)i * selected->padded;
    for (int row = 0; row < selected->padded; row++)
      into[row] = row < selected->rows ? from[step->wanted[row]] : 0;
  }
}

// What a step's time goes to.
enum { PRODUCTS = 0, ATTENTION = 1, REST = 2 };

static double now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec + 1e-9 * t.tv_nsec;
}

// All pieces of a phase, shared among the threads. `ahead` is the piece that this thread does next.
#define PHASE(kind, count, work)                                                        \
  do {                                                                                  \
    for (int piece = team_next(team), ahead; piece < (count); piece = ahead) {          \
      ahead = team_next(team);                                                          \
      work;                                                                             \
      (void)ahead;                                                                      \
    }                                                                                   \
    team_meet(team);                                                                    \
    if (seconds) {                                                                      \
      double end = now();                                                               \
      seconds[kind] += end - begin;                                                     \
      begin = end;                                                                      \
    }                                                                                   \
  } while (0)

// The same for a product, whose outputs `into` takes sixteen at a time from `tile`.
#define PRODUCTS_PHASE(matrix, work, into)                                              \
  do {                                                                                  \
    int pieces = pieces_at_once(&(matrix), l, team->threads);                           \
    PHASE(PRODUCTS, (matrix).outputs / (pieces * OUTPUTS), {                            \
      work;                                                                             \
      for (int i = 0; i < pieces; i++) {                                                \
        int output = (piece * pieces + i) * OUTPUTS;                                    \
        float *found = tile + i * piece_size;                                           \
        into;                                                                           \
      }                                                                                 \
    });                                                                                 \
  } while (0)

// The logits of the rows that are wanted.
static void run_head(const Model *m, const Step *step, const Shared *s, Team *team, float *tile,
                     char *rest, double *seconds) {
  Shared head = *s;
  const Layout *l = &head.layout;
  double begin = seconds ? now() : 0;
  if (step->wanted) {
    head.layout = layout_of(m, step->outputs);
    PHASE(REST, l->tiles ? m->width / LANES : l->rows, select_rows(m, step, s, l, piece));
    head.shortcut = s->selected;
  }
  size_t piece_size = (size_t)OUTPUTS * l->padded;
  PHASE(REST, l->tiles ? l->padded / LANES : l->rows, normalise(m, &head, m->norm, piece));
  PRODUCTS_PHASE(m->output, product(&m->output, l, head.normed, piece, pieces, tile, rest, ahead),
                 spread(l, found, step->logits, m->codes, output));
}

// One thread's part of a step; `seconds` is where the first one counts its time, or NULL.
static void run(const Model *m, const Step *step, const Shared *s, Team *team, int number,
                char *room, double *seconds) {
  const Layout *l = &s->layout;
  size_t piece_size = (size_t)OUTPUTS * l->padded;
  float *tile = (float *)room, *other = tile + MOST_PIECES * piece_size;
  float *tops = s->tops + (size_t)number * l->padded;
  char *rest = room + aligned(2 * MOST_PIECES * piece_size * 4);
  int norms = l->tiles ? l->padded / LANES : l->rows;
  size_t row_width = (size_t)(m->heads + 2 * m->kv_heads) * m->head_dim;
  double begin = seconds ? now() : 0;
  if (l->tiles) tiles_begin();
  PHASE(REST, norms, embed(m, step, s, piece));
  for (int layer = 0; layer < m->layers; layer++) {
    const Layer *w = &m->layer[layer];
    PHASE(REST, norms, normalise(m, s, w->attention_norm, piece));
    PRODUCTS_PHASE(w->qkv, product(&w->qkv, l, s->normed, piece, pieces, tile, rest, ahead),
                   spread(l, found, s->qkv, row_width, output));
    PHASE(ATTENTION, step->sequences * m->kv_heads,
          attend_all(m, step, s, layer, piece, (float *)rest, ahead));
    if (l->tiles) PHASE(REST, norms, into_tiles(l, s->mixed, s->attended, piece));
    else if (l->whole) PHASE(REST, norms, row_to_whole(l, s->attended, piece));
    PRODUCTS_PHASE(w->out, product(&w->out, l, s->attended, piece, pieces, tile, rest, ahead),
                   add_to_shortcut(m, s, found, output));
    PHASE(REST, norms, normalise(m, s, w->ffn_norm, piece));
    for (int i = 0; l->tiles && i < l->padded; i++) tops[i] = LEAST;
    PRODUCTS_PHASE(w->gate, {
      product(&w->gate, l, s->normed, piece, pieces, tile, rest, ahead);
      product(&w->up, l, s->normed, piece, pieces, other, rest, ahead);
    }, activate(s, found, other + i * piece_size, output, tops));
    if (l->whole) PHASE(REST, norms, inner_to_whole(s, team, piece));
    PRODUCTS_PHASE(w->down, product(&w->down, l, s->inner, piece, pieces, tile, rest, ahead),
                   add_to_shortcut(m, s, found, output));
  }
  if (step->outputs) run_head(m, step, s, team, tile, rest, seconds);
  if (l->tiles) tiles_end();
}

void decode_step(const Model *m, const Step *step) {
  Shared shared;
  char *scratch = (char *)aligned((size_t)step->scratch);
  size_t used = divide(m, step->rows, step->threads, scratch, &shared);
  int positions = 0;
  for (int row = 0; row < step->rows; row++)
    if (step->positions[row] >= positions) positions = step->positions[row] + 1;
  size_t own = own_room(m, step->rows, positions);
  Team team;
  team_init(&team, step->threads);
#pragma omp parallel num_threads(step->threads)
  {
#ifdef _OPENMP
    // Fewer threads than were asked for would wait for ever for the others.
    int here = omp_get_num_threads(), own_number = omp_get_thread_num();
#pragma omp single
    team.threads = here;
#else
    int own_number = 0;
    team.threads = 1;
#endif
    run(m, step, &shared, &team, own_number, scratch + used + own_number * own,
        own_number == 0 ? step->seconds : NULL);
  }
}

static size_t sampling_scratch_of_thread(int codes) {
  return aligned((size_t)codes * (sizeof(float) + sizeof(Candidate)));
}

// Bytes of scratch that sample_codes() needs.
size_t sampling_scratch(int32_t codes, int32_t threads) {
  return threads * sampling_scratch_of_thread(codes) + 64;
}

#ifdef _OPENMP
#define THREAD omp_get_thread_num()
#else
#define THREAD 0
#endif

// Samples a code of each row.
void sample_codes(SamplingRow *rows, int32_t count, int32_t codes, int32_t threads, void *scratch) {
  char *start = (char *)aligned((size_t)scratch);
#pragma omp parallel for num_threads(threads) schedule(dynamic)
  for (int i = 0; i < count; i++) {
    float *probabilities = (float *)(start + THREAD * sampling_scratch_of_thread(codes));
    sample_row(&rows[i], codes, probabilities, (Candidate *)(probabilities + codes));
  }
}

// What was compiled: 1 pairs of bfloat16, 2 tiles, 4 whole numbers of sixteen bits, 8 threads.
int32_t decode_features(void) {
  int found = PAIRS | has_tiles() << 1 | WORDS << 2;
#ifdef _OPENMP
  found |= 8;
#endif
  return found;
}
