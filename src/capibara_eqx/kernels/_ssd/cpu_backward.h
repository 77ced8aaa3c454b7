// The dual backward over the tokens of one head of one row, chunk by chunk from the last
// to the first. The states of a chunk are computed again from the saved one that entered
// it.
#pragma once

#include "cpu_heads.h"

namespace capibara {

// Of the results, and the states that `ForwardResults` has saved.
template <typename T>
struct Cotangents {
  const T *saved, *y, *final_state;
};

// `B` and `C` are summed over the heads of each part: (rows, parts, seq, n_groups,
// d_state). What is absent is null.
template <typename T>
struct BackwardResults {
  int64_t parts;
  T *x, *log_decay, *coefficient, *B, *C, *initial_state;
};

// What is read and written at the tokens of a run, from its first on, in one block.
// `entering` is x times the coefficient, `dx` its cotangent.
template <typename T>
struct Run {
  const T *decays, *entering, *dy;
  const T *B, *C;
  int64_t stride_B, stride_C;
  T *dB, *dC;
  int64_t stride;  // of dB and dC
  Lanes<T>*dx, *ddecay;
};

// The states of a run from the one that enters it: `states` gets that one and those after
// every token.
template <typename T>
void refill(int64_t count, const Run<T>& run, const T* state, int64_t columns,
            Lanes<T>* states) {
  using V = Lanes<T>;
  V h[kRows][kColumns];
  for (int p = 0; p < kRows; ++p) {
    for (int k = 0; k < kColumns; ++k) {
      h[p][k] = load(state + p * columns + k * kLanes<T>);
      states[p * kColumns + k] = h[p][k];
    }
  }
  for (int64_t t = 0; t < count; ++t) {
    V* after = states + (t + 1) * kRows * kColumns;
    const V decay = all<T>(run.decays[t]);
    V b[kColumns];
    for (int k = 0; k < kColumns; ++k) {
      b[k] = load(run.B + t * run.stride_B + k * kLanes<T>);
    }
#pragma GCC unroll 4
    for (int p = 0; p < kRows; ++p) {
      const V x = all<T>(run.entering[t * kRows + p]);
#pragma GCC unroll 4
      for (int k = 0; k < kColumns; ++k) {
        h[p][k] = decay * h[p][k] + x * b[k];
        after[p * kColumns + k] = h[p][k];
      }
    }
  }
}

// Walk back through a run. With l_t the cotangent of the state after token t, d_t = e^a_t
// and x_t what enters,
//   l_t = dy_t C_t^T + d_(t+1) l_(t+1),  dB_t += l_t^T x_t,  dC_t += h_t^T dy_t,
//   dx_t += l_t B_t,  dd_t += <l_t, h_(t-1)>.
// `carry` is d l of the token after the run; it becomes that of the first token in it.
template <typename T>
void walk_back(int64_t count, const Run<T>& run, const Lanes<T>* states, T* carry,
               int64_t columns) {
  using V = Lanes<T>;
  V l[kRows][kColumns];
  for (int p = 0; p < kRows; ++p) {
    for (int k = 0; k < kColumns; ++k) l[p][k] = load(carry + p * columns + k * kLanes<T>);
  }
  for (int64_t t = count - 1; t >= 0; --t) {
    const V* before = states + t * kRows * kColumns;
    const V* after = before + kRows * kColumns;
    const V decay = all<T>(run.decays[t]);
    V dx[kRows] = {}, ddecay[kRows] = {};  // apart, lest one sum wait for another
#pragma GCC unroll 4
    for (int k = 0; k < kColumns; ++k) {
      const V b = load(run.B + t * run.stride_B + k * kLanes<T>);
      const V c = load(run.C + t * run.stride_C + k * kLanes<T>);
      T* const at_B = run.dB + t * run.stride + k * kLanes<T>;
      T* const at_C = run.dC + t * run.stride + k * kLanes<T>;
      V dB = load(at_B), dC = load(at_C);
#pragma GCC unroll 4
      for (int p = 0; p < kRows; ++p) {
        const V dy = all<T>(run.dy[t * kRows + p]);
        l[p][k] += dy * c;
        dB += all<T>(run.entering[t * kRows + p]) * l[p][k];
        dC += dy * after[p * kColumns + k];
        dx[p] += l[p][k] * b;
        ddecay[p] += l[p][k] * before[p * kColumns + k];
        l[p][k] *= decay;
      }
      store(at_B, dB);
      store(at_C, dC);
    }
    for (int p = 0; p < kRows; ++p) run.dx[t * kRows + p] += dx[p];
    run.ddecay[t] += (ddecay[0] + ddecay[1]) + (ddecay[2] + ddecay[3]);
  }
  for (int p = 0; p < kRows; ++p) {
    for (int k = 0; k < kColumns; ++k) store(carry + p * columns + k * kLanes<T>, l[p][k]);
  }
}

template <typename T>
struct BackwardScratch {
  T *state, *carry, *nothing;
  T *decays, *through, *x, *entering, *dy, *sums;
  T *B, *C, *dB, *dC;
  Lanes<T> *states, *dx, *ddecay;

