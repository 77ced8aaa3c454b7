// One token of the scan, for decoding. There is no time to rearrange the states for, so
// here a register holds states of one channel, as they lie in memory.
#pragma once

#include "cpu_forward.h"

namespace capibara {

// One channel: its new states, and C h. `before` is null for a state of zeros.
template <typename T>
T step_channel(int64_t d_state, T step, T entering, const T* A, const T* B, const T* C,
               const T* before, T* after) {
  using V = Lanes<T>;
  V out{};
  for (int64_t n = 0; n < d_state; n += kLanes<T>) {
    const int64_t count = d_state - n;
    V state = entering * load_some(B + n, count);
    if (before != nullptr) {
      const V decay = exp2_of_any<T>(step * load_some(A + n, count) * kLog2e<T>);
      state += decay * load_some(before + n, count);
    }
    store_some(after + n, state, count);
    out += state * load_some(C + n, count);
  }
  return sum<T>(out);
}

template <typename T>
void step_tile(const Scan<T>& scan, int64_t row, int64_t index,
               const ForwardResults<T>& results) {
  using V = Lanes<T>;
  const Tile<T> tile(scan, row, index);
  V bias[kRegisters], skip[kRegisters], u[kRegisters], dt[kRegisters], z[kRegisters];
  V y[kRegisters] = {};
  tile.read_weights(scan.delta_bias, bias);
  tile.read_weights(scan.D, skip);
  tile.read(scan.u, 0, 1, u);
  tile.read(scan.delta, 0, 1, dt);
  prepare_steps<T>(tile, bias, 1, dt, nullptr);

  const int64_t d_state = scan.d_state;
  const bool fresh =
      scan.initial_state == nullptr || (scan.reset != nullptr && scan.reset[row]);
  const T* A = scan.A + (tile.group * scan.d_inner + tile.first) * d_state;
  const int64_t states = (row * scan.d_inner + tile.first) * d_state;
  const T* before = fresh ? nullptr : scan.initial_state + states;
  T* after = results.final_state + states;
  for (int64_t c = 0; c < tile.width; ++c) {
    const int64_t v = c / kLanes<T>, lane = c % kLanes<T>;
    const T step = dt[v][lane];
    y[v][lane] = step_channel<T>(
        d_state, step, step * u[v][lane], A + c * d_state, scan.B + row * d_state,
        scan.C + row * d_state, fresh ? nullptr : before + c * d_state,
        after + c * d_state);
  }
  if (scan.z != nullptr) tile.read(scan.z, 0, 1, z);
  for (int v = 0; v < kRegisters; ++v) {
    y[v] += skip[v] * u[v];
    if (scan.z != nullptr) y[v] *= z[v] * sigmoid<T>(z[v]);
  }
  tile.write(y, 0, 1, results.y);
}

}  // namespace capibara
