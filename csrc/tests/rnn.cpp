// The recurrent kernels against the equations of normwise.h in double: outputs element by element, and every gradient
// by the change of a random functional of all outputs along a random direction.
#include <algorithm>
#include <cmath>
#include <random>
#include <string>
#include <vector>

#include "checks.h"

namespace {

using Numbers = std::vector<double>;

std::mt19937 generator(2);

Numbers normals(size_t n, double scale = 1) {
  std::normal_distribution<double> normal(0, scale);
  Numbers v(n);
  for (double& x : v) x = double(float(normal(generator)));  // exact in float, so that both sides get the same numbers
  return v;
}

struct Recurrence {
  int cell, norm_placement, cell_norm = NW_CELL_NONE, groups[4] = {};
  bool center = true, reset_candidate = false, update_paper = false;
  int statistics = NW_OF_ROW;
};

struct Size {
  int64_t steps, batch, inputs, units;
};

enum StepLayout { EQUAL_LENGTHS, RAGGED, RESET, REVERSE };

// Everything with a gradient; empty: null in the call.
enum Field { X, H0, C0, W_IH, W_HH, B_IH, B_HH, G_IH, G_HH, B_INNER, G_C, B_C, FIELDS };
const char* const field_names[FIELDS] = {"x",       "h0",      "c0",      "weight_ih",  "weight_hh", "bias_ih",
                                         "bias_hh", "gain_ih", "gain_hh", "bias_inner", "gain_c",    "bias_c"};

struct Problem {
  Recurrence recurrence;
  Size size;
  int gates;
  bool reverse;
  double eps = 1e-2, offset = 0.25;
  std::vector<int64_t> batch_sizes;
  std::vector<uint8_t> reset;
  std::vector<int64_t> start;  // of each step's rows
  int64_t rows = 0;
  int64_t stat_rows = 0, features = 0;
  Numbers mean, var;  // (stat_rows, features), where they are given

  Problem(const Recurrence& recurrence, const Size& size, StepLayout layout)
      : recurrence(recurrence),
        size(size),
        gates(recurrence.cell == NW_LSTM  ? 4
              : recurrence.cell == NW_GRU ? 3
                                          : 1),
        reverse(layout == REVERSE) {
    for (int64_t s = 0; s < size.steps; ++s) {
      start.push_back(rows);
      rows += layout == RAGGED ? std::max<int64_t>(1, size.batch - 2 * s) : size.batch;
      if (layout == RAGGED) batch_sizes.push_back(rows - start.back());
    }
    for (int64_t r = 0; layout == RESET && r < rows; ++r) reset.push_back(uint8_t(r % 3 == 1));
    if (recurrence.statistics == NW_OF_ROW) return;
    features = (recurrence.norm_placement == NW_SEPARATE ? 2 : 1) * gates * size.units +
               (recurrence.cell_norm == NW_CELL_NONE ? 0 : size.units);
    stat_rows = recurrence.statistics == NW_OF_STEP ? size.steps : 2;
    if (recurrence.statistics == NW_GIVEN) mean = normals(size_t(stat_rows * features)), var = mean;
    for (double& v : var) v = double(float(0.5 + v * v));
  }
  int64_t samples(int64_t s) const { return batch_sizes.empty() ? size.batch : batch_sizes[size_t(s)]; }