  static size_t tokens(const Dual<T>& dual) { return dual.chunk + kLanes<T>; }

  static size_t bytes(const Dual<T>& dual) {
    const size_t count = tokens(dual), maps = 4 * Maps<T>::size(dual);
    const size_t states = 2 * dual.padded_state() + kRows * dual.padded_columns();
    return (states + maps + (2 + 4 * kRows) * count) * sizeof(T) +
           ((count + 1) * kRows * kColumns + count * (kRows + 1)) * sizeof(Lanes<T>);
  }

  BackwardScratch(const Dual<T>& dual, Scratch& scratch) {
    const size_t count = tokens(dual);
    states = scratch.take<Lanes<T>>((count + 1) * kRows * kColumns);
    dx = scratch.take<Lanes<T>>(count * kRows);
    ddecay = scratch.take<Lanes<T>>(count);
    for (T** maps : {&B, &C, &dB, &dC}) {
      *maps = scratch.take<T>(Maps<T>::size(dual));
    }
    for (T** whole : {&state, &carry}) *whole = scratch.take<T>(dual.padded_state());
    nothing = scratch.take<T>(kRows * dual.padded_columns());
    std::fill_n(nothing, kRows * dual.padded_columns(), T(0));
    for (T** each : {&x, &entering, &dy, &sums}) *each = scratch.take<T>(count * kRows);
    for (T** one : {&decays, &through}) *one = scratch.take<T>(count);
  }
};

// One head of one row, and the chunk that it is in.
template <typename T>
struct Place {
  const Dual<T>& dual;
  int64_t row, head, token, count;
};

// One block of a head's state through one chunk. Resets part the chunk into runs: one
// that begins with a reset starts from nothing and hands nothing back.
template <typename T>
void backward_block(const Place<T>& place, int64_t first, int64_t n, const Maps<T>& B,
                    const Maps<T>& C, const BackwardScratch<T>& at) {
  const int64_t columns = place.dual.padded_columns();
  T* const carry = at.carry + first * columns + n;
  for (int64_t end = place.count, start; end > 0; end = start) {
    start = end - 1;
    while (start > 0 && !place.dual.is_reset(place.row, place.token + start)) --start;
    const bool fresh = place.dual.is_reset(place.row, place.token + start);
    const T* const entry = fresh ? at.nothing : at.state + first * columns + n;
    const Run<T> run{at.decays + start,
                     at.entering + start * kRows,
                     at.dy + start * kRows,
                     B.at + start * B.stride + n,
                     C.at + start * C.stride + n,
                     B.stride,
                     C.stride,
                     at.dB + start * columns + n,
                     at.dC + start * columns + n,
                     columns,
                     at.dx + start * kRows,
                     at.ddecay + start};
    refill<T>(end - start, run, entry, columns, at.states);
    walk_back<T>(end - start, run, at.states, carry, columns);
    if (!fresh) continue;
    for (int p = 0; p < kRows; ++p) std::fill_n(carry + p * columns, kBlock<T>, T(0));
  }
}

// The cotangents of some channels of x, and `through`, what they add to that of the
// coefficient.
template <typename T>
void finish_rows(const Place<T>& place, int64_t first, const BackwardScratch<T>& at,
                 const BackwardResults<T>& results) {
  const auto& [dual, row, head, token, count] = place;
  sum_each<T>(at.dx, count * kRows, at.sums);
  for (int64_t t = 0; t < count; ++t) {
    const T factor = coefficient(dual, row, head, token + t);
    for (int64_t p = 0; p < kRows; ++p) {
      at.through[t] += at.sums[t * kRows + p] * at.x[t * kRows + p];
      at.sums[t * kRows + p] *= factor;
    }
  }
  write_rows(dual, at.sums, row, head, token, count, first, results.x);
}

// Add dB or dC of a head to that of its part.
template <typename T>
void add_maps(const Place<T>& place, const T* from, T* part) {
  const auto& [dual, row, head, token, count] = place;
  const int64_t columns = dual.padded_columns();
  for (int64_t t = 0; t < count; ++t) {
    T* to = part + ((token + t) * dual.n_groups + dual.group(head)) * dual.d_state;
    for (int64_t n = 0; n < dual.d_state; ++n) to[n] += from[t * columns + n];
  }
}

template <typename T>
void backward_chunk(const Place<T>& place, const Cotangents<T>& cotangents,
                    const BackwardScratch<T>& at, T* part_B, T* part_C,
                    const BackwardResults<T>& results) {
  const auto& [dual, row, head, token, count] = place;
  const int64_t columns = dual.padded_columns(), group = dual.group(head);
  const Maps<T> B(dual, dual.B, row, group, token, count, at.B);
  const Maps<T> C(dual, dual.C, row, group, token, count, at.C);
  read_decays(dual, row, head, token, count, at.decays);
  for (T* sums : {at.dB, at.dC}) std::fill_n(sums, count * columns, T(0));
  std::fill_n(at.ddecay, count, Lanes<T>{});
  std::fill_n(at.through, count, T(0));
  for (int64_t first = 0; first < dual.head_dim; first += kRows) {
    read_rows(dual, dual.x, row, head, token, count, first, false, at.x);
    read_rows(dual, dual.x, row, head, token, count, first, true, at.entering);
    read_rows(dual, cotangents.y, row, head, token, count, first, false, at.dy);
    std::fill_n(at.dx, count * kRows, Lanes<T>{});
    for (int64_t n = 0; n < columns; n += kBlock<T>) {
      backward_block(place, first, n, B, C, at);
    }
    finish_rows(place, first, at, results);
  }
  add_maps(place, at.dB, part_B);
  add_maps(place, at.dC, part_C);
  sum_each<T>(at.ddecay, count, at.sums);
  for (int64_t t = 0; t < count; ++t) {
    const int64_t i = (row * dual.seq + token + t) * dual.n_heads + head;
    results.log_decay[i] = at.decays[t] * at.sums[t];
    if (results.coefficient != nullptr) results.coefficient[i] = at.through[t];
  }
}

// A part is a run of neighbouring heads of one group, whose sums are taken in order: the
// result does not depend on which thread does what.
template <typename T>
void backward_part(const Dual<T>& dual, int64_t row, int64_t part,
                   const Cotangents<T>& cotangents, const BackwardResults<T>& results) {
  const int64_t sums = dual.seq * dual.n_groups * dual.d_state;
  const int64_t group = part / results.parts, own = part % results.parts;
  T* const B = results.B + (row * results.parts + own) * sums;
  T* const C = results.C + (row * results.parts + own) * sums;
  for (int64_t t = 0; t < dual.seq; ++t) {
    const int64_t at = (t * dual.n_groups + group) * dual.d_state;
    for (T* maps : {B, C}) std::fill_n(maps + at, dual.d_state, T(0));
  }
  Scratch& scratch = Scratch::of_this_thread();
  scratch.reserve(BackwardScratch<T>::bytes(dual));
  const BackwardScratch<T> at(dual, scratch);
  const int64_t size = dual.state_size();
  const int64_t heads = dual.n_heads / dual.n_groups;
  const int64_t end = group * heads + heads * (own + 1) / results.parts;
  for (int64_t head = group * heads + heads * own / results.parts; head < end; ++head) {
    const int64_t index = row * dual.n_heads + head;
    read_state(dual, cotangents.final_state + index * size, at.carry);
    for (int64_t chunk = dual.chunks() - 1; chunk >= 0; --chunk) {
      const int64_t token = chunk * dual.chunk;
      const int64_t saved = (row * dual.chunks() + chunk) * dual.n_heads + head;
      read_state(dual, cotangents.saved + saved * size, at.state);
      const Place<T> place{dual, row, head, token, std::min(dual.chunk, dual.seq - token)};
      backward_chunk(place, cotangents, at, B, C, results);
    }
    if (results.initial_state != nullptr) {
      write_state(dual, at.carry, results.initial_state + index * size);
    }
  }
}

}  // namespace capibara
