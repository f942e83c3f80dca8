#!/usr/bin/env bash
# Sets up .venv-gpu on a machine with an NVIDIA card: from PyPI, or from a folder of wheels where there is no network.
#
#   benchmarks/gpu/setup.sh [WHEELS]
#
# Fill the folder on a machine with a network, for the Python that the other one has:
#   pip download -d WHEELS --python-version 312 --only-binary :all: -r benchmarks/gpu/requirements.txt
set -euo pipefail
cd "$(dirname "$0")/../.."
[ -x .venv-gpu/bin/pip ] || python3 -m venv --system-site-packages .venv-gpu
from=()
[ $# -eq 0 ] || from=(--no-index --find-links "$1")
.venv-gpu/bin/pip install --quiet "${from[@]}" -r benchmarks/gpu/requirements.txt
.venv-gpu/bin/pip install --quiet --no-deps --no-build-isolation --editable .
