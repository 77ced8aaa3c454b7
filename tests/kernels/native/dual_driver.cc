// The state space dual in C++ without Python and XLA: every result and every cotangent
// against plain loops in double, over odd sizes, on threads of its own. Made to run
// under sanitizers; every array is a heap block of exactly its size.
//
// With the argument `spoil`, `overrun` or `race` it does what has to be noticed.
#include <algorithm>
#include <cmath>
#include <cstdio>
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
#include "driver.h"

namespace {

using namespace capibara;

struct Case {
  int64_t rows, seq, heads, head_dim, groups, d_state, chunk, parts;
  // A bit each: coefficient, initial_state, reset.
  unsigned options;

  int64_t tokens() const { return rows * seq * heads; }
  int64_t stream() const { return tokens() * head_dim; }
  int64_t maps() const { return seq * groups * d_state; }
  int64_t state() const { return head_dim * d_state; }
  int64_t states() const { return rows * heads * state(); }
  int64_t chunks() const { return (seq + chunk - 1) / chunk; }
  bool has(int option) const { return (options >> option & 1) != 0; }
};

template <typename T>
struct Inputs {
  std::vector<T> x, log_decay, B, C, coefficient, initial, dy, dfinal;
  std::unique_ptr<bool[]> reset;
};

template <typename T>
Inputs<T> draw(const Case& c, unsigned seed) {
  std::mt19937 random(seed);
  const auto some = [&](int64_t count) { return drawn<T>(random, count, -1, 1); };
  Inputs<T> in;
  in.x = some(c.stream());
  in.log_decay = drawn<T>(random, c.tokens(), -1.5, 0);
  for (T& value : in.log_decay) {
    const unsigned kind = random() % 8;
    if (kind == 0) value = 0;
    if (kind == 1) value = -std::numeric_limits<T>::infinity();
  }
  in.B = some(c.rows * c.maps());
  in.C = some(c.rows * c.maps());
  if (c.has(0)) in.coefficient = some(c.tokens());
  if (c.has(1)) in.initial = some(c.states());
  if (c.has(2) && c.rows * c.seq > 0) {
    in.reset.reset(new bool[c.rows * c.seq]);
    for (int64_t i = 0; i < c.rows * c.seq; ++i) in.reset[i] = random() % 4 == 0;
  }
  in.dy = some(c.stream());
  in.dfinal = some(c.states());
  return in;
}

template <typename T>
Dual<T> operands(const Case& c, Inputs<T>& in) {
  return {c.rows,         c.seq,        c.heads,       c.head_dim,
          c.groups,       c.d_state,    c.chunk,       pointer(in.x),
          pointer(in.log_decay),        pointer(in.coefficient),
          pointer(in.B),  pointer(in.C), pointer(in.initial), in.reset.get()};
}

template <typename T>
struct Results {
  std::vector<T> y, final_state, saved, x, log_decay, B, C, coefficient, initial;

