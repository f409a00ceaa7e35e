#!/usr/bin/env bash
# Runs the tests that matter with the lowest versions that setup.cfg allows, in an environment of its own (.venv-lowest,
# some 6 GB: delete it afterwards). From the root of the repository:  PYTHON=python3.11 bash scripts/check_floors.sh
# What is given after it goes to pytest. The lowest numpy has wheels for Python 3.11 and 3.12 alone.
VERSIONS=lowest
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh" test
# Loading, attributing, evaluating, editing, saving, reloading; the Hub, cards, the explorer; what dies on the way.
matter=(package demo readme format hub cards masking components engine store crash fuzz processes streaming path_gradient
    estimators solvers outputs ragged editing editing_in_steps cli config plots report explore tracking)
files=("${matter[@]/#/tests/test_}")
files=("${files[@]/%/.py}")
OMP_NUM_THREADS=1 "$venv/bin/python" -m pytest --numprocesses 2 --dist loadfile "${files[@]}" "$@"
