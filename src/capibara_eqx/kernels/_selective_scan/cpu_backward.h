// The scan backward over some tiles of channels of one row: chunk by chunk from the last
// to the first, the states of a chunk are computed again from the one that entered it.
#pragma once

#include <vector>

#include "cpu_tile.h"

namespace capibara {

template <typename T>
struct Cotangents {
  const T *saved, *y, *final_state;
};

// One entry a row for what belongs to the weights. `B` and `C` are the sums over the
// channels of one part, (rows, parts, seq, d_state); absent ones are null.
template <typename T>
struct BackwardResults {
  int64_t parts;
  T *u, *delta, *A, *B, *C, *D, *z, *delta_bias, *initial_state;
};

// What a thread keeps of the chunk that it walks through.
template <typename T>
struct Chunk {
  using V = Lanes<T>;

  int64_t token = 0, count = 0;
  V *u, *dt, *slope, *z, *dy, *y, *du, *ddelta;
  V *dA, *sums_B, *sums_C;  // of this chunk; of one token, a register a state
  V* decays;   // of every token
  V* states;   // before every token, and after the last
  V* nothing;  // what a token finds that is reset

  static size_t bytes(const Scan<T>& scan) {
    const int64_t stream = scan.chunk * kRegisters;
    const int64_t states = kRegisters * scan.d_state;
    return (8 * stream + 2 * stream * scan.d_state + 3 * states + 2 * sums(scan)) *
           sizeof(V);
  }

  // States, up to whole registers of them.
  static int64_t sums(const Scan<T>& scan) {
    return (scan.d_state + kLanes<T> - 1) / kLanes<T> * kLanes<T>;
  }

  Chunk(const Scan<T>& scan, Scratch& scratch) {
    const int64_t stream = scan.chunk * kRegisters;
    for (V** buffer : {&u, &dt, &slope, &z, &dy, &y, &du, &ddelta}) {
      *buffer = scratch.take<V>(stream);
    }
    decays = scratch.take<V>(stream * scan.d_state);
    states = scratch.take<V>((stream + kRegisters) * scan.d_state);
    nothing = scratch.take<V>(kRegisters * scan.d_state);
    dA = scratch.take<V>(kRegisters * scan.d_state);
    sums_B = scratch.take<V>(sums(scan));
    sums_C = scratch.take<V>(sums(scan));
    std::fill(nothing, nothing + kRegisters * scan.d_state, V{});
    std::fill(sums_B, sums_B + sums(scan), V{});
    std::fill(sums_C, sums_C + sums(scan), V{});
  }

  const V* before(const Scan<T>& scan, int64_t row, int64_t t) const {
    const bool reset = scan.reset != nullptr && scan.reset[row * scan.seq + token + t];
    return reset ? nothing : states + t * scan.d_state * kRegisters;
  }
};

// The states of a chunk, from those that enter it; `y` is C h.
template <typename T, bool kBounded>
void refill(const Tile<T>& tile, const Lanes<T>* rates, const Chunk<T>& chunk) {
  using V = Lanes<T>;
  const int64_t d_state = tile.scan.d_state, size = d_state * kRegisters;
  for (int64_t t = 0; t < chunk.count; ++t) {
    const int64_t at = tile.row * tile.scan.seq + chunk.token + t;
    const T* B = tile.scan.B + at * d_state;
    const T* C = tile.scan.C + at * d_state;
    const V* before = chunk.before(tile.scan, tile.row, t);
    V* after = chunk.states + (t + 1) * size;
    V* decays = chunk.decays + t * size;
    V step[kRegisters], entering[kRegisters], out[kRegisters];
    for (int v = 0; v < kRegisters; ++v) {
      step[v] = chunk.dt[t * kRegisters + v];
      entering[v] = step[v] * chunk.u[t * kRegisters + v];
      out[v] = V{};
    }
    for (int64_t n = 0; n < d_state; ++n) {
#pragma GCC unroll 8
      for (int v = 0; v < kRegisters; ++v) {
        const int64_t i = n * kRegisters + v;
        decays[i] = decay<T, kBounded>(step[v], rates[i]);
        after[i] = decays[i] * before[i] + entering[v] * B[n];
        out[v] += after[i] * C[n];
      }
    }
    for (int v = 0; v < kRegisters; ++v) chunk.y[t * kRegisters + v] = out[v];
  }
}

// A tile on its way back: the cotangent of the state, and sums over the tokens that it
// has walked through. They are taken a chunk at a time, since a sum of very many terms in
// one go would lose their last digits.
template <typename T>
struct BackwardTile : Weighted<T> {
  using V = Lanes<T>;

