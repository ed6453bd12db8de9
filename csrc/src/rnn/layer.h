// What the two directions of the recurrent kernels share: the description prepared for use, where rows lie, and who
// computes them.
#pragma once

#include <sched.h>

#include <atomic>

#include "normwise.h"
#include "common/parallel.h"
#include "gemm/precision.h"

namespace NW_ISA {
namespace {

// The description of a layer as the cells read it; gains and biases are never null here.
struct Layer {
  int64_t units, stacked;  // stacked = gates * units
  int gates, cell, terms, cell_norm;
  bool center, hidden_apart, reset_candidate, update_paper;
  float eps, update_offset;
  int group_count, group_from[5];  // group g is gates group_from[g] .. group_from[g+1] - 1
  const float *gain_ih, *gain_hh, *gain_c, *bias_c;
  const float* bias;                // b_ih + b_hh, where they act at the same place
  const float *bias_ih, *bias_hh;   // where they do not: a GRU with the reset gate on its hidden term
  int64_t stat_width;
  // Inputs so few that the cells multiply them themselves; -1: their products are given.
  int thin;
  const float* thin_weight;  // (thin, stacked): W_ih transposed, less its mean over each group
  const float* thin_scaled;  // the same times gain_ih
  float thin_gram[4][16];    // of each group: the averages of products of two columns of thin_weight
};

inline int64_t whole_lines(int64_t bytes) { return (bytes + 63) / 64 * 64; }

// All scratch memory of one call, in pieces that begin at a cache line.
class Memory {
 public:
  Memory() = default;
  ~Memory() {
    for (int i = 0; i < count_; ++i) std::free(pieces_[i]);
  }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  float* take(int64_t n) { return static_cast<float*>(take_bytes(n * int64_t(sizeof(float)))); }
  void* take_bytes(int64_t n) {
    void* piece = std::aligned_alloc(64, size_t(whole_lines(n > 0 ? n : 1)));
    if (!piece || count_ == most) {
      std::free(piece);
      failed_ = true;
      return nullptr;
    }
    return pieces_[count_++] = piece;
  }
  bool failed() const { return failed_; }

