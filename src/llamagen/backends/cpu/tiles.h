// Tiles of sixteen rows of 64 bytes: AMX. Products of two tiles of bfloat16 pairs or of whole
// numbers of eight bits are added to a third one.
//
// With EMULATED_TILES the same in plain C, so that tests of what uses tiles run on any processor.

#ifndef LLAMAGEN_TILES_H
#define LLAMAGEN_TILES_H

#include "vectors.h"

#if defined(EMULATED_TILES)
#define TILES 1
#elif PAIRS && defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(__AMX_INT8__) && \
    defined(__linux__)
#define TILES 1
#else
#define TILES 0
#endif

#if defined(EMULATED_TILES)

typedef union {
  float sums[16][16];
  int32_t whole_sums[16][16];
  bf16 pairs[16][32];
  int8_t numbers[16][64];
  uint8_t bytes[16][64];
} Tile;

static _Thread_local Tile tile_registers[8];

INLINE int has_tiles(void) { return 1; }
INLINE void tiles_begin(void) {}
INLINE void tiles_end(void) {}

INLINE void tile_load(int to, const void *from, size_t step) {
  for (int i = 0; i < 16; i++)
    memcpy(tile_registers[to].bytes[i], (const char *)from + i * step, 64);
}

INLINE void tile_store(int from, void *to, size_t step) {
  for (int i = 0; i < 16; i++) memcpy((char *)to + i * step, tile_registers[from].bytes[i], 64);
}

static void tile_add(int whole, int to, int left, int right) {
  Tile *t = &tile_registers[to];
  const Tile *a = &tile_registers[left], *b = &tile_registers[right];
  for (int i = 0; i < 16; i++)
    for (int k = 0; k < 16; k++)
      for (int j = 0; j < 16; j++) {
        if (whole)
          for (int p = 0; p < 4; p++)
            t->whole_sums[i][j] += a->numbers[i][4 * k + p] * b->numbers[k][4 * j + p];
        else
          for (int p = 0; p < 2; p++)
            t->sums[i][j] += f32_of(a->pairs[i][2 * k + p]) * f32_of(b->pairs[k][2 * j + p]);
      }
}

#define TILES_READ()
#define TILE_ZERO(tile) memset(&tile_registers[tile], 0, sizeof(Tile))
#define TILE_LOAD(tile, from, step) tile_load(tile, from, step)
#define TILE_STORE(tile, to, step) tile_store(tile, to, step)
#define TILE_ADD(whole, to, left, right) tile_add(whole, to, left, right)

#elif TILES

#include <sys/syscall.h>
#include <unistd.h>

// Comes before instructions that read memory without GCC's knowing it.
#define TILES_READ() __asm__ volatile("" : : : "memory")

typedef struct {
  uint8_t palette, start;
  uint8_t reserved[14];
  uint16_t bytes[16];
  uint8_t rows[16];
} TileShapes;

static int has_tiles(void) {
  static int answer = -1;  // the same for all threads, whoever asks first
  // The kernel hands out the tile registers on request: ARCH_REQ_XCOMP_PERM, feature 18.
  if (answer < 0) answer = syscall(SYS_arch_prctl, 0x1023, 18) == 0;
  return answer;
}

static void tiles_begin(void) {
  TileShapes shapes = {.palette = 1};
  for (int i = 0; i < 8; i++) {
    shapes.bytes[i] = 64;
    shapes.rows[i] = 16;
  }
  TILES_READ();
  _tile_loadconfig(&shapes);
}

static void tiles_end(void) { _tile_release(); }

#define TILE_ZERO(tile) _tile_zero(tile)
#define TILE_LOAD(tile, from, step) _tile_loadd(tile, from, step)
#define TILE_STORE(tile, to, step) _tile_stored(tile, to, step)
#define TILE_ADD(whole, to, left, right)            \
  do {                                              \
    if (whole) _tile_dpbssd(to, left, right);       \
    else _tile_dpbf16ps(to, left, right);           \
  } while (0)

#else

INLINE int has_tiles(void) { return 0; }
INLINE void tiles_begin(void) {}
INLINE void tiles_end(void) {}

#endif

#endif
