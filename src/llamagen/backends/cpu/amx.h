// AMX: tiles of sixteen rows of 64 bytes. Products of two tiles of bfloat16 or int8 are added to a
// third one.

#ifndef LLAMAGEN_AMX_H
#define LLAMAGEN_AMX_H

#include "vectors.h"

#if HAS_AVX512_BF16 && defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(__AMX_INT8__) && \
    defined(__linux__)
#define HAS_AMX 1

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
#if defined(EMULATE_AVX512)
  answer = 1;
#endif
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

#define TILE_DOT(int8, to, left, right)             \
  do {                                              \
    if (int8) _tile_dpbssd(to, left, right);        \
    else _tile_dpbf16ps(to, left, right);           \
  } while (0)

#else
#define HAS_AMX 0

INLINE int has_amx(void) { return 0; }
INLINE void amx_begin(void) {}
INLINE void amx_end(void) {}

#endif

#endif
