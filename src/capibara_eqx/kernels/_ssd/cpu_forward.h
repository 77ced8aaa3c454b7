// The dual forward over the tokens of one head of one row, and by one token.
#pragma once

#include "cpu_heads.h"

namespace capibara {

template <typename T>
struct ForwardResults {
  T *y, *final_state, *saved;  // `saved` may be null
};

// The tokens of a run through one block of the state. `y` gets the products with C, added
// to what the blocks before have left there: to nothing if it is the first.
template <typename T, bool kFirst>
void advance(int64_t count, const T* decays, const T* entering, const T* B, const T* C,
             int64_t stride_B, int64_t stride_C, T* state, int64_t columns, Lanes<T>* y) {
  using V = Lanes<T>;
  V h[kRows][kColumns];
  for (int p = 0; p < kRows; ++p) {
    for (int k = 0; k < kColumns; ++k) h[p][k] = load(state + p * columns + k * kLanes<T>);
  }
  for (int64_t t = 0; t < count; ++t) {
    const V decay = all<T>(decays[t]);
    V b[kColumns], c[kColumns];
#pragma GCC unroll 4
    for (int k = 0; k < kColumns; ++k) {
      b[k] = load(B + t * stride_B + k * kLanes<T>);
      c[k] = load(C + t * stride_C + k * kLanes<T>);
    }
#pragma GCC unroll 4
    for (int p = 0; p < kRows; ++p) {
      const V x = all<T>(entering[t * kRows + p]);
      V out = kFirst ? V{} : y[t * kRows + p];
#pragma GCC unroll 4
      for (int k = 0; k < kColumns; ++k) {
        h[p][k] = decay * h[p][k] + x * b[k];
        out += h[p][k] * c[k];
      }
      y[t * kRows + p] = out;
    }
  }
  for (int p = 0; p < kRows; ++p) {
    for (int k = 0; k < kColumns; ++k) store(state + p * columns + k * kLanes<T>, h[p][k]);
  }
}

template <typename T>
struct ForwardScratch {
  T *state, *decays, *entering, *B, *C, *sums;
  Lanes<T>* y;

  static size_t bytes(const Dual<T>& dual) {
    const size_t tokens = dual.chunk + kLanes<T>;
    const size_t maps = 2 * Maps<T>::size(dual);
    return (dual.padded_state() + maps + (2 * kRows + 1) * tokens) * sizeof(T) +
           kRows * tokens * sizeof(Lanes<T>);
  }

