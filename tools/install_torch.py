"""Installs the torch pinned in constraints.txt, without gigabytes of CUDA packages on a machine that has no NVIDIA GPU.

`PEFT_ZOO_TORCH_INDEX=<url>` names the package index to take torch from and skips the question.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from importlib.metadata import distributions
from pathlib import Path

CONSTRAINTS = Path(__file__).resolve().parents[1] / "constraints.txt"
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
# Bytecode is made where a module is first imported: most of torch's never is.
PIP = [sys.executable, "-m", "pip", "install", "--quiet", "--no-compile"]


def pulls_cuda(requirement: str) -> bool:
    """Whether pip, as it is configured here, would install NVIDIA's packages along with `requirement`."""
    report = json.loads(subprocess.check_output([*PIP, "--dry-run", "--report", "-", requirement]))
    return any(item["metadata"]["name"].startswith(("nvidia", "cuda")) for item in report["install"])


def main() -> None:
    version = re.findall(r"^torch==(\S+)$", CONSTRAINTS.read_text(), re.MULTILINE)[0]
    if any(found.version.split("+")[0] == version for found in distributions(name="torch")):
        return
    index = os.environ.get("PEFT_ZOO_TORCH_INDEX")
    if index is None and shutil.which("nvidia-smi") is None and pulls_cuda(f"torch=={version}"):
        index = CPU_INDEX
    # From such an index torch alone: its dependencies come from the usual one, with the package that requires them.
    subprocess.check_call([*PIP, *(["--no-deps", "--index-url", index] if index else []), f"torch=={version}"])


if __name__ == "__main__":
    main()
