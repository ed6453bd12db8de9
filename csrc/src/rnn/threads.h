// How the threads divide the work of a recurrent layer.
#pragma once

#include <sched.h>

#include <atomic>

#include "rnn/layer.h"

namespace NW_ISA {
namespace {

// A barrier that spins, since the other threads arrive within microseconds; where they do not, it yields.
class Barrier {
 public:
  void wait(int threads) {
    if (threads == 1) return;
    const int round = round_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) == threads - 1) {
      arrived_.store(0, std::memory_order_relaxed);
      round_.store(round + 1, std::memory_order_release);
      return;
    }
    for (int spins = 0; round_.load(std::memory_order_acquire) == round; ++spins) {
      if (spins > 500) {
        sched_yield();
      } else {
#if defined(__x86_64__)
        __builtin_ia32_pause();
#endif
      }
    }
  }

 private:
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<int> round_{0};
};

// One thread's share of a step. Threads work separately on every `count`-th sample each, and never wait for each other
// in the loop over steps. With only a few samples they are cooperative: each computes some columns of every matrix
// product, and everything else redundantly for itself.
struct ThreadShare {
  int index, count;
  bool cooperative;
  int64_t first() const { return cooperative ? 0 : index; }
  int64_t stride() const { return cooperative ? 1 : count; }
  int64_t sample_count(int64_t samples) const {
    return cooperative ? samples : samples > index ? (samples - index + count - 1) / count : 0;
  }
  bool writes_outputs() const { return !cooperative || index == 0; }
  int64_t panel_begin(int64_t panels) const { return cooperative ? panels * index / count : 0; }
  int64_t panel_end(int64_t panels) const { return cooperative ? panels * (index + 1) / count : panels; }
};

// Below this many multiplications in the whole call, or in one step of cooperative threads, more threads cost more than
// they save.
constexpr int64_t min_parallel_products = 1 << 19, min_parallel_step_products = 1 << 16;

// How many threads are worth having for this layer.
inline int threads_for(const nw_recurrent& a) {
  const int64_t products_per_row = gates_of(a.cell) * a.units * (a.units + a.inputs);
  if (a.threads < 2 || a.rows * products_per_row < min_parallel_products) return 1;
  if (a.batch == 1 && products_per_row < min_parallel_step_products) return 1;
  return a.threads;
}
// Whether they work cooperatively.
inline bool use_cooperative(const nw_recurrent& a, int threads) {
  return a.batch <= 2 * threads && gates_of(a.cell) * a.units * a.units >= min_parallel_step_products;
}

}  // namespace
}  // namespace NW_ISA
