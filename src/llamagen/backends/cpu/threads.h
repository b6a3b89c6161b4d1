// A team of threads that goes through the phases of a step together.

#ifndef LLAMAGEN_THREADS_H
#define LLAMAGEN_THREADS_H

#include <sched.h>
#include <stdatomic.h>

#ifdef _OPENMP
#include <omp.h>
#define THREAD omp_get_thread_num()
#else
#define THREAD 0
#endif

#if defined(__x86_64__)
#include <immintrin.h>
#define CPU_RELAX() _mm_pause()
#elif defined(__aarch64__)
#define CPU_RELAX() __asm__ volatile("yield")
#else
#define CPU_RELAX()
#endif

// A thread that has spun for longer yields: something else runs on another thread's processor.
#define MAX_SPINS 4000

typedef struct {
  int threads;
  _Alignas(64) atomic_int arrived;
  _Alignas(64) atomic_int phase;
  _Alignas(64) atomic_int next;  // the next chunk of work of this phase
} Team;

// Ends a phase: returns once all threads have arrived.
static void team_barrier(Team *team) {
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
  for (int spins = 0; atomic_load_explicit(&team->phase, memory_order_acquire) == phase; spins++) {
    if (spins < MAX_SPINS)
      CPU_RELAX();
    else
      sched_yield();
  }
}

// Threads take chunks one by one, so a thread that was held up does less.
static int team_next_chunk(Team *team) {
  return atomic_fetch_add_explicit(&team->next, 1, memory_order_relaxed);
}

#endif
