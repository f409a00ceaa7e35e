#!/usr/bin/env bash
# Sets up an environment and runs the demo. From the root of the repository:  bash scripts/demo.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh" plots
"$venv/bin/hf-coar" demo "$@"
