"""Tasks: for every kind of head the right output without a word, compared with the head's own loss or by hand."""

import pytest
import torch
from task_cases import CASES, made, rows

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
