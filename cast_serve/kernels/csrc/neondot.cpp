// NEON with the dot products of ARMv8.2: four products of bytes, and their sum, in one instruction.
#if defined(__aarch64__)
#include "neon.h"

namespace cast24 {
namespace {

struct DotProduct {
  static int32x4_t add(int32x4_t sum, int8x16_t x, int8x16_t w) { return vdotq_s32(sum, x, w); }
};

}  // namespace

const QuantizedKernels kQuantizedNeonDot = {tile_quantized<NeonBytes<DotProduct>>, quantize_rows<NeonBytes<DotProduct>>};
const Isa kNeonDot = make_isa<Neon>("neondot", &kQuantizedNeonDot);

}  // namespace cast24
#endif
