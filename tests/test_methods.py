"""The contract of estimators and solvers: by name, of one's own, refused in a sentence, and from the command line."""

from dataclasses import dataclass

import pytest
import torch
from conftest import build_net

import hf_coar as coar
from hf_coar import cli, estimators
from hf_coar.cli import config, methods
from hf_coar.errors import CoarError
from hf_coar.estimators import ESTIMATORS, Size, solvers
from hf_coar.estimators.solvers import SOLVERS


@pytest.fixture
def own_names():
    """Names that a test registers are forgotten afterwards."""
    before = {registry: list(registry) for registry in (ESTIMATORS, SOLVERS)}
    yield
    for registry, names in before.items():
        for name in set(registry) - set(names):
            del registry[name]


def attribute(net, method, **options):
    batches = [net.batch]
    options = {"ablated_fraction": 0.2, "progress": False, "output": net.output, **options}
    return coar.attribute(net.model, batches, method=method, **options)


@pytest.mark.parametrize("name", sorted(set(ESTIMATORS) - {"regression"}))
def test_a_name_stands_for_the_method_with_its_own_settings(name):
    net = build_net("mlp")
    by_name, by_object = attribute(net, name), attribute(net, ESTIMATORS[name]())
    assert torch.equal(by_name.weights, by_object.weights)
    assert by_name.provenance.method == ESTIMATORS[name]().settings() and by_name.provenance.method_name == name


@pytest.mark.parametrize("name", SOLVERS)
def test_solvers_by_name(name):
    method = coar.Regression(9, name)
    assert method == coar.Regression(9, SOLVERS[name]()) and method.settings()["solver"]["name"].lower() == name
    assert coar.Regression(9, "ridge", "path_gradient").prior == coar.PathGradient()


def test_the_parts_of_a_hybrid_are_those_of_its_prior_and_its_masks():
    size, prior = Size(50, 0.05), coar.PathGradient(rounds=2, n_flips=0, check_masks=0)  # nobody predicts with a prior
    hybrid = coar.Regression(100, prior=prior)
    assert [part.kind for part in hybrid.parts(size)] == ["anchored", "masks", "masks"]
    assert hybrid.cost(size) == prior.cost(size) + 100 and hybrid.differentiates
    assert coar.Regression(100, prior=coar.PathGradient(rounds=2)).cost(size) == hybrid.cost(size)


REFUSED = {
    "a class": (lambda: estimators.get(coar.PathGradient), r"PathGradient is a class; give an object of it: PathGrad"),
    "an unknown name": (lambda: estimators.get("path-gradient"), "did you mean 'path_gradient'"),
    "no estimator": (lambda: estimators.get(3), "method=3 is no estimator"),
    "a class of solvers": (lambda: coar.Regression(9, coar.Ridge), r"solver=Ridge is a class"),
    "an unknown solver": (lambda: coar.Regression(9, "rigde"), "did you mean 'ridge'"),
    "a solver that is no dataclass": (lambda: coar.Regression(9, Plain()), "Plain is no dataclass"),
    "a solver that does not say": (lambda: coar.Regression(9, Silent()), "takes a prior"),
    "a prior for the lasso": (lambda: coar.Regression(9, "lasso", "path_gradient"), "Lasso takes no prior"),
    "a taken name": (lambda: estimators.register("regression")(Constant), "'regression' is taken"),
    "no estimator to register": (lambda: estimators.register("new")(Plain), "is no dataclass that is an Estimator"),
    "no solver to register": (lambda: solvers.register("new")(Plain), "is no dataclass"),
}


class Plain:
    """No dataclass."""

    def fit(self, masks, outputs):
        raise AssertionError("never called")


@dataclass(frozen=True)
class Silent:
    """Does not say whether it takes a prior."""

    def fit(self, masks, outputs):
        raise AssertionError("never called")


@dataclass(frozen=True)
class Constant(estimators.Estimator):
    """The same weight for all."""

    weight: float = 2.0

    def parts(self, size):
        return estimators.parts_of(1)

    def fit(self, problem):
        outputs = problem.measure(Whole(len(problem.components)))
        weights = torch.full((outputs.shape[1], len(problem.components)), self.weight)
        return estimators.Fit(weights, outputs[0] - weights.sum(1))


