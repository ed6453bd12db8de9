// Threads and scratch memory.
#pragma once

#include <cstdint>
#include <cstdlib>

#include "common/simd.h"
#include "common/openmp.h"

namespace NW_ISA {
namespace {

// Below this many elements, waking a second thread costs more than it saves.
constexpr int64_t serial_below = 32768;

inline int worth_threads(int64_t elements, int threads) { return elements < serial_below || threads < 1 ? 1 : threads; }

// Whether n items, one after the other on one thread each, keep all threads busy nearly to the end.
inline bool one_thread_each(int64_t n, int threads) {
  const int64_t rounds = (n + threads - 1) / threads;
  return threads == 1 || 4 * rounds * threads <= 5 * n;
}

// f(i) for i = 0 .. n-1, neighbours on one thread, so that two loops over the same n meet the same caches.
template <class F> inline void parallel_for(int64_t n, int threads, F f) {
  in_team(n > 1 ? threads : 1, [&](int64_t thread, int64_t all) {
    for (int64_t i = n * thread / all, end = n * (thread + 1) / all; i < end; ++i) f(i);
    finish_output();
  });
}

// Rows cut into chunks by the shape alone; each has its own partial sums, added up in order afterwards.
struct Chunks {
  int64_t rows, each, count;
  Chunks(int64_t rows, int64_t least, int64_t most) : rows(rows) {
    count = rows / least < 1 ? 1 : (rows / least > most ? most : rows / least);
    each = (rows + count - 1) / count;
    each = (each + 3) / 4 * 4;  // rows are taken four at a time
    count = each > 0 ? (rows + each - 1) / each : 0;
  }
  int64_t begin(int64_t i) const { return i * each; }
  int64_t end(int64_t i) const { return (i + 1) * each < rows ? (i + 1) * each : rows; }
};

template <class E> class Scratch {
 public:
  explicit Scratch(int64_t n) : data_(static_cast<E*>(std::malloc(n > 0 ? size_t(n) * sizeof(E) : 1))) {}
  ~Scratch() { std::free(data_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  explicit operator bool() const { return data_ != nullptr; }
  E* get() const { return data_; }

 private:
  E* data_;
};

}  // namespace
}  // namespace NW_ISA
