// LayerNorm and RMSNorm with a gate, y = norm(s) * gate_act(gate) or norm(s * gate_act(gate)). What the gate gives, or
// gets, lies in rows of scratch, which stay in cache and are never rounded.
#include "norm/gated_rows.h"

#include "common/activations.h"
#include "common/parallel.h"
#include "norm/row_backward.h"
#include "norm/row_forward.h"
#include "norm/rows_backward.h"

namespace NW_ISA {
namespace {

// Calls body(i, part, opened, slope) for each vector of a gate's row.
template <class T, class Body> NW_INLINE void for_each_gate(const T* gate, int64_t n, int code, Body body) {
  using C = compute_t<T>;
  if (code == NW_SILU) {
    for_each_vector<C>(n, [&](int64_t i, auto part) NW_LAMBDA {
      prefetch(gate + n + i);
      vec<C> slope;
      const vec<C> opened = open_silu<C>(load(gate + i, part), slope);
      body(i, part, opened, slope);
    });
  } else {
    for_each_vector<C>(n, [&](int64_t i, auto part) NW_LAMBDA {
      prefetch(gate + n + i);
      vec<C> slope;
      const vec<C> opened = open_by_code<C>(load(gate + i, part), slope, code);
      body(i, part, opened, slope);
    });
  }
}

// out = in * gate_act(gate)
template <class T, class In, class Out>
NW_NOINLINE void apply_gate(const In* in, const T* gate, Out* out, int64_t n, int code, bool non_temporal) {
  using C = compute_t<T>;
  for_each_gate<T>(gate, n, code, [&](int64_t i, auto part, vec<C> opened, vec<C>) NW_LAMBDA {
    prefetch(in + n + i);
    store_output(out + i, load(in + i, part) * opened, part, non_temporal);
  });
}

template <class In, class Out> NW_NOINLINE void convert_row(const In* in, Out* out, int64_t n, bool non_temporal) {
  for_each_vector<compute_t<In>>(n, [&](int64_t i, auto part) NW_LAMBDA {
    prefetch(in + n + i);
    store_output(out + i, load(in + i, part), part, non_temporal);
  });
}

// `scratch`: two rows.
template <class T, int act>
void forward_gated_row(const nw_rows_forward_args& a, int64_t row, compute_t<T>* scratch, bool non_temporal) {
  using C = compute_t<T>;
  constexpr bool is_wide = sizeof(T) == sizeof(C);
  if (skip_padding<T>(a, row)) return;
  const int64_t n = a.cols;
  const T* const s = add_residual<T>(a, row);
  const T* const gate = static_cast<const T*>(a.gate) + row * n;
  T* const y = static_cast<T*>(a.y) + row * n;
  C *const input = scratch, *const output = scratch + n;
  if (a.gate_first) {
    apply_gate<T>(s, gate, input, n, a.gate_act, false);
    if constexpr (is_wide) {
      normalize_row<C, act>(a, row, input, y, non_temporal);
    } else {
      normalize_row<C, act>(a, row, input, output, false);
      convert_row(output, y, n, non_temporal);
    }
  } else {
    if constexpr (is_wide) {
      normalize_row<C, act>(a, row, s, output, false);
    } else {
      convert_row(s, input, n, false);
      normalize_row<C, act>(a, row, input, output, false);
    }
    apply_gate<T>(output, gate, y, n, a.gate_act, non_temporal);
  }
}

template <class T, int act> int forward_gated(const nw_rows_forward_args& a) {
  const bool non_temporal = past_the_caches<T>(a.y, a, 0, a.rows);
  const int threads = useful_threads(a.rows * a.cols, a.threads);
  Scratch<compute_t<T>> scratch(threads * 2 * a.cols);
  if (!scratch) return NW_OUT_OF_MEMORY;
  parallel_for_threads(a.rows, threads, [&](int64_t thread, int64_t row) {
    forward_gated_row<T, act>(a, row, scratch.get() + thread * 2 * a.cols, non_temporal);
  });
  return NW_OK;
}

// What the backward of a gate needs of a row before its norm's, in rows of `scratch`: what was normalized, its
// gradient's upstream, where the gate comes last its own gradient, and where it comes first what the norm's gradient is
// times.
template <class T>
NW_NOINLINE void before_gated_row(const nw_rows_backward_args& a, int64_t row, compute_t<T>* scratch) {
  using C = compute_t<T>;
  const int64_t n = a.cols;
  const T *const s = static_cast<const T*>(a.s) + row * n, *const dy = static_cast<const T*>(a.dy) + row * n;
  const T* const gate = static_cast<const T*>(a.gate) + row * n;
  C *const input = scratch, *const grad = scratch + n, *const of_s = scratch + 3 * n, *const of_gate = of_s + n;
  if (a.gate_first) {
    for_each_gate<T>(gate, n, a.gate_act, [&](int64_t i, auto part, vec<C> opened, vec<C> slope) NW_LAMBDA {
      const vec<C> value = load(s + i, part);
      prefetch(s + n + i);
      prefetch(dy + n + i);
      store(input + i, value * opened, part);
      store(grad + i, load(dy + i, part), part);
      store(of_s + i, opened, part);
      store(of_gate + i, value * slope, part);
    });
    return;
  }
  const int64_t gain = gain_offset(a, row);
  const ParamVector<C> weight(a.weight, gain, C(1)), bias(a.bias, gain, C(0));
  const Standardize<C> standardize(a.mean[row], a.rstd[row]);
  T* const dgate = static_cast<T*>(a.dgate) + row * n;
  for_each_gate<T>(gate, n, a.gate_act, [&](int64_t i, auto part, vec<C> opened, vec<C> slope) NW_LAMBDA {
    const vec<C> value = load(s + i, part), g = load(dy + i, part);
    prefetch(s + n + i);
    prefetch(dy + n + i);
    store(input + i, value, part);
    store(grad + i, g * opened, part);
    store(dgate + i, g * slope * (standardize(value) * weight.at(i, part) + bias.at(i, part)), part);
  });
}

// The gradients of s, and of a gate that comes first, from the norm's.
template <class T>
NW_NOINLINE void after_gated_row(const nw_rows_backward_args& a, int64_t row, const compute_t<T>* scratch,
                                 bool non_temporal) {
  using C = compute_t<T>;
  const int64_t n = a.cols;
  const C *const grad = scratch + 2 * n, *const of_s = grad + n, *const of_gate = of_s + n;
  const T* const dsum = a.dsum ? static_cast<const T*>(a.dsum) + row * n : nullptr;
  T *const ds = static_cast<T*>(a.ds) + row * n, *const dgate = static_cast<T*>(a.dgate) + row * n;
  if (a.gate_first) {
    for_each_vector<C>(n, [&](int64_t i, auto part) NW_LAMBDA {
      store_output(dgate + i, load(grad + i, part) * load(of_gate + i, part), part, non_temporal);
    });
  }
  for_each_vector<C>(n, [&](int64_t i, auto part) NW_LAMBDA {
    vec<C> gradient = load(grad + i, part);
    if (a.gate_first) gradient *= load(of_s + i, part);
    if (dsum) gradient += load(dsum + i, part);
    store_output(ds + i, gradient, part, non_temporal);
  });
}

constexpr int64_t gated_scratch_rows = 5;

template <class T, int act>
void backward_gated_row(const nw_rows_backward_args& a, int64_t row, compute_t<T>* dweight, compute_t<T>* dbias,
                        compute_t<T>* scratch, bool non_temporal) {
  using C = compute_t<T>;
  before_gated_row<T>(a, row, scratch);
  const int64_t gain = gain_offset(a, row), own = 0;
  nw_rows_backward_args norm = a;
  norm.s = scratch;
  norm.dy = scratch + a.cols;
  norm.ds = scratch + 2 * a.cols;
  norm.dsum = nullptr;
  norm.mean = a.mean + row;
  norm.rstd = a.rstd + row;
  if (a.weight) norm.weight = static_cast<const C*>(a.weight) + gain;
  if (a.bias) norm.bias = static_cast<const C*>(a.bias) + gain;
  backward_rows<1, C, act>(norm, &own, dweight, dbias, false);
  after_gated_row<T>(a, row, scratch, non_temporal);
}

template <class T, int act>
void backward_gated_chunk(const nw_rows_backward_args& a, int64_t begin, int64_t end, compute_t<T>* dweight,
                          compute_t<T>* dbias, compute_t<T>* scratch) {
  const bool non_temporal = past_the_caches<T>(a.ds, a, begin, end) && past_the_caches<T>(a.dgate, a, begin, end);
  for (int64_t row = begin; row < end; ++row) {
    if (a.mask && !a.mask[row]) {
      zero_fill(static_cast<T*>(a.ds) + row * a.cols, a.cols);
      zero_fill(static_cast<T*>(a.dgate) + row * a.cols, a.cols);
    } else {
      backward_gated_row<T, act>(a, row, dweight, dbias, scratch, non_temporal);
    }
  }
}

template <class T, int act> int backward_gated(const nw_rows_backward_args& a) {
  return backward_in_chunks<T>(a, gated_scratch_rows,
                               [&](auto... chunk) { backward_gated_chunk<T, act>(a, chunk...); });
}

}  // namespace

// Few norms have a gate and an activation.
int gated_rows_forward(const nw_rows_forward_args& a) {
  return dispatch_dtype_and_act<true>(a.dtype, a.act, [&]<class T, int act>() { return forward_gated<T, act>(a); });
}

int gated_rows_backward(const nw_rows_backward_args& a) {
  return dispatch_dtype_and_act<true>(a.dtype, a.act, [&]<class T, int act>() { return backward_gated<T, act>(a); });
}

}  // namespace NW_ISA
