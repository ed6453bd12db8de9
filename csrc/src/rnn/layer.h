// A recurrent layer: its description as the cells read it, its checks, and what it saves for the backward.
#pragma once

#include <cstdint>
#include <type_traits>

#include "common/simd.h"
#include "normwise.h"

namespace NW_ISA {
namespace {

// Inputs so few that the cells multiply them by W_ih themselves: see small_input.h.
constexpr int max_small_inputs = 4;
struct SmallInput {
  int inputs;                  // how many; -1: p is given
  const float* weight;         // (inputs, gate_units): W_ih transposed, less its mean over each group
  const float* scaled_weight;  // the same times gain_ih
  float gram[4][max_small_inputs * max_small_inputs];  // of each group: the mean product of two rows of `weight`
};

// The description of a layer as the cells read it. Gains and biases are never null here.
struct Layer {
  int64_t units, gate_units;  // gate_units = gates * units
  int gates, cell, norm_placement, cell_norm;
  bool center, reset_on_hidden, reset_candidate, update_paper;
  float eps, update_offset;
  int group_count, group_begin[5];  // group g is gates group_begin[g] .. group_begin[g + 1] - 1
  const float *gain_ih, *gain_hh, *gain_c, *bias_c;
  const float* bias;               // b_ih + b_hh, where the two terms are simply added
  const float *bias_ih, *bias_hh;  // where they are not: in a GRU whose reset gate acts on the hidden term
  int64_t stat_width;
  SmallInput small;
};

inline int gates_of(int cell) { return cell == NW_LSTM ? 4 : cell == NW_GRU ? 3 : 1; }

// Whether each feature has statistics of its own, over samples.
inline bool of_samples(const nw_recurrent& a) { return a.statistics != NW_OF_ROW; }

inline bool well_formed(const nw_recurrent& a) {
  const bool known = a.cell >= NW_LSTM && a.cell <= NW_RNN_RELU && a.norm_placement >= NW_UNNORMALIZED &&
                     a.norm_placement <= NW_INPUT && a.statistics >= NW_OF_ROW && a.statistics <= NW_GIVEN &&
                     a.cell_norm >= NW_CELL_NONE && a.cell_norm <= NW_CELL_STATE;
  if (!known || a.dtype != NW_FLOAT32 || a.steps < 0 || a.batch < 0 || a.inputs < 0 || a.units < 1) return false;
  if (a.products != NW_FLOAT32 && a.products != NW_BFLOAT16) return false;
  if (a.reverse && a.batch_sizes) return false;
  if (a.cell_norm != NW_CELL_NONE && (a.cell != NW_LSTM || a.norm_placement == NW_UNNORMALIZED)) return false;
  if (a.cell == NW_GRU && a.norm_placement == NW_SUM && !a.reset_candidate) return false;
  if (of_samples(a)) {
    if (a.norm_placement == NW_UNNORMALIZED || a.stat_rows < (a.rows > 0)) return false;
    if (a.stat_rows > 0 && (!a.mean || !a.var)) return false;
    if (a.statistics == NW_OF_STEP && a.stat_rows != a.steps) return false;
  } else if (a.norm_placement == NW_INPUT) {
    return false;
  }
  int gates = 0;
  for (int g = 0; g < 4; ++g) gates += a.groups[g];
  if (a.norm_placement != NW_UNNORMALIZED && !of_samples(a) && gates != gates_of(a.cell)) return false;
  int64_t rows = 0, before = a.batch;
  for (int64_t s = 0; s < a.steps; ++s) {
    const int64_t now = a.batch_sizes ? a.batch_sizes[s] : a.batch;
    if (now < 0 || now > before) return false;
    rows += before = now;
  }
  return rows == a.rows;
}

// Whether p and q must be kept apart until the gates: they have norms of their own, or the reset gate acts on q alone.
inline bool has_separate_terms(const nw_recurrent& a) {
  return a.norm_placement == NW_SEPARATE || a.norm_placement == NW_INPUT || (a.cell == NW_GRU && !a.reset_candidate);
}

// Whether p of so few inputs is never kept. Where p + q is normalized, p is a matrix product like any other.
inline bool has_few_inputs(const nw_recurrent& a) { return a.inputs <= max_small_inputs && a.norm_placement != NW_SUM; }

// Whether the cells compute p themselves. Statistics over samples need a whole column of it: there p is a product, and
// the backward repeats it.
inline bool has_small_input(const nw_recurrent& a) { return has_few_inputs(a) && !of_samples(a); }

// Whether the forward saves activated gates instead of q, as it does for an LSTM without norms.
inline bool saves_gates(const nw_recurrent& a) { return a.norm_placement == NW_UNNORMALIZED && a.cell == NW_LSTM; }

// The columns of input_terms, hidden_terms, cells and stats.
inline void saved_widths(const nw_recurrent& a, int64_t widths[4]) {
  const int64_t gate_units = gates_of(a.cell) * a.units;
  int groups = 0;
  while (groups < 4 && a.groups[groups] > 0) ++groups;
  widths[0] = has_separate_terms(a) && !has_few_inputs(a) ? gate_units : 0;
  // An RNN needs nothing of a term without a norm: its output says where it was.
  const bool hidden_norm = a.norm_placement == NW_SEPARATE || a.norm_placement == NW_SUM;
  widths[1] = !hidden_norm && a.cell >= NW_RNN_TANH ? 0 : gate_units;
  widths[2] = a.cell == NW_LSTM ? a.units : 0;
  widths[3] = a.norm_placement == NW_UNNORMALIZED || of_samples(a)
                  ? 0
                  : groups * (a.norm_placement == NW_SEPARATE ? 2 : 1) + (a.cell_norm ? 2 : 0);
}

// f of the layer's cell as a constant.
template <class F> auto with_cell(const nw_recurrent& a, F f) {
  switch (a.cell) {
    case NW_LSTM: return f(std::integral_constant<int, NW_LSTM>());
    case NW_GRU: return f(std::integral_constant<int, NW_GRU>());
    case NW_RNN_TANH: return f(std::integral_constant<int, NW_RNN_TANH>());
    default: return f(std::integral_constant<int, NW_RNN_RELU>());
  }
}

// f of the norms' placement as a constant, and of whether the cells compute p themselves. Not for NW_INPUT, which rows
// do not have.
template <class F> auto with_placement(const nw_recurrent& a, F f) {
  using Unnormalized = std::integral_constant<int, NW_UNNORMALIZED>;
  using Separate = std::integral_constant<int, NW_SEPARATE>;
  if (a.norm_placement == NW_SUM) return f(std::integral_constant<int, NW_SUM>(), std::false_type());
  const bool separate = a.norm_placement == NW_SEPARATE;
  if (has_small_input(a)) return separate ? f(Separate(), std::true_type()) : f(Unnormalized(), std::true_type());
  return separate ? f(Separate(), std::false_type()) : f(Unnormalized(), std::false_type());
}

}  // namespace
}  // namespace NW_ISA
