#!/usr/bin/env bash
# Sets up an environment, checks the style and runs the tests. From the root of the repository:  bash scripts/check.sh
# What is given after it goes to pytest, such as:  bash scripts/check.sh -m slow
# With the newest versions of everything in the place of those that were tested:  VERSIONS=newest bash scripts/check.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh" test
"$venv/bin/ruff" check .
"$venv/bin/ruff" format --check .
# Two processes with one thread each, file by file: the machine this is meant for has two cores.
OMP_NUM_THREADS=1 "$venv/bin/python" -m pytest --numprocesses 2 --dist loadfile "$@"
