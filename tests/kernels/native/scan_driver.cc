// The selective scan in C++ without Python and XLA: every result and every cotangent
// against plain loops in double, over odd sizes, on threads of its own. Made to run
// under sanitizers; every array is a heap block of exactly its size.
//
// With the argument `spoil`, `overrun` or `race` it does what has to be noticed.
#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <functional>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "cpu_backward.h"
#include "cpu_forward.h"
#include "cpu_step.h"
#include "driver.h"

namespace {

using namespace capibara;

struct Case {
  int64_t rows, groups, seq, d_inner, d_state, chunk, parts;
  // A bit each: D, z, delta_bias, initial_state, reset, softplus.
  unsigned options;
  // Of the step sizes: large ones drive exponents out of their range.
  double scale;
};

bool has(const Case& c, int option) { return (c.options >> option & 1) != 0; }

template <typename T>
struct Inputs {
  std::vector<T> u, delta, A, B, C, D, z, bias, initial, dy, dfinal;
  std::unique_ptr<bool[]> reset;
};

template <typename T>
Inputs<T> draw(const Case& c, unsigned seed) {
  std::mt19937 random(seed);
  const auto some = [&](int64_t count, double low, double high) {
    return drawn<T>(random, count, low, high);
  };
  const int64_t stream = c.rows * c.seq * c.d_inner, maps = c.rows * c.seq * c.d_state;
  const int64_t states = c.rows * c.d_inner * c.d_state;
  const int64_t weights = c.groups * c.d_inner;
  Inputs<T> in;
  in.u = some(stream, -1, 1);
  in.delta = some(stream, 0.05 * c.scale, 0.8 * c.scale);
  in.A = some(weights * c.d_state, -2, -0.2);
  in.B = some(maps, -1, 1);
  in.C = some(maps, -1, 1);
  if (has(c, 0)) in.D = some(weights, -1, 1);
  if (has(c, 1)) in.z = some(stream, -3, 3);
  if (has(c, 2)) in.bias = some(weights, 0, 0.3);
  if (has(c, 3)) in.initial = some(states, -1, 1);
  if (has(c, 4) && c.rows * c.seq > 0) {
    in.reset.reset(new bool[c.rows * c.seq]);
    for (int64_t i = 0; i < c.rows * c.seq; ++i) in.reset[i] = random() % 4 == 0;
  }
  in.dy = some(stream, -1, 1);
  in.dfinal = some(states, -1, 1);
  return in;
}

template <typename T>
struct Results {
  std::vector<T> y, final_state, saved, u, delta, A, B, C, D, z, bias, initial;