 private:
  static constexpr int most = 32;
  void* pieces_[most];
  int count_ = 0;
  bool failed_ = false;
};

// mean and rstd of one group of one row
struct Stat {
  float mean, rstd;
};

inline int gates_of(int cell) { return cell == NW_LSTM ? 4 : cell == NW_GRU ? 3 : 1; }

inline bool well_formed(const nw_recurrent& a) {
  const bool known = a.cell >= NW_LSTM && a.cell <= NW_RNN_RELU && a.terms >= NW_PLAIN && a.terms <= NW_SUM &&
                     a.cell_norm >= NW_CELL_NONE && a.cell_norm <= NW_CELL_CARRIED;
  if (!known || a.dtype != NW_FLOAT32 || a.steps < 0 || a.batch < 0 || a.inputs < 0 || a.units < 1) return false;
  if (a.products != NW_FLOAT32 && a.products != NW_BFLOAT16) return false;
  if (a.reverse && a.batch_sizes) return false;
  if (a.cell_norm != NW_CELL_NONE && (a.cell != NW_LSTM || a.terms == NW_PLAIN)) return false;
  if (a.cell == NW_GRU && a.terms == NW_SUM && !a.reset_candidate) return false;
  int gates = 0;
  for (int g = 0; g < 4; ++g) gates += a.groups[g];
  if (a.terms != NW_PLAIN && gates != gates_of(a.cell)) return false;
  int64_t rows = 0, before = a.batch;
  for (int64_t s = 0; s < a.steps; ++s) {
    const int64_t now = a.batch_sizes ? a.batch_sizes[s] : a.batch;
    if (now < 0 || now > before) return false;
    rows += before = now;
  }
  return rows == a.rows;
}

// p and q must be kept apart until the gates: they have norms of their own, or the reset gate acts on q alone.
inline bool terms_apart(const nw_recurrent& a) {
  return a.terms == NW_SEPARATE || (a.cell == NW_GRU && !a.reset_candidate);
}

// With so few inputs p is cheaper to compute again than to read, and its statistics follow from x alone. Under a norm
// of p + q it is a product like any other.
constexpr int most_thin = 4;
inline bool few_inputs(const nw_recurrent& a) { return a.inputs <= most_thin && a.terms != NW_SUM; }

// Whether the forward has q to keep; an LSTM without norms keeps its gates instead.
inline bool keeps_gates(const nw_recurrent& a) { return a.terms == NW_PLAIN && a.cell == NW_LSTM; }

inline void saved_widths(const nw_recurrent& a, int64_t widths[4]) {
  const int64_t stacked = gates_of(a.cell) * a.units;
  int groups = 0;
  while (groups < 4 && a.groups[groups] > 0) ++groups;
  widths[0] = terms_apart(a) && !few_inputs(a) ? stacked : 0;
  // An RNN without a norm needs nothing but its output.
  widths[1] = a.terms == NW_PLAIN && a.cell >= NW_RNN_TANH ? 0 : stacked;
  widths[2] = a.cell == NW_LSTM ? a.units : 0;
  widths[3] = a.terms == NW_PLAIN ? 0 : groups * (a.terms == NW_SEPARATE ? 2 : 1) + (a.cell_norm ? 2 : 0);
}

// The floats that `prepare` needs for vectors that the caller left out or that are sums.
inline int64_t prepared_size(const nw_recurrent& a) {
  return (4 + 2 * most_thin) * gates_of(a.cell) * a.units + 2 * a.units;
}

inline void prepare_thin(const nw_recurrent& a, Layer& k, float* memory) {
  const float* w = static_cast<const float*>(a.weight_ih);
  float *weight = memory, *scaled = memory + most_thin * k.stacked;
  k.thin = int(a.inputs), k.thin_weight = weight, k.thin_scaled = scaled;
  for (int g = 0; g < (a.terms == NW_PLAIN ? 1 : k.group_count); ++g) {
    const int64_t from = a.terms == NW_PLAIN ? 0 : k.group_from[g] * k.units;
    const int64_t end = a.terms == NW_PLAIN ? k.stacked : k.group_from[g + 1] * k.units;
    for (int i = 0; i < k.thin; ++i) {
      double mean = 0;
      for (int64_t j = from; j < end; ++j) mean += w[j * k.thin + i];
      mean = a.terms != NW_PLAIN && k.center ? mean / double(end - from) : 0;
      for (int64_t j = from; j < end; ++j) {
        weight[i * k.stacked + j] = float(w[j * k.thin + i] - mean);
        scaled[i * k.stacked + j] = weight[i * k.stacked + j] * (a.terms == NW_PLAIN ? 1.f : k.gain_ih[j]);
      }
      for (int other = 0; other <= i; ++other) {
        double sum = 0;
        for (int64_t j = from; j < end; ++j) sum += double(weight[i * k.stacked + j]) * weight[other * k.stacked + j];
        const float average = float(sum / double(end - from));
        k.thin_gram[g][i * most_thin + other] = k.thin_gram[g][other * most_thin + i] = average;
      }
    }
  }
}

inline Layer prepare(const nw_recurrent& a, float* memory) {
  Layer k{};
  k.gates = gates_of(a.cell), k.units = a.units, k.stacked = k.gates * a.units;
  k.cell = a.cell, k.terms = a.terms, k.cell_norm = a.cell_norm;
  k.center = a.center, k.hidden_apart = a.cell == NW_GRU && !a.reset_candidate;
  k.reset_candidate = a.reset_candidate, k.update_paper = a.update_paper;
  k.eps = float(a.eps), k.update_offset = float(a.update_offset);
  for (; k.group_count < 4 && a.groups[k.group_count] > 0; ++k.group_count) {
    k.group_from[k.group_count + 1] = k.group_from[k.group_count] + a.groups[k.group_count];
  }
  float *sum = memory, *zeros = sum + k.stacked, *ones = zeros + k.stacked + k.units;
  for (int64_t i = 0; i < k.stacked; ++i) {
    sum[i] = (a.bias_ih ? a.bias_ih[i] : 0.f) + (a.bias_hh ? a.bias_hh[i] : 0.f);
    zeros[i] = 0.f, ones[i] = 1.f;
  }
  k.bias = sum;
  k.bias_ih = a.bias_ih ? a.bias_ih : zeros, k.bias_hh = a.bias_hh ? a.bias_hh : zeros;
  k.gain_ih = a.gain_ih ? a.gain_ih : ones, k.gain_hh = a.gain_hh ? a.gain_hh : ones;
  k.gain_c = a.gain_c ? a.gain_c : ones, k.bias_c = a.bias_c ? a.bias_c : zeros;
  int64_t widths[4];
  saved_widths(a, widths);
  k.stat_width = widths[3];
  k.thin = -1;
  if (few_inputs(a)) prepare_thin(a, k, ones + k.stacked);
  return k;
}

// Where the rows of each step lie.
class Rows {
 public:
  explicit Rows(const nw_recurrent& a) : a_(a), starts_(a.batch_sizes ? a.steps : 0) {
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

// Steps cut into chunks of about `rows` rows.
inline int64_t chunk_steps(const nw_recurrent& a, int64_t rows) {
  const int64_t each = a.steps > 0 ? (a.rows + a.steps - 1) / a.steps : 1;
  const int64_t steps = rows / (each > 0 ? each : 1);
  return steps < 1 ? 1 : steps > a.steps ? a.steps : steps;
}

// A barrier that spins: the others are at most microseconds away. It yields when they are not.
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

// One thread's share of a step. Apart: it has every `count`-th sample, for good, and meets nobody in the loop over
// steps. Together, for a few samples: it has some columns of every product, and computes all else for itself.
struct Share {
  int index, count;
  bool together;
  int64_t first() const { return together ? 0 : index; }
  int64_t stride() const { return together ? 1 : count; }
  int64_t of(int64_t samples) const {
    return together ? samples : samples > index ? (samples - index + count - 1) / count : 0;
  }
  bool writes() const { return !together || index == 0; }
  int64_t panel_begin(int64_t panels) const { return together ? panels * index / count : 0; }
  int64_t panel_end(int64_t panels) const { return together ? panels * (index + 1) / count : panels; }
};

// Below this many multiplications in the whole call, or together in one step, further threads cost more than they save.
constexpr int64_t serial_products = 1 << 19, serial_step = 1 << 16;

inline int useful_threads(const nw_recurrent& a) {
  const int64_t each_row = gates_of(a.cell) * a.units * (a.units + a.inputs);
  if (a.threads < 2 || a.rows * each_row < serial_products) return 1;
  if (a.batch == 1 && each_row < serial_step) return 1;
  return a.threads;
}
inline bool work_together(const nw_recurrent& a, int threads) {
  return a.batch <= 2 * threads && gates_of(a.cell) * a.units * a.units >= serial_step;
}

// f(policy of precision.h) by the one that is to multiply for this layer.
template <class F> inline int with_products(const nw_recurrent& a, bool tiles, F f) {
#if defined(NW_TILES)
  if (tiles && a.products == NW_BFLOAT16) return f(Tiles{});
#endif
  (void)tiles;
  return a.products == NW_BFLOAT16 ? f(RoundedToBfloat16{}) : f(Float32{});
}

// Writes v less its mean to `to`, which may be v, so that nobody needs the mean again; returns 1 / sqrt(var + eps), the
// variance being about the mean. Without `center` v stays and its mean square is taken.
NW_INLINE float centre(const float* v, int64_t n, bool center, float eps, float* to) {
  float mean = 0.f;
  if (center) {
    vec<float> sum[4] = {};
    sweep_sums<float>(n, [&](int64_t i, auto part, int at) NW_LAMBDA { sum[at] += load(v + i, part); });
    mean = sum_lanes<float>(sum) / float(n);
  }
  vec<float> square[4] = {};
  sweep_sums<float>(n, [&](int64_t i, auto part, int at) NW_LAMBDA {
    const vec<float> d = keep<float>(load(v + i, part) - mean, part);
    store(to + i, d, part);
    square[at] += d * d;
  });
  return 1.f / std::sqrt(sum_lanes<float>(square) / float(n) + eps);
}

// W_ih x of some steps, plus b_inner, and centred where it has a norm of its own: as one product for all of a thread's
// rows of a chunk of steps, since then each panel of W_ih comes from far away once. `data` holds all rows, or those of
// the present chunk.
template <class P> struct InputTerms {
  const nw_recurrent& a;
  const Layer& k;
  const Rows& rows;
  int64_t stacked;
  Packed weight;
  float* data;
  bool whole;
  float* rstd;  // (rows as in data, groups), null: p has no norm of its own

  float* row(int64_t row, int64_t chunk_first) const { return data + (row - (whole ? 0 : chunk_first)) * stacked; }

  float* rstd_of(int64_t row, int64_t chunk_first) const {
    return rstd + (row - (whole ? 0 : chunk_first)) * k.group_count;
  }

  // Steps s .. end-1: of the thread's samples, or of its part of all rows. `memory`: ready_bytes of the inputs.
  void project(Share share, int64_t s, int64_t end, void* memory) const {
    const int64_t first = rows.first(s, end), count = rows.count(s, end), all = panels_of<P>(stacked);
    if (share.together || share.count == 1) {
      const int64_t from = count * share.index / share.count, to = count * (share.index + 1) / share.count;
      project_rows(first + from, 1, to - from, first, 0, all, memory);
      centre_rows(first + from, 1, to - from, first);
    } else if (!a.batch_sizes && a.batch % share.count == 0) {
      project_rows(first + share.index, share.count, count / share.count, first, 0, all, memory);
      centre_rows(first + share.index, share.count, count / share.count, first);
    } else {
      // Rows that must be made ready are made so once: then all panels pass at every step.
      const int64_t each = P::as_they_are ? 1 : all;
      for (int64_t panel = 0; panel < all; panel += each) {
        for (int64_t t = s; t < end; ++t) {
          project_rows(rows.start(t) + share.index, share.count, share.of(rows.samples(t)), first, panel, panel + each,
                       memory);
        }
      }
      for (int64_t t = s; t < end; ++t) {
        centre_rows(rows.start(t) + share.index, share.count, share.of(rows.samples(t)), first);
      }
    }
  }

 private:
  void project_rows(int64_t from, int64_t stride, int64_t n, int64_t chunk_first, int64_t panel, int64_t last,
                    void* memory) const {
    const float* inner = a.terms == NW_SUM ? a.bias_inner : nullptr;
    float* to = row(from, chunk_first);
    if (inner) {
      const int64_t at = panel * P::panel_width;
      const int64_t width = (last * P::panel_width < stacked ? last * P::panel_width : stacked) - at;
      for (int64_t i = 0; i < n; ++i) {
        std::memcpy(to + i * stride * stacked + at, inner + at, size_t(width) * sizeof *to);
      }
    }
    multiply_rows<P>(n, static_cast<const float*>(a.x) + from * a.inputs, stride * a.inputs, weight, panel, last, to,
                     stride * stacked, inner != nullptr, memory);
  }

  void centre_rows(int64_t from, int64_t stride, int64_t n, int64_t chunk_first) const {
    for (int64_t i = 0; rstd && i < n; ++i) {
      const int64_t at = from + i * stride;
      float* p = row(at, chunk_first);
      for (int g = 0; g < k.group_count; ++g) {
        const int64_t first = k.group_from[g] * k.units, width = k.group_from[g + 1] * k.units - first;
        rstd_of(at, chunk_first)[g] = centre(p + first, width, k.center, k.eps, p + first);
      }
    }
  }
};

}  // namespace
}  // namespace NW_ISA
