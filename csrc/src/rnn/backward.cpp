// The backward pass of a recurrent layer, in chunks of steps from the last one: step by step through the cell and W_hh,
// and then, while the chunk's gradients are in the cache, the products for dx and the weights' gradients.
#include "common/scratch_arena.h"
#include "gemm/precision.h"
#include "rnn/cells_backward.h"
#include "rnn/kernels.h"
#include "rnn/prepare.h"
#include "rnn/steps.h"
#include "rnn/threads.h"

namespace NW_ISA {
namespace {

// A chunk's gradients take memory, 1 MiB for 128 rows of 1024 gates, and are read again from the cache. With fewer rows
// the weights' gradients, which each chunk reads and writes, begin to cost: chunks of 64 rows take 4 to 7 % longer.
constexpr int64_t chunk_rows = 128;

template <class P> struct Backward {
  const nw_recurrent_backward_args& args;
  const nw_recurrent& a;
  const Layer& layer;
  const StepRows& rows;
  BackwardCell cell;
  int64_t chunk;     // steps
  bool separate;     // dp and dq differ
  bool small_input;  // the cells compute the gradients of x and W_ih
  PackedMatrix weight_ih, weight_hh;
  float *dp, *dq;             // of the chunk's rows
  const float** h_before;     // of the chunk's rows: the state before
  void *packed_x, *packed_h;  // x and h_before of the chunk
  float* dh[2];               // cooperative: of even and odd steps
  const float* zeros;         // units
  float* thread_scratch;      // for each thread
  int64_t thread_scratch_size;
  char* packed_left;  // for each thread: left-hand rows
  int64_t packed_left_size;
  const float** row_pointers;  // for each thread: to the rows of a matrix that it packs
  int64_t row_pointer_count;
  double* totals;  // for each thread: ParamGradSums summed over chunks
  Barrier& barrier;

  struct ThreadScratch {
    float *sums, *rows, *dc, *dh_direct, *dp, *dq;
    void* left;
  };
  static int64_t scratch_row(const Layer& layer) { return 2 * layer.gate_units + 2 * layer.units; }
  static int64_t thread_scratch_size_of(const nw_recurrent& a, const Layer& layer, bool cooperative) {
    const int64_t state = a.batch * layer.units;
    const int64_t size = ParamGradSums::size(layer) + row_block * scratch_row(layer) +
                         (cooperative ? 2 * state + (a.batch + row_block) * layer.gate_units : 0);
    return (size + 15) / 16 * 16;
  }
  ThreadScratch scratch_of(ThreadShare share) const {
    ThreadScratch scratch;
    scratch.sums = thread_scratch + share.index * thread_scratch_size;
    scratch.rows = scratch.sums + ParamGradSums::size(layer);
    scratch.dc = scratch.rows + row_block * scratch_row(layer);
    scratch.dh_direct = scratch.dc + a.batch * layer.units;
    scratch.dp = scratch.dh_direct + a.batch * layer.units;
    scratch.dq = scratch.dp + row_block * layer.gate_units;
    scratch.left = packed_left + share.index * packed_left_size;
    return scratch;
  }

  void run(ThreadShare share) const {
    const ThreadScratch scratch = scratch_of(share);
    double* total = totals + share.index * ParamGradSums::size(layer);
    for (int64_t i = 0; i < ParamGradSums::size(layer); ++i) total[i] = 0;
    const int64_t state = a.batch * layer.units;
    if (share.cooperative) {
      if (share.index == 0) {
        std::memcpy(dh[0], args.dh, size_t(state) * sizeof(float));
        std::memcpy(dh[1], args.dh, size_t(state) * sizeof(float));
      }
      if (args.dc) std::memcpy(scratch.dc, args.dc, size_t(state) * sizeof(float));
    }
    const int index = share.index, count = share.count;
    P::begin();
    if (args.dx && !small_input) pack(static_cast<const float*>(a.weight_ih), weight_ih, index, count);
    pack(static_cast<const float*>(a.weight_hh), weight_hh, index, count);
    barrier.wait(count);
    for (int64_t end = a.steps; end > 0; end -= chunk) {
      const int64_t s = end > chunk ? end - chunk : 0;
      for (int64_t i = 0; i < ParamGradSums::size(layer); ++i) scratch.sums[i] = 0.f;
      for (int64_t t = end; t-- > s;) step(share, scratch, t, rows.first(s, end));
      for (int64_t i = 0; i < ParamGradSums::size(layer); ++i) total[i] += scratch.sums[i];
      barrier.wait(count);
      products(share, scratch, s, end);
      barrier.wait(count);
    }
    P::end();
    if (share.cooperative && index == 0) {
      std::memcpy(args.dh, dh[1], size_t(state) * sizeof(float));
      if (args.dc) std::memcpy(args.dc, scratch.dc, size_t(state) * sizeof(float));
    }
  }

  // Cooperative threads keep dh of step s in dh[s & 1]; that of step -1, the gradient of h0, is then in dh[1].
  void step(ThreadShare share, const ThreadScratch& scratch, int64_t s, int64_t chunk_first) const {
    const int64_t n = share.sample_count(rows.samples(s)), start = rows.start(s), units = layer.units,
                  gate_units = layer.gate_units;
    const int64_t first = share.first(), stride = share.stride(), past = first + n * stride;
    const int64_t before = s > 0 ? rows.start(s - 1) : 0;
    const bool writes = share.writes_outputs(), cooperative = share.cooperative;
    float* dh_now = cooperative ? dh[s & 1] : args.dh;
    float* dh_before = cooperative ? dh[(s & 1) ^ 1] : args.dh;
    float* dc = cooperative ? scratch.dc : args.dc;
    float* dq_first = writes ? dq + (start - chunk_first) * gate_units : scratch.dq;
    const float* output = static_cast<const float*>(a.output);
    const float* doutput = static_cast<const float*>(args.doutput);
    const float* x = static_cast<const float*>(a.x);
    for (int64_t from = 0; from < n; from += row_block) {
      BackwardRow block[row_block];
      const int count = int(n - from < row_block ? n - from : row_block);
      for (int r = 0; r < count; ++r) {
        const int64_t i = first + (from + r) * stride, row = start + i, next = i + row_block * stride;
        const bool is_reset = a.reset && a.reset[row];
        const float* h = is_reset ? zeros : s > 0 ? output + (before + i) * units : a.h0 + i * units;
        const float* c = is_reset || !a.cells ? zeros : s > 0 ? a.cells + (before + i) * units : a.c0 + i * units;
        float* dq_row = dq_first + i * gate_units;
        float* dx = static_cast<float*>(args.dx);
        float* thread_dp = scratch.dp + r * gate_units;
        block[r] = {
            .in = {.p = separate && !small_input ? a.input_terms + row * gate_units : nullptr,
                   .x = x + row * a.inputs,
                   .rstd = nullptr},
            .q = a.hidden_terms ? a.hidden_terms + row * gate_units : nullptr,
            .stats = a.stats ? a.stats + row * layer.stat_width : nullptr,
            .h_before = h,
            .c_before = c,
            .h = output + row * units,
            .cell = a.cells ? a.cells + row * units : nullptr,
            .doutput = doutput ? doutput + row * units : nullptr,
            .dh = dh_now + i * units,
            .dh_direct = cooperative ? scratch.dh_direct + i * units : dh_now + i * units,
            .dc = dc ? dc + i * units : nullptr,
            .dp = !separate                ? dq_row
                  : !small_input && writes ? dp + (row - chunk_first) * gate_units
                                           : thread_dp,
            .dq = dq_row,
            .dx = writes && small_input && dx ? dx + row * a.inputs : nullptr,
            .scratch = scratch.rows + r * scratch_row(layer),
            .prefetch_offset = (next < past ? row_block * stride
                                : s > 0     ? before + first + r * stride - row
                                            : 0) *
                               gate_units,
        };
        if (writes) h_before[row - chunk_first] = h;
      }
      cell(layer, block, count, ParamGradSums(layer, scratch.sums));
    }
    const int64_t panels = panel_count_of<P>(units);
    const int64_t from = share.panel_begin(panels), last = share.panel_end(panels);
    const int64_t column = from * P::panel_width;
    const int64_t width = (last * P::panel_width < units ? last * P::panel_width : units) - column;
    const bool add = a.cell == NW_GRU;
    if (add && cooperative) {
      for (int64_t i = 0; i < n; ++i) {
        std::memcpy(dh_before + i * units + column, scratch.dh_direct + i * units + column, size_t(width) * sizeof *dc);
      }
    }
    multiply_rows<P>(n, dq_first + first * gate_units, stride * gate_units, weight_hh, from, last,
                     dh_before + first * units, stride * units, add, scratch.left, s & 1);
    if (a.reset) {
      for (int64_t i = first; i < past; i += stride) {
        if (!a.reset[start + i]) continue;
        std::memset(dh_before + i * units + column, 0, size_t(width) * sizeof *dc);
        if (dc) std::memset(dc + i * units, 0, size_t(units) * sizeof *dc);
      }
    }
    if (cooperative) barrier.wait(share.count);
  }

  // One thread's share of packing a row-major matrix.
  void pack(const float* b, const PackedMatrix& to, int index, int count) const {
    const float** rows = row_pointers + index * row_pointer_count;
    for (int64_t i = 0; i < to.depth; ++i) rows[i] = b + i * to.columns;
    pack_share<P>(rows, to, index, count);
  }

  // dx of steps s .. end-1, and what these steps add to the gradients of the weights.
  void products(ThreadShare share, const ThreadScratch& scratch, int64_t s, int64_t end) const {
    const int64_t first = rows.first(s, end), n = rows.count(s, end);
    const int index = share.index, count = share.count;
    const bool add = end < a.steps;
    const float* x = static_cast<const float*>(a.x) + first * a.inputs;
    if (args.dweight_ih && !small_input) pack(x, {packed_x, n, a.inputs}, index, count);
    if (args.dweight_hh) pack_share<P>(h_before, {packed_h, n, layer.units}, index, count);
    barrier.wait(count);
    const int64_t blocks = (layer.gate_units + left_block - 1) / left_block;
    const int64_t from = blocks * index / count * left_block;
    const int64_t last = blocks * (index + 1) / count * left_block;
    const int64_t to = last < layer.gate_units ? last : layer.gate_units;
    if (args.dweight_ih && !small_input) {
      P::multiply_transposed(dp, layer.gate_units, packed_x, n, a.inputs, from, to, args.dweight_ih, a.inputs, add,
                             scratch.left);
    }
    if (args.dweight_hh) {
      P::multiply_transposed(dq, layer.gate_units, packed_h, n, layer.units, from, to, args.dweight_hh, layer.units,
                             add, scratch.left);
    }
    if (args.dx && !small_input) {
      const int64_t mine = n * index / count, past = n * (index + 1) / count;
      float* dx = static_cast<float*>(args.dx) + first * a.inputs;
      // As many rows of dp as stay in the cache while the panels pass; multiply_rows divides rows that it packs by
      // itself.
      const int64_t block = P::left_in_place ? 64 : past - mine;
      for (int64_t row = mine; row < past; row += block) {
        multiply_rows<P>(past - row < block ? past - row : block, dp + row * layer.gate_units, layer.gate_units,
                         weight_ih, 0, panel_count_of<P>(a.inputs), dx + row * a.inputs, a.inputs, false, scratch.left);
      }
    }
  }
};

// to[i] = the sum over threads of their total number offset + i, where each thread has `totals_per_thread`.
void sum_over_threads(float* to, const double* totals, int64_t offset, int64_t n, int64_t totals_per_thread,
                      int threads) {
  if (!to) return;
  for (int64_t i = 0; i < n; ++i) {
    double sum = 0;
    for (int t = 0; t < threads; ++t) sum += totals[t * totals_per_thread + offset + i];
    to[i] = float(sum);
  }
}

void zero_fill_if_given(float* to, int64_t n) {
  if (to && n > 0) std::memset(to, 0, size_t(n) * sizeof *to);
}

bool has_all_saved(const nw_recurrent& a) {
  int64_t widths[4];
  saved_widths(a, widths);
  return a.rows == 0 || ((!widths[0] || a.input_terms) && (!widths[1] || a.hidden_terms) && (!widths[2] || a.cells) &&
                         (!widths[3] || a.stats));
}

template <class P> int run_backward(const nw_recurrent_backward_args* args) {
  const nw_recurrent& a = args->layer;
  const bool separate = has_separate_terms(a);
  const int threads = threads_for(a);
  const bool cooperative = threads > 1 && use_cooperative(a, threads);
  const int64_t chunk = chunk_steps(a, chunk_rows), max_rows = chunk * a.batch;
  StepRows rows(a);
  ScratchArena memory;
  float* vectors = memory.floats(prepared_size(a));
  if (memory.failed() || !rows) return NW_OUT_OF_MEMORY;
  const Layer layer = prepare(a, vectors);
  const bool small_input = has_small_input(a);
  void* panels_ih = args->dx && !small_input ? memory.bytes(P::packed_bytes(layer.gate_units, a.inputs)) : nullptr;
  void* panels_hh = memory.bytes(P::packed_bytes(layer.gate_units, layer.units));
  float* dq = memory.floats(max_rows * layer.gate_units);
  float* dp = separate && !small_input ? memory.floats(max_rows * layer.gate_units) : dq;
  const int64_t pointer_size = int64_t(sizeof(float*)),
                row_pointer_count = layer.gate_units < max_rows ? max_rows : layer.gate_units;
  const float** h_before = static_cast<const float**>(memory.bytes(max_rows * pointer_size));
  const float** row_pointers = static_cast<const float**>(memory.bytes(threads * row_pointer_count * pointer_size));
  void* packed_x = small_input ? nullptr : memory.bytes(P::packed_bytes(max_rows, a.inputs));
  void* packed_h = memory.bytes(P::packed_bytes(max_rows, layer.units));
  float* dh = cooperative ? memory.floats(2 * a.batch * layer.units) : nullptr;
  float* zeros = memory.floats(layer.units);
  const int64_t thread_scratch_size = Backward<P>::thread_scratch_size_of(a, layer, cooperative);
  float* thread_scratch = memory.floats(threads * thread_scratch_size);
  const int64_t left_chunk = left_chunk_bytes<P>(layer.gate_units), transposed = P::transposed_bytes(max_rows);
  const int64_t packed_left_size = round_up_to_cache_lines(left_chunk < transposed ? transposed : left_chunk);
  char* packed_left = static_cast<char*>(memory.bytes(threads * packed_left_size));
  Scratch<double> totals(threads * ParamGradSums::size(layer));
  if (memory.failed() || !totals) return NW_OUT_OF_MEMORY;
  zero_fill_if_given(zeros, layer.units);
  Barrier barrier;
  const Backward<P> backward{
      .args = *args,
      .a = a,
      .layer = layer,
      .rows = rows,
      .cell = backward_cell(a),
      .chunk = chunk,
      .separate = separate,
      .small_input = small_input,
      .weight_ih = {.panels = panels_ih, .depth = layer.gate_units, .columns = a.inputs},
      .weight_hh = {.panels = panels_hh, .depth = layer.gate_units, .columns = layer.units},
      .dp = dp,
      .dq = dq,
      .h_before = h_before,
      .packed_x = packed_x,
      .packed_h = packed_h,
      .dh = {dh, cooperative ? dh + a.batch * layer.units : nullptr},
      .zeros = zeros,
      .thread_scratch = thread_scratch,
      .thread_scratch_size = thread_scratch_size,
      .packed_left = packed_left,
      .packed_left_size = packed_left_size,
      .row_pointers = row_pointers,
      .row_pointer_count = row_pointer_count,
      .totals = totals.get(),
      .barrier = barrier,
  };
  int threads_used = 1;
  if (a.rows > 0) {
    parallel_region(threads, [&](int index, int count) {
      if (index == 0) threads_used = cooperative && count > 1 ? 1 : count;
      backward.run({.index = index, .count = count, .cooperative = cooperative && count > 1});
    });
  } else {
    for (int64_t i = 0; i < ParamGradSums::size(layer); ++i) totals.get()[i] = 0;
    zero_fill_if_given(args->dweight_ih, layer.gate_units * a.inputs);
    zero_fill_if_given(args->dweight_hh, layer.gate_units * layer.units);
  }
  const int64_t totals_per_thread = ParamGradSums::size(layer), n = layer.gate_units;
  sum_over_threads(args->dbias_ih, totals.get(), 0, n, totals_per_thread, threads_used);
  sum_over_threads(args->dbias_hh, totals.get(), layer.reset_on_hidden ? n : 0, n, totals_per_thread, threads_used);
  if (!small_input) sum_over_threads(args->dgain_ih, totals.get(), 2 * n, n, totals_per_thread, threads_used);
  sum_over_threads(args->dgain_hh, totals.get(), 3 * n, n, totals_per_thread, threads_used);
  sum_over_threads(args->dbias_inner, totals.get(), 4 * n, n, totals_per_thread, threads_used);
  sum_over_threads(args->dgain_c, totals.get(), 5 * n, layer.units, totals_per_thread, threads_used);
  sum_over_threads(args->dbias_c, totals.get(), 5 * n + layer.units, layer.units, totals_per_thread, threads_used);
  if (small_input) {
    double* sum = totals.get();
    for (int64_t i = ParamGradSums::small_input_offset(layer); i < totals_per_thread; ++i) {
      for (int t = 1; t < threads_used; ++t) sum[i] += sum[t * totals_per_thread + i];
    }
    const double* products = sum + ParamGradSums::small_input_offset(layer);
    finish_small_input(layer, products, products + max_small_inputs * n, args->dweight_ih, args->dgain_ih);
  }
  return NW_OK;
}

}  // namespace

int recurrent_backward(const nw_recurrent_backward_args* args, bool use_amx) {
  if (!well_formed(args->layer) || !has_all_saved(args->layer)) return NW_BAD_ARGUMENT;
  if (of_samples(args->layer)) return batch_backward(args, use_amx);
  return with_precision(args->layer.products, use_amx,
                        [&](auto precision) { return run_backward<decltype(precision)>(args); });
}

}  // namespace NW_ISA
