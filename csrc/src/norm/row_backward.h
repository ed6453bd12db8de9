// The backward of a row of LayerNorm and RMSNorm, or of a few at once that have one gain and bias.
#pragma once

#include "common/activations.h"
#include "norm/row.h"

namespace NW_ISA {
namespace {

// One row of the backward: the gradient g of z and x_hat.
template <class T, int act> struct RowGradient {
  using C = compute_t<T>;
  const T *dy, *s;
  Standardize<C> standardize;
  int code;  // the activation's

  RowGradient(const nw_rows_backward_args& a, int64_t row)
      : dy(static_cast<const T*>(a.dy) + row * a.cols),
        s(static_cast<const T*>(a.s) + row * a.cols),
        standardize(a.mean[row], a.rstd[row]),
        code(a.act) {}

  template <class Part> NW_INLINE vec<C> x_hat_at(int64_t i, Part part) const { return standardize(load(s + i, part)); }
  template <class Part>
  NW_INLINE vec<C> at(int64_t i, Part part, vec<C> weight, const ParamVector<C>& bias, vec<C>& x_hat) const {
    x_hat = x_hat_at(i, part);
    vec<C> g = load(dy + i, part);
    if constexpr (act != NW_IDENTITY) g *= activation_derivative<act, C>(x_hat * weight + bias.at(i, part), code);
    return g;
  }
};

// Sums over a row of g * weight, and of that times x_hat.
struct RowSums {
  double grad = 0, grad_x_hat = 0;
};

// Writes ds = rstd * weight * g - offset - x_hat * slope of one row, in which g may wait, see keeps_gradient.
// `prefetch_offset`: how far away the row lies that is read after it.
template <class T, int act>
void write_input_gradient(const nw_rows_backward_args& a, int64_t row, const RowSums& sums,
                          const ParamVector<compute_t<T>>& weight, const ParamVector<compute_t<T>>& bias,
                          int64_t prefetch_offset, bool non_temporal) {
  using C = compute_t<T>;
  const RowGradient<T, act> r(a, row);
  const double n = double(a.cols), rstd = a.rstd[row];
  const C offset = a.center ? C(rstd * sums.grad / n) : C(0), slope = C(rstd * sums.grad_x_hat / n);
  const T* const dsum = a.dsum ? static_cast<const T*>(a.dsum) + row * a.cols : nullptr;
  T* const ds = static_cast<T*>(a.ds) + row * a.cols;
  if (keeps_gradient<T, act>) non_temporal = false;  // where g lies in the caches ds takes its place
  for_each_vector<C>(a.cols, [&](int64_t i, auto part) NW_LAMBDA {
    const vec<C> w = weight.at(i, part);
    vec<C> x_hat, g;
    if constexpr (keeps_gradient<T, act>) {
      x_hat = r.x_hat_at(i, part);
      g = load(ds + i, part);
    } else {
      g = r.at(i, part, w, bias, x_hat);
    }
    vec<C> gradient = g * w * r.standardize.rstd - offset - x_hat * slope;
    if (dsum) gradient += load(dsum + i, part);
    store_output(ds + i, gradient, part, non_temporal);
    prefetch(r.s + i + prefetch_offset);
    prefetch(r.dy + i + prefetch_offset);
  });
}

// R rows of one gain and bias at once where they are only read, so that the partial sums of the gain's and bias's
// gradients are loaded and stored once for R rows; what is written is written one row after the other, see
// forward_short_rows.
template <int R, class T, int act>
void backward_rows(const nw_rows_backward_args& a, const int64_t* rows, compute_t<T>* dweight, compute_t<T>* dbias,
                   bool non_temporal) {
  using C = compute_t<T>;
  constexpr int64_t block = 1024;  // float sums in one accumulator stay accurate
  const int64_t gain = gain_offset(a, rows[0]);
  const ParamVector<C> weight(a.weight, gain, C(1)), bias(a.bias, gain, C(0));
  const RowGradient<T, act> r0(a, rows[0]), r1(a, rows[R > 1 ? 1 : 0]), r2(a, rows[R > 1 ? 2 : 0]),
      r3(a, rows[R > 1 ? 3 : 0]);
  RowSums sums[R];
  for (int64_t start = 0; start < a.cols; start += block) {
    vec<C> grad[R] = {}, grad_x_hat[R] = {};
    for_each_vector<C>(a.cols - start < block ? a.cols - start : block, [&](int64_t j, auto part) NW_LAMBDA {
      const int64_t i = start + j;
      const vec<C> w = weight.at(i, part);
      const auto add = [&](const RowGradient<T, act>& r, int k, vec<C>& dw) NW_LAMBDA {
        vec<C> x_hat;
        const vec<C> g = r.at(i, part, w, bias, x_hat), gw = g * w;
        if constexpr (keeps_gradient<T, act>) store(static_cast<T*>(a.ds) + rows[k] * a.cols + i, g, part);
        grad[k] += gw;
        grad_x_hat[k] += gw * x_hat;
        dw = g * x_hat;
        return g;
      };
      vec<C> dw, db = add(r0, 0, dw);
      if constexpr (R > 1) {
        vec<C> dw1, dw2, dw3;
        const vec<C> g1 = add(r1, 1, dw1), g2 = add(r2, 2, dw2), g3 = add(r3, 3, dw3);
        db = (db + g1) + (g2 + g3);
        dw = (dw + dw1) + (dw2 + dw3);
      }
      store(dweight + i, load(dweight + i, part) + dw, part);
      store(dbias + i, load(dbias + i, part) + db, part);
    });
#pragma GCC unroll 4
    for (int k = 0; k < R; ++k) {
      sums[k].grad += double(sum_lanes<C>(grad[k]));
      sums[k].grad_x_hat += double(sum_lanes<C>(grad_x_hat[k]));
    }
  }
  for (int k = 0; k < R; ++k) {
    write_input_gradient<T, act>(a, rows[k], sums[k], weight, bias, R * a.cols, non_temporal);
  }
}

}  // namespace
}  // namespace NW_ISA