  V *carry, *dA;
  V dD[kRegisters] = {}, dbias[kRegisters] = {};

  static size_t bytes(const Scan<T>& scan) { return 3 * Weighted<T>::bytes(scan); }

  BackwardTile(const Scan<T>& scan, int64_t row, int64_t index, const T* dfinal,
               Scratch& scratch)
      : Weighted<T>(scan, row, index, scratch) {
    const int64_t size = scan.d_state * kRegisters;
    carry = scratch.take<V>(size);
    dA = scratch.take<V>(size);
    this->tile.read_states(dfinal, row, T(1), carry);
    std::fill(dA, dA + size, V{});
  }
};

// Add the sum over the lanes of each of `count` registers to a number of its own.
template <typename T>
void add_sums(const Lanes<T>* x, int64_t count, T* to) {
  for (int64_t n = 0; n < count; n += kLanes<T>) {
    const Lanes<T> total = load_some(to + n, count - n) + sums<T>(x + n);
    store_some(to + n, total, count - n);
  }
}

// Walk back through a chunk. With l_t the cotangent of the state after token t,
//   l_t = C_t dy_t + a_(t+1) l_(t+1),  dB_t += l_t dt u,  dC_t += dy_t h_t,
//   da_t = l_t h_(t-1),  dA += dt a_t da_t,  du and ddt from the rest.
// `rates` is A log2 e, hence the factor ln 2 at the end.
template <typename T>
void walk_back(const BackwardTile<T>& walk, const Chunk<T>& chunk, T* dB, T* dC) {
  using V = Lanes<T>;
  const Tile<T>& tile = walk.tile;
  const int64_t d_state = tile.scan.d_state, size = d_state * kRegisters;
  for (int64_t t = chunk.count - 1; t >= 0; --t) {
    const int64_t at = tile.row * tile.scan.seq + chunk.token + t;
    const T* B = tile.scan.B + at * d_state;
    const T* C = tile.scan.C + at * d_state;
    const V* before = chunk.before(tile.scan, tile.row, t);
    const V* after = chunk.states + (t + 1) * size;
    const V* decays = chunk.decays + t * size;
    V step[kRegisters], entering[kRegisters], dy[kRegisters];
    V through_B[kRegisters] = {}, through_decay[kRegisters] = {};
    for (int v = 0; v < kRegisters; ++v) {
      step[v] = chunk.dt[t * kRegisters + v];
      entering[v] = step[v] * chunk.u[t * kRegisters + v];
      dy[v] = chunk.dy[t * kRegisters + v];
    }
    for (int64_t n = 0; n < d_state; ++n) {
      V sum_B{}, sum_C{};
#pragma GCC unroll 8
      for (int v = 0; v < kRegisters; ++v) {
        const int64_t i = n * kRegisters + v;
        const V cotangent = walk.carry[i] + dy[v] * C[n];
        sum_B += cotangent * entering[v];
        sum_C += dy[v] * after[i];
        through_B[v] += cotangent * B[n];
        const V decayed = cotangent * decays[i];
        const V of_exponent = decayed * before[i];
        through_decay[v] += of_exponent * walk.rates[i];
        chunk.dA[i] += of_exponent * step[v];
        walk.carry[i] = decayed;
      }
      chunk.sums_B[n] = sum_B;
      chunk.sums_C[n] = sum_C;
    }
    add_sums<T>(chunk.sums_B, d_state, dB + (chunk.token + t) * d_state);
    add_sums<T>(chunk.sums_C, d_state, dC + (chunk.token + t) * d_state);
    if (before == chunk.nothing) std::fill(walk.carry, walk.carry + size, V{});
    for (int v = 0; v < kRegisters; ++v) {
      const int64_t i = t * kRegisters + v;
      chunk.du[i] = step[v] * through_B[v];
      chunk.ddelta[i] = chunk.u[i] * through_B[v] + through_decay[v] * kLn2<T>;
    }
  }
}

// Cotangents of the gate, `dy` before it, from those after it.
template <typename T>
void through_gate(const Tile<T>& tile, const Lanes<T>* skip, const Chunk<T>& chunk,
                  const BackwardResults<T>& results) {
  tile.read(tile.scan.z, chunk.token, chunk.count, chunk.z);
  for (int64_t i = 0; i < chunk.count * kRegisters; ++i) {
    const Lanes<T> z = chunk.z[i], open = sigmoid<T>(z), gate = z * open;
    const Lanes<T> y = chunk.y[i] + skip[i % kRegisters] * chunk.u[i];
    chunk.z[i] = chunk.dy[i] * y * (open + gate * (T(1) - open));
    chunk.dy[i] *= gate;
  }
  tile.write(chunk.z, chunk.token, chunk.count, results.z);
}

// One chunk of one tile.
template <typename T>
void backward_chunk(BackwardTile<T>& walk, const Chunk<T>& chunk,
                    const Cotangents<T>& cotangents, T* dB, T* dC,
                    const BackwardResults<T>& results) {
  const Tile<T>& tile = walk.tile;
  const Scan<T>& scan = tile.scan;
  const int64_t size = scan.d_state * kRegisters;
  for (int64_t n = 0; n < scan.d_state; ++n) {
    const int64_t from = tile.saved_at(chunk.token / scan.chunk, n);
    tile.copy(cotangents.saved + from, reinterpret_cast<T*>(chunk.states + n * kRegisters));
  }
  tile.read(scan.u, chunk.token, chunk.count, chunk.u);
  tile.read(scan.delta, chunk.token, chunk.count, chunk.dt);
  tile.read(cotangents.y, chunk.token, chunk.count, chunk.dy);
  const T step = prepare_steps<T>(tile, walk.bias, chunk.count, chunk.dt, chunk.slope);
  if (bounded<T>(step, walk.rate)) {
    refill<T, true>(tile, walk.rates, chunk);
  } else {
    refill<T, false>(tile, walk.rates, chunk);
  }
  if (scan.z != nullptr) through_gate<T>(tile, walk.skip, chunk, results);
  std::fill(chunk.dA, chunk.dA + size, Lanes<T>{});
  walk_back<T>(walk, chunk, dB, dC);
  for (int64_t i = 0; i < size; ++i) walk.dA[i] += chunk.dA[i];
  Lanes<T> dD[kRegisters] = {}, dbias[kRegisters] = {};
  for (int64_t i = 0; i < chunk.count * kRegisters; ++i) {
    const int v = i % kRegisters;
    chunk.du[i] += walk.skip[v] * chunk.dy[i];
    chunk.ddelta[i] *= chunk.slope[i];
    dD[v] += chunk.dy[i] * chunk.u[i];
    dbias[v] += chunk.ddelta[i];
  }
  for (int v = 0; v < kRegisters; ++v) {
    walk.dD[v] += dD[v];
    walk.dbias[v] += dbias[v];
  }
  tile.write(chunk.du, chunk.token, chunk.count, results.u);
  tile.write(chunk.ddelta, chunk.token, chunk.count, results.delta);
}

template <typename T>
void finish(const BackwardTile<T>& walk, const BackwardResults<T>& results) {
  const Tile<T>& tile = walk.tile;
  tile.write_states(walk.dA, results.A);
  if (results.D != nullptr) tile.write_row(walk.dD, results.D);
  if (results.delta_bias != nullptr) tile.write_row(walk.dbias, results.delta_bias);
  if (results.initial_state != nullptr) {
    tile.write_states(walk.carry, results.initial_state);
  }
}

// A part is a run of neighbouring tiles of one row, whose sums over channels are taken
// in order: the result does not depend on which thread does what.
template <typename T>
void backward_part(const Scan<T>& scan, int64_t row, int64_t part,
                   const Cotangents<T>& cotangents, const BackwardResults<T>& results) {
  const int64_t sums = scan.seq * scan.d_state;
  T* dB = results.B + (row * results.parts + part) * sums;
  T* dC = results.C + (row * results.parts + part) * sums;
  std::fill(dB, dB + sums, T(0));
  std::fill(dC, dC + sums, T(0));
  const int64_t first = scan.tiles() * part / results.parts;
  const int64_t end = scan.tiles() * (part + 1) / results.parts;
  Scratch& scratch = Scratch::of_this_thread();
  scratch.reserve(Chunk<T>::bytes(scan) + (end - first) * BackwardTile<T>::bytes(scan));
  Chunk<T> chunk(scan, scratch);
  std::vector<BackwardTile<T>> tiles;
  tiles.reserve(end - first);
  for (int64_t i = first; i < end; ++i) {
    tiles.emplace_back(scan, row, i, cotangents.final_state, scratch);
  }
  for (int64_t at = scan.chunks() - 1; at >= 0; --at) {
    chunk.token = at * scan.chunk;
    chunk.count = std::min(scan.chunk, scan.seq - chunk.token);
    for (auto& tile : tiles) backward_chunk<T>(tile, chunk, cotangents, dB, dC, results);
  }
  for (const auto& tile : tiles) finish<T>(tile, results);
}

}  // namespace capibara
