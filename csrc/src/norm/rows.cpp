// LayerNorm and RMSNorm: statistics along each row, gain and bias along the columns, of all rows or of a group of them.
#include "norm/gated_rows.h"

#include "common/activations.h"
#include "common/parallel.h"
#include "norm/kernels.h"
#include "norm/row_backward.h"
#include "norm/row_forward.h"
#include "norm/rows_backward.h"

namespace NW_ISA {
namespace {

template <class T, int act> void forward_row(const nw_rows_forward_args& a, int64_t row, bool non_temporal) {
  if (skip_padding<T>(a, row)) return;
  normalize_row<T, act>(a, row, add_residual<T>(a, row), static_cast<T*>(a.y) + row * a.cols, non_temporal);
}

// Rows up to this long are handled four at once: a short row alone mostly waits for its few dependent sums.
constexpr int64_t short_row = 512;

// R neighbouring rows without a mask or a residual. Each row has one accumulator whatever R is, so that its result does
// not depend on its neighbours.
template <int R, class T, int act>
void forward_short_rows(const nw_rows_forward_args& a, int64_t row, bool non_temporal) {
  using C = compute_t<T>;
  const int64_t n = a.cols;
  const T* x = static_cast<const T*>(a.x) + row * n;
  T* y = static_cast<T*>(a.y) + row * n;
  double mean[R] = {};
  C rounded_mean[R] = {};  // sums of deviations from it correct its rounding
  if (a.center) {
    vec<C> sum[R] = {};
    for_each_vector<C>(n, [&](int64_t i, auto part) NW_LAMBDA {
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) sum[r] += load(x + r * n + i, part);
    });
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) rounded_mean[r] = C(double(sum_lanes<C>(sum[r])) / double(n));
  }
  vec<C> sum_d[R] = {}, sum_d2[R] = {};
  for_each_vector<C>(n, [&](int64_t i, auto part) NW_LAMBDA {
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      vec<C> d = clear_tail<C>(load(x + r * n + i, part) - rounded_mean[r], part);
      sum_d[r] += d;
      sum_d2[r] += d * d;
    }
  });
  double rstd[R];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
    double s1 = a.center ? double(sum_lanes<C>(sum_d[r])) : 0.0, s2 = double(sum_lanes<C>(sum_d2[r]));
    mean[r] = double(rounded_mean[r]) + s1 / double(n);
    rstd[r] = rstd_of((s2 - s1 * s1 / double(n)) / double(n), a.eps);
    store_statistics(a, row + r, mean[r], rstd[r]);
  }
  ParamVector<C> weight(a.weight, 0, C(1)), bias(a.bias, 0, C(0));
  // One row after the other: vectors of AVX2 are half a cache line, and non-temporal stores to several rows in turn
  // would flush half lines.
  for (int r = 0; r < R; ++r) {
    if (a.group_rows < a.rows) {
      const int64_t gain = gain_offset(a, row + r);
      weight.start_at(a.weight, gain);
      bias.start_at(a.bias, gain);
    }
    const T* const row_x = x + r * n;
    T* const row_y = y + r * n;
    const Standardize<C> standardize(mean[r], rstd[r]);
    for_each_vector<C>(n, [&](int64_t i, auto part) NW_LAMBDA {
      prefetch(row_x + R * n + i);
      vec<C> z = standardize(load(row_x + i, part)) * weight.at(i, part) + bias.at(i, part);
      store_output(row_y + i, activate<act, C>(z, a.act), part, non_temporal);
    });
  }
}

template <class T, int act> int forward(const nw_rows_forward_args& a) {
  const bool non_temporal = past_the_caches<T>(a.y, a, 0, a.rows);
  const int threads = useful_threads(a.rows * a.cols, a.threads);
  if (a.cols > short_row || a.mask || a.residual) {
    parallel_for(a.rows, threads, [&](int64_t row) { forward_row<T, act>(a, row, non_temporal); });
    return NW_OK;
  }
  parallel_for((a.rows + 3) / 4, threads, [&](int64_t four) {
    const int64_t row = 4 * four, end = row + 4 < a.rows ? row + 4 : a.rows;
    if (end - row == 4) return forward_short_rows<4, T, act>(a, row, non_temporal);
    for (int64_t one = row; one < end; ++one) forward_short_rows<1, T, act>(a, one, non_temporal);
  });
  return NW_OK;
}

template <class T, int act>
void backward_chunk(const nw_rows_backward_args& a, int64_t begin, int64_t end, compute_t<T>* dweight,
                    compute_t<T>* dbias) {
  const bool non_temporal = past_the_caches<T>(a.ds, a, begin, end);
  int64_t pending[4];
  int count = 0;
  for (int64_t row = begin; row < end; ++row) {
    if (a.mask && !a.mask[row]) {
      zero_fill(static_cast<T*>(a.ds) + row * a.cols, a.cols);
      continue;
    }
    pending[count++] = row;
    if (count < 4) continue;
    backward_rows<4, T, act>(a, pending, dweight, dbias, non_temporal);
    count = 0;
  }
  for (int i = 0; i < count; ++i) backward_rows<1, T, act>(a, pending + i, dweight, dbias, non_temporal);
}

template <class T, int act> int backward(const nw_rows_backward_args& a) {
  return backward_in_chunks<T>(a, 0, [&](int64_t begin, int64_t end, auto dweight, auto dbias, auto) {
    backward_chunk<T, act>(a, begin, end, dweight, dbias);
  });
}

// Whether sizes and codes are ones that the contract knows.
template <class Args> bool is_valid(const Args& a) {
  if (a.rows < 0 || a.cols < 1 || a.group_rows < 1) return false;
  return !a.gate || (opens_gate(a.gate_act) && (a.gate_first || a.act == NW_IDENTITY));
}

}  // namespace

int rows_forward(const nw_rows_forward_args* args) {
  const nw_rows_forward_args& a = *args;
  if (!is_valid(a)) return NW_BAD_ARGUMENT;
  if (a.gate) return gated_rows_forward(a);
  return dispatch_dtype_and_act(a.dtype, a.act, [&]<class T, int act>() { return forward<T, act>(a); });
}

int rows_near_zero(const float* x, int64_t rows, int64_t cols, double eps, double limit) {
  for (int64_t row = 0; row < rows; ++row) {
    const Moments m = region_moments(x + row * cols, Region{.planes = 1, .stride = 0, .length = cols});
    const double rstd = m.rstd(eps), ratio = m.mean * rstd;
    // Written so that NaN is found too. An rstd this small belongs to a variance that overflows a float.
    if (!(ratio <= limit && ratio >= -limit && rstd > 1e-19)) return 0;
  }
  return 1;
}

int rows_backward(const nw_rows_backward_args* args) {
  const nw_rows_backward_args& a = *args;
  if (!is_valid(a) || (a.gate && !a.dgate)) return NW_BAD_ARGUMENT;
  if (a.gate) return gated_rows_backward(a);
  return dispatch_dtype_and_act(a.dtype, a.act, [&]<class T, int act>() { return backward<T, act>(a); });
}

}  // namespace NW_ISA
