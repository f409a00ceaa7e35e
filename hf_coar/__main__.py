"""`python -m hf_coar …` and `accelerate launch -m hf_coar …`: the same as `hf-coar …`."""

import sys

from hf_coar.cli import main

sys.exit(main())
