// One step of decoding on a CPU: a code of each sequence in, logits of the next ones out.
//
// The whole step is one call. Its threads take pieces of each phase (sixteen outputs of a product,
// a head of a sequence) and meet in between. Statistics, sums, shortcuts and softmax are in
// float32; what is multiplied is rounded to bfloat16 where the weights are.

#include <stdlib.h>
#include <time.h>

#ifdef _OPENMP
#include <omp.h>
#endif

#include "attention.h"
#include "draw.h"
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
  const void *embedding;  // (codes, width), in the precision of the cache
  const float *norm;
  Matrix output;
} Model;

typedef struct {
  int32_t rows, threads;
  int32_t window;         // positions fed to each sequence, one row after the other
  const int64_t *codes;   // (rows,) fed
  const int32_t *place;   // (rows,) position that each code takes in the cache
  const int32_t *first;   // (rows,) first position that is attended to
  const int32_t *cell;    // (rows,) row of the table that each code turns by
  const float *rope;      // (cells, head_dim / 2, 2)
  void *const *keys;      // per layer (rows / window, kv_heads, positions, head_dim)
  void *const *values;
  int64_t row_stride, head_stride;  // of keys and values, in numbers
  float *logits;          // (rows, codes)
  void *scratch;          // of decode_scratch() bytes
  double *seconds;        // (3,) products, attention and the rest are added to; or NULL
} Step;