  auto named() const {
    return Named<T>{
        {"y", &y}, {"final_state", &final_state}, {"saved", &saved}, {"du", &u},
        {"ddelta", &delta}, {"dA", &A}, {"dB", &B}, {"dC", &C}, {"dD", &D}, {"dz", &z},
        {"dbias", &bias}, {"dinitial", &initial}};
  }
};

// `B` and `C` have one entry a part.
template <typename T>
Results<T> room(const Case& c, int64_t parts) {
  const int64_t stream = c.rows * c.seq * c.d_inner;
  const int64_t states = c.rows * c.d_inner * c.d_state;
  const int64_t chunks = (c.seq + c.chunk - 1) / c.chunk;
  Results<T> out;
  out.y = unwritten<T>(stream);
  out.final_state = unwritten<T>(states);
  out.saved = unwritten<T>(c.rows * chunks * c.d_state * c.d_inner);
  out.u = unwritten<T>(stream);
  out.delta = unwritten<T>(stream);
  out.A = unwritten<T>(states);
  out.B = unwritten<T>(c.rows * parts * c.seq * c.d_state);
  out.C = unwritten<T>(c.rows * parts * c.seq * c.d_state);
  if (has(c, 0)) out.D = unwritten<T>(c.rows * c.d_inner);
  if (has(c, 1)) out.z = unwritten<T>(stream);
  if (has(c, 2)) out.bias = unwritten<T>(c.rows * c.d_inner);
  if (has(c, 3)) out.initial = unwritten<T>(states);
  return out;
}

template <typename T>
Results<T> run(const Case& c, Inputs<T>& in, Pool& pool, int64_t threads) {
  const Scan<T> scan{c.rows,           c.groups,         c.seq,
                     c.d_inner,        c.d_state,        c.chunk,
                     has(c, 5),        pointer(in.u),    pointer(in.delta),
                     pointer(in.A),    pointer(in.B),    pointer(in.C),
                     pointer(in.D),    pointer(in.z),    pointer(in.bias),
                     pointer(in.initial), in.reset.get()};
  Results<T> out = room<T>(c, c.parts);
  const ForwardResults<T> forward{pointer(out.y), pointer(out.final_state),
                                  pointer(out.saved)};
  pool.run_tasks(c.rows * c.parts, threads, [&](int64_t task) {
    forward_part<T>(scan, task / c.parts, task % c.parts, c.parts, forward);
  });
  const Cotangents<T> cotangents{pointer(out.saved), pointer(in.dy), pointer(in.dfinal)};
  const BackwardResults<T> backward{
      c.parts,        pointer(out.u), pointer(out.delta), pointer(out.A),
      pointer(out.B), pointer(out.C), pointer(out.D),     pointer(out.z),
      pointer(out.bias), pointer(out.initial)};
  pool.run_tasks(c.rows * c.parts, threads, [&](int64_t task) {
    backward_part<T>(scan, task / c.parts, task % c.parts, cotangents, backward);
  });
  return out;
}

template <typename T>
Results<T> run_step(const Case& c, Inputs<T>& in) {
  const Scan<T> scan{c.rows,           c.groups,         c.seq,
                     c.d_inner,        c.d_state,        c.chunk,
                     has(c, 5),        pointer(in.u),    pointer(in.delta),
                     pointer(in.A),    pointer(in.B),    pointer(in.C),
                     pointer(in.D),    pointer(in.z),    pointer(in.bias),
                     pointer(in.initial), in.reset.get()};
  Results<T> out = room<T>(c, c.parts);
  const ForwardResults<T> results{pointer(out.y), pointer(out.final_state), nullptr};
  for (int64_t row = 0; row < c.rows; ++row) {
    for (int64_t tile = 0; tile < scan.tiles(); ++tile) {
      step_tile<T>(scan, row, tile, results);
    }
  }
  return out;
}

double logistic(double x) { return 1 / (1 + std::exp(-x)); }

// One channel of one row, forward and then backward, as the formulas say it.
template <typename T>
void expect_channel(const Case& c, const Inputs<T>& in, int64_t row, int64_t d,
                    Results<double>& out) {
  const int64_t N = c.d_state, chunks = (c.seq + c.chunk - 1) / c.chunk;
  const int64_t weight = row / (c.rows / c.groups) * c.d_inner + d;
  const int64_t channel = row * c.d_inner + d;
  const double D = in.D.empty() ? 0.0 : in.D[weight];
  const double bias = in.bias.empty() ? 0.0 : in.bias[weight];
  std::vector<double> dt(c.seq), slope(c.seq), inner(c.seq), entering(c.seq * N),
      left(c.seq * N), h(N);
  for (int64_t n = 0; n < N; ++n) h[n] = in.initial.empty() ? 0 : in.initial[channel * N + n];
  for (int64_t t = 0; t < c.seq; ++t) {
    const int64_t token = row * c.seq + t, at = token * c.d_inner + d;
    if (t % c.chunk == 0) {
      for (int64_t n = 0; n < N; ++n) {
        out.saved[((row * chunks + t / c.chunk) * N + n) * c.d_inner + d] = h[n];
      }
    }
    const double raw = in.delta[at] + bias;
    dt[t] = has(c, 5) ? std::log1p(std::exp(-std::abs(raw))) + std::max(raw, 0.0) : raw;
    slope[t] = has(c, 5) ? logistic(raw) : 1;
    inner[t] = D * in.u[at];
    for (int64_t n = 0; n < N; ++n) {
      if (in.reset && in.reset[token]) h[n] = 0;
      entering[t * N + n] = h[n];
      h[n] = std::exp(dt[t] * in.A[weight * N + n]) * h[n] +
             dt[t] * in.B[token * N + n] * in.u[at];
      left[t * N + n] = h[n];
      inner[t] += in.C[token * N + n] * h[n];
    }
    out.y[at] = in.z.empty() ? inner[t] : inner[t] * in.z[at] * logistic(in.z[at]);
  }
  for (int64_t n = 0; n < N; ++n) out.final_state[channel * N + n] = h[n];

  std::vector<double> dh(N), dA(N);
  double dD = 0, dbias = 0;
  for (int64_t n = 0; n < N; ++n) dh[n] = in.dfinal[channel * N + n];
  for (int64_t t = c.seq - 1; t >= 0; --t) {
    const int64_t token = row * c.seq + t, at = token * c.d_inner + d;
    double dinner = in.dy[at];
    if (!in.z.empty()) {
      const double z = in.z[at], open = logistic(z);
      out.z[at] = in.dy[at] * inner[t] * open * (1 + z * (1 - open));
      dinner *= z * open;
    }
    dD += dinner * in.u[at];
    double du = dinner * D, ddt = 0;
    for (int64_t n = 0; n < N; ++n) {
      const int64_t map = token * N + n;
      const double A = in.A[weight * N + n], B = in.B[map], before = entering[t * N + n];
      const double decay = std::exp(dt[t] * A);
      dh[n] += dinner * in.C[map];
      out.C[map] += dinner * left[t * N + n];
      out.B[map] += dh[n] * dt[t] * in.u[at];
      du += dh[n] * dt[t] * B;
      ddt += dh[n] * (A * decay * before + B * in.u[at]);
      dA[n] += dh[n] * dt[t] * decay * before;
      dh[n] *= in.reset && in.reset[token] ? 0 : decay;
    }
    out.u[at] = du;
    out.delta[at] = ddt * slope[t];
    dbias += ddt * slope[t];
  }
  for (int64_t n = 0; n < N; ++n) out.A[channel * N + n] = dA[n];
  if (!in.D.empty()) out.D[channel] = dD;
  if (!in.bias.empty()) out.bias[channel] = dbias;
  for (int64_t n = 0; n < N && !in.initial.empty(); ++n) out.initial[channel * N + n] = dh[n];
}

template <typename T>
Results<double> expect(const Case& c, const Inputs<T>& in) {
  Results<double> out = room<double>(c, 1);
  std::fill(out.B.begin(), out.B.end(), 0.0);
  std::fill(out.C.begin(), out.C.end(), 0.0);
  for (int64_t row = 0; row < c.rows; ++row) {
    for (int64_t d = 0; d < c.d_inner; ++d) expect_channel(c, in, row, d, out);
  }
  return out;
}

void fail(const Case& c, const char* name, const char* what) {
  ++failures;
  std::printf("%s: %s (rows %d, groups %d, seq %d, d_inner %d, d_state %d, chunk %d, "
              "parts %d, options %u, scale %g)\n",
              name, what, int(c.rows), int(c.groups), int(c.seq), int(c.d_inner),
              int(c.d_state), int(c.chunk), int(c.parts), c.options, c.scale);
}

// There is a term a token, state and channel.
template <typename T>
void compare(const Case& c, const char* name, const std::vector<T>& got,
             const std::vector<double>& want) {
  const double terms = double(c.seq + c.d_state + c.d_inner);
  const std::string what = difference(got, want, terms, c.scale);
  if (!what.empty()) fail(c, name, what.c_str());
}

template <typename T>
void compare_all(const Case& c, const Results<T>& got, const Results<double>& want,
                 size_t count) {
  const auto all = got.named(), expected = want.named();
  for (size_t i = 0; i < count; ++i) {
    const char* name = all[i].first;
    const bool apart = std::strcmp(name, "dB") == 0 || std::strcmp(name, "dC") == 0;
    const std::vector<T>& found = *all[i].second;
    const int64_t size = c.seq * c.d_state;
    compare(c, name, apart ? sum_parts(found, c.rows, c.parts, size) : found,
            *expected[i].second);
  }
}

template <typename T>
void check(const Case& c, Pool& pool, bool spoil = false) {
  Inputs<T> in = draw<T>(c, unsigned(c.options + 64 * c.d_inner + c.d_state));
  const Results<T> got = run<T>(c, in, pool, 4);
  Results<double> want = expect(c, in);
  if (spoil) want.A.back() += 1e-2;
  compare_all(c, got, want, want.named().size());
  if (c.seq == 1) compare_all(c, run_step<T>(c, in), want, 2);
  // The threads change nothing, not a bit.
  const Results<T> alone = run<T>(c, in, pool, 1);
  const auto all = got.named(), other = alone.named();
  for (size_t i = 0; i < all.size(); ++i) {
    if (*all[i].second != *other[i].second) fail(c, all[i].first, "depends on threads");
  }
}

// Numbers that are none: no comparison, but nothing undefined either.
template <typename T>
void poison(const Case& c, Pool& pool) {
  using Limits = std::numeric_limits<T>;
  for (T value : {Limits::quiet_NaN(), Limits::infinity(), -Limits::infinity(),
                  Limits::max(), Limits::lowest(), Limits::denorm_min()}) {
    Inputs<T> in = draw<T>(c, 5);
    for (auto* values : {&in.u, &in.delta, &in.A, &in.B, &in.C, &in.z, &in.dy}) {
      if (!values->empty()) (*values)[values->size() / 2] = value;
    }
    run<T>(c, in, pool, 3);
    if (c.seq == 1) run_step<T>(c, in);
  }
}

constexpr unsigned kAll = 63;

template <typename T>
void check_all(Pool& pool) {
  const int64_t tile = kTile<T>;
  for (unsigned options = 0; options <= kAll; ++options) {
    check<T>({2, 1, 5, 3, 3, 2, 1, options, 1}, pool);
    check<T>({2, 2, 1, tile + 1, 5, 1, 1, options, 1}, pool);
  }
  for (int64_t d_state = 0; d_state <= 17; ++d_state) {
    check<T>({1, 1, 7, tile - 1, d_state, 3, 1, kAll, 1}, pool);
    check<T>({1, 1, 1, 2, d_state, 1, 1, kAll, 1}, pool);
  }
  for (int64_t d_inner : {int64_t{1}, tile - 1, tile, tile + 1, 3 * tile + 5}) {
    for (int64_t seq : {1, 8, 9}) {
      for (int64_t parts : {1, 2, 5}) {
        check<T>({2, 1, seq, d_inner, 2, 4, parts, kAll, 1}, pool);
      }
    }
  }
  check<T>({6, 3, 9, 5, 4, 4, 1, kAll, 1}, pool);
  check<T>({6, 6, 9, tile + 2, 4, 64, 2, kAll, 1}, pool);
  check<T>({1, 1, 130, 3, 4, 64, 1, kAll, 1}, pool);
  check<T>({2, 1, 40, 2 * tile, 3, 8, 2, kAll, 1}, pool);
  // Exponents beyond the range, with softplus and without.
  check<T>({1, 1, 9, tile + 3, 3, 4, 1, kAll, 2000}, pool);
  check<T>({1, 1, 9, tile + 3, 3, 4, 1, 15, 2000}, pool);
  check<T>({1, 1, 1, tile + 3, 3, 1, 1, 15, 2000}, pool);
  std::mt19937 random(1);
  const auto below = [&](int64_t end) { return int64_t(random() % unsigned(end)); };
  for (int i = 0; i < 200; ++i) {
    const int64_t groups = 1 + below(3);
    check<T>({groups * (1 + below(3)), groups, 1 + below(20), 1 + below(2 * tile + 9),
              below(9), 1 + below(8), 1 + below(4), unsigned(below(64)), 1},
             pool);
  }
  for (unsigned options : {0u, kAll}) {
    check<T>({0, 1, 4, 3, 2, 2, 1, options, 1}, pool);
    check<T>({2, 1, 4, 0, 2, 2, 1, options, 1}, pool);
    check<T>({2, 1, 4, 3, 0, 2, 1, options, 1}, pool);
    check<T>({2, 2, 4, 0, 0, 2, 1, options, 1}, pool);
    check<T>({0, 1, 1, 0, 0, 1, 1, options, 1}, pool);
    poison<T>({2, 1, 9, tile + 1, 3, 4, 2, options, 1}, pool);
    poison<T>({2, 1, 1, tile + 1, 3, 1, 2, options, 1}, pool);
  }
}

// Loops from several callers at once, on threads that are taken, of many short tasks.
void check_parallel_for(Pool& pool) {
  std::atomic<int> wrong{0};
  const auto call = [&] {
    for (int64_t tasks = 0; tasks < 40; ++tasks) {
      std::vector<int> runs(tasks, 0);
      pool.run_tasks(tasks, 1 + tasks % 7, [&](int64_t task) { ++runs[task]; });
      for (int count : runs) wrong += count != 1;
    }
  };
  std::vector<std::thread> callers;
  for (int i = 0; i < 4; ++i) callers.emplace_back(call);
  for (std::thread& caller : callers) caller.join();
  failures += wrong;
  if (wrong != 0) std::printf("parallel_for: %d tasks not run once\n", int(wrong));
}

}  // namespace

int main(int count, char** arguments) {
  const auto check_everything = [](Pool& pool) {
    check_all<float>(pool);
    check_all<double>(pool);
    check_parallel_for(pool);
  };
  const auto spoil = [](Pool& pool) {
    check<double>({2, 1, 5, 3, 3, 2, 1, kAll, 1}, pool, true);
  };
  return drive(count, arguments, check_everything, spoil);
}
