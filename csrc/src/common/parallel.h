// How work is divided among threads, and scratch memory.
#pragma once

#include <cstdint>
#include <cstdlib>

#include "common/openmp.h"
#include "common/simd.h"

namespace NW_ISA {
namespace {

// Below this many elements waking a second thread costs more than it saves.
constexpr int64_t min_parallel_elements = 32768;

inline int useful_threads(int64_t elements, int threads) {
  return elements < min_parallel_elements || threads < 1 ? 1 : threads;
}

// Whether n items, each computed by a single thread, keep all threads busy nearly to the end.
inline bool fills_threads(int64_t n, int threads) {
  const int64_t rounds = (n + threads - 1) / threads;
  return threads == 1 || 4 * rounds * threads <= 5 * n;
}

// f(begin, end) for each thread's share of 0 .. n-1. Neighbouring items share a thread, so that two loops over the same
// n find the same caches warm.
template <class F> inline void parallel_for_ranges(int64_t n, int threads, F f) {
  parallel_region(n > 1 ? threads : 1, [&](int64_t thread, int64_t count) {
    f(n * thread / count, n * (thread + 1) / count);
    fence_non_temporal();
  });
}

// f(i) for i = 0 .. n-1.
template <class F> inline void parallel_for(int64_t n, int threads, F f) {
  parallel_for_ranges(n, threads, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) f(i);
  });
}

// f(thread, i) for i = 0 .. n-1, where thread < threads says whose scratch memory to use.
template <class F> inline void parallel_for_threads(int64_t n, int threads, F f) {
  parallel_region(n > 1 ? threads : 1, [&](int64_t thread, int64_t count) {
    for (int64_t i = n * thread / count; i < n * (thread + 1) / count; ++i) f(thread, i);
    fence_non_temporal();
  });
}

// The same in which each thread begins with its last item: a second pass then finds the end of the first one in cache.
template <class F> inline void parallel_for_from_end(int64_t n, int threads, F f) {
  parallel_for_ranges(n, threads, [&](int64_t begin, int64_t end) {
    while (end > begin) f(--end);
  });
}

// Rows divided into chunks by the shape alone: each has its own partial sums, which are added up in order afterwards,
// so that results do not depend on the number of threads.
struct Chunks {
  int64_t rows, rows_per_chunk, count;
  Chunks(int64_t rows, int64_t min_rows, int64_t max_count, int64_t multiple = 4) : rows(rows) {
    count = rows / min_rows < 1 ? 1 : (rows / min_rows > max_count ? max_count : rows / min_rows);
    rows_per_chunk = (rows + count - 1) / count;
    rows_per_chunk = (rows_per_chunk + multiple - 1) / multiple * multiple;  // loops handle several rows at a time
    count = rows_per_chunk > 0 ? (rows + rows_per_chunk - 1) / rows_per_chunk : 0;
  }
  int64_t begin(int64_t i) const { return i * rows_per_chunk; }
  int64_t end(int64_t i) const { return (i + 1) * rows_per_chunk < rows ? (i + 1) * rows_per_chunk : rows; }
};

// Uninitialized memory for n elements; false if the system has none.
template <class T> class Scratch {
 public:
  explicit Scratch(int64_t n) : data_(static_cast<T*>(std::malloc(n > 0 ? size_t(n) * sizeof(T) : 1))) {}
  ~Scratch() { std::free(data_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  explicit operator bool() const { return data_ != nullptr; }
  T* get() const { return data_; }

 private:
  T* data_;
};

}  // namespace
}  // namespace NW_ISA