// What the threads share; all of it in `scratch`.
typedef struct {
  Layout layout;
  float *shortcut;     // (rows, width), for tiles (width, padded)
  Activations normed;  // width
  float *qkv;          // (rows, heads of queries, keys and values)
  Activations attended;
  Activations inner;   // hidden
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
static size_t divide(const Model *m, int rows, char *scratch, Shared *s) {
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
  TAKE_ACTIVATIONS(s->normed, m->width);
  TAKE_ACTIVATIONS(s->attended, m->heads * m->head_dim);
  TAKE_ACTIVATIONS(s->inner, m->hidden);
#undef TAKE_ACTIVATIONS
#undef TAKE
  return used;
}

static size_t own_room(const Model *m, int rows, int positions) {
  int padded = (rows + LANES - 1) / LANES * LANES;
  size_t tiles = aligned((size_t)2 * OUTPUTS * padded * 4);
  size_t longest = m->hidden > m->width ? m->hidden : m->width;
  size_t scores = (size_t)(positions + LANES) * 4;
  size_t weights = (size_t)OUTPUTS * (longest * 4 + 2 * padded * 4);
  return tiles + aligned(scores > weights ? scores : weights);
}

// Bytes of scratch that a step needs for `rows` sequences of up to `positions` positions.
size_t decode_scratch(const Model *m, int32_t rows, int32_t positions, int32_t threads) {
  Shared s;
  return divide(m, rows, NULL, &s) + threads * own_room(m, rows, positions) + 64;
}

static void embed(const Model *m, const Step *step, const Shared *s, int row) {
  const Layout *l = &s->layout;
  size_t at = (size_t)step->codes[row] * m->width;
  for (int i = 0; i < m->width; i++) {
    float x = m->half ? f32_of(((const bf16 *)m->embedding)[at + i])
                      : ((const float *)m->embedding)[at + i];
    s->shortcut[l->tiles ? (size_t)i * l->padded + row : (size_t)row * m->width + i] = x;
  }
}

// Root-mean-square norm of one row, or of sixteen for tiles.
static void normalise(const Model *m, const Shared *s, const float *weight, int piece) {
  const Layout *l = &s->layout;
  int width = m->width;
  if (l->tiles) {
    int lane = piece * LANES;
    const float *x = s->shortcut + lane;
    v16 total = splat(0);
    for (int i = 0; i < width; i++) {
      v16 own = load_f32(x + (size_t)i * l->padded);
      total += own * own;
    }
    v16 factor;
    for (int i = 0; i < LANES; i++) factor[i] = 1.0f / sqrtf(total[i] / width + m->eps);
    for (int i = 0; i < width; i += 2)
      put_two(l, s->normed, lane, i, load_f32(x + (size_t)i * l->padded) * factor * weight[i],
              load_f32(x + (size_t)(i + 1) * l->padded) * factor * weight[i + 1]);
    if (l->whole) to_whole(l, s->normed, piece);
    return;
  }
  const float *x = s->shortcut + (size_t)piece * width;
  v16 total = splat(0);
  for (int i = 0; i < width; i += LANES) total += load_f32(x + i) * load_f32(x + i);
  float factor = 1.0f / sqrtf(sum(total) / width + m->eps);
  for (int i = 0; i < width; i += LANES)
    put(l, s->normed, piece, i, load_f32(x + i) * factor * load_f32(weight + i), LANES);
  if (l->whole) to_whole(l, s->normed, piece);
}

// A product to where each row has it in one piece.
static void spread(const Layout *l, const float *tile, float *into, size_t stride, int output) {
  for (int row = 0; row < l->rows; row++) {
    float *to = into + row * stride + output;
    if (l->tiles)
      for (int n = 0; n < OUTPUTS; n++) to[n] = tile[n * l->padded + row];
    else
      memcpy(to, tile + row * OUTPUTS, OUTPUTS * sizeof(float));
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

static void activate(const Shared *s, const float *gate, const float *up, int output) {
  const Layout *l = &s->layout;
  if (l->tiles) {
    for (int n = 0; n < OUTPUTS; n += 2)
      for (int lane = 0; lane < l->padded; lane += LANES) {
        size_t at = (size_t)n * l->padded + lane, after = at + l->padded;
        put_two(l, s->inner, lane, output + n, gated(load_f32(gate + at), load_f32(up + at)),
                gated(load_f32(gate + after), load_f32(up + after)));
      }
    return;
  }
  for (int row = 0; row < l->rows; row++)
    put(l, s->inner, row, output,
        gated(load_f32(gate + row * OUTPUTS), load_f32(up + row * OUTPUTS)), OUTPUTS);
}

// One new position's key and value of a head join the cache.
static void join(const Model *m, const Step *step, const Shared *s, int row, int kv, char *keys,
                 char *values) {
  int size = m->head_dim;
  float *key = s->qkv + ((size_t)row * (m->heads + 2 * m->kv_heads) + m->heads + kv) * size;
  float *value = key + (size_t)m->kv_heads * size;
  size_t at = (size_t)step->place[row] * size;
  turn(key, step->rope + (size_t)step->cell[row] * size, size);
  keep(keys, m->half, at, key, size);
  keep(values, m->half, at, value, size);
}

// Attention of one new position's heads that share a key; `then` is what is read next.
static void attend(const Model *m, const Step *step, const Shared *s, int row, int kv,
                   const char *keys, const char *values, float *scores, const char *then) {
  int size = m->head_dim, group = m->heads / m->kv_heads;
  int first = step->first[row], place = step->place[row];
  const float *rope = step->rope + (size_t)step->cell[row] * size;
  float *queries = s->qkv + (size_t)row * (m->heads + 2 * m->kv_heads) * size;
  float out[WIDEST_HEAD + LANES];
  for (int head = kv * group; head < (kv + 1) * group; head++) {
    float *query = queries + (size_t)head * size;
    turn(query, rope, size);
    if (m->half && size == 64)  // of every preset but the largest
      attend_head(keys, values, 1, PAIRS, query, 64, first, place, scores, out, then);
    else if (m->half)
      attend_head(keys, values, 1, PAIRS, query, size, first, place, scores, out, then);
    else
      attend_head(keys, values, 0, 0, query, size, first, place, scores, out, then);
    for (int i = 0; i < size; i += LANES)
      put(&s->layout, s->attended, row, head * size + i, load_f32(out + i),
          size - i < LANES ? size - i : LANES);
  }
}

// Where a sequence's keys or values of one head begin.
INLINE char *head_of(const Model *m, const Step *step, void *const *cache, int layer, int piece) {
  int sequence = piece / m->kv_heads, kv = piece % m->kv_heads;
  size_t start = (sequence * step->row_stride + kv * step->head_stride) * (m->half ? 2 : 4);
  return (char *)cache[layer] + start;
}

// A sequence's new positions, of the heads that share a key: each sees those before it too.
static void attend_all(const Model *m, const Step *step, const Shared *s, int layer, int piece,
                       float *scores, int ahead) {
  int kv = piece % m->kv_heads, from = piece / m->kv_heads * step->window;
  int to = from + step->window;
  char *keys = head_of(m, step, step->keys, layer, piece);
  char *values = head_of(m, step, step->values, layer, piece);
  int more = ahead < step->rows / step->window * m->kv_heads;
  const char *next = more ? head_of(m, step, step->keys, layer, ahead) : NULL;
  for (int row = from; row < to; row++) join(m, step, s, row, kv, keys, values);
  for (int row = from; row < to; row++)
    attend(m, step, s, row, kv, keys, values, scores, row + 1 < to ? keys : next);
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

// One thread's part of a step; `seconds` is where the first one counts its time, or NULL.
static void run(const Model *m, const Step *step, const Shared *s, Team *team, char *room,
                double *seconds) {
  const Layout *l = &s->layout;
  float *tile = (float *)room, *other = tile + OUTPUTS * l->padded;
  char *rest = room + aligned((size_t)2 * OUTPUTS * l->padded * 4);
  int norms = l->tiles ? l->padded / LANES : l->rows;
  size_t row_width = (size_t)(m->heads + 2 * m->kv_heads) * m->head_dim;
  double begin = seconds ? now() : 0;
  if (l->tiles) tiles_begin();
  PHASE(REST, l->rows, embed(m, step, s, piece));
  for (int i = 0; i < m->layers; i++) {
    const Layer *w = &m->layer[i];
    PHASE(REST, norms, normalise(m, s, w->attention_norm, piece));
    PHASE(PRODUCTS, w->qkv.outputs / OUTPUTS, {
      product(&w->qkv, l, s->normed, piece * OUTPUTS, tile, rest, ahead);
      spread(l, tile, s->qkv, row_width, piece * OUTPUTS);
    });
    PHASE(ATTENTION, l->rows / step->window * m->kv_heads,
          attend_all(m, step, s, i, piece, (float *)rest, ahead));
    if (l->whole) PHASE(REST, norms, to_whole(l, s->attended, piece));
    PHASE(PRODUCTS, w->out.outputs / OUTPUTS, {
      product(&w->out, l, s->attended, piece * OUTPUTS, tile, rest, ahead);
      add_to_shortcut(m, s, tile, piece * OUTPUTS);
    });
    PHASE(REST, norms, normalise(m, s, w->ffn_norm, piece));
    PHASE(PRODUCTS, w->gate.outputs / OUTPUTS, {
      product(&w->gate, l, s->normed, piece * OUTPUTS, tile, rest, ahead);
      product(&w->up, l, s->normed, piece * OUTPUTS, other, rest, ahead);
      activate(s, tile, other, piece * OUTPUTS);
    });
    if (l->whole) PHASE(REST, norms, to_whole(l, s->inner, piece));
    PHASE(PRODUCTS, w->down.outputs / OUTPUTS, {
      product(&w->down, l, s->inner, piece * OUTPUTS, tile, rest, ahead);
      add_to_shortcut(m, s, tile, piece * OUTPUTS);
    });
  }
  PHASE(REST, norms, normalise(m, s, m->norm, piece));
  PHASE(PRODUCTS, m->output.outputs / OUTPUTS, {
    product(&m->output, l, s->normed, piece * OUTPUTS, tile, rest, ahead);
    spread(l, tile, step->logits, m->codes, piece * OUTPUTS);
  });
  if (l->tiles) tiles_end();
}

void decode_step(const Model *m, const Step *step) {
  Shared shared;
  char *scratch = (char *)aligned((size_t)step->scratch);
  size_t used = divide(m, step->rows, scratch, &shared);
  int positions = 0;
  for (int row = 0; row < step->rows; row++)
    if (step->place[row] >= positions) positions = step->place[row] + 1;
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
    run(m, step, &shared, &team, scratch + used + own_number * own,
        own_number == 0 ? step->seconds : NULL);
  }
}

static size_t draw_own_room(int codes) {
  return aligned((size_t)codes * (sizeof(float) + sizeof(Candidate)));
}

// Bytes of room that draw_codes() needs.
size_t draw_room(int32_t codes, int32_t threads) { return threads * draw_own_room(codes) + 64; }

#ifdef _OPENMP
#define THREAD omp_get_thread_num()
#else
#define THREAD 0
#endif

// A code of each image.
void draw_codes(Draw *draws, int32_t count, int32_t codes, int32_t threads, void *room) {
  char *rooms = (char *)aligned((size_t)room);
#pragma omp parallel for num_threads(threads) schedule(dynamic)
  for (int i = 0; i < count; i++) {
    float *own = (float *)(rooms + THREAD * draw_own_room(codes));
    draw_one(&draws[i], codes, own, (Candidate *)(own + codes));
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
