"""The end of a large run: one process makes the estimates, a few examples at a time, in a file that all of them map."""

import errno
import os
from dataclasses import replace

import pytest
import torch
from conftest import build_net
from other_processes import start, wait
from safetensors.torch import save_file
from test_crash import content, data

import hf_coar as coar
from hf_coar.attributions import rows
from hf_coar.errors import CoarError
from hf_coar.runs import problem
from hf_coar.runs.store import Store
from hf_coar.storage import streaming

METHOD = coar.PathGradient(rounds=2, n_flips=0, check_masks=0)  # whose estimates are the weights


def attribute(out, method=METHOD, **options):
    return coar.attribute(build_net("mlp").model, data(), method=method, out=out, progress=False, **options)


@pytest.fixture
def large(monkeypatch):
    """Every run is a large one."""
    monkeypatch.setattr(problem, "_IN_MEMORY", 0)


def saved(folder):
    """Bytes by name of all but the shards, which short units share as it happens."""
    return {name: value for name, value in content(folder).items() if not name.startswith("shards/")}


def estimates(folder):
    return sorted(path.name for path in folder.glob("estimates-*"))


# ------------------------------------------------------------------------------------------------------------ the files


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("n_rows", [1, 64, 130])
def test_a_file_in_blocks_has_the_bytes_of_the_library(tmp_path, dtype, n_rows):
    matrices = {name: torch.randn(n_rows, 7).to(dtype) for name in rows.MATRICES}
    columns = {"bias": torch.randn(n_rows), "labels": torch.arange(n_rows), "old": torch.randn(n_rows).double()}
    root = rows.save(tmp_path / "a", matrices, columns)
    found, small = rows.load([tmp_path / "a"], [root], rows.MATRICES)
    checksums = {f"{name}_row_checksums": rows._row_checksums(matrix) for name, matrix in matrices.items()}
    save_file({**matrices, **columns, **checksums}, tmp_path / "b", metadata={"sha256": root})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert torch.equal(found["weights"].tensor(), matrices["weights"].float())
    assert torch.equal(small["labels"], columns["labels"])


@pytest.mark.parametrize("n_rows", [3, 5])
def test_too_few_or_too_many_rows_leave_no_file(tmp_path, n_rows):
    blocks = [{"a": torch.zeros(2, 3)}, {"a": torch.zeros(2, 3)}]
    with pytest.raises(CoarError, match=f"4 rows .* {n_rows}"):
        streaming.write(tmp_path / "a", n_rows, blocks, lambda kinds: {})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("scale", [None, 2.0])
def test_rows_and_columns_are_corrected_alike(scale):
    weights, errors, indices = torch.randn(5, 7), torch.rand(5, 7), torch.tensor([1, 4])
    estimates = problem.Estimates(weights, errors).replaced(indices, torch.zeros(5, 2), torch.ones(5, 2))
    estimates = estimates if scale is None else estimates.scaled(scale)
    whole, wanted = estimates.rows(0, 5), torch.tensor([4, 0, 1, 6])
    assert all(torch.equal(all_[:, wanted], some) for all_, some in zip(whole, estimates.of(wanted), strict=True))
    assert (whole.weights[:, indices] == 0).all() and (whole.errors[:, indices] == (scale or 1)).all()
    assert torch.equal(whole.weights[2], estimates.some([2]).weights[0])
    less_certain = replace(estimates, scale=None).scaled(scale or 1.0, uncertain=0.2).rows(0, 5)
    assert torch.equal(less_certain.weights, whole.weights)
    torch.testing.assert_close(less_certain.errors**2, whole.errors**2 + (0.2 * whole.weights) ** 2)
    with pytest.raises(ValueError, match="before estimates are scaled"):
        estimates.replaced(indices, torch.zeros(5, 2), torch.ones(5, 2))


# -------------------------------------------------------------------------------------------------------------- the run


@pytest.mark.parametrize("method", [METHOD, coar.PathGradient(rounds=2), coar.baselines.LeaveOneOut(check_masks=5)])
def test_a_large_run_ends_in_the_same_bytes(tmp_path, monkeypatch, method):
    attribute(tmp_path / "small", method)
    with monkeypatch.context() as patched:
        patched.setattr(problem, "concatenated", lambda blocks: pytest.fail("all of it in memory"))
        patched.setattr(problem, "_IN_MEMORY", 0)
        attribute(tmp_path / "large", method)
    assert saved(tmp_path / "large") == saved(tmp_path / "small")
    assert not estimates(tmp_path / "large")