  auto named() const {
    return Named<T>{{"y", &y},   {"final_state", &final_state}, {"saved", &saved},
                    {"dx", &x},  {"dlog_decay", &log_decay},
                    {"dB", &B},  {"dC", &C},
                    {"dcoefficient", &coefficient}, {"dinitial", &initial}};
  }
};

// `B` and `C` have one entry a part.
template <typename T>
Results<T> room(const Case& c, int64_t parts) {
  Results<T> out;
  out.y = unwritten<T>(c.stream());
  out.final_state = unwritten<T>(c.states());
  out.saved = unwritten<T>(c.chunks() * c.states());
  out.x = unwritten<T>(c.stream());
  out.log_decay = unwritten<T>(c.tokens());
  out.B = unwritten<T>(c.rows * parts * c.maps());
  out.C = unwritten<T>(c.rows * parts * c.maps());
  if (c.has(0)) out.coefficient = unwritten<T>(c.tokens());
  if (c.has(1)) out.initial = unwritten<T>(c.states());
  return out;
}

// On one thread, whose scratch memory is as much as is asked for and holds no numbers.
template <typename T>
void run_alone(size_t bytes, int64_t tasks, const std::function<void(int64_t)>& body) {
  std::thread thread([&] {
    Scratch& scratch = Scratch::of_this_thread();
    scratch.reserve(bytes);
    const size_t count = bytes / sizeof(T);
    std::fill_n(scratch.take<T>(count), count, std::numeric_limits<T>::quiet_NaN());
    for (int64_t task = 0; task < tasks; ++task) body(task);
  });
  thread.join();
}

template <typename T>
Results<T> run(const Case& c, Inputs<T>& in, Pool& pool, int64_t threads) {
  const Dual<T> dual = operands(c, in);
  Results<T> out = room<T>(c, c.parts);
  const auto share = [&](size_t bytes, int64_t tasks, auto body) {
    if (threads == 1) return run_alone<T>(bytes, tasks, body);
    pool.run_tasks(tasks, threads, body);
  };
  const ForwardResults<T> forward{pointer(out.y), pointer(out.final_state),
                                  pointer(out.saved)};
  share(ForwardScratch<T>::bytes(dual), c.rows * c.heads, [&](int64_t task) {
    forward_head<T>(dual, task / c.heads, task % c.heads, forward);
  });
  const Cotangents<T> cotangents{pointer(out.saved), pointer(in.dy), pointer(in.dfinal)};
  const BackwardResults<T> backward{c.parts,        pointer(out.x),
                                    pointer(out.log_decay), pointer(out.coefficient),
                                    pointer(out.B), pointer(out.C),
                                    pointer(out.initial)};
  const int64_t parts = c.groups * c.parts;
  share(BackwardScratch<T>::bytes(dual), c.rows * parts, [&](int64_t task) {
    backward_part<T>(dual, task / parts, task % parts, cotangents, backward);
  });
  return out;
}

// One token, where nothing is saved, by `one_head`. In place: the new state lies where
// the one before it was, as XLA has it in a loop.
template <typename T, typename OneHead>
Results<T> run_token(const Case& c, Inputs<T>& in, Pool& pool, OneHead one_head,
                     bool in_place) {
  Dual<T> dual = operands(c, in);
  Results<T> out = room<T>(c, c.parts);
  if (in_place && !in.initial.empty()) {
    out.final_state = in.initial;
    dual.initial_state = pointer(out.final_state);
  }
  const ForwardResults<T> results{pointer(out.y), pointer(out.final_state), nullptr};
  pool.run_tasks(c.rows * c.heads, 4, [&](int64_t task) {
    one_head(dual, task / c.heads, task % c.heads, results);
  });
  return out;
}

// One head of one row, forward and then backward, as the formulas say it.
template <typename T>
void expect_head(const Case& c, const Inputs<T>& in, int64_t row, int64_t head,
                 Results<double>& out) {
  const int64_t P = c.head_dim, N = c.d_state, size = c.state();
  const int64_t group = head / (c.heads / c.groups), index = row * c.heads + head;
  const auto weight = [&](int64_t at) {
    return in.coefficient.empty() ? 1.0 : double(in.coefficient[at]);
  };
  const auto starts = [&](int64_t token) { return in.reset && in.reset[token]; };
  std::vector<double> h(size), before(c.seq * size), after(c.seq * size);
  if (!in.initial.empty()) {
    std::copy_n(in.initial.begin() + index * size, size, h.begin());
  }
  for (int64_t t = 0; t < c.seq; ++t) {
    const int64_t token = row * c.seq + t, at = token * c.heads + head;
    const int64_t map = (token * c.groups + group) * N;
    if (t % c.chunk == 0) {
      const int64_t saved = (row * c.chunks() + t / c.chunk) * c.heads + head;
      std::copy(h.begin(), h.end(), out.saved.begin() + saved * size);
    }
    if (starts(token)) std::fill(h.begin(), h.end(), 0.0);
    std::copy(h.begin(), h.end(), before.begin() + t * size);
    for (int64_t p = 0; p < P; ++p) {
      double y = 0;
      for (int64_t n = 0; n < N; ++n) {
        double& state = h[p * N + n];
        state = std::exp(double(in.log_decay[at])) * state +
                weight(at) * in.x[at * P + p] * in.B[map + n];
        y += state * in.C[map + n];
      }
      out.y[at * P + p] = y;
    }
    std::copy(h.begin(), h.end(), after.begin() + t * size);
  }
  std::copy(h.begin(), h.end(), out.final_state.begin() + index * size);

  // Of the state after a token, without what its own y says of it.
  std::vector<double> dh(size);
  std::copy_n(in.dfinal.begin() + index * size, size, dh.begin());
  for (int64_t t = c.seq - 1; t >= 0; --t) {
    const int64_t token = row * c.seq + t, at = token * c.heads + head;
    const int64_t map = (token * c.groups + group) * N;
    const double decay = std::exp(double(in.log_decay[at]));
    double ddecay = 0, dweight = 0;
    for (int64_t p = 0; p < P; ++p) {
      const double x = in.x[at * P + p], dy = in.dy[at * P + p];
      double through = 0;
      for (int64_t n = 0; n < N; ++n) {
        const int64_t i = t * size + p * N + n;
        double& l = dh[p * N + n];
        l += dy * in.C[map + n];
        out.C[map + n] += dy * after[i];
        out.B[map + n] += l * weight(at) * x;
        through += l * in.B[map + n];
        ddecay += l * before[i];
        l *= starts(token) ? 0 : decay;
      }
      out.x[at * P + p] = weight(at) * through;
      dweight += through * x;
    }
    out.log_decay[at] = decay * ddecay;
    if (!out.coefficient.empty()) out.coefficient[at] = dweight;
  }
  if (out.initial.empty()) return;
  std::copy(dh.begin(), dh.end(), out.initial.begin() + index * size);
}

template <typename T>
Results<double> expect(const Case& c, const Inputs<T>& in) {
  Results<double> out = room<double>(c, 1);
  for (auto* sums : {&out.B, &out.C}) std::fill(sums->begin(), sums->end(), 0.0);
  for (int64_t row = 0; row < c.rows; ++row) {
    for (int64_t head = 0; head < c.heads; ++head) expect_head(c, in, row, head, out);
  }
  return out;
}

void fail(const Case& c, const char* name, const char* what) {
  ++failures;
  std::printf("%s: %s (rows %d, seq %d, heads %d, head_dim %d, groups %d, d_state %d, "
              "chunk %d, parts %d, options %u)\n",
              name, what, int(c.rows), int(c.seq), int(c.heads), int(c.head_dim),
              int(c.groups), int(c.d_state), int(c.chunk), int(c.parts), c.options);
}

// The terms of what is summed over all channels of a group, over a whole state or over
// one of its rows; each is the result of a recurrence over the tokens.
double terms_of(const Case& c, const std::string& name) {
  int64_t sum = c.d_state;
  if (name == "dB" || name == "dC") sum = c.head_dim * c.heads / c.groups;
  if (name == "dlog_decay" || name == "dcoefficient") sum = c.state();
  return double(c.seq + sum);
}

template <typename T>
void compare(const Case& c, const Results<T>& got, const Results<double>& want,
             size_t count) {
  const auto all = got.named(), expected = want.named();
  for (size_t i = 0; i < count; ++i) {
    const std::string name = all[i].first;
    const std::vector<T>& found = *all[i].second;
    const bool apart = name == "dB" || name == "dC";
    const std::string what =
        difference(apart ? sum_parts(found, c.rows, c.parts, c.maps()) : found,
                   *expected[i].second, terms_of(c, name), 1);
    if (!what.empty()) fail(c, name.c_str(), what.c_str());
  }
}

template <typename T>
void compare_token(const Case& c, Inputs<T>& in, Pool& pool,
                   const Results<double>& want) {
  for (bool in_place : {false, true}) {
    compare(c, run_token(c, in, pool, step_head<T>, in_place), want, 2);
    compare(c, run_token(c, in, pool, forward_head<T>, in_place), want, 2);
  }
}

template <typename T>
void check(const Case& c, Pool& pool, bool spoil = false) {
  Inputs<T> in = draw<T>(c, unsigned(c.options + 8 * c.head_dim + 512 * c.d_state));
  const Results<T> got = run<T>(c, in, pool, 4);
  Results<double> want = expect(c, in);
  if (spoil) want.log_decay.back() += 1e-2;
  compare(c, got, want, want.named().size());
  if (c.seq == 1) compare_token(c, in, pool, want);
  // The threads change nothing, not a bit, nor does what their memory held before.
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
    for (auto* values : {&in.x, &in.log_decay, &in.B, &in.C, &in.coefficient,
                         &in.initial, &in.dy, &in.dfinal}) {
      if (!values->empty()) (*values)[values->size() / 2] = value;
    }
    run<T>(c, in, pool, 3);
    if (c.seq == 1) run_token(c, in, pool, step_head<T>, true);
  }
}