  std::vector<Numbers> inputs() const {
    const size_t units = size_t(size.units), wide = size_t(gates) * units, ins = size_t(size.inputs);
    const int placement = recurrence.norm_placement;
    std::vector<Numbers> v(FIELDS);
    v[X] = normals(size_t(rows) * ins);
    v[H0] = normals(size_t(size.batch) * units);
    if (recurrence.cell == NW_LSTM) v[C0] = normals(size_t(size.batch) * units);
    v[W_IH] = normals(wide * ins, 1 / std::sqrt(double(ins)));
    v[W_HH] = normals(wide * units, 1 / std::sqrt(double(units)));
    v[B_IH] = normals(wide);
    if (!reverse) v[B_HH] = normals(wide);  // one case without
    if (placement == NW_SEPARATE || placement == NW_INPUT) v[G_IH] = normals(wide);
    if (placement == NW_SEPARATE || placement == NW_SUM) v[G_HH] = normals(wide);
    if (placement == NW_SUM) v[B_INNER] = normals(wide);
    if (recurrence.cell_norm != NW_CELL_NONE) v[G_C] = normals(units), v[B_C] = normals(units);
    return v;
  }
};

double sigmoid(double z) { return 1 / (1 + std::exp(-z)); }

void normalize(double* v, int64_t n, bool center, double eps, const double* gain) {
  double mean = 0, var = 0;
  for (int64_t i = 0; i < n; ++i) mean += center ? v[i] / double(n) : 0;
  for (int64_t i = 0; i < n; ++i) var += (v[i] - mean) * (v[i] - mean) / double(n);
  for (int64_t i = 0; i < n; ++i) v[i] = (v[i] - mean) / std::sqrt(var + eps) * gain[i];
}

struct Outcome {
  Numbers output, h, c;
  Numbers mean, var;  // of the steps' batches
};

// The equations, one step of all samples at a time.
Outcome truth(const Problem& p, const std::vector<Numbers>& v) {
  const int64_t units = p.size.units, wide = p.gates * units, ins = p.size.inputs;
  Outcome out{Numbers(size_t(p.rows * units)), v[H0], v[C0], p.mean, p.var};
  if (p.recurrence.statistics == NW_OF_STEP) out.mean = out.var = Numbers(size_t(p.stat_rows * p.features), 0.0);
  auto at = [&](Field f, int64_t i) { return v[f].empty() ? 0.0 : v[f][size_t(i)]; };
  auto norm_groups = [&](Numbers& n, Field gain) {
    int64_t first = 0;
    for (int count : p.recurrence.groups) {
      if (count) normalize(&n[size_t(first)], count * units, p.recurrence.center, p.eps, &v[gain][size_t(first)]);
      first += count * units;
    }
  };
  for (int64_t k = 0; k < p.size.steps; ++k) {
    const int64_t s = p.reverse ? p.size.steps - 1 - k : k, samples = p.samples(s);
    // Norm over samples of features first .. of n numbers each, which are features from .. of the statistics.
    auto norm_columns = [&](std::vector<Numbers>& rows, int64_t n, int64_t from, Field gain) {
      for (int64_t j = 0; j < n; ++j) {
        const size_t of_step = size_t(std::min(k, p.stat_rows - 1) * p.features + from + j);
        double &mean = out.mean[of_step], &var = out.var[of_step];
        if (p.recurrence.statistics == NW_OF_STEP) {
          for (const Numbers& row : rows) mean += row[size_t(j)] / double(samples);
          for (const Numbers& row : rows) var += (row[size_t(j)] - mean) * (row[size_t(j)] - mean) / double(samples);
        }
        const double scale = v[gain][size_t(j)] / std::sqrt(var + p.eps);
        for (Numbers& row : rows) row[size_t(j)] = (row[size_t(j)] - mean) * scale;
      }
    };
    std::vector<Numbers> ins_of, hids_of, seen_of;
    for (int64_t b = 0; b < samples; ++b) {
      const int64_t row = p.start[size_t(s)] + b;
      double *h = &out.h[size_t(b * units)], *c = out.c.empty() ? nullptr : &out.c[size_t(b * units)];
      for (int64_t u = 0; u < units && !p.reset.empty() && p.reset[size_t(row)]; ++u) {
        h[u] = 0;
        if (c) c[u] = 0;
      }
      Numbers in(size_t(wide), 0.0), hid(size_t(wide), 0.0);
      for (int64_t g = 0; g < wide; ++g) {
        for (int64_t i = 0; i < ins; ++i) in[size_t(g)] += at(W_IH, g * ins + i) * at(X, row * ins + i);
        for (int64_t u = 0; u < units; ++u) hid[size_t(g)] += at(W_HH, g * units + u) * h[u];
      }
      if (p.recurrence.norm_placement == NW_SUM) {
        for (int64_t g = 0; g < wide; ++g) in[size_t(g)] += hid[size_t(g)] + at(B_INNER, g), hid[size_t(g)] = 0;
      }
      ins_of.push_back(in), hids_of.push_back(hid);
    }
    const int placement = p.recurrence.norm_placement;
    if (p.recurrence.statistics == NW_OF_ROW) {
      for (Numbers& in : ins_of) {
        if (placement != NW_UNNORMALIZED) norm_groups(in, placement == NW_SUM ? G_HH : G_IH);
      }
      for (Numbers& hid : hids_of) {
        if (placement == NW_SEPARATE) norm_groups(hid, G_HH);
      }
    } else {
      norm_columns(ins_of, wide, 0, placement == NW_SUM ? G_HH : G_IH);
      if (placement == NW_SEPARATE) norm_columns(hids_of, wide, wide, G_HH);
    }
    // z of gate `which` of a sample, biases included.
    auto input = [&](int64_t b, int64_t i) { return ins_of[size_t(b)][size_t(i)] + at(B_IH, i); };
    auto hidden = [&](int64_t b, int64_t i) { return hids_of[size_t(b)][size_t(i)] + at(B_HH, i); };
    auto gate = [&](int64_t b, int64_t which, int64_t u) {
      return input(b, which * units + u) + hidden(b, which * units + u);
    };
    if (p.recurrence.cell == NW_LSTM) {
      for (int64_t b = 0; b < samples; ++b) {
        double* c = &out.c[size_t(b * units)];
        for (int64_t u = 0; u < units; ++u) {
          c[u] = sigmoid(gate(b, 1, u)) * c[u] + sigmoid(gate(b, 0, u)) * std::tanh(gate(b, 2, u));
        }
        seen_of.emplace_back(c, c + units);
      }
      if (p.recurrence.cell_norm != NW_CELL_NONE) {
        if (p.recurrence.statistics == NW_OF_ROW) {
          for (Numbers& seen : seen_of) normalize(seen.data(), units, p.recurrence.center, p.eps, v[G_C].data());
        } else {
          norm_columns(seen_of, units, p.features - units, G_C);
        }
      }
      for (int64_t b = 0; b < samples; ++b) {
        Numbers& seen = seen_of[size_t(b)];
        for (int64_t u = 0; u < units; ++u) seen[size_t(u)] += at(B_C, u);
        if (p.recurrence.cell_norm == NW_CELL_STATE) std::copy(seen.begin(), seen.end(), &out.c[size_t(b * units)]);
      }
    }
    for (int64_t b = 0; b < samples; ++b) {
      double* h = &out.h[size_t(b * units)];
      Numbers fresh(static_cast<size_t>(units));
      for (int64_t u = 0; u < units; ++u) {
        if (p.recurrence.cell == NW_LSTM) {
          fresh[size_t(u)] = sigmoid(gate(b, 3, u)) * std::tanh(seen_of[size_t(b)][size_t(u)]);
        } else if (p.recurrence.cell == NW_GRU) {
          const double r = sigmoid(gate(b, 0, u)), z = sigmoid(gate(b, 1, u) + p.offset);
          const int64_t n = 2 * units + u;
          const double candidate = std::tanh(p.recurrence.reset_candidate ? r * (input(b, n) + hidden(b, n))
                                                                          : input(b, n) + r * hidden(b, n));
          const double old = p.recurrence.update_paper ? 1 - z : z;
          fresh[size_t(u)] = old * h[u] + (1 - old) * candidate;
        } else {
          fresh[size_t(u)] = p.recurrence.cell == NW_RNN_TANH ? std::tanh(gate(b, 0, u)) : std::max(gate(b, 0, u), 0.0);
        }
      }
      std::copy(fresh.begin(), fresh.end(), h);
      std::copy(h, h + units, &out.output[size_t((p.start[size_t(s)] + b) * units)]);
    }
  }
  return out;
}

double dot(const Numbers& a, const Numbers& b) {
  double sum = 0;
  for (size_t i = 0; i < a.size(); ++i) sum += a[i] * b[i];
  return sum;
}

// A heap block of exactly n floats, full of NaN or with given numbers; n = 0 gives null.
struct Floats {
  std::unique_ptr<float[]> data;
  size_t n;
  explicit Floats(size_t n) : data(n ? new float[n] : nullptr), n(n) { std::fill_n(data.get(), n, NAN); }
  explicit Floats(const Numbers& v) : Floats(v.size()) { std::copy(v.begin(), v.end(), data.get()); }
  float* get() const { return data.get(); }
};

void check(const Recurrence& recurrence, const Size& size, StepLayout layout, int threads, int products) {
  const Problem p(recurrence, size, layout);
  const std::vector<Numbers> v = p.inputs();
  const std::string what = "recurrent cell " + std::to_string(recurrence.cell) + " norm placement " +
                           std::to_string(recurrence.norm_placement) + " statistics " +
                           std::to_string(recurrence.statistics) + " norm of c " +
                           std::to_string(recurrence.cell_norm) + " layout " + std::to_string(layout) + " products " +
                           std::to_string(products);
  std::vector<Floats> given;
  for (const Numbers& numbers : v) given.emplace_back(numbers);
  const size_t state = size_t(size.batch * size.units), lstm = recurrence.cell == NW_LSTM ? state : 0;
  Floats output(size_t(p.rows * size.units)), h(state), c(lstm);

  nw_recurrent layer{};
  layer.x = given[X].get();
  layer.batch_sizes = p.batch_sizes.empty() ? nullptr : p.batch_sizes.data();
  layer.reset = p.reset.empty() ? nullptr : p.reset.data();
  layer.weight_ih = given[W_IH].get();
  layer.weight_hh = given[W_HH].get();
  const float** fields[] = {&layer.bias_ih,    &layer.bias_hh, &layer.gain_ih, &layer.gain_hh,
                            &layer.bias_inner, &layer.gain_c,  &layer.bias_c};
  for (int f = B_IH; f < FIELDS; ++f) *fields[f - B_IH] = given[size_t(f)].get();
  layer.h0 = given[H0].get();
  layer.c0 = given[C0].get();
  layer.output = output.get();
  layer.steps = size.steps, layer.batch = size.batch, layer.rows = p.rows;
  layer.inputs = size.inputs, layer.units = size.units;
  layer.stat_rows = p.stat_rows, layer.statistics = recurrence.statistics;
  layer.eps = p.eps, layer.update_offset = p.offset;
  layer.dtype = NW_FLOAT32, layer.cell = recurrence.cell, layer.norm_placement = recurrence.norm_placement,
  layer.center = recurrence.center;
  layer.cell_norm = recurrence.cell_norm, layer.reset_candidate = recurrence.reset_candidate,
  layer.update_paper = recurrence.update_paper;
  layer.reverse = p.reverse, layer.threads = threads, layer.products = products;
  std::copy(recurrence.groups, recurrence.groups + 4, layer.groups);
  int64_t widths[4];
  check_status(what + " saves", nw_recurrent_saves(&layer, widths));
  std::vector<Floats> saved;
  for (int64_t width : widths) saved.emplace_back(size_t(p.rows * width));
  layer.input_terms = saved[0].get(), layer.hidden_terms = saved[1].get();
  layer.cells = saved[2].get(), layer.stats = saved[3].get();
  const bool of_step = recurrence.statistics == NW_OF_STEP;
  Floats mean = of_step ? Floats(size_t(p.stat_rows * p.features)) : Floats(p.mean);
  Floats var = of_step ? Floats(size_t(p.stat_rows * p.features)) : Floats(p.var);
  layer.mean = mean.get(), layer.var = var.get();

  nw_recurrent_forward_args forward{.layer = layer, .h = h.get(), .c = c.get()};
  check_status(what + " forward", nw_recurrent_forward(&forward));
  const Outcome exact = truth(p, v);
  auto same = [&](const std::string& name, const Floats& got, const Numbers& expected) {
    for (size_t i = 0; i < got.n; ++i) close(what + " " + name, products, got.get()[i], expected[i], 10);
  };
  same("output", output, exact.output), same("h", h, exact.h), same("c", c, exact.c);
  same("mean", mean, exact.mean), same("variance", var, exact.var);

  const Numbers up = normals(output.n), up_h = normals(state), up_c = normals(lstm);
  Floats doutput(up), dh(up_h), dc(up_c);
  std::vector<Floats> grads;
  for (int f = 0; f < FIELDS; ++f) grads.emplace_back(f == H0 || f == C0 ? 0 : v[size_t(f)].size());
  nw_recurrent_backward_args backward{.layer = layer,
                                      .doutput = doutput.get(),
                                      .dh = dh.get(),
                                      .dc = dc.get(),
                                      .dx = grads[X].get(),
                                      .dweight_ih = grads[W_IH].get(),
                                      .dweight_hh = grads[W_HH].get(),
                                      .dbias_ih = grads[B_IH].get(),
                                      .dbias_hh = grads[B_HH].get(),
                                      .dgain_ih = grads[G_IH].get(),
                                      .dgain_hh = grads[G_HH].get(),
                                      .dbias_inner = grads[B_INNER].get(),
                                      .dgain_c = grads[G_C].get(),
                                      .dbias_c = grads[B_C].get()};
  check_status(what + " backward", nw_recurrent_backward(&backward));
  auto functional = [&](const std::vector<Numbers>& at) {
    const Outcome o = truth(p, at);
    return dot(up, o.output) + dot(up_h, o.h) + dot(up_c, o.c);
  };
  for (int f = 0; f < FIELDS; ++f) {
    if (v[size_t(f)].empty()) continue;
    const Floats& gradient = f == H0 ? dh : f == C0 ? dc : grads[size_t(f)];
    const Numbers direction = normals(v[size_t(f)].size());
    const double step = 1e-7;  // so small that hardly a unit of a ReLU crosses 0 between the two ends
    std::vector<Numbers> plus = v, minus = v;
    double along = 0, scale = 0;
    for (size_t i = 0; i < direction.size(); ++i) {
      plus[size_t(f)][i] += step * direction[i], minus[size_t(f)][i] -= step * direction[i];
      along += double(gradient.get()[i]) * direction[i];
      scale += std::fabs(double(gradient.get()[i]) * direction[i]);
    }
    const double expected = (functional(plus) - functional(minus)) / (2 * step);
    close(what + " gradient of " + field_names[f], products, along, expected, 10 * (1 + scale));
  }
}

}  // namespace

