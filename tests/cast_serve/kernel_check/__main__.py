"""python -m tests.cast_serve.kernel_check: under ASan and UBSan; with --under, without them under an emulator.

python -m tests.cast_serve.kernel_check --under "qemu-x86_64 -cpu Nehalem"
CXX="aarch64-linux-gnu-g++ -static" python -m tests.cast_serve.kernel_check --machine aarch64 --under qemu-aarch64
"""

import argparse
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.cast_serve.kernel_check.build import SANITIZE, build

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--under", help="command that runs the program, built as the library is")
parser.add_argument("--machine", help="what CXX compiles for, where it is another one")
arguments = parser.parse_args()
with tempfile.TemporaryDirectory() as folder:
    program = build(Path(folder), SANITIZE if arguments.under is None else (), arguments.machine)
    sys.exit(subprocess.run([*shlex.split(arguments.under or ""), program]).returncode)
