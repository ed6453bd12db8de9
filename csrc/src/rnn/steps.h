// Where the rows of each step lie, and how steps are divided into chunks.
#pragma once

#include "common/parallel.h"
#include "normwise.h"

namespace NW_ISA {
namespace {

class StepRows {
 public:
  explicit StepRows(const nw_recurrent& a) : a_(a), starts_(a.batch_sizes ? a.steps : 0) {
    if (!a.batch_sizes) return;
    int64_t row = 0;
    for (int64_t s = 0; s < a.steps; ++s) starts_.get()[s] = row, row += a.batch_sizes[s];
  }
  explicit operator bool() const { return bool(starts_); }
  int64_t samples(int64_t s) const { return a_.batch_sizes ? a_.batch_sizes[s] : a_.batch; }
  int64_t start(int64_t s) const {
    return a_.batch_sizes ? starts_.get()[s] : (a_.reverse ? a_.steps - 1 - s : s) * a_.batch;
  }
  // Steps s .. end-1 of a chunk fill consecutive rows from here.
  int64_t first(int64_t s, int64_t end) const { return start(a_.reverse ? end - 1 : s); }
  int64_t count(int64_t s, int64_t end) const {
    int64_t n = 0;
    for (; s < end; ++s) n += samples(s);
    return n;
  }

 private:
  const nw_recurrent& a_;
  Scratch<int64_t> starts_;
};

// The number of steps in a chunk of about `rows` rows.
inline int64_t chunk_steps(const nw_recurrent& a, int64_t rows) {
  const int64_t rows_per_step = a.steps > 0 ? (a.rows + a.steps - 1) / a.steps : 1;
  const int64_t steps = rows / (rows_per_step > 0 ? rows_per_step : 1);
  return steps < 1 ? 1 : steps > a.steps ? a.steps : steps;
}

}  // namespace
}  // namespace NW_ISA
