// The backward pass of a recurrent layer, a chunk of steps at a time from the last: step by step through the cell and
// W_hh; then, while the chunk's gradients are in the cache, the products that give dx and the weights' gradients.
#include "kernel_table.h"
#include "rnn/cells_backward.h"

namespace NW_ISA {
namespace {

// A chunk's gradients take memory, 1 MiB at 128 rows of 1024 gates, and are read again from the cache. With fewer rows
// the sums of the weights' gradients, which each chunk reads and writes, begin to count: 64 rows take 4 to 7 % longer.
constexpr int64_t chunk_rows = 128;

template <class P> struct Backward {
  const nw_recurrent_backward_args& args;
  const nw_recurrent& a;
  const Layer& k;
  const Rows& rows;
  BackwardCell cell;
  int64_t chunk;  // steps
  bool apart, thin;       // p and q are apart; the cells multiply the inputs
  Packed weight_ih, weight_hh;
  float *dp, *dq;                // of the chunk's rows
  const float** h_before;        // of the chunk's rows: the state before
  void *right_x, *right_h;       // x and h_before of the chunk in panels
  float *dh[2];           // together: of even and odd steps
  const float* zeros;     // units
  float* private_memory;  // for each thread
  int64_t private_size;
  char* left;             // for each thread: left-hand rows
  int64_t left_size;
  const float** listed;   // for each thread: where the rows lie of a matrix that it packs
  int64_t list_size;
  double* totals;         // for each thread, sums over chunks
  Barrier& barrier;

  struct Mine {
    float *sums, *scratch, *dc, *direct, *dp, *dq;
    void* left;
  };
  static int64_t scratch_row(const Layer& k) { return 2 * k.stacked + 2 * k.units; }
  static int64_t size_of_private(const nw_recurrent& a, const Layer& k, bool together) {
    const int64_t state = a.batch * k.units;
    const int64_t size = Sums::size(k) + row_block * scratch_row(k) +
                         (together ? 2 * state + (a.batch + row_block) * k.stacked : 0);
    return (size + 15) / 16 * 16;
  }
  Mine mine(Share share) const {
    Mine m;
    m.sums = private_memory + share.index * private_size;
    m.scratch = m.sums + Sums::size(k);
    m.dc = m.scratch + row_block * scratch_row(k);
    m.direct = m.dc + a.batch * k.units;
    m.dp = m.direct + a.batch * k.units;
    m.dq = m.dp + row_block * k.stacked;
    m.left = left + share.index * left_size;
    return m;
  }

  void run(Share share) const {
    const Mine m = mine(share);
    double* total = totals + share.index * Sums::size(k);
    for (int64_t i = 0; i < Sums::size(k); ++i) total[i] = 0;
    const int64_t state = a.batch * k.units;
    if (share.together) {
      if (share.index == 0) {
        std::memcpy(dh[0], args.dh, size_t(state) * sizeof(float));
        std::memcpy(dh[1], args.dh, size_t(state) * sizeof(float));
      }
      if (args.dc) std::memcpy(m.dc, args.dc, size_t(state) * sizeof(float));
    }
    const int index = share.index, count = share.count;
    P::begin();
    if (args.dx && !thin) pack(static_cast<const float*>(a.weight_ih), weight_ih, index, count);
    pack(static_cast<const float*>(a.weight_hh), weight_hh, index, count);
    barrier.wait(count);
    for (int64_t end = a.steps; end > 0; end -= chunk) {
      const int64_t s = end > chunk ? end - chunk : 0;
      for (int64_t i = 0; i < Sums::size(k); ++i) m.sums[i] = 0.f;
      for (int64_t t = end; t-- > s;) step(share, m, t, rows.first(s, end));
      for (int64_t i = 0; i < Sums::size(k); ++i) total[i] += m.sums[i];
      barrier.wait(count);
      products(share, m, s, end);
      barrier.wait(count);
    }
    P::end();
    if (share.together && index == 0) {
      std::memcpy(args.dh, dh[1], size_t(state) * sizeof(float));
      if (args.dc) std::memcpy(args.dc, m.dc, size_t(state) * sizeof(float));
    }
  }

  // dh of step s lies in dh[s & 1] when threads work together; that of step -1, the gradient of h0, in dh[1].
  void step(Share share, const Mine& m, int64_t s, int64_t chunk_first) const {
    const int64_t n = share.of(rows.samples(s)), start = rows.start(s), units = k.units, stacked = k.stacked;
    const int64_t first = share.first(), stride = share.stride(), past = first + n * stride;
    const int64_t before = s > 0 ? rows.start(s - 1) : 0;
    const bool writes = share.writes(), by_step = share.together;
    float* dh_now = by_step ? dh[s & 1] : args.dh;
    float* dh_before = by_step ? dh[(s & 1) ^ 1] : args.dh;
    float* dc = by_step ? m.dc : args.dc;
    float* dq_first = writes ? dq + (start - chunk_first) * stacked : m.dq;
    const float* output = static_cast<const float*>(a.output);
    const float* doutput = static_cast<const float*>(args.doutput);
    const float* x = static_cast<const float*>(a.x);
    for (int64_t from = 0; from < n; from += row_block) {
      BackwardRow block[row_block];
      const int count = int(n - from < row_block ? n - from : row_block);
      for (int r = 0; r < count; ++r) {
        const int64_t i = first + (from + r) * stride, row = start + i, next = i + row_block * stride;
        const bool fresh = a.reset && a.reset[row];
        const float* h = fresh ? zeros : s > 0 ? output + (before + i) * units : a.h0 + i * units;
        const float* c = fresh || !a.cells ? zeros : s > 0 ? a.cells + (before + i) * units : a.c0 + i * units;
        float* dq_row = dq_first + i * stacked;
        float* dx = static_cast<float*>(args.dx);
        block[r] = {{apart && !thin ? a.input_terms + row * stacked : nullptr, x + row * a.inputs, nullptr},
                    a.hidden_terms ? a.hidden_terms + row * stacked : nullptr,
                    a.stats ? a.stats + row * k.stat_width : nullptr,
                    h,
                    c,
                    output + row * units,
                    a.cells ? a.cells + row * units : nullptr,
                    doutput ? doutput + row * units : nullptr,
                    dh_now + i * units,
                    by_step ? m.direct + i * units : dh_now + i * units,
                    dc ? dc + i * units : nullptr,
                    !apart ? dq_row : !thin && writes ? dp + (row - chunk_first) * stacked : m.dp + r * stacked,
                    dq_row,
                    writes && thin && dx ? dx + row * a.inputs : nullptr,
                    m.scratch + r * scratch_row(k),
                    (next < past ? row_block * stride : s > 0 ? before + first + r * stride - row : 0) * stacked};
        if (writes) h_before[row - chunk_first] = h;
      }
      cell(k, block, count, Sums(k, m.sums));
    }
    const int64_t panels = panels_of<P>(units);
    const int64_t from = share.panel_begin(panels), last = share.panel_end(panels);
    const int64_t column = from * P::panel_width;
    const int64_t width = (last * P::panel_width < units ? last * P::panel_width : units) - column;
    const bool add = a.cell == NW_GRU;
    if (add && by_step) {
      for (int64_t i = 0; i < n; ++i) {
        std::memcpy(dh_before + i * units + column, m.direct + i * units + column, size_t(width) * sizeof *dc);
      }
    }
    multiply_rows<P>(n, dq_first + first * stacked, stride * stacked, weight_hh, from, last,
                     dh_before + first * units, stride * units, add, m.left, s & 1);
    if (a.reset) {
      for (int64_t i = first; i < past; i += stride) {
        if (!a.reset[start + i]) continue;
        std::memset(dh_before + i * units + column, 0, size_t(width) * sizeof *dc);
        if (dc) std::memset(dc + i * units, 0, size_t(units) * sizeof *dc);
      }
    }
    if (by_step) barrier.wait(share.count);
  }

  // One thread's part of packing a row-major matrix.
  void pack(const float* b, const Packed& to, int index, int count) const {
    const float** rows = listed + index * list_size;
    for (int64_t k = 0; k < to.depth; ++k) rows[k] = b + k * to.columns;
    pack_shared<P>(rows, to, index, count);
  }

  // dx and what the steps s .. end-1 add to the gradients of the weights.
  void products(Share share, const Mine& m, int64_t s, int64_t end) const {
    const int64_t first = rows.first(s, end), n = rows.count(s, end);
    const int index = share.index, count = share.count;
    const bool add = end < a.steps;
    const float* x = static_cast<const float*>(a.x) + first * a.inputs;
    if (args.dweight_ih && !thin) pack(x, {right_x, n, a.inputs}, index, count);
    if (args.dweight_hh) pack_shared<P>(h_before, {right_h, n, k.units}, index, count);
    barrier.wait(count);
    const int64_t blocks = (k.stacked + left_block - 1) / left_block;
    const int64_t from = blocks * index / count * left_block;
    const int64_t last = blocks * (index + 1) / count * left_block;
    const int64_t to = last < k.stacked ? last : k.stacked;
    if (args.dweight_ih && !thin) {
      P::multiply_transposed(dp, k.stacked, right_x, n, a.inputs, from, to, args.dweight_ih, a.inputs, add, m.left);
    }
    if (args.dweight_hh) {
      P::multiply_transposed(dq, k.stacked, right_h, n, k.units, from, to, args.dweight_hh, k.units, add, m.left);
    }
    if (args.dx && !thin) {
      const int64_t mine = n * index / count, past = n * (index + 1) / count;
      float* dx = static_cast<float*>(args.dx) + first * a.inputs;
      // Rows of dp that stay in the cache while the panels pass; those that are made ready are cut so in any case.
      const int64_t block = P::as_they_are ? 64 : past - mine;
      for (int64_t row = mine; row < past; row += block) {
        multiply_rows<P>(past - row < block ? past - row : block, dp + row * k.stacked, k.stacked, weight_ih, 0,
                         panels_of<P>(a.inputs), dx + row * a.inputs, a.inputs, false, m.left);
      }
    }
  }
};

void fill(float* to, const double* totals, int64_t offset, int64_t n, int64_t each, int threads) {
  if (!to) return;
  for (int64_t i = 0; i < n; ++i) {
    double sum = 0;
    for (int t = 0; t < threads; ++t) sum += totals[t * each + offset + i];
    to[i] = float(sum);
  }
}

void zero(float* to, int64_t n) {
  if (to && n > 0) std::memset(to, 0, size_t(n) * sizeof *to);
}

bool has_all_saved(const nw_recurrent& a) {
  int64_t widths[4];
  saved_widths(a, widths);
  return a.rows == 0 || ((!widths[0] || a.input_terms) && (!widths[1] || a.hidden_terms) && (!widths[2] || a.cells) &&
                         (!widths[3] || a.stats));
}

template <class P> int backward_in(const nw_recurrent_backward_args* args) {
  const nw_recurrent& a = args->layer;
  const bool apart = terms_apart(a);
  const int threads = useful_threads(a);
  const bool together = threads > 1 && work_together(a, threads);
  const int64_t chunk = chunk_steps(a, chunk_rows), most = chunk * a.batch;
  Rows rows(a);
  Memory memory;
  float* vectors = memory.take(prepared_size(a));
  if (memory.failed() || !rows) return NW_OUT_OF_MEMORY;
  const Layer k = prepare(a, vectors);
  const bool thin = few_inputs(a);
  void* panels_x = args->dx && !thin ? memory.take_bytes(P::packed_bytes(k.stacked, a.inputs)) : nullptr;
  void* panels_h = memory.take_bytes(P::packed_bytes(k.stacked, k.units));
  float* dq = memory.take(most * k.stacked);
  float* dp = apart && !thin ? memory.take(most * k.stacked) : dq;
  const int64_t pointer = int64_t(sizeof(float*)), list_size = k.stacked < most ? most : k.stacked;
  const float** h_before = static_cast<const float**>(memory.take_bytes(most * pointer));
  const float** listed = static_cast<const float**>(memory.take_bytes(threads * list_size * pointer));
  void* right_x = thin ? nullptr : memory.take_bytes(P::packed_bytes(most, a.inputs));
  void* right_h = memory.take_bytes(P::packed_bytes(most, k.units));
  float* dh = together ? memory.take(2 * a.batch * k.units) : nullptr;
  float* zeros = memory.take(k.units);
  const int64_t private_size = Backward<P>::size_of_private(a, k, together);
  float* private_memory = memory.take(threads * private_size);
  const int64_t ready = ready_bytes<P>(k.stacked), transposed = P::transposed_bytes(most);
  const int64_t left_size = whole_lines(ready < transposed ? transposed : ready);
  char* left = static_cast<char*>(memory.take_bytes(threads * left_size));
  Scratch<double> totals(threads * Sums::size(k));
  if (memory.failed() || !totals) return NW_OUT_OF_MEMORY;
  zero(zeros, k.units);
  Barrier barrier;
  const Backward<P> backward{*args, a, k, rows, backward_cell(a), chunk, apart, thin,
                             {panels_x, k.stacked, a.inputs}, {panels_h, k.stacked, k.units}, dp, dq, h_before,
                             right_x, right_h, {dh, together ? dh + a.batch * k.units : nullptr}, zeros,
                             private_memory, private_size, left, left_size, listed, list_size, totals.get(), barrier};
  int used = 1;
  if (a.rows > 0) {
    in_team(threads, [&](int index, int count) {
      if (index == 0) used = together && count > 1 ? 1 : count;
      backward.run({index, count, together && count > 1});
    });
  } else {
    for (int64_t i = 0; i < Sums::size(k); ++i) totals.get()[i] = 0;
    zero(args->dweight_ih, k.stacked * a.inputs);
    zero(args->dweight_hh, k.stacked * k.units);
  }
  const int64_t each = Sums::size(k), n = k.stacked;
  fill(args->dbias_ih, totals.get(), 0, n, each, used);
  fill(args->dbias_hh, totals.get(), k.hidden_apart ? n : 0, n, each, used);
  if (!thin) fill(args->dgain_ih, totals.get(), 2 * n, n, each, used);
  fill(args->dgain_hh, totals.get(), 3 * n, n, each, used);
  fill(args->dbias_inner, totals.get(), 4 * n, n, each, used);
  fill(args->dgain_c, totals.get(), 5 * n, k.units, each, used);
  fill(args->dbias_c, totals.get(), 5 * n + k.units, k.units, each, used);
  if (thin) {
    double* sum = totals.get();
    for (int64_t i = Sums::thin_at(k); i < each; ++i) {
      for (int t = 1; t < used; ++t) sum[i] += sum[t * each + i];
    }
    const double* products = sum + Sums::thin_at(k);
    finish_thin(k, products, products + most_thin * n, args->dweight_ih, args->dgain_ih);
  }
  return NW_OK;
}

}  // namespace

int recurrent_backward(const nw_recurrent_backward_args* args, bool tiles) {
  if (!well_formed(args->layer) || !has_all_saved(args->layer)) return NW_BAD_ARGUMENT;
  return with_products(args->layer, tiles, [&](auto products) { return backward_in<decltype(products)>(args); });
}

}  // namespace NW_ISA