def test_rows_come_in_blocks(tmp_path, large, monkeypatch):
    monkeypatch.setattr("hf_coar.estimators.path_gradient.BLOCK", 3)
    seen, write = [], rows.write

    def noted(path, n_rows, blocks, names):
        blocks = list(blocks)
        seen.extend(len(block["weights"]) for block in blocks)
        return write(path, n_rows, blocks, names)

    with monkeypatch.context() as patched:
        patched.setattr(rows, "write", noted)
        with pytest.MonkeyPatch.context() as saving:
            saving.setattr(coar.Attributions, "save_pretrained", lambda *args: None)
            attribute(tmp_path)
    assert seen == [3, 3, 2]


def test_a_damaged_file_is_made_again(tmp_path, large, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(Store, "drop_estimates", lambda store, part="": None)
        weights = attribute(tmp_path).weights.clone()
    (name,) = estimates(tmp_path)
    whole = bytearray((tmp_path / name).read_bytes())
    place = whole.find(weights[3].numpy().tobytes())
    assert place > 0
    whole[place] ^= 1
    (tmp_path / name).write_bytes(whole)
    assert torch.equal(attribute(tmp_path).weights, weights)


def test_a_run_that_was_broken_off_at_the_end_takes_what_is_there(tmp_path, large, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(coar.Attributions, "save_pretrained", lambda *args: os.kill(os.getpid(), 9))
        assert wait(start(lambda: attribute(tmp_path))) == -9
    (name,) = estimates(tmp_path)
    inode = (tmp_path / name).stat().st_ino
    monkeypatch.setattr(rows, "write", lambda *args: pytest.fail("it was made again"))
    found = Store.estimates
    inodes = []

    def noted(store, *args):
        inodes.append((tmp_path / name).stat().st_ino)
        return found(store, *args)

    monkeypatch.setattr(Store, "estimates", noted)
    monkeypatch.setattr(coar.Attributions, "save_pretrained", lambda *args: None)
    assert attribute(tmp_path).weights.isfinite().all() and inodes == [inode]
    assert not estimates(tmp_path)  # and it goes once it is saved


def test_of_processes_at_once_one_makes_it(tmp_path):
    store = Store(tmp_path / "run", {"seed": 0})
    (tmp_path / "made").mkdir()

    def blocks():
        (tmp_path / "made" / str(os.getpid())).touch()
        yield {"weights": torch.ones(4, 3), "labels": torch.arange(4)}

    def work():
        found = store.estimates("rounds-000000", 4, 4, blocks())
        assert torch.equal(found["weights"], torch.ones(4, 3)) and found["labels"].tolist() == [0, 1, 2, 3]

    children = [start(work) for _ in range(4)]
    assert [wait(child) for child in children] == [0] * 4
    assert len(list((tmp_path / "made").iterdir())) == 1


def test_estimates_of_other_examples_are_others(tmp_path):
    store = Store(tmp_path / "run", {"seed": 0})
    for left_out in (0, 1):
        if left_out:
            store.skip(2, "broken")
        block = {"weights": torch.full((4 - left_out, 3), float(left_out)), "labels": torch.zeros(4 - left_out)}
        assert float(store.estimates("rounds-000000", 4, 4 - left_out, [block])["weights"].mean()) == left_out
    assert len(estimates(tmp_path / "run")) == 1  # what nobody will ask for is gone


def test_a_full_disk_at_the_end_loses_nothing(tmp_path, large, monkeypatch):
    put = streaming._put

    def full(file, offset, first, tensor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(streaming, "_put", full)
    with pytest.raises(CoarError, match="No space left"):
        attribute(tmp_path / "a")
    assert not [path for path in (tmp_path / "a").rglob("*") if path.name.endswith(".tmp")]
    monkeypatch.setattr(streaming, "_put", put)
    attribute(tmp_path / "a")
    attribute(tmp_path / "b")
    assert saved(tmp_path / "a") == saved(tmp_path / "b")
