// What forward and backward of LayerNorm and RMSNorm read of one row: gain and bias along its columns, x_hat.
#pragma once

#include "common/parallel.h"
#include "norm/moments.h"
#include "normwise.h"

namespace NW_ISA {
namespace {

// A gain or bias along the columns. Where there is none, every load returns the same constant vector.
template <class C> struct ParamVector {
  alignas(vector_bytes) C constant[lanes<C>];
  const C* data;
  int64_t index_mask;
  ParamVector(const void* values, int64_t offset, C default_value) : data(constant), index_mask(0) {
    start_at(values, offset);
    if (values) return;
    for (C& c : constant) c = default_value;
  }
  NW_INLINE void start_at(const void* values, int64_t offset) {
    if (!values) return;
    data = static_cast<const C*>(values) + offset;
    index_mask = -1;
  }
  template <class Part> NW_INLINE vec<C> at(int64_t i, Part part) const { return load(data + (i & index_mask), part); }
};

// Whether rows `begin` to `end` of an output take non-temporal stores. Fresh memory is in the caches anyway: there such
// stores take 1.1 to 1.2 times as long as others, elsewhere 0.75.
template <class T, class Args>
inline bool past_the_caches(const void* output, const Args& a, int64_t begin, int64_t end) {
  const T* rows = static_cast<const T*>(output);
  return use_non_temporal(rows, a.rows * a.cols, a.cols) &&
         !is_fresh(rows + begin * a.cols, (end - begin) * a.cols * int64_t(sizeof(T)));
}

// Where the gain and bias of a row begin.
template <class Args> NW_INLINE int64_t gain_offset(const Args& a, int64_t row) {
  return row < a.group_rows ? 0 : row / a.group_rows * a.cols;
}

// x_hat = (x - mean) * rstd.
template <class C> struct Standardize {
  C mean, rstd, shift;  // shift: what the mean's rounding to C leaves out
  Standardize(double mean, double rstd)
      : mean(C(mean)), rstd(C(rstd)), shift(C(0 - SplitMean<C>(mean).low_times(rstd))) {}
  NW_INLINE vec<C> operator()(vec<C> x) const { return (x - mean) * rstd + shift; }
};

}  // namespace
}  // namespace NW_ISA
