// LayerNorm and RMSNorm: statistics along each row, gain and bias along the columns.
#include "common/activations.h"
#include "common/parallel.h"
#include "norm/kernels.h"
#include "norm/moments.h"

namespace NW_ISA {
namespace {

// A gain or bias along the columns. Where there is none, every load returns the same constant vector.
template <class C> struct ParamVector {
  alignas(vector_bytes) C constant[lanes<C>];
  const C* data;
  int64_t index_mask;
  ParamVector(const void* values, C default_value) : data(static_cast<const C*>(values)), index_mask(-1) {
    if (data) return;
    for (C& c : constant) c = default_value;
    data = constant;
    index_mask = 0;
  }
  template <class Part> NW_INLINE vec<C> at(int64_t i, Part part) const { return load(data + (i & index_mask), part); }
};

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

// x_hat = (x - mean) * rstd.
template <class C> struct Standardize {
  C mean, rstd, shift;  // shift: what the mean's rounding to C leaves out
  Standardize(double mean, double rstd)
      : mean(C(mean)), rstd(C(rstd)), shift(C(0 - SplitMean<C>(mean).low_times(rstd))) {}
  NW_INLINE vec<C> operator()(vec<C> x) const { return (x - mean) * rstd + shift; }
};

template <class T, int act> void forward_row(const nw_rows_forward_args& a, int64_t row, bool non_temporal) {
  using C = compute_t<T>;
  const int64_t n = a.cols;
  const T* x = static_cast<const T*>(a.x) + row * n;
  T* y = static_cast<T*>(a.y) + row * n;
  T* sum = a.residual ? static_cast<T*>(a.sum) + row * n : nullptr;
  const T* next = x + n;
  if (a.mask && !a.mask[row]) {
    zero_fill(y, n);
    if (sum) zero_fill(sum, n);
    store_statistics(a, row, 0, 0);
    return;
  }
  if (sum) {
    const T* residual = static_cast<const T*>(a.residual) + row * n;
    for_each_vector<C>(
        n, [&](int64_t i, auto part) NW_LAMBDA { store(sum + i, load(x + i, part) + load(residual + i, part), part); });
    x = sum;
  }
  double mean = 0, rstd;
  if (a.center) {
    Moments m = region_moments(x, Region{.planes = 1, .stride = 0, .length = n});
    mean = m.mean;
    rstd = m.rstd(a.eps);
  } else {
    rstd = rstd_of(mean_square(x, n), a.eps);
  }
  store_statistics(a, row, mean, rstd);

  const ParamVector<C> weight(a.weight, C(1)), bias(a.bias, C(0));
  const Standardize<C> standardize(mean, rstd);
  for_each_vector<C>(n, [&](int64_t i, auto part) NW_LAMBDA {
    prefetch(next + i);
    vec<C> z = standardize(load(x + i, part)) * weight.at(i, part) + bias.at(i, part);
    store_output(y + i, activate<act, C>(z, a.act), part, non_temporal);
  });
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
  const ParamVector<C> weight(a.weight, C(1)), bias(a.bias, C(0));
  // One row after the other: vectors of AVX2 are half a cache line, and non-temporal stores to several rows in turn
  // would flush half lines.
  for (int r = 0; r < R; ++r) {
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
  const bool non_temporal = use_non_temporal(static_cast<T*>(a.y), a.rows * a.cols, a.cols);
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

  template <class Part>
  NW_INLINE vec<C> at(int64_t i, Part part, vec<C> weight, const ParamVector<C>& bias, vec<C>& x_hat) const {
    x_hat = standardize(load(s + i, part));
    vec<C> g = load(dy + i, part);
    if constexpr (act != NW_IDENTITY) g *= activation_derivative<act, C>(x_hat * weight + bias.at(i, part), code);
    return g;
  }
};

// Sums over a row of g * weight, and of that times x_hat.
struct RowSums {
  double grad = 0, grad_x_hat = 0;
};

// Writes ds = rstd * weight * g - offset - x_hat * slope of one row. `prefetch_offset`: how far away the row lies that
// is read after it.
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
  for_each_vector<C>(a.cols, [&](int64_t i, auto part) NW_LAMBDA {
    const vec<C> w = weight.at(i, part);
    vec<C> x_hat;
    const vec<C> g = r.at(i, part, w, bias, x_hat);
    vec<C> gradient = g * w * r.standardize.rstd - offset - x_hat * slope;
    if (dsum) gradient += load(dsum + i, part);
    store_output(ds + i, gradient, part, non_temporal);
    prefetch(r.s + i + prefetch_offset);
    prefetch(r.dy + i + prefetch_offset);
  });
}

// R rows at once where they are only read, so that the partial sums of the gain's and bias's gradients are loaded and
// stored once for R rows; what is written is written one row after the other, see forward_short_rows.
template <int R, class T, int act>
void backward_rows(const nw_rows_backward_args& a, const int64_t* rows, compute_t<T>* dweight, compute_t<T>* dbias,
                   bool non_temporal) {
  using C = compute_t<T>;
  constexpr int64_t block = 1024;  // float sums in one accumulator stay accurate
  const ParamVector<C> weight(a.weight, C(1)), bias(a.bias, C(0));
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

template <class T, int act>
void backward_chunk(const nw_rows_backward_args& a, int64_t begin, int64_t end, compute_t<T>* dweight,
                    compute_t<T>* dbias) {
  zero_fill(dweight, a.cols);
  zero_fill(dbias, a.cols);
  const bool non_temporal = use_non_temporal(static_cast<T*>(a.ds), a.rows * a.cols, a.cols);
  int64_t pending[4];
  int count = 0;
  for (int64_t row = begin; row < end; ++row) {
    if (a.mask && !a.mask[row]) {
      zero_fill(static_cast<T*>(a.ds) + row * a.cols, a.cols);
      continue;
    }
    pending[count++] = row;
    if (count == 4) {
      backward_rows<4, T, act>(a, pending, dweight, dbias, non_temporal);
      count = 0;
    }
  }
  for (int i = 0; i < count; ++i) backward_rows<1, T, act>(a, pending + i, dweight, dbias, non_temporal);
}

// Adds up columns begin .. end-1 of the chunks' partial sums.
template <class C>
void reduce_partials(const C* partial, int64_t chunks, int64_t stride, int64_t begin, int64_t end, void* out) {
  if (!out) return;
  constexpr int64_t most = 64;
  for (int64_t first = begin; first < end; first += most) {
    const int64_t n = end - first < most ? end - first : most;
    double total[most] = {};
    for (int64_t k = 0; k < chunks; ++k) {
      const C* from = partial + k * stride + first;
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) total[i] += double(from[i]);
    }
    for (int64_t i = 0; i < n; ++i) static_cast<C*>(out)[first + i] = C(total[i]);
  }
}

template <class T, int act> int backward(const nw_rows_backward_args& a) {
  using C = compute_t<T>;
  const int threads = useful_threads(a.rows * a.cols, a.threads);
  // No more than 1024 rows are added up in floats.
  const Chunks chunks(a.rows, 32, a.rows > 32 * 1024 ? a.rows / 1024 : 32);
  if (chunks.count == 1 && a.dweight && a.dbias) {
    backward_chunk<T, act>(a, 0, a.rows, static_cast<C*>(a.dweight), static_cast<C*>(a.dbias));
    fence_non_temporal();
    return NW_OK;
  }
  Scratch<C> partial(chunks.count * 2 * a.cols);
  if (!partial) return NW_OUT_OF_MEMORY;
  parallel_for(chunks.count, threads, [&](int64_t k) {
    C* mine = partial.get() + k * 2 * a.cols;
    backward_chunk<T, act>(a, chunks.begin(k), chunks.end(k), mine, mine + a.cols);
  });
  const Chunks slices(a.cols, 512, 64);
  parallel_for(slices.count, useful_threads(chunks.count * a.cols, threads), [&](int64_t i) {
    reduce_partials(partial.get(), chunks.count, 2 * a.cols, slices.begin(i), slices.end(i), a.dweight);
    reduce_partials(partial.get() + a.cols, chunks.count, 2 * a.cols, slices.begin(i), slices.end(i), a.dbias);
  });
  return NW_OK;
}

}  // namespace

int rows_forward(const nw_rows_forward_args* args) {
  const nw_rows_forward_args& a = *args;
  if (a.rows < 0 || a.cols < 1) return NW_BAD_ARGUMENT;
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
  if (a.rows < 0 || a.cols < 1) return NW_BAD_ARGUMENT;
  return dispatch_dtype_and_act(a.dtype, a.act, [&]<class T, int act>() { return backward<T, act>(a); });
}

}  // namespace NW_ISA
