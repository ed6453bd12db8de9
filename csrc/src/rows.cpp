// LayerNorm and RMSNorm: statistics along each row, gain and bias along the columns.
#include "activations.h"
#include "kernels.h"
#include "moments.h"
#include "parallel.h"

namespace NW_ISA {
namespace {

// A gain or bias along the columns; where there is none, one constant vector that every load returns.
template <class C> struct Columns {
  alignas(vector_bytes) C constant[lanes<C>];
  const C* data;
  int64_t step;
  Columns(const void* given, C otherwise) : data(static_cast<const C*>(given)), step(-1) {
    if (data) return;
    for (C& c : constant) c = otherwise;
    data = constant;
    step = 0;
  }
  template <class Part> NW_INLINE vec<C> at(int64_t i, Part part) const { return load(data + (i & step), part); }
};

template <class T> NW_INLINE void fill_zero(T* p, int64_t n) { std::memset(static_cast<void*>(p), 0, size_t(n) * sizeof(T)); }

template <class T> NW_INLINE double mean_square(const T* x, int64_t n) {
  using C = compute_t<T>;
  double total = 0;
  for (int64_t start = 0; start < n; start += Blocks::target) {
    vec<C> squares[4] = {};
    int64_t length = n - start < Blocks::target ? n - start : Blocks::target;
    sweep_sums<C>(length, [&](int64_t i, auto part, int k) NW_LAMBDA {
      vec<C> v = load(x + start + i, part);
      squares[k] += v * v;
    });
    total += sum_lanes<C>((squares[0] + squares[1]) + (squares[2] + squares[3]));
  }
  return total / double(n);
}

template <class T, int act> void forward_row(const nw_rows_forward_args& a, int64_t row) {
  using C = compute_t<T>;
  const int64_t n = a.cols;
  const T* x = static_cast<const T*>(a.x) + row * n;
  T* y = static_cast<T*>(a.y) + row * n;
  T* sum = a.residual ? static_cast<T*>(a.sum) + row * n : nullptr;
  if (a.mask && !a.mask[row]) {
    fill_zero(y, n);
    if (sum) fill_zero(sum, n);
    a.mean[row] = a.rstd[row] = 0;
    return;
  }
  if (sum) {
    const T* residual = static_cast<const T*>(a.residual) + row * n;
    sweep<C>(n, [&](int64_t i, auto part) NW_LAMBDA {
      store(sum + i, load(x + i, part) + load(residual + i, part), part);
    });
    x = sum;
  }
  double mean = 0, rstd;
  if (a.center) {
    Moments m = region_moments(x, Region{1, 0, n});
    mean = m.mean;
    rstd = m.rstd(a.eps);
  } else {
    rstd = 1.0 / std::sqrt(mean_square(x, n) + a.eps);
  }
  a.mean[row] = mean;
  a.rstd[row] = rstd;

  const Columns<C> weight(a.weight, C(1)), bias(a.bias, C(0));
  const Centre<C> centre(mean);
  const C scale = C(rstd);
  sweep<C>(n, [&](int64_t i, auto part) NW_LAMBDA {
    vec<C> z = centre.distance(load(x + i, part)) * scale * weight.at(i, part) + bias.at(i, part);
    store(y + i, act_value<act, C>(z), part);
  });
}

// The gradient that arrives at z, and the distance from the mean, for one vector of one row.
template <class T, int act> struct RowGradient {
  using C = compute_t<T>;
  const T *dy, *s, *dsum;
  T* ds;
  Centre<C> centre;
  C rstd, offset, slope;  // ds = rstd * weight * g - offset - distance * slope

  RowGradient(const nw_rows_backward_args& a, int64_t row)
      : dy(static_cast<const T*>(a.dy) + row * a.cols), s(static_cast<const T*>(a.s) + row * a.cols),
        dsum(a.dsum ? static_cast<const T*>(a.dsum) + row * a.cols : nullptr),
        ds(static_cast<T*>(a.ds) + row * a.cols), centre(a.mean[row]), rstd(C(a.rstd[row])), offset(0), slope(0) {}

  template <class Part>
  NW_INLINE vec<C> at(int64_t i, Part part, vec<C> weight, const Columns<C>& bias, vec<C>& distance) const {
    distance = centre.distance(load(s + i, part));
    vec<C> g = load(dy + i, part);
    if constexpr (act != NW_IDENTITY) g *= act_slope<act, C>(distance * rstd * weight + bias.at(i, part));
    return g;
  }
};

template <class T, int act>
void row_sums(const nw_rows_backward_args& a, int64_t row, RowGradient<T, act>& r, const Columns<compute_t<T>>& weight,
              const Columns<compute_t<T>>& bias) {
  using C = compute_t<T>;
  double along_one = 0, along_x = 0;
  for (int64_t start = 0; start < a.cols; start += Blocks::target) {
    vec<C> one[4] = {}, x[4] = {};
    int64_t length = a.cols - start < Blocks::target ? a.cols - start : Blocks::target;
    sweep_sums<C>(length, [&](int64_t j, auto part, int k) NW_LAMBDA {
      int64_t i = start + j;
      vec<C> distance, w = weight.at(i, part);
      vec<C> gw = r.at(i, part, w, bias, distance) * w;
      one[k] += gw;
      x[k] += gw * distance;
    });
    along_one += sum_lanes<C>((one[0] + one[1]) + (one[2] + one[3]));
    along_x += sum_lanes<C>((x[0] + x[1]) + (x[2] + x[3]));
  }
  const double n = double(a.cols), rstd = a.rstd[row];
  r.offset = a.center ? C(rstd * along_one / n) : C(0);
  r.slope = C(rstd * rstd * rstd * along_x / n);
}

// R rows at once, so that each partial sum of the gain's and bias's gradient is loaded and stored once for R rows.
template <int R, class T, int act>
void backward_rows(const nw_rows_backward_args& a, const int64_t* rows, compute_t<T>* dweight, compute_t<T>* dbias) {
  using C = compute_t<T>;
  const Columns<C> weight(a.weight, C(1)), bias(a.bias, C(0));
  RowGradient<T, act> r0(a, rows[0]), r1(a, rows[R > 1 ? 1 : 0]), r2(a, rows[R > 1 ? 2 : 0]), r3(a, rows[R > 1 ? 3 : 0]);
  row_sums(a, rows[0], r0, weight, bias);
  if constexpr (R > 1) {
    row_sums(a, rows[1], r1, weight, bias);
    row_sums(a, rows[2], r2, weight, bias);
    row_sums(a, rows[3], r3, weight, bias);
  }
  sweep<C>(a.cols, [&](int64_t i, auto part) NW_LAMBDA {
    const vec<C> w = weight.at(i, part);
    vec<C> dw = load(dweight + i, part), db = load(dbias + i, part);
    auto one = [&](const RowGradient<T, act>& r) NW_LAMBDA {
      vec<C> distance;
      vec<C> g = r.at(i, part, w, bias, distance);
      vec<C> ds = g * w * r.rstd - r.offset - distance * r.slope;
      if (r.dsum) ds += load(r.dsum + i, part);
      store(r.ds + i, ds, part);
      db += g;
      dw += g * (distance * r.rstd);
    };
    one(r0);
    if constexpr (R > 1) {
      one(r1);
      one(r2);
      one(r3);
    }
    store(dweight + i, dw, part);
    store(dbias + i, db, part);
  });
}

template <class T, int act>
void backward_chunk(const nw_rows_backward_args& a, int64_t begin, int64_t end, compute_t<T>* dweight,
                    compute_t<T>* dbias) {
  fill_zero(dweight, a.cols);
  fill_zero(dbias, a.cols);
  int64_t waiting[4];
  int count = 0;
  for (int64_t row = begin; row < end; ++row) {
    if (a.mask && !a.mask[row]) {
      fill_zero(static_cast<T*>(a.ds) + row * a.cols, a.cols);
      continue;
    }
    waiting[count++] = row;
    if (count == 4) {
      backward_rows<4, T, act>(a, waiting, dweight, dbias);
      count = 0;
    }
  }
  for (int i = 0; i < count; ++i) backward_rows<1, T, act>(a, waiting + i, dweight, dbias);
}

template <class C> void add_up(const C* partial, int64_t chunks, int64_t stride, int64_t begin, int64_t end, void* out) {
  if (!out) return;
  for (int64_t i = begin; i < end; ++i) {
    double total = 0;
    for (int64_t k = 0; k < chunks; ++k) total += double(partial[k * stride + i]);
    static_cast<C*>(out)[i] = C(total);
  }
}

template <class T, int act> int backward(const nw_rows_backward_args& a) {
  using C = compute_t<T>;
  const int threads = worth_threads(a.rows * a.cols, a.threads);
  const Chunks chunks(a.rows, 32, 32);
  Scratch<C> partial(chunks.count * 2 * a.cols);
  if (!partial) return NW_OUT_OF_MEMORY;
  parallel_for(chunks.count, threads, [&](int64_t k) {
    C* mine = partial.get() + k * 2 * a.cols;
    backward_chunk<T, act>(a, chunks.begin(k), chunks.end(k), mine, mine + a.cols);
  });
  const Chunks slices(a.cols, 512, 64);
  parallel_for(slices.count, worth_threads(chunks.count * a.cols, threads), [&](int64_t i) {
    add_up(partial.get(), chunks.count, 2 * a.cols, slices.begin(i), slices.end(i), a.dweight);
    add_up(partial.get() + a.cols, chunks.count, 2 * a.cols, slices.begin(i), slices.end(i), a.dbias);
  });
  return NW_OK;
}

}  // namespace

int rows_forward(const nw_rows_forward_args* args) {
  const nw_rows_forward_args& a = *args;
  if (a.rows < 0 || a.cols < 1) return NW_BAD_ARGUMENT;
  int status = NW_BAD_ARGUMENT;
  with_dtype(a.dtype, [&](auto element) {
    using T = typename decltype(element)::type;
    with_act(a.act, [&](auto which) {
      constexpr int act = decltype(which)::act;
      parallel_for(a.rows, worth_threads(a.rows * a.cols, a.threads), [&](int64_t row) { forward_row<T, act>(a, row); });
      status = NW_OK;
    });
  });
  return status;
}

int rows_backward(const nw_rows_backward_args* args) {
  const nw_rows_backward_args& a = *args;
  if (a.rows < 0 || a.cols < 1) return NW_BAD_ARGUMENT;
  int status = NW_BAD_ARGUMENT;
  with_dtype(a.dtype, [&](auto element) {
    with_act(a.act, [&](auto which) { status = backward<typename decltype(element)::type, decltype(which)::act>(a); });
  });
  return status;
}

}  // namespace NW_ISA
