// Threads that walk through the phases of a step together.

#ifndef LLAMAGEN_THREADS_H
#define LLAMAGEN_THREADS_H

#include <sched.h>
#include <stdatomic.h>

#if defined(__x86_64__)
#include <immintrin.h>
#define RELAX() _mm_pause()
#elif defined(__aarch64__)
#define RELAX() __asm__ volatile("yield")
#else
#define RELAX()
#endif

// Waiting for longer than this, something else has the other thread's processor: let it run.
#define PATIENCE 4000

typedef struct {
  int threads;
  _Alignas(64) atomic_int arrived;
  _Alignas(64) atomic_int phase;
  _Alignas(64) atomic_int next;  // the next piece of work of this phase
} Team;

static void team_init(Team *team, int threads) {
  team->threads = threads;
  atomic_init(&team->arrived, 0);
  atomic_init(&team->phase, 0);
  atomic_init(&team->next, 0);
}

// Ends a phase: returns once all threads have come.
static void team_meet(Team *team) {
  if (team->threads == 1) {
    atomic_store_explicit(&team->next, 0, memory_order_relaxed);
    return;
  }
  int phase = atomic_load_explicit(&team->phase, memory_order_relaxed);
  if (atomic_fetch_add_explicit(&team->arrived, 1, memory_order_acq_rel) == team->threads - 1) {
    atomic_store_explicit(&team->arrived, 0, memory_order_relaxed);
    atomic_store_explicit(&team->next, 0, memory_order_relaxed);
    atomic_store_explicit(&team->phase, phase + 1, memory_order_release);
    return;
  }
  for (int waited = 0; atomic_load_explicit(&team->phase, memory_order_acquire) == phase; waited++) {
    if (waited < PATIENCE)
      RELAX();
    else
      sched_yield();
  }
}

// Pieces are taken as threads get to them, so a thread that was held up does less.
static int team_next(Team *team) {
  return atomic_fetch_add_explicit(&team->next, 1, memory_order_relaxed);
}

#endif
