// Teams of OpenMP threads. Two OpenMP runtimes in one process keep a pool each, whose threads wait on the cores that the
// other's want: twice as slow in turn as alone. So the runtime must be torch's, which on Linux is GCC's libgomp. Clang's
// pragmas want its own, libomp; NW_GOMP calls what GCC makes of the same pragma instead.
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

// f(index of the thread, number of threads) in a team of `threads`, or as many as there are to be had.
template <class F> inline void in_team(int threads, F f) {
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
