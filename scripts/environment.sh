# Sourced by demo.sh, check.sh and others: makes an environment beside the sources and installs the package there with the
# extras named. PYTHON chooses the interpreter (3.11 or newer), VERSIONS what is installed: the versions that were tested
# (`tested`, the default: scripts/constraints.txt, in .venv), the floors of setup.cfg (`lowest`, in .venv-lowest) or what
# is newest today (`newest`, in .venv-newest).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python3}
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
  echo "hf_coar needs Python 3.11 or newer; $python is $("$python" --version). Set PYTHON to another one." >&2
  exit 2
}
versions=${VERSIONS:-tested}
case "$versions" in
  tested) venv=.venv options=(--constraint scripts/constraints.txt) ;;
  lowest) venv=.venv-lowest options=(--constraint .venv-lowest/floors.txt) ;;
  newest) venv=.venv-newest options=(--upgrade --upgrade-strategy eager) ;;
  *)
    echo "VERSIONS=$versions; there are tested, lowest and newest." >&2
    exit 2
    ;;
esac
[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
# Every lower bound of setup.cfg as the version itself.
sed -nE 's/^ +([A-Za-z0-9_.-]+)>=([0-9.]+)$/\1==\2/p' setup.cfg >"$venv/floors.txt"
echo "installing into $(basename "$PWD")/$venv (the first time: some 6 GB, minutes) ..."
"$venv/bin/python" -m pip install --quiet --quiet --disable-pip-version-check "${options[@]}" --editable ".[$1]"
