// The depthwise causal convolution for XLA on the CPU. `cpu.py` calls it.
#include "cpu_conv.h"
#include "xla_call.h"

namespace capibara {
namespace {

namespace ffi = xla::ffi;

template <typename T>
Conv<T> conv_of(bool silu, int64_t dilation, const Buffer& x, const Buffer& weight,
                const Buffer& bias, const Buffer& history, const Buffer& document) {
  const auto sizes = x.dimensions();
  const auto weights = weight.dimensions();
  return {sizes[0],          weights[0],      sizes[1],           sizes[2],
          weights[1],        dilation,        silu,               values<T>(x),
          values<T>(weight), values<T>(bias), values<T>(history), values<int32_t>(document)};
}

template <typename T>
int64_t work(const Conv<T>& conv) {
  return conv.rows * conv.seq * conv.channels * (conv.silu ? 4 : 1);
}

template <typename T>
void forward(ffi::ThreadPool& pool, const Conv<T>& conv, T* y) {
  const int64_t runs = (conv.seq + kRun - 1) / kRun, blocks = conv.blocks();
  run_tasks(pool, conv.rows * runs * blocks, work(conv), [&](int64_t task) {
    const int64_t run = task / blocks % runs, row = task / blocks / runs;
    forward_run<T>(conv, row, task % blocks, run, y);
  });
}

template <typename T>
void backward(ffi::ThreadPool& pool, const Conv<T>& conv, const T* dy,
              const ConvResults<T>& results) {
  const int64_t parts = results.parts, blocks = conv.blocks();
  run_tasks(pool, conv.rows * parts * blocks, 4 * work(conv), [&](int64_t task) {
    const int64_t part = task / blocks % parts, row = task / blocks / parts;
    backward_part<T>(conv, row, task % blocks, part, dy, results);
  });
}

ffi::Error forward_handler(ffi::ThreadPool pool, bool silu, int64_t dilation, Buffer x,
                           Buffer weight, Buffer bias, Buffer history, Buffer document,
                           Result y) {
  expect_many_writes(y);
  const auto run = [&](auto number) {
    using T = decltype(number);
    const auto conv = conv_of<T>(silu, dilation, x, weight, bias, history, document);
    forward<T>(pool, conv, values<T>(y));
  };
  x.element_type() == ffi::F64 ? run(0.0) : run(0.0f);
  return ffi::Error::Success();
}

ffi::Error backward_handler(ffi::ThreadPool pool, bool silu, int64_t dilation, Buffer x,
                            Buffer weight, Buffer bias, Buffer history, Buffer document,
                            Buffer dy, Result dx, Result dweights, Result dhistory) {
  expect_many_writes(dx);
  const auto run = [&](auto number) {
    using T = decltype(number);
    const auto conv = conv_of<T>(silu, dilation, x, weight, bias, history, document);
    backward<T>(pool, conv, values<T>(dy),
                {dweights->dimensions()[1], values<T>(dx), values<T>(dweights),
                 values<T>(dhistory)});
  };
  x.element_type() == ffi::F64 ? run(0.0) : run(0.0f);
  return ffi::Error::Success();
}

#define CAPIBARA_OPERANDS        \
  ffi::Ffi::Bind()               \
      .Ctx<ffi::ThreadPool>()    \
      .Attr<bool>("silu")        \
      .Attr<int64_t>("dilation") \
      .Arg<Buffer>() /* x */     \
      .Arg<Buffer>() /* weight */ \
      .Arg<Buffer>() /* bias */  \
      .Arg<Buffer>() /* history */ \
      .Arg<Buffer>() /* document */

}  // namespace
}  // namespace capibara

// All else is hidden, lest it be mistaken for a name of jaxlib's.
#pragma GCC visibility push(default)

using namespace capibara;

XLA_FFI_DEFINE_HANDLER_SYMBOL(capibara_causal_conv_forward, forward_handler,
                              CAPIBARA_OPERANDS.Ret<Buffer>());  // y

XLA_FFI_DEFINE_HANDLER_SYMBOL(capibara_causal_conv_backward, backward_handler,
                              CAPIBARA_OPERANDS.Arg<Buffer>()  // dy
                                  .Ret<Buffer>()               // dx
                                  .Ret<Buffer>()               // dweight and dbias
                                  .Ret<Buffer>());             // dhistory

#pragma GCC visibility pop
