"""Tasks: for every kind of head the right output without a word, compared with the head's own loss or by hand."""

import pytest
import torch
from exactness import zeroed_by_hand
from task_cases import CASES, made, rows

import hf_coar as coar
from hf_coar.models import tasks


@pytest.fixture(params=CASES)
def case(request):
    return request.param


def test_the_head_tells_the_task_and_its_output(case):
    model, batch = made(case)
    assert tasks.of(model).name == CASES[case].task
    assert tasks.bind(model, batch=batch).name == CASES[case].output


def test_the_output_is_what_one_works_out_by_hand(case):
    model, batch = made(case)
    with torch.no_grad():
        found = tasks.bind(model, batch=batch).of(model, batch)
        expected = CASES[case].by_hand(model, batch)
    assert found.shape == (4,) and found.dtype == torch.float32
    assert found.tolist() == pytest.approx(expected.tolist(), rel=1e-4, abs=1e-5)
    assert expected.unique().numel() > 1


def test_an_example_alone_gives_what_it_gives_in_a_batch(case):
    model, batch = made(case)
    output = tasks.bind(model, batch=batch)
    with torch.no_grad():
        alone = torch.cat([output.of(model, row) for row in rows(batch)])
        assert alone.tolist() == pytest.approx(output.of(model, batch).tolist(), rel=1e-3, abs=1e-4)


# -------------------------------------------------------------------------------------------- components and the output


def some_masks(n_components, n_masks=3):
    """The last one keeps all, the others lack a tenth of the components."""
    kept = torch.rand(n_masks, n_components, generator=torch.Generator().manual_seed(0)) > 0.1
    kept[-1] = True
    return kept


def test_components_reach_the_output_as_zeroing_by_hand_does(case):
    model, batch = made(case)
    components, output = coar.find_components(model), tasks.bind(model, batch=batch)
    masks = some_masks(len(components))
    with torch.no_grad():
        for kept in masks:
            by_hand = output.of(zeroed_by_hand(model, components, kept), batch)
            with coar.ablate(model, components, kept, how="weights"):
                assert torch.allclose(output.of(model, batch), by_hand, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(by_hand, masked(model, components, output, batch, masks[:1].expand(4, -1)), atol=1e-4)


def masked(model, components, output, batch, kept):
    with torch.no_grad(), coar.ablate(model, components, kept):
        return output.of(model, batch)


def test_every_example_may_have_components_of_its_own(case):
    model, batch = made(case)
    components, output = coar.find_components(model), tasks.bind(model, batch=batch)
    kept = some_masks(len(components))[[0, 1, 2, 0]]
    found = masked(model, components, output, batch, kept)
    alone = [masked(model, components, output, batch, row)[i] for i, row in enumerate(kept)]
    assert found.tolist() == pytest.approx(torch.stack(alone).tolist(), rel=1e-3, abs=1e-3)
