"""The tutorials, made small: each does what its page says, on a model that its script trains."""

import sys
from pathlib import Path

import pytest
import torch

SCRIPTS = Path(__file__).parent.parent / "scripts"
sys.path.insert(0, str(SCRIPTS))


def test_a_shortcut_is_taken_out_of_a_classifier_of_tumours():
    import tutorial_medical as tutorial

    found = [tutorial.run(seed, rounds=2) for seed in range(2)]
    worst = {name: sum(one[name][0] for one in found) / 2 for name in found[0]}
    assert worst["edited"] > worst["the network"] + 0.05 and worst["edited"] > worst["with another threshold"]
    assert "| edited |" in tutorial.report(found)


@pytest.mark.slow
def test_a_graph_network_forgets_nitro_groups():
    pytest.importorskip("rdkit")
    import tutorial_molecules as tutorial

    torch.manual_seed(0)
    found = tutorial.run(most=600, epochs=8, rounds=2)
    assert found["correlation"] > 0.6 and found["slower"] < 3  # of the processor's time, which other programs disturb
    (before, others), (after, left) = found["before"], found["after"]
    assert after < before - 0.3 and left > others - 0.1
    assert "| after |" in tutorial.table(found)


@pytest.mark.slow
def test_a_diffusion_model_forgets_sevens():
    import tutorial_diffusion as tutorial

    found = tutorial.run()
    (before, others), (after, left) = (found["rates"][name] for name in list(found["rates"])[:2])
    assert found["same"] and before > 0.6 and after < before - 0.5 and left > others - 0.1
    assert "| the model |" in tutorial.table([found])
