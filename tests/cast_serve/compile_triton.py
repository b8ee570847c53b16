"""`python -m tests.cast_serve.compile_triton`: the Triton kernels for GPUs that need not be there; JSON, spilled bytes.

A process of its own, since modules whose kernels were interpreted stay so.
"""

import json
import re
import subprocess
import tempfile
from typing import Any

from triton import compile as compile_kernel
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

from cast_serve.kernels.cuda.triton_dense import _dense_quantized, columns_of_step
from cast_serve.kernels.cuda.triton_linear import GROUPS, WARPS, _linear24, block

ROWS = (1, 512)


def compile_for(capability: int, kernel: Any, types: dict[str, str], constants: dict[str, Any]) -> int:
    """Compile as for aligned tensors whose sizes are multiples of 16; return the bytes that are spilled to memory."""
    aligned = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(types.values()) if kind != "i32" or i > 7}
    source = ASTSource(kernel, types | dict.fromkeys(constants, "constexpr"), constants, attrs=aligned)
    code = compile_kernel(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": WARPS})
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(code.asm["ptx"])
        file.flush()
        architecture = f"sm_{capability}{'a' if capability >= 90 else ''}"
        command = [get_ptxas(capability).path, "-v", f"-arch={architecture}", file.name, "-o", "/dev/null"]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    (spilled,) = re.findall(r"(\d+) bytes spill stores", said)
    return int(spilled)


def main() -> None:
    spilled: dict[str, int] = {}
    sizes = {"M": "i32", "N": "i32"}
    for capability in (80, 90, 120):
        for M in ROWS:
            rows, outputs = block(M)
            types = {"x": "*bf16", "pairs": "*i32", "bitmask": "*u8", "bias": "*bf16", "y": "*bf16"} | sizes
            types |= {"groups": "i32", "x_stride": "i32"}
            constants: dict[str, Any] = {"HAS_BIAS": True, "ROWS": rows, "OUTPUTS": outputs, "GROUPS": GROUPS}
            spilled[f"sm_{capability}, 2:4, {M} rows"] = compile_for(capability, _linear24, types, constants)
            for bits, group in ((8, 0), (8, 64), (4, 32), (4, 128)):
                types = {"x": "*bf16", "codes": "*i8" if bits == 8 else "*u8", "scales": "*fp32", "bias": "*bf16"}
                types |= {"y": "*bf16"} | sizes | {"K": "i32", "x_stride": "i32", "row_bytes": "i32"}
                constants = {"HAS_BIAS": True, "BITS": bits, "GROUP": group, "ROWS": rows, "OUTPUTS": outputs}
                constants["COLUMNS"] = columns_of_step(rows, group or None)
                name = f"sm_{capability}, dense int{bits} g{group}, {M} rows"
                spilled[name] = compile_for(capability, _dense_quantized, types, constants)
    print(json.dumps(spilled))


if __name__ == "__main__":
    main()
