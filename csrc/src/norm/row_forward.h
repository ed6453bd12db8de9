// The forward of one row of LayerNorm and RMSNorm.
#pragma once

#include "common/activations.h"
#include "norm/row.h"

namespace NW_ISA {
namespace {

template <class T> NW_INLINE double mean_square(const T* x, int64_t n) {
  using C = compute_t<T>;
  double total = 0;
  for (int64_t start = 0; start < n; start += Blocks::max_elements) {
    vec<C> squares[4] = {};
    int64_t length = n - start < Blocks::max_elements ? n - start : Blocks::max_elements;
    for_each_vector_x4<C>(length, [&](int64_t i, auto part, int k) NW_LAMBDA {
      vec<C> v = load(x + start + i, part);
      squares[k] += v * v;
    });
    total += sum_lanes<C>(squares);
  }
  return total / double(n);
}

NW_INLINE void store_statistics(const nw_rows_forward_args& a, int64_t row, double mean, double rstd) {
  if (!a.mean) return;
  a.mean[row] = mean;
  a.rstd[row] = rstd;
}

// A row without statistics: padding.
template <class T> bool skip_padding(const nw_rows_forward_args& a, int64_t row) {
  if (!a.mask || a.mask[row]) return false;
  zero_fill(static_cast<T*>(a.y) + row * a.cols, a.cols);
  if (a.residual) zero_fill(static_cast<T*>(a.sum) + row * a.cols, a.cols);
  store_statistics(a, row, 0, 0);
  return true;
}

// s of a row: x, or the sum, which is stored.
template <class T> const T* add_residual(const nw_rows_forward_args& a, int64_t row) {
  using C = compute_t<T>;
  const T* const x = static_cast<const T*>(a.x) + row * a.cols;
  if (!a.residual) return x;
  const T* const residual = static_cast<const T*>(a.residual) + row * a.cols;
  T* const sum = static_cast<T*>(a.sum) + row * a.cols;
  for_each_vector<C>(a.cols, [&](int64_t i, auto part)
                                 NW_LAMBDA { store(sum + i, load(x + i, part) + load(residual + i, part), part); });
  return sum;
}

template <class T, int act>
void normalize_row(const nw_rows_forward_args& a, int64_t row, const T* x, T* y, bool non_temporal) {
  using C = compute_t<T>;
  const int64_t n = a.cols;
  const T* next = x + n;
  double mean = 0, rstd;
  if (a.center) {
    Moments m = region_moments(x, Region{.planes = 1, .stride = 0, .length = n});
    mean = m.mean;
    rstd = m.rstd(a.eps);
  } else {
    rstd = rstd_of(mean_square(x, n), a.eps);
  }
  store_statistics(a, row, mean, rstd);

  const int64_t gain = gain_offset(a, row);
  const ParamVector<C> weight(a.weight, gain, C(1)), bias(a.bias, gain, C(0));
  const Standardize<C> standardize(mean, rstd);
  for_each_vector<C>(n, [&](int64_t i, auto part) NW_LAMBDA {
    prefetch(next + i);
    vec<C> z = standardize(load(x + i, part)) * weight.at(i, part) + bias.at(i, part);
    store_output(y + i, activate<act, C>(z, a.act), part, non_temporal);
  });
}

}  // namespace
}  // namespace NW_ISA
