"""Examples by number or by mask, wherever they can be given."""

import numpy as np
import pytest
import torch
from test_format import tiny
from tiny_texts import classifier

import hf_coar as coar
from hf_coar import cli, data
from hf_coar.editing import tasks
from hf_coar.errors import OutOfRangeError
from hf_coar.plots import canvas

MASKS = [torch.tensor, np.array, list]


@pytest.fixture(scope="module")
def attributions() -> coar.Attributions:
    """Four examples, the last two of one class."""
    model, generator = classifier(), torch.Generator().manual_seed(0)
    batch = {
        "input_ids": torch.randint(4, 11, (4, 6), generator=generator),
        "labels": torch.tensor([0, 0, 1, 1]),
    }
    components = coar.find_components(model, "head")
    return coar.attribute(model, [batch], components, method=coar.baselines.LeaveOneOut(), progress=False)


@pytest.mark.parametrize("made", MASKS)
def test_a_mask_chooses_what_it_marks(attributions, made):
    """True and False were taken for the numbers 1 and 0."""
    mask = made((attributions.labels == 1).tolist())
    assert attributions[mask].rows == [2, 3]
    head = attributions.without([0], example=mask)
    assert torch.equal(head.after, attributions.without([0], example=[2, 3]).after)
    ranked = [coar.editing.rank_components(attributions, decrease=one).tolist() for one in (mask, [2, 3])]
    assert ranked[0] == ranked[1]
    assert tasks.held.checked(mask, 4, "fix") == canvas.chosen(mask, 4) == [2, 3]
    assert data.within(mask, 4) == [2, 3]


@pytest.mark.parametrize("given", [[True, False], [1.5, 2], "ab", [[0], [1]]])
def test_what_is_no_number_is_told(attributions, given):
    for use in (lambda one: attributions.without([0], example=one), lambda one: data.numbers(one, 4)):
        with pytest.raises(coar.CoarError, match="mask"):
            use(given)


def test_a_number_that_there_is_none_of_is_an_error_of_both_families(attributions):
    """So that the command line says it in a line, and loops over parts end."""
    uses = (lambda: attributions[4], lambda: attributions.top(example=-5), lambda: attributions.row(4))
    for use in (*uses, lambda: attributions.components[99], lambda: attributions.without([0], example=[4])):
        with pytest.raises(OutOfRangeError, match=r"give a number from 0 to \d+") as found:
            use()
        assert isinstance(found.value, coar.CoarError) and isinstance(found.value, IndexError)


def test_the_command_line_says_it_in_a_line(tmp_path, capsys):
    tiny().save_pretrained(tmp_path / "run")
    assert cli.main(["show", str(tmp_path / "run"), "--example", "99"]) == 2
    assert "example 99 of" in capsys.readouterr().err