@dataclass(frozen=True)
class Whole:
    """One mask that keeps all."""

    n_components: int
    count: int = 1
    ablated_fraction: float = 0.0

    def rows(self, start, stop):
        return torch.ones(stop - start, self.n_components, dtype=torch.bool)


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_method_is_refused_in_a_sentence(name):
    make, message = REFUSED[name]
    with pytest.raises(CoarError, match=message):
        make()


def test_a_method_of_ones_own_is_known_everywhere(own_names):
    estimators.register("constant")(Constant)
    net = build_net("mlp")
    found = attribute(net, "constant")
    assert (found.weights == 2).all() and found.provenance.method == {"name": "constant", "weight": 2.0}
    assert found.provenance.cost == 1
    assert chosen("--method", "constant", "--set", "weight=3.5") == Constant(3.5)


# -------------------------------------------------------------------------------------------------- the command line


def chosen(*words):
    return methods.chosen(cli.parser().parse_args(["attribute", "m", "d", "--out", "x", *words]))


def test_every_field_can_be_set():
    words = ["--set", "rounds=8", "--set", "check_masks=32", "smooth=no", "max-outliers=0"]
    assert chosen(*words) == coar.PathGradient(8, check_masks=32, smooth=False, max_outliers=0)
    assert chosen("--method", "neuron_conductance", "--set", "n_steps=3") == coar.baselines.NeuronConductance(3)
    hybrid = chosen("--method", "regression", "--prior", "path_gradient", "--rounds", "2", "--set", "shrink=no")
    assert hybrid == coar.Regression(prior=coar.PathGradient(2, shrink=False))
    assert chosen("--method", "regression", "--solver", "lasso") == coar.Regression(solver=coar.Lasso())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--set", "rounds"], "write a field and its value"),
        (["--set", "colour=red"], "path_gradient has no such field; it has rounds"),
        (["--set", "n_masks=3"], "add --method regression"),
        (["--n-masks", "3"], "--n-masks 3 is of another method; add --method regression"),
        (["--max-rounds", "4"], "no effect"),
        (["--set", "rounds=3"], "must be an even number"),
    ],
)
def test_fields_that_are_none(words, message):
    with pytest.raises(CoarError, match=message):
        chosen(*words)


def test_flags_are_explained_by_the_docstrings(capsys):
    with pytest.raises(SystemExit):
        cli.parser().parse_args(["attribute", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "of path_gradient: an even number (default 4)" in text and "of regression: how many masks" in text


OWN = """
from hf_coar import outputs

@outputs.register("first_logit", unit="logits", replace=True)
def first_logit(logits, batch):
    return logits[:, 0]
"""


def test_a_file_of_ones_own_runs_before_the_flags_are_read(tmp_path, capsys):
    (tmp_path / "own.py").write_text(OWN)
    words = ["attribute", "m", "d", "--out", str(tmp_path / "r"), "--import", str(tmp_path / "own.py")]
    config.run_imports(words)
    assert "first_logit" in coar.outputs.names()
    for wrong, message in ((tmp_path / "none.py", "there is no such file"), (tmp_path / "bad.py", "ZeroDivisionError")):
        (tmp_path / "bad.py").write_text("1 / 0")
        assert cli.main([*words[:-1], str(wrong)]) == 2
        assert message in capsys.readouterr().err


def test_a_file_of_flags_cannot_run_code(tmp_path, capsys):
    (tmp_path / "own.py").write_text("raise SystemExit('this must not run')")
    (tmp_path / "run.yaml").write_text(f"verb: components\nimport: {tmp_path / 'own.py'}\n")
    assert cli.main(["components", "m", "--config", str(tmp_path / "run.yaml")]) == 2
    assert "has no import" in capsys.readouterr().err
    (tmp_path / "run.yaml").write_text(f"verb: components\nimport_: {tmp_path / 'own.py'}\n")
    assert cli.main(["components", "m", "--config", str(tmp_path / "run.yaml")]) == 2