constexpr unsigned kAll = 7;

template <typename T>
void check_all(Pool& pool) {
  const int64_t lanes = kLanes<T>, block = kBlock<T>;
  for (unsigned options = 0; options <= kAll; ++options) {
    check<T>({2, 5, 4, 3, 2, 3, 2, 2, options}, pool);
    check<T>({2, 1, 2, lanes + kRows + 1, 1, block + 1, 1, 2, options}, pool);
  }
  for (int64_t d_state : {int64_t{0}, int64_t{1}, int64_t{3}, int64_t{kRows + 1},
                          lanes - 1, lanes, lanes + 1, block - 1, block, block + 1}) {
    for (int64_t head_dim : {int64_t{0}, int64_t{1}, int64_t{3}, int64_t{kRows},
                             int64_t{kRows + 1}, lanes - 1, lanes + 1}) {
      check<T>({1, 7, 2, head_dim, 1, d_state, 3, 2, kAll}, pool);
      check<T>({2, 1, 2, head_dim, 2, d_state, 1, 1, kAll}, pool);
    }
  }
  const std::pair<int64_t, int64_t> grouped[] = {{1, 1}, {3, 3}, {6, 2}, {7, 1}};
  for (auto [heads, groups] : grouped) {
    for (int64_t parts = 1; parts <= heads; ++parts) {
      check<T>({2, 5, heads, 3, groups, lanes + 1, 4, parts, kAll}, pool);
    }
  }
  for (int64_t chunk : {1, 2, 3, 64}) {
    for (int64_t seq = 1; seq <= 20; ++seq) {
      check<T>({2, seq, 2, kRows + 1, 1, 3, chunk, 2, kAll}, pool);
    }
  }
  check<T>({1, 130, 2, kRows + 1, 1, block + 1, 64, 2, kAll}, pool);
  check<T>({1, 130, 1, 3, 1, 2 * block, 64, 1, 3}, pool);
  std::mt19937 random(1);
  const auto below = [&](int64_t end) { return int64_t(random() % unsigned(end)); };
  for (int i = 0; i < 200; ++i) {
    const int64_t groups = 1 + below(3), heads = groups * (1 + below(3));
    check<T>({below(3), 1 + below(20), heads, below(3 * kRows), groups,
              below(2 * lanes + 2), 1 + below(8), 1 + below(heads), unsigned(below(8))},
             pool);
  }
  for (unsigned options : {0u, kAll}) {
    check<T>({0, 4, 2, 3, 1, 2, 2, 1, options}, pool);
    check<T>({2, 4, 0, 3, 1, 2, 2, 1, options}, pool);
    check<T>({2, 1, 0, 0, 1, 0, 1, 1, options}, pool);
    poison<T>({2, 9, 2, kRows + 1, 1, block + 1, 4, 2, options}, pool);
    poison<T>({2, 1, 2, kRows + 1, 1, lanes + 1, 1, 1, options}, pool);
    poison<T>({2, 1, 2, kRows + 1, 1, lanes, 1, 1, options}, pool);
  }
}

}  // namespace

int main(int count, char** arguments) {
  const auto check_everything = [](Pool& pool) {
    check_all<float>(pool);
    check_all<double>(pool);
  };
  const auto spoil = [](Pool& pool) {
    check<double>({2, 5, 4, 3, 2, 3, 2, 2, kAll}, pool, true);
  };
  return drive(count, arguments, check_everything, spoil);
}
