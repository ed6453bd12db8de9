// OpenMP parallel regions. Two OpenMP runtimes in one process keep a pool of threads each, and each pool's threads spin
// on the cores that the other needs: calls that alternate between them take twice as long. So the runtime must be
// torch's, which on Linux is GCC's libgomp. Clang's pragmas need its own, libomp; with NW_GOMP the code calls libgomp
// directly, as GCC's code for the same pragma does.
#pragma once

#if defined(NW_GOMP)
extern "C" {
void GOMP_parallel(void (*body)(void*), void* data, unsigned threads, unsigned flags);
int omp_get_thread_num(void);
int omp_get_num_threads(void);
}
#elif defined(_OPENMP)
#include <omp.h>
#endif

namespace {

// Runs f(index of the thread, number of threads) on `threads` threads, or on as many as the runtime provides.
template <class F> inline void parallel_region(int threads, F f) {
#if defined(NW_GOMP)
  if (threads > 1) {
    auto body = [](void* f) { (*static_cast<F*>(f))(omp_get_thread_num(), omp_get_num_threads()); };
    return GOMP_parallel(body, &f, unsigned(threads), 0);
  }
#elif defined(_OPENMP)
  if (threads > 1) {
#pragma omp parallel num_threads(threads)
    f(omp_get_thread_num(), omp_get_num_threads());
    return;
  }
#endif
  (void)threads;
  f(0, 1);
}

}  // namespace
