#if defined(__aarch64__)
#include "neon.h"

namespace cast24 {
namespace {

// Products of bytes are 16-bit words (|x| <= 127, |w| <= 128), added by pairs, twice.
struct Multiply {
  static int32x4_t add(int32x4_t sum, int8x16_t x, int8x16_t w) {
    const int32x4_t first = vpaddlq_s16(vmull_s8(vget_low_s8(x), vget_low_s8(w)));
    const int32x4_t second = vpaddlq_s16(vmull_high_s8(x, w));
    return vaddq_s32(sum, vpaddq_s32(first, second));
  }
};

}  // namespace

const QuantizedKernels kQuantizedNeon = {tile_quantized<NeonBytes<Multiply>>, quantize_rows<NeonBytes<Multiply>>};
const Isa kNeon = make_isa<Neon>("neon", &kQuantizedNeon);

}  // namespace cast24
#endif
