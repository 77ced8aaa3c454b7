// The state space dual for XLA on the CPU. `cpu.py` calls it and says what the operands
// are; an operand without elements is an absent one.
#include "cpu_backward.h"
#include "cpu_forward.h"
#include "xla_call.h"

namespace capibara {
namespace {

namespace ffi = xla::ffi;

// The operands in the order of `Operands`, whatever their type.
struct Inputs {
  int64_t chunk;
  const Buffer &x, &log_decay, &B, &C, &coefficient, &initial_state, &reset;

  template <typename T>
  Dual<T> dual() const {
    const auto sizes = x.dimensions(), maps = B.dimensions();
    return {sizes[0],
            sizes[1],
            sizes[2],
            sizes[3],
            maps[2],
            maps[3],
            chunk,
            values<T>(x),
            values<T>(log_decay),
            values<T>(coefficient),
            values<T>(B),
            values<T>(C),
            values<T>(initial_state),
            values<bool>(reset)};
  }
};

template <typename T>
int64_t work(const Dual<T>& dual) {
  return dual.rows * dual.seq * dual.n_heads * dual.state_size() / 4;
}

template <typename T>
void forward(ffi::ThreadPool& pool, const Inputs& inputs,
             const ForwardResults<T>& results) {
  const Dual<T> dual = inputs.dual<T>();
  const bool one_token = dual.seq == 1 && results.saved == nullptr;
  const auto run = one_token ? step_head<T> : forward_head<T>;
  // One token is as long as its state takes to come from memory, not to compute.
  const int64_t units = (one_token ? 4 : 1) * work(dual);
  run_tasks(pool, dual.rows * dual.n_heads, units, [&](int64_t task) {
    run(dual, task / dual.n_heads, task % dual.n_heads, results);
  });
}

template <typename T>
void backward(ffi::ThreadPool& pool, const Inputs& inputs,
              const Cotangents<T>& cotangents, const BackwardResults<T>& results) {
  const Dual<T> dual = inputs.dual<T>();
  const int64_t parts = dual.n_groups * results.parts;
  run_tasks(pool, dual.rows * parts, 4 * work(dual), [&](int64_t task) {
    backward_part<T>(dual, task / parts, task % parts, cotangents, results);
  });
}

ffi::Error forward_handler(ffi::ThreadPool pool, int64_t chunk, Buffer x,
                           Buffer log_decay, Buffer B, Buffer C, Buffer coefficient,
                           Buffer initial_state, Buffer reset, Result y,
                           Result final_state, Result saved) {
  const Inputs inputs{chunk, x, log_decay, B, C, coefficient, initial_state, reset};
  for (Result* result : {&y, &saved}) expect_many_writes(*result);
  const auto run = [&](auto number) {
    using T = decltype(number);
    forward<T>(pool, inputs, {values<T>(y), values<T>(final_state), values<T>(saved)});
  };
  x.element_type() == ffi::F64 ? run(0.0) : run(0.0f);
  return ffi::Error::Success();
}

ffi::Error backward_handler(ffi::ThreadPool pool, int64_t chunk, Buffer x,
                            Buffer log_decay, Buffer B, Buffer C, Buffer coefficient,
                            Buffer initial_state, Buffer reset, Buffer saved, Buffer dy,
                            Buffer dfinal, Result dx, Result dlog_decay, Result dB,
                            Result dC, Result dcoefficient, Result dinitial) {
  const Inputs inputs{chunk, x, log_decay, B, C, coefficient, initial_state, reset};
  for (Result* result : {&dx, &dB, &dC}) expect_many_writes(*result);
  const auto run = [&](auto number) {
    using T = decltype(number);
    backward<T>(pool, inputs, {values<T>(saved), values<T>(dy), values<T>(dfinal)},
                {dB->dimensions()[1], values<T>(dx), values<T>(dlog_decay),
                 values<T>(dcoefficient), values<T>(dB), values<T>(dC),
                 values<T>(dinitial)});
  };
  x.element_type() == ffi::F64 ? run(0.0) : run(0.0f);
  return ffi::Error::Success();
}

#define CAPIBARA_OPERANDS            \
  ffi::Ffi::Bind()                   \
      .Ctx<ffi::ThreadPool>()        \
      .Attr<int64_t>("chunk")        \
      .Arg<Buffer>() /* x */         \
      .Arg<Buffer>() /* log_decay */ \
      .Arg<Buffer>() /* B */         \
      .Arg<Buffer>() /* C */         \
      .Arg<Buffer>() /* coefficient */ \
      .Arg<Buffer>() /* initial */   \
      .Arg<Buffer>() /* reset */

}  // namespace
}  // namespace capibara

// All else is hidden, lest it be mistaken for a name of jaxlib's.
#pragma GCC visibility push(default)

using namespace capibara;

XLA_FFI_DEFINE_HANDLER_SYMBOL(capibara_ssd_forward, forward_handler,
                              CAPIBARA_OPERANDS.Ret<Buffer>()  // y
                                  .Ret<Buffer>()               // final_state
                                  .Ret<Buffer>());             // saved

XLA_FFI_DEFINE_HANDLER_SYMBOL(capibara_ssd_backward, backward_handler,
                              CAPIBARA_OPERANDS.Arg<Buffer>()  // saved
                                  .Arg<Buffer>()               // dy
                                  .Arg<Buffer>()               // dfinal_state
                                  .Ret<Buffer>()               // dx
                                  .Ret<Buffer>()               // dlog_decay
                                  .Ret<Buffer>()               // dB
                                  .Ret<Buffer>()               // dC
                                  .Ret<Buffer>()               // dcoefficient
                                  .Ret<Buffer>());             // dinitial_state

#pragma GCC visibility pop
