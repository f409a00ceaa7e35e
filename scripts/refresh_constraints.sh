#!/usr/bin/env bash
# Makes scripts/constraints.txt anew: the newest versions of everything, once the tests are green with them. From the root
# of the repository:  bash scripts/refresh_constraints.sh
# What is given after it goes to pytest. Each Python that is there (3.11, 3.12, 3.13) then has to find all of them.
set -euo pipefail
VERSIONS=newest bash "$(dirname "${BASH_SOURCE[0]}")/check.sh" "$@"
cd "$(dirname "${BASH_SOURCE[0]}")/.."
.venv-newest/bin/python scripts/pins.py >.venv-newest/constraints.txt
for python in python3.11 python3.12 python3.13; do
  "$python" -c "" 2>/dev/null || { echo "$python is not here; not tried" && continue; }
  echo "$python: looking for the versions of all requirements ..."
  "$python" -m pip install --quiet --dry-run --ignore-installed --only-binary :all: --disable-pip-version-check \
    --constraint .venv-newest/constraints.txt ".[plots,explore,completion,diffusion,adapters,graphs,docs,test]"
done
mv .venv-newest/constraints.txt scripts/constraints.txt
echo "scripts/constraints.txt is new; look at what changed with git diff"