  ForwardScratch(const Dual<T>& dual, Scratch& scratch) {
    const size_t tokens = dual.chunk + kLanes<T>;
    y = scratch.take<Lanes<T>>(kRows * tokens);
    state = scratch.take<T>(dual.padded_state());
    B = scratch.take<T>(Maps<T>::size(dual));
    C = scratch.take<T>(Maps<T>::size(dual));
    entering = scratch.take<T>(kRows * tokens);
    sums = scratch.take<T>(kRows * tokens);
    decays = scratch.take<T>(tokens);
  }
};

// One chunk of one head.
template <typename T>
void forward_chunk(const Dual<T>& dual, int64_t row, int64_t head, int64_t token,
                   const ForwardScratch<T>& at, const ForwardResults<T>& results) {
  const int64_t count = std::min(dual.chunk, dual.seq - token);
  const int64_t columns = dual.padded_columns();
  const int64_t group = dual.group(head);
  const Maps<T> B(dual, dual.B, row, group, token, count, at.B);
  const Maps<T> C(dual, dual.C, row, group, token, count, at.C);
  read_decays(dual, row, head, token, count, at.decays);
  for (int64_t first = 0; first < dual.head_dim; first += kRows) {
    read_rows(dual, dual.x, row, head, token, count, first, true, at.entering);
    T* state = at.state + first * columns;
    for (int64_t start = 0, end; start < count; start = end) {
      end = end_of_run(dual, row, token, start, count);
      if (dual.is_reset(row, token + start)) {
        std::fill(state, state + kRows * columns, T(0));
      }
      for (int64_t n = 0; n < columns; n += kBlock<T>) {
        const auto run = n == 0 ? advance<T, true> : advance<T, false>;
        run(end - start, at.decays + start, at.entering + start * kRows,
            B.at + start * B.stride + n, C.at + start * C.stride + n, B.stride, C.stride,
            state + n, columns, at.y + start * kRows);
      }
    }
    sum_each<T>(at.y, count * kRows, at.sums);
    write_rows(dual, at.sums, row, head, token, count, first, results.y);
  }
}

template <typename T>
void forward_head(const Dual<T>& dual, int64_t row, int64_t head,
                  const ForwardResults<T>& results) {
  Scratch& scratch = Scratch::of_this_thread();
  scratch.reserve(ForwardScratch<T>::bytes(dual));
  const ForwardScratch<T> at(dual, scratch);
  const int64_t size = dual.state_size(), index = row * dual.n_heads + head;
  const T* before = dual.initial_state;
  read_state(dual, before == nullptr ? nullptr : before + index * size, at.state);
  for (int64_t chunk = 0; chunk < dual.chunks(); ++chunk) {
    if (results.saved != nullptr) {
      const int64_t saved = (row * dual.chunks() + chunk) * dual.n_heads + head;
      write_state(dual, at.state, results.saved + saved * size);
    }
    forward_chunk(dual, row, head, chunk * dual.chunk, at, results);
  }
  write_state(dual, at.state, results.final_state + index * size);
}

// One token through some rows of a head's state, which may be written where it is read;
// `out` gets the products with C. `kWhole`: the columns are whole registers.
template <typename T, int kCount, bool kWhole>
void step_rows(int64_t d_state, T decay, const T* x, const T* B, const T* C,
               const T* before, T* after, Lanes<T>* out) {
  using V = Lanes<T>;
  V total[kCount] = {};
  for (int64_t n = 0; n < d_state; n += kLanes<T>) {
    const int64_t count = kWhole ? kLanes<T> : d_state - n;
    const V b = load_some(B + n, count), c = load_some(C + n, count);
#pragma GCC unroll 4
    for (int p = 0; p < kCount; ++p) {
      V h = all<T>(x[p]) * b;
      if (before != nullptr) h += decay * load_some(before + p * d_state + n, count);
      store_some(after + p * d_state + n, h, count);
      total[p] += h * c;
    }
  }
  for (int p = 0; p < kCount; ++p) out[p] = total[p];
}

// One token, for decoding: the state is read and written once.
template <typename T, bool kWhole>
void step_in_registers(const Dual<T>& dual, int64_t row, int64_t head,
                       const ForwardResults<T>& results) {
  const int64_t index = row * dual.n_heads + head, size = dual.state_size();
  const bool fresh = dual.initial_state == nullptr || dual.is_reset(row, 0);
  const T* const before = fresh ? nullptr : dual.initial_state + index * size;
  T* const after = results.final_state + index * size;
  const int64_t maps = (row * dual.n_groups + dual.group(head)) * dual.d_state;
  const T decay = std::exp(dual.log_decay[index]);
  const T factor = coefficient(dual, row, head, 0);
  for (int64_t first = 0; first < dual.head_dim; first += kLanes<T>) {
    const int64_t some = std::min<int64_t>(kLanes<T>, dual.head_dim - first);
    T x[kLanes<T>];
    Lanes<T> out[kLanes<T>] = {};
    for (int64_t p = 0; p < some; ++p) {
      x[p] = factor * dual.x[index * dual.head_dim + first + p];
    }
    const auto run = [&](auto step, int64_t p) {
      const int64_t at = (first + p) * dual.d_state;
      step(dual.d_state, decay, x + p, dual.B + maps, dual.C + maps,
           before == nullptr ? nullptr : before + at, after + at, out + p);
    };
    int64_t p = 0;
    for (; p + kRows <= some; p += kRows) run(step_rows<T, kRows, kWhole>, p);
    for (; p < some; ++p) run(step_rows<T, 1, kWhole>, p);
    store_some(results.y + index * dual.head_dim + first, sums<T>(out), some);
  }
}

template <typename T>
void step_head(const Dual<T>& dual, int64_t row, int64_t head,
               const ForwardResults<T>& results) {
  const bool whole = dual.d_state % kLanes<T> == 0;
  const auto run = whole ? step_in_registers<T, true> : step_in_registers<T, false>;
  run(dual, row, head, results);
}

}  // namespace capibara