void check_recurrent() {
  const Recurrence recurrences[] = {
      {.cell = NW_LSTM, .norm_placement = NW_UNNORMALIZED},
      {.cell = NW_LSTM, .norm_placement = NW_SEPARATE, .cell_norm = NW_CELL_READOUT, .groups = {4}},
      {.cell = NW_LSTM, .norm_placement = NW_SEPARATE, .groups = {1, 1, 1, 1}, .center = false},
      {.cell = NW_LSTM, .norm_placement = NW_SUM, .cell_norm = NW_CELL_STATE, .groups = {1, 1, 1, 1}},
      {.cell = NW_GRU, .norm_placement = NW_UNNORMALIZED},
      {.cell = NW_GRU, .norm_placement = NW_SEPARATE, .groups = {2, 1}, .update_paper = true},
      {.cell = NW_GRU, .norm_placement = NW_SUM, .groups = {3}, .center = false, .reset_candidate = true},
      {.cell = NW_RNN_TANH, .norm_placement = NW_SEPARATE, .groups = {1}},
      {.cell = NW_RNN_TANH, .norm_placement = NW_SUM, .groups = {1}, .center = false},
      {.cell = NW_RNN_RELU, .norm_placement = NW_UNNORMALIZED},
      {.cell = NW_LSTM, .norm_placement = NW_SEPARATE, .cell_norm = NW_CELL_READOUT, .statistics = NW_OF_STEP},
      {.cell = NW_LSTM, .norm_placement = NW_SUM, .cell_norm = NW_CELL_STATE, .statistics = NW_OF_STEP},
      {.cell = NW_LSTM, .norm_placement = NW_INPUT, .cell_norm = NW_CELL_STATE, .statistics = NW_GIVEN},
      {.cell = NW_GRU, .norm_placement = NW_SEPARATE, .update_paper = true, .statistics = NW_OF_STEP},
      {.cell = NW_GRU, .norm_placement = NW_INPUT, .reset_candidate = true, .statistics = NW_OF_STEP},
      {.cell = NW_GRU, .norm_placement = NW_SUM, .reset_candidate = true, .statistics = NW_GIVEN},
      {.cell = NW_RNN_TANH, .norm_placement = NW_INPUT, .statistics = NW_OF_STEP},
      {.cell = NW_RNN_TANH, .norm_placement = NW_SEPARATE, .statistics = NW_GIVEN},
      {.cell = NW_RNN_TANH, .norm_placement = NW_SUM, .statistics = NW_OF_STEP},
  };
  const Size sizes[] = {{1, 1, 1, 2}, {3, 5, 2, 7}, {2, 9, 5, 19}, {3, 1, 3, 65}};  // steps, batch, inputs, units
  for (const Recurrence& recurrence : recurrences) {
    for (const Size& size : sizes) {
      for (StepLayout layout : {EQUAL_LENGTHS, RAGGED, RESET, REVERSE}) {
        check(recurrence, size, layout, layout == EQUAL_LENGTHS ? 3 : 1, NW_FLOAT32);
      }
    }
  }
  // Sizes around a tile of 16 rows and columns and of depth 32, so that tiles end where the memory does.
  const Size tiles[] = {{2, 33, 5, 3}, {2, 3, 33, 17}, {1, 17, 31, 16}};
  for (const Recurrence& recurrence : recurrences) {
    for (const Size& size : tiles) {
      for (StepLayout layout : {EQUAL_LENGTHS, RAGGED}) {
        check(recurrence, size, layout, layout == EQUAL_LENGTHS ? 2 : 1, NW_BFLOAT16);
      }
    }
  }
}
