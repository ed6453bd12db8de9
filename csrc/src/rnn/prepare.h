// From the description of a layer that a caller passes to the one that the cells read.
#pragma once

#include "rnn/small_input.h"

namespace NW_ISA {
namespace {

// The floats that `prepare` needs for vectors that the caller left out, sums of biases, and a small input's weights.
inline int64_t prepared_size(const nw_recurrent& a) {
  return (4 + 2 * max_small_inputs) * gates_of(a.cell) * a.units + 2 * a.units;
}

inline Layer prepare(const nw_recurrent& a, float* memory) {
  Layer layer{};
  layer.gates = gates_of(a.cell), layer.units = a.units, layer.gate_units = layer.gates * a.units;
  layer.cell = a.cell, layer.norm_placement = a.norm_placement, layer.cell_norm = a.cell_norm;
  layer.center = a.center, layer.reset_on_hidden = a.cell == NW_GRU && !a.reset_candidate;
  layer.reset_candidate = a.reset_candidate, layer.update_paper = a.update_paper;
  layer.eps = float(a.eps), layer.update_offset = float(a.update_offset);
  for (; layer.group_count < 4 && a.groups[layer.group_count] > 0; ++layer.group_count) {
    layer.group_begin[layer.group_count + 1] = layer.group_begin[layer.group_count] + a.groups[layer.group_count];
  }
  float *sum = memory, *zeros = sum + layer.gate_units, *ones = zeros + layer.gate_units + layer.units;
  for (int64_t i = 0; i < layer.gate_units; ++i) {
    sum[i] = (a.bias_ih ? a.bias_ih[i] : 0.f) + (a.bias_hh ? a.bias_hh[i] : 0.f);
    zeros[i] = 0.f, ones[i] = 1.f;
  }
  layer.bias = sum;
  layer.bias_ih = a.bias_ih ? a.bias_ih : zeros, layer.bias_hh = a.bias_hh ? a.bias_hh : zeros;
  layer.gain_ih = a.gain_ih ? a.gain_ih : ones, layer.gain_hh = a.gain_hh ? a.gain_hh : ones;
  layer.gain_c = a.gain_c ? a.gain_c : ones, layer.bias_c = a.bias_c ? a.bias_c : zeros;
  int64_t widths[4];
  saved_widths(a, widths);
  layer.stat_width = widths[3];
  layer.small.inputs = -1;
  if (has_small_input(a)) prepare_small_input(a, layer, ones + layer.gate_units);
  return layer;
}

}  // namespace
}  // namespace NW_ISA
