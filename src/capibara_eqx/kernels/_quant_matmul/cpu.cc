// The packed product in whole numbers for XLA on the CPU. `cpu.py` calls it.
#include "cpu_product.h"
#include "xla_call.h"

namespace capibara {
namespace {

namespace ffi = xla::ffi;

ffi::Error product_handler(ffi::ThreadPool pool, int64_t bits, int64_t group_bytes,
                           Buffer x, Buffer codes, Buffer scale, Buffer zero, Buffer sums,
                           Buffer step, Result y) {
  // (tokens, places, width), (rows, bytes), (groups, rows)
  const auto tokens = x.dimensions(), matrix = codes.dimensions();
  const Product product{tokens[0],
                        matrix[0],
                        matrix[1],
                        tokens[2],
                        scale.dimensions()[0],
                        group_bytes,
                        static_cast<int>(bits),
                        values<int8_t>(x),
                        values<uint8_t>(codes),
                        values<float>(scale),
                        values<float>(step),
                        values<int32_t>(zero),
                        values<int32_t>(sums)};
  expect_many_writes(y);
  const int64_t work = product.rows * product.width * product.places() *
                       (product.tokens + kTokens) / kRows;
  run_tasks(pool, product.blocks(), work, [&](int64_t block) {
    multiply_block(product, block, values<float>(y));
  });
  return ffi::Error::Success();
}

}  // namespace
}  // namespace capibara

// All else is hidden, lest it be mistaken for a name of jaxlib's.
#pragma GCC visibility push(default)

using namespace capibara;

XLA_FFI_DEFINE_HANDLER_SYMBOL(capibara_quant_matmul, product_handler,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Attr<int64_t>("bits")
                                  .Attr<int64_t>("group_bytes")
                                  .Arg<Buffer>()    // x
                                  .Arg<Buffer>()    // codes
                                  .Arg<Buffer>()    // scale
                                  .Arg<Buffer>()    // zero
                                  .Arg<Buffer>()    // sums
                                  .Arg<Buffer>()    // step
                                  .Ret<Buffer>());  // y

#pragma GCC visibility pop
