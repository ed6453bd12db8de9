// Runs every kernel on every instruction set of this machine against plain loops in double, on buffers of exactly the
// size that the contract asks for. Built under AddressSanitizer and UBSan, so that a read or write past an end, or an
// undefined shift, stops it. Prints one line and returns 0 if all is well.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "checks.h"

namespace {

std::mt19937 generator(1);
// A buffer of n elements of one dtype, allocated by itself so that the sanitizer sees both of its ends.
struct Buffer {
  int dtype;
  size_t n;
  std::unique_ptr<unsigned char[]> bytes;

  Buffer(int dtype, size_t n) : dtype(dtype), n(n), bytes(new unsigned char[n * width()]) {
    std::memset(bytes.get(), 0xff, n * width());  // NaN in every dtype
  }
  size_t width() const { return dtype == NW_FLOAT64 ? 8 : dtype == NW_FLOAT32 ? 4 : 2; }
  void* data() { return bytes.get(); }
  void* data_or_null(bool wanted) { return wanted ? data() : nullptr; }

  double get(size_t i) const {
    if (dtype == NW_FLOAT64) return reinterpret_cast<const double*>(bytes.get())[i];
    if (dtype == NW_FLOAT32) return reinterpret_cast<const float*>(bytes.get())[i];
    uint32_t bits = uint32_t(reinterpret_cast<const uint16_t*>(bytes.get())[i]) << 16;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
  }
  void set(size_t i, double value) {
    if (dtype == NW_FLOAT64) {
      reinterpret_cast<double*>(bytes.get())[i] = value;
    } else if (dtype == NW_FLOAT32) {
      reinterpret_cast<float*>(bytes.get())[i] = float(value);
    } else {
      const float narrow = float(value);
      uint32_t bits;
      std::memcpy(&bits, &narrow, sizeof bits);
      reinterpret_cast<uint16_t*>(bytes.get())[i] = uint16_t(bits >> 16);
    }
  }
  Buffer& fill() {
    std::normal_distribution<double> normal;
    for (size_t i = 0; i < n; ++i) set(i, normal(generator));
    return *this;
  }
};

double activate(int act, double z) {
  switch (act) {
    case NW_RELU: return z > 0 ? z : 0;
    case NW_LEAKY_RELU: return z > 0 ? z : 0.01 * z;
    case NW_SILU: return z / (1 + std::exp(-z));
    case NW_GELU: return 0.5 * z * std::erfc(-z / std::sqrt(2.0));
    case NW_RELU6: return std::fmin(std::fmax(z, 0), 6);
    case NW_HARDSWISH: return z * std::fmin(std::fmax(z + 3, 0), 6) / 6;
    case NW_HARDSIGMOID: return std::fmin(std::fmax(z + 3, 0), 6) / 6;
    case NW_ELU: return z > 0 ? z : std::exp(z) - 1;
    case NW_GELU_TANH: return 0.5 * z * (1 + std::tanh(std::sqrt(2 / M_PI) * (z + 0.044715 * z * z * z)));
    case NW_SOFTPLUS: return std::log(1 + std::exp(z));
    case NW_MISH: return z * std::tanh(std::log(1 + std::exp(z)));
    case NW_SIGMOID: return 1 / (1 + std::exp(-z));
  }
  return z;
}
double slope(int act, double z) {
  const double h = 1e-5;
  return (activate(act, z + h) - activate(act, z - h)) / (2 * h);
}

// One call as index maps: element i of x belongs to statistic stat(i) and parameter param(i).
struct Problem {
  size_t elements, stats, params;
  std::function<size_t(size_t)> stat, param;
  std::function<bool(size_t)> valid;
  bool center, add_before;  // the residual goes in before the statistics (rows) or before the activation
  bool minimal;             // neither residual nor gain nor bias, and no gradient of them
  int dtype, act;
  double eps;
  const Buffer *given_mean, *given_var;  // constant statistics without a gradient; null: those of the input
};

struct Tensors {
  Buffer x, residual, dy, dsum, weight, bias, y, dx, dresidual, dweight, dbias;
  std::vector<double> mean, rstd;
  explicit Tensors(const Problem& p)
      : x(p.dtype, p.elements),
        residual(p.dtype, p.elements),
        dy(p.dtype, p.elements),
        dsum(p.dtype, p.elements),
        weight(wide(p), p.params),
        bias(wide(p), p.params),
        y(p.dtype, p.elements),
        dx(p.dtype, p.elements),
        dresidual(p.dtype, p.elements),
        dweight(wide(p), p.params),
        dbias(wide(p), p.params),
        mean(p.stats, NAN),
        rstd(p.stats, NAN) {
    for (Buffer* b : {&x, &residual, &dy, &dsum, &weight, &bias}) b->fill();
    for (Buffer* b : {&residual, &dsum, &bias}) {
      for (size_t i = 0; p.minimal && i < b->n; ++i) b->set(i, 0);
    }
    for (size_t i = 0; p.minimal && i < weight.n; ++i) weight.set(i, 1);
  }
  static int wide(const Problem& p) { return p.dtype == NW_FLOAT64 ? NW_FLOAT64 : NW_FLOAT32; }
};

// Compares with loops in double. `s` holds what was normalized: x, or the stored sum.
void verify(const std::string& what, const Problem& p, const Tensors& t, const Buffer& s) {
  std::vector<double> count(p.stats), mean(p.stats), var(p.stats), sum_g(p.stats), sum_gz(p.stats);
  std::vector<double> z(p.elements), g(p.elements), dweight(p.params), dbias(p.params);
  auto each = [&](const std::function<void(size_t, size_t, size_t)>& body) {
    for (size_t i = 0; i < p.elements; ++i) {
      if (p.valid(i)) body(i, p.stat(i), p.param(i));
    }
  };
  each([&](size_t i, size_t k, size_t) { count[k] += 1, mean[k] += p.center ? s.get(i) : 0; });
  for (size_t k = 0; k < p.stats; ++k) mean[k] /= count[k] > 0 ? count[k] : 1;
  each([&](size_t i, size_t k, size_t) { var[k] += std::pow(s.get(i) - mean[k], 2) / count[k]; });
  for (size_t k = 0; p.given_mean && k < p.stats; ++k) mean[k] = p.given_mean->get(k), var[k] = p.given_var->get(k);
  each([&](size_t i, size_t k, size_t c) {
    z[i] = (s.get(i) - mean[k]) / std::sqrt(var[k] + p.eps);
    double in = z[i] * t.weight.get(c) + t.bias.get(c) + (p.add_before ? 0 : t.residual.get(i));
    close(what + " y", p.dtype, t.y.get(i), activate(p.act, in), 1);
    g[i] = t.dy.get(i) * slope(p.act, in);
    for (double kink : {0, -3, 3, 6}) {  // where the difference quotient is meaningless
      if (p.act != NW_IDENTITY && std::fabs(in - kink) < 1e-4) g[i] = NAN;
    }
    if (!p.given_mean) {
      sum_g[k] += g[i] * t.weight.get(c) / count[k];
      sum_gz[k] += g[i] * t.weight.get(c) * z[i] / count[k];
    }
    dweight[c] += g[i] * z[i];
    dbias[c] += g[i];
  });
  for (size_t i = 0; i < p.elements; ++i) {
    if (!p.valid(i)) {
      close(what + " y in padding", p.dtype, t.y.get(i), 0, 0);
      close(what + " dx in padding", p.dtype, t.dx.get(i), 0, 0);
    }
  }
  each([&](size_t i, size_t k, size_t c) {
    double dx = (g[i] * t.weight.get(c) - (p.center ? sum_g[k] : 0) - z[i] * sum_gz[k]) / std::sqrt(var[k] + p.eps);
    if (std::isnan(dx)) return;
    if (p.add_before) dx += t.dsum.get(i);
    close(what + " dx", p.dtype, t.dx.get(i), dx, 5 / std::sqrt(var[k] + p.eps));
    if (!p.add_before && !p.minimal) close(what + " dresidual", p.dtype, t.dresidual.get(i), g[i], 1);
  });
  for (size_t c = 0; !p.minimal && c < p.params; ++c) {
    if (std::isnan(dweight[c])) continue;
    close(what + " dweight", Tensors::wide(p), t.dweight.get(c), dweight[c], double(p.elements));
    close(what + " dbias", Tensors::wide(p), t.dbias.get(c), dbias[c], double(p.elements));
  }
}

// `groups` of neighbouring rows have a gain and bias each.
void check_rows(size_t rows, size_t cols, int dtype, int act, bool center, bool masked, bool minimal = false,
                size_t groups = 1) {
  const size_t group_rows = rows > 0 ? rows / groups : 1;
  std::unique_ptr<uint8_t[]> mask(new uint8_t[rows]);
  for (size_t i = 0; i < rows; ++i) mask[i] = uint8_t(i % 3 != 1);
  Problem p{.elements = rows * cols,
            .stats = rows,
            .params = groups * cols,
            .stat = [=](size_t i) { return i / cols; },
            .param = [=](size_t i) { return i / cols / group_rows * cols + i % cols; },
            .valid = [&](size_t i) { return !masked || mask[i / cols]; },
            .center = center,
            .add_before = true,
            .minimal = minimal,
            .dtype = dtype,
            .act = act,
            .eps = 1e-3,
            .given_mean = nullptr,
            .given_var = nullptr};
  Tensors t(p);
  Buffer sum(dtype, minimal ? 0 : p.elements);
  Buffer& s = minimal ? t.x : sum;
  const uint8_t* m = masked ? mask.get() : nullptr;
  nw_rows_forward_args f{.x = t.x.data(),
                         .residual = t.residual.data_or_null(!minimal),
                         .mask = m,
                         .weight = t.weight.data_or_null(!minimal),
                         .bias = t.bias.data_or_null(!minimal),
                         .gate = nullptr,
                         .sum = sum.data_or_null(!minimal),
                         .y = t.y.data(),
                         .mean = t.mean.data(),
                         .rstd = t.rstd.data(),
                         .rows = int64_t(rows),
                         .cols = int64_t(cols),
                         .group_rows = int64_t(group_rows),
                         .eps = p.eps,
                         .dtype = dtype,
                         .center = center,
                         .act = act,
                         .threads = 3,
                         .gate_act = NW_IDENTITY,
                         .gate_first = 0};
  check_status("rows forward", nw_rows_forward(&f));
  nw_rows_backward_args b{.dy = t.dy.data(),
                          .dsum = t.dsum.data_or_null(!minimal),
                          .s = s.data(),
                          .mask = m,
                          .weight = t.weight.data_or_null(!minimal),
                          .bias = t.bias.data_or_null(!minimal),
                          .gate = nullptr,
                          .mean = t.mean.data(),
                          .rstd = t.rstd.data(),
                          .ds = t.dx.data(),
                          .dweight = t.dweight.data_or_null(!minimal),
                          .dbias = t.dbias.data_or_null(!minimal),
                          .dgate = nullptr,
                          .rows = int64_t(rows),
                          .cols = int64_t(cols),
                          .group_rows = int64_t(group_rows),
                          .dtype = dtype,
                          .center = center,
                          .act = act,
                          .threads = 3,
                          .gate_act = NW_IDENTITY,
                          .gate_first = 0};
  check_status("rows backward", nw_rows_backward(&b));
  verify("rows", p, t, s);
}

// LayerNorm of two groups of rows with a gate, in plain loops.
void check_gated_rows(size_t rows, size_t cols, int dtype, int gate_act, bool first, bool masked) {
  const size_t n = rows * cols, half = rows / 2;
  const double eps = 1e-3;
  const int wide = dtype == NW_FLOAT64 ? NW_FLOAT64 : NW_FLOAT32;
  Buffer x(dtype, n), gate(dtype, n), dy(dtype, n), y(dtype, n), dx(dtype, n), dgate(dtype, n);
  Buffer weight(wide, 2 * cols), bias(wide, 2 * cols), dweight(wide, 2 * cols), dbias(wide, 2 * cols);
  for (Buffer* b : {&x, &gate, &dy, &weight, &bias}) b->fill();
  std::vector<double> mean(rows, NAN), rstd(rows, NAN), want_dweight(2 * cols), want_dbias(2 * cols);
  std::unique_ptr<uint8_t[]> mask(new uint8_t[rows]);
  for (size_t i = 0; i < rows; ++i) mask[i] = uint8_t(i % 3 != 1);
  const uint8_t* m = masked ? mask.get() : nullptr;
  nw_rows_forward_args f{};
  f.x = x.data(), f.mask = m, f.weight = weight.data(), f.bias = bias.data(), f.gate = gate.data(), f.y = y.data();
  f.mean = mean.data(), f.rstd = rstd.data(), f.rows = int64_t(rows), f.cols = int64_t(cols);
  f.group_rows = int64_t(half), f.eps = eps, f.dtype = dtype, f.center = 1, f.threads = 3;
  f.gate_act = gate_act, f.gate_first = first;
  check_status("gated rows forward", nw_rows_forward(&f));
  nw_rows_backward_args b{};
  b.dy = dy.data(), b.s = x.data(), b.mask = m, b.weight = weight.data(), b.bias = bias.data(), b.gate = gate.data();
  b.mean = mean.data(), b.rstd = rstd.data(), b.ds = dx.data(), b.dweight = dweight.data(), b.dbias = dbias.data();
  b.dgate = dgate.data(), b.rows = int64_t(rows), b.cols = int64_t(cols), b.group_rows = int64_t(half);
  b.dtype = dtype, b.center = 1, b.threads = 3, b.gate_act = gate_act, b.gate_first = first;
  check_status("gated rows backward", nw_rows_backward(&b));
  for (size_t row = 0; row < rows; ++row) {
    const size_t at = row * cols, gain = row / half * cols;
    std::vector<double> u(cols), z(cols), open(cols), gw(cols);
    double avg = 0, var = 0, sum_g = 0, sum_gz = 0;
    for (size_t j = 0; j < cols; ++j) {
      if (masked && !mask[row]) {
        for (const Buffer* out : {&y, &dx, &dgate}) close("gated padding", dtype, out->get(at + j), 0, 0);
        continue;
      }
      open[j] = activate(gate_act, gate.get(at + j));
      u[j] = x.get(at + j) * (first ? open[j] : 1);
      avg += u[j] / double(cols);
    }
    if (masked && !mask[row]) continue;
    for (size_t j = 0; j < cols; ++j) var += std::pow(u[j] - avg, 2) / double(cols);
    const double r = 1 / std::sqrt(var + eps);
    for (size_t j = 0; j < cols; ++j) {
      z[j] = (u[j] - avg) * r;
      const double g = dy.get(at + j) * (first ? 1 : open[j]);
      gw[j] = g * weight.get(gain + j);
      sum_g += gw[j] / double(cols), sum_gz += gw[j] * z[j] / double(cols);
      want_dweight[gain + j] += g * z[j], want_dbias[gain + j] += g;
    }
    for (size_t j = 0; j < cols; ++j) {
      const double normed = z[j] * weight.get(gain + j) + bias.get(gain + j), du = (gw[j] - sum_g - z[j] * sum_gz) * r;
      const double gate_slope = slope(gate_act, gate.get(at + j));
      close("gated y", dtype, y.get(at + j), normed * (first ? 1 : open[j]), 3);
      close("gated dx", dtype, dx.get(at + j), du * (first ? open[j] : 1), 10 * r);
      if (std::fabs(gate.get(at + j)) < 1e-4) continue;  // relu's difference quotient is meaningless there
      const double towards_gate = first ? du * x.get(at + j) : dy.get(at + j) * normed;
      close("gated dgate", dtype, dgate.get(at + j), towards_gate * gate_slope, 10 * (r + 1));
    }
  }
  for (size_t k = 0; k < 2 * cols; ++k) {
    close("gated dweight", wide, dweight.get(k), want_dweight[k], double(rows));
    close("gated dbias", wide, dbias.get(k), want_dbias[k], double(rows));
  }
}

void positions_masked(size_t n, size_t positions, std::unique_ptr<uint8_t[]>& mask) {
  mask.reset(new uint8_t[n * positions]);
  for (size_t i = 0; i < n * positions; ++i) mask[i] = uint8_t(i % 3 != 1);
}

void check_groups(size_t n, size_t channels, size_t positions, size_t count, int layout, int dtype, int act,
                  bool masked, bool minimal = false) {
  std::unique_ptr<uint8_t[]> mask;
  positions_masked(n, positions, mask);
  const bool last = layout == NW_CHANNELS_LAST;
  const size_t sample = channels * positions;
  auto channel = [=](size_t i) { return last ? i % channels : i / positions % channels; };
  Problem p{
      .elements = n * sample,
      .stats = n * count,
      .params = channels,
      .stat = [=](size_t i) { return i / sample * count + channel(i) / (channels / count); },
      .param = channel,
      .valid = [&](size_t i) { return !masked || mask[last ? i / channels : i / sample * positions + i % positions]; },
      .center = true,
      .add_before = false,
      .minimal = minimal,
      .dtype = dtype,
      .act = act,
      .eps = 1e-3,
      .given_mean = nullptr,
      .given_var = nullptr};
  Tensors t(p);
  const uint8_t* m = masked ? mask.get() : nullptr;
  nw_groups_forward_args f{.x = t.x.data(),
                           .residual = t.residual.data_or_null(!minimal),
                           .mask = m,
                           .weight = t.weight.data_or_null(!minimal),
                           .bias = t.bias.data_or_null(!minimal),
                           .y = t.y.data(),
                           .mean = t.mean.data(),
                           .rstd = t.rstd.data(),
                           .batch = int64_t(n),
                           .channels = int64_t(channels),
                           .positions = int64_t(positions),
                           .groups = int64_t(count),
                           .eps = p.eps,
                           .dtype = dtype,
                           .layout = layout,
                           .act = act,
                           .threads = 3};
  check_status("groups forward", nw_groups_forward(&f));
  nw_groups_backward_args b{.dy = t.dy.data(),
                            .x = t.x.data(),
                            .residual = t.residual.data_or_null(!minimal),
                            .mask = m,
                            .weight = t.weight.data_or_null(!minimal),
                            .bias = t.bias.data_or_null(!minimal),
                            .mean = t.mean.data(),
                            .rstd = t.rstd.data(),
                            .dx = t.dx.data(),
                            .dresidual = t.dresidual.data_or_null(!minimal),
                            .dweight = t.dweight.data_or_null(!minimal),
                            .dbias = t.dbias.data_or_null(!minimal),
                            .batch = int64_t(n),
                            .channels = int64_t(channels),
                            .positions = int64_t(positions),
                            .groups = int64_t(count),
                            .dtype = dtype,
                            .layout = layout,
                            .act = act,
                            .threads = 3};
  check_status("groups backward", nw_groups_backward(&b));
  verify(last ? "groups last" : "groups first", p, t, t.x);
}

// `groups` of neighbouring samples have a gain and bias each.
void check_channels(size_t n, size_t channels, size_t positions, int layout, int dtype, int act, bool masked,
                    bool training = true, bool minimal = false, size_t groups = 1) {
  const size_t group_samples = n > 0 ? (n + groups - 1) / groups : 1, sample = channels * positions;
  std::unique_ptr<uint8_t[]> mask;
  positions_masked(n, positions, mask);
  const bool last = layout == NW_CHANNELS_LAST;
  auto channel = [=](size_t i) { return last ? i % channels : i / positions % channels; };
  const int wide = dtype == NW_FLOAT64 ? NW_FLOAT64 : NW_FLOAT32;
  Buffer running_mean(wide, channels), running_var(wide, channels);
  running_mean.fill();
  running_var.fill();
  for (size_t c = 0; c < channels; ++c) running_var.set(c, 0.5 + std::fabs(running_var.get(c)));
  Problem p{.elements = n * channels * positions,
            .stats = channels,
            .params = groups * channels,
            .stat = channel,
            .param = [=](size_t i) { return i / sample / group_samples * channels + channel(i); },
            .valid =
                [&](size_t i) {
                  return !masked || mask[last ? i / channels : i / (channels * positions) * positions + i % positions];
                },
            .center = true,
            .add_before = false,
            .minimal = minimal,
            .dtype = dtype,
            .act = act,
            .eps = 1e-3,
            .given_mean = training ? nullptr : &running_mean,
            .given_var = training ? nullptr : &running_var};
  Tensors t(p);
  const bool has_running_stats = !(training && minimal);
  const uint8_t* m = masked ? mask.get() : nullptr;
  int64_t num_batches_tracked = 41;
  nw_channels_forward_args f{.x = t.x.data(),
                             .residual = t.residual.data_or_null(!minimal),
                             .mask = m,
                             .weight = t.weight.data_or_null(!minimal),
                             .bias = t.bias.data_or_null(!minimal),
                             .running_mean = running_mean.data_or_null(has_running_stats),
                             .running_var = running_var.data_or_null(has_running_stats),
                             .y = t.y.data(),
                             .mean = t.mean.data(),
                             .rstd = t.rstd.data(),
                             .num_batches_tracked = &num_batches_tracked,
                             .batch = int64_t(n),
                             .channels = int64_t(channels),
                             .positions = int64_t(positions),
                             .group_samples = int64_t(group_samples),
                             .eps = p.eps,
                             .momentum = 0.1,
                             .dtype = dtype,
                             .layout = layout,
                             .training = training,
                             .act = act,
                             .threads = 3};
  check_status("channels forward", nw_channels_forward(&f));
  close("num_batches_tracked", NW_FLOAT64, double(num_batches_tracked), 41 + training, 0);
  nw_channels_backward_args b{.dy = t.dy.data(),
                              .x = t.x.data(),
                              .residual = t.residual.data_or_null(!minimal),
                              .mask = m,
                              .weight = t.weight.data_or_null(!minimal),
                              .bias = t.bias.data_or_null(!minimal),
                              .mean = t.mean.data(),
                              .rstd = t.rstd.data(),
                              .dx = t.dx.data(),
                              .dresidual = t.dresidual.data_or_null(!minimal),
                              .dweight = t.dweight.data_or_null(!minimal),
                              .dbias = t.dbias.data_or_null(!minimal),
                              .batch = int64_t(n),
                              .channels = int64_t(channels),
                              .positions = int64_t(positions),
                              .group_samples = int64_t(group_samples),
                              .dtype = dtype,
                              .layout = layout,
                              .training = training,
                              .act = act,
                              .threads = 3};
  check_status("channels backward", nw_channels_backward(&b));
  verify(last ? "channels last" : "channels first", p, t, t.x);
}

void check_norms() {
#ifdef NW_SUBSET
  const int dtypes[] = {NW_FLOAT32, NW_BFLOAT16}, acts[] = {NW_IDENTITY, NW_MISH};
#else
  const int dtypes[] = {NW_FLOAT32, NW_BFLOAT16, NW_FLOAT64};
  const int acts[] = {NW_IDENTITY,  NW_RELU,        NW_LEAKY_RELU, NW_SILU,      NW_GELU,     NW_RELU6,
                      NW_HARDSWISH, NW_HARDSIGMOID, NW_ELU,        NW_GELU_TANH, NW_SOFTPLUS, NW_MISH};
#endif
  for (int dtype : dtypes) {
    for (int act : acts) {
      for (bool masked : {false, true}) {
        for (size_t cols : {1, 7, 63, 131}) {
          check_rows(6, cols, dtype, act, true, masked);
          check_rows(6, cols, dtype, act, false, masked);
          check_rows(6, cols, dtype, act, true, masked, true);
        }
        for (size_t positions : {1, 7, 50}) {
          for (int layout : {NW_CHANNELS_FIRST, NW_CHANNELS_LAST}) {
            check_groups(2, 6, positions, 3, layout, dtype, act, masked);
            check_groups(2, 6, positions, 3, layout, dtype, act, masked, true);
            for (bool training : {true, false}) {
              check_channels(5, 7, positions, layout, dtype, act, masked, training);
              check_channels(5, 7, positions, layout, dtype, act, masked, training, true);
              check_channels(5, 7, positions, layout, dtype, act, masked, training, false, 5);
            }
          }
        }
      }
    }
  }
  for (int layout : {NW_CHANNELS_FIRST, NW_CHANNELS_LAST}) {
    check_groups(0, 6, 5, 3, layout, NW_FLOAT32, NW_MISH, true);
    check_channels(0, 7, 5, layout, NW_FLOAT32, NW_MISH, true);
  }
  check_rows(0, 7, NW_FLOAT32, NW_MISH, true, true);
  for (int dtype : dtypes) {
    check_rows(6, 63, dtype, NW_MISH, true, true, false, 3);
    check_rows(7, 600, dtype, NW_IDENTITY, false, false, false, 7);
    for (int layout : {NW_CHANNELS_FIRST, NW_CHANNELS_LAST}) {
      check_channels(5, 7, 9, layout, dtype, NW_MISH, true, true, false, 2);
      check_channels(3, 2, 9001, layout, dtype, NW_IDENTITY, false, true, false, 3);
      check_channels(3, 40, 9, layout, dtype, NW_MISH, false, true, false, 3);
      check_channels(300, 33, 2, layout, dtype, NW_IDENTITY, true, true, false, 300);
    }
    for (bool first : {true, false}) {
      for (int gate_act : {NW_IDENTITY, NW_RELU, NW_SILU, NW_GELU, NW_SIGMOID}) {
        check_gated_rows(6, 63, dtype, gate_act, first, gate_act == NW_SILU);
      }
    }
  }
  check_gated_rows(140, 300, NW_FLOAT32, NW_SILU, true, true);
  // Large enough for several threads, blocks and chunks.
  check_rows(70, 600, NW_FLOAT32, NW_IDENTITY, true, true);
  check_groups(2, 4, 5001, 2, NW_CHANNELS_FIRST, NW_FLOAT32, NW_MISH, true);
  check_groups(1, 4, 9001, 1, NW_CHANNELS_FIRST, NW_FLOAT32, NW_IDENTITY, false);
  check_groups(1, 34, 999, 17, NW_CHANNELS_LAST, NW_FLOAT32, NW_MISH, true);
  check_groups(12, 34, 99, 2, NW_CHANNELS_LAST, NW_BFLOAT16, NW_IDENTITY, false);
  check_channels(2, 2, 9001, NW_CHANNELS_FIRST, NW_FLOAT32, NW_MISH, true);
  check_channels(4, 20, 500, NW_CHANNELS_FIRST, NW_BFLOAT16, NW_IDENTITY, false);
  check_channels(9, 330, 25, NW_CHANNELS_FIRST, NW_FLOAT32, NW_IDENTITY, false);
  check_channels(9, 330, 25, NW_CHANNELS_FIRST, NW_BFLOAT16, NW_IDENTITY, false, true, false, 9);
  check_channels(3, 17, 999, NW_CHANNELS_LAST, NW_FLOAT32, NW_MISH, true);
}

}  // namespace

int main() {
  for (const std::string isa : {"avx512_amx", "avx512", "avx2", "baseline"}) {
    if (nw_use_isa(isa.c_str()) != NW_OK) continue;
    if (isa != "avx512_amx") check_norms();  // its norms are those of avx512
    check_recurrent();
    std::printf("%s: ok\n", nw_isa());
  }
  std::printf("%d checks passed\n", checks);
  return 0;
}
