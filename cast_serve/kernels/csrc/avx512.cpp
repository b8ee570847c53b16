// AVX-512 with the instructions of tile.h alone, with VNNI for quantized weights, and with pair products of bf16.
#if defined(__x86_64__)
#include "avx512.h"

namespace cast24 {

const Isa kAvx512 = make_isa<Avx512>("avx512", &kQuantizedAvx2);
const Isa kAvx512Vnni = make_isa<Avx512>("avx512vnni", &kQuantizedVnni);
const Isa kAvx512Bf16 = make_isa<Avx512>("avx512bf16", &kQuantizedVnni, &kPairsAvx512);

}  // namespace cast24
#endif
