// AMX: tiles of sixteen rows of 64 bytes. Products of two tiles of bfloat16 or int8 are added to a
// third one.
//
// With EMULATE_AMX the same in plain C, so that the code that uses tiles is tested on any processor.

#ifndef LLAMAGEN_AMX_H
#define LLAMAGEN_AMX_H

#include "vectors.h"

#if defined(EMULATE_AMX)
#define HAS_AMX 1
#elif HAS_AVX512_BF16 && defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(__AMX_INT8__) && \
    defined(__linux__)
#define HAS_AMX 1
#else
#define HAS_AMX 0
#endif

#if defined(EMULATE_AMX)

typedef union {
  float f32_sums[16][16];
  int32_t int32_sums[16][16];
  bf16 bf16_rows[16][32];
  int8_t int8_rows[16][64];
  uint8_t bytes[16][64];
} Tile;

static _Thread_local Tile tile_registers[8];

INLINE int has_amx(void) { return 1; }
INLINE void amx_begin(void) {}
INLINE void amx_end(void) {}

INLINE void tile_load(int to, const void *from, size_t step) {
  for (int i = 0; i < 16; i++)
    memcpy(tile_registers[to].bytes[i], (const char *)from + i * step, 64);
}

INLINE void tile_store(int from, void *to, size_t step) {
  for (int i = 0; i < 16; i++) memcpy((char *)to + i * step, tile_registers[from].bytes[i], 64);
}

static void tile_dot(int int8, int to, int left, int right) {
  Tile *t = &tile_registers[to];
  const Tile *a = &tile_registers[left], *b = &tile_registers[right];
  for (int i = 0; i < 16; i++)
    for (int k = 0; k < 16; k++)
      for (int j = 0; j < 16; j++) {
        if (int8)
          for (int p = 0; p < 4; p++)
            t->int32_sums[i][j] += a->int8_rows[i][4 * k + p] * b->int8_rows[k][4 * j + p];
        else
          for (int p = 0; p < 2; p++)
            t->f32_sums[i][j] +=
                bf16_to_f32(a->bf16_rows[i][2 * k + p]) * bf16_to_f32(b->bf16_rows[k][2 * j + p]);
      }
}

#define AMX_FENCE()
#define TILE_ZERO(tile) memset(&tile_registers[tile], 0, sizeof(Tile))
#define TILE_LOAD(tile, from, step) tile_load(tile, from, step)
#define TILE_STORE(tile, to, step) tile_store(tile, to, step)
#define TILE_DOT(int8, to, left, right) tile_dot(int8, to, left, right)

#elif HAS_AMX

#include <sys/syscall.h>
#include <unistd.h>

// Comes before instructions that read memory without GCC knowing it.
#define AMX_FENCE() __asm__ volatile("" : : : "memory")

typedef struct {
  uint8_t palette, start;
  uint8_t reserved[14];
  uint16_t bytes[16];
  uint8_t rows[16];
} TileConfig;

static int has_amx(void) {
  static int answer = -1;  // the same for all threads, whichever asks first
  // The kernel hands out the tile registers on request: ARCH_REQ_XCOMP_PERM, feature 18.
  if (answer < 0) answer = syscall(SYS_arch_prctl, 0x1023, 18) == 0;
  return answer;
}

static void amx_begin(void) {
  TileConfig shapes = {.palette = 1};
  for (int i = 0; i < 8; i++) {
    shapes.bytes[i] = 64;
    shapes.rows[i] = 16;
  }
  AMX_FENCE();
  _tile_loadconfig(&shapes);
}

static void amx_end(void) { _tile_release(); }

#define TILE_ZERO(tile) _tile_zero(tile)
#define TILE_LOAD(tile, from, step) _tile_loadd(tile, from, step)
#define TILE_STORE(tile, to, step) _tile_stored(tile, to, step)
#define TILE_DOT(int8, to, left, right)             \
  do {                                              \
    if (int8) _tile_dpbssd(to, left, right);        \
    else _tile_dpbf16ps(to, left, right);           \
  } while (0)

#else

INLINE int has_amx(void) { return 0; }
INLINE void amx_begin(void) {}
INLINE void amx_end(void) {}

#endif

#endif
