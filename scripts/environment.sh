# Sourced by demo.sh and check.sh: makes .venv beside the sources and installs the package there with the extras named.
# PYTHON chooses the interpreter (3.11 or newer).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python3}
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
  echo "hf_coar needs Python 3.11 or newer; $python is $("$python" --version). Set PYTHON to another one." >&2
  exit 2
}
[ -x .venv/bin/python ] || "$python" -m venv .venv
echo "installing into $(basename "$PWD")/.venv (the first time: some 6 GB, minutes) ..."
.venv/bin/python -m pip install --quiet --quiet --disable-pip-version-check --editable ".[$1]"
