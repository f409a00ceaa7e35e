"""Whether a class is gone or only hidden: linear probes of the features, and one constant added to its logit."""

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_coar.editing.tasks.looking import Seen

_RIDGE = 10.0  # of standardised features; between 1 and 100 the edits are the same
_DECAY = 1e-2  # of the probe's weights
_STEPS = 60  # of L-BFGS, after which the probes of all our networks stand still
_BIASES = 400  # that are tried


def direction(features: Tensor, own: Tensor) -> tuple[Tensor, Tensor]:
    """Where a class lies in the features: the ridge direction that tells it from all others.

    Args:
        features: float32 [examples, features].
        own: of the class, bool [examples].

    Returns:
        (direction, centre), float32 [features] each, such that (features - centre) · direction is on average 1 higher
        for the class than for the others.
    """
    centre, spread = features.mean(0), features.std(0).clamp_min(1e-6)
    standard = ((features - centre) / spread).double()
    target = own.double() - own.double().mean()
    gram = standard.T @ standard + _RIDGE * torch.eye(standard.shape[1], dtype=torch.float64)
    found = torch.linalg.solve(gram, standard.T @ target).float() / spread
    distance = (features[own].mean(0) - features[~own].mean(0)) @ found
    return found / distance.abs().clamp_min(1e-9), centre


def linear_probe(fit: Seen, fit_labels: Tensor, judge: Seen) -> Tensor | None:
    """What a fresh linear classifier of the features says of other examples, labels int64 [examples].

    Multinomial logistic regression, every class counting alike (Alain, Bengio 2017).

    Args:
        fit: examples to fit it to.
        fit_labels: their labels, int64 [examples].
        judge: examples to classify; None is returned where features are not known.
    """
    if fit.features is None or judge.features is None:
        return None
    centre, spread = fit.features.mean(0), fit.features.std(0).clamp_min(1e-6)
    inputs, classes = (fit.features - centre) / spread, fit_labels.unique()
    targets = torch.searchsorted(classes, fit_labels)
    balance = len(targets) / (len(classes) * torch.bincount(targets).float())
    with torch.enable_grad():
        probe = torch.nn.Linear(inputs.shape[1], len(classes))
        torch.nn.init.zeros_(probe.weight)
        torch.nn.init.zeros_(probe.bias)
        optimiser = torch.optim.LBFGS(probe.parameters(), max_iter=_STEPS, line_search_fn="strong_wolfe")

        def loss() -> Tensor:
            optimiser.zero_grad()
            found = F.cross_entropy(probe(inputs), targets, balance) + _DECAY * probe.weight.square().sum() / 2
            found.backward()
            return found

        optimiser.step(loss)
    with torch.no_grad():
        return classes[probe((judge.features - centre) / spread).argmax(1)]


def one_bias(fit: Seen, fit_labels: Tensor, judge: Seen, label: int) -> Tensor | None:
    """What the model says with the constant added to one logit that makes it right most often, int64 [examples].

    Args:
        fit: examples by which the constant is chosen: the mean accuracy over the classes counts.
        fit_labels: their labels, int64 [examples].
        judge: examples to classify; None is returned where logits are not known.
        label: of the logit.
    """
    if fit.logits is None or judge.logits is None:
        return None
    logits = judge.logits.clone()
    logits[:, label] += best_bias(fit.logits, fit_labels, label)
    return logits.argmax(1)


def best_bias(logits: Tensor, labels: Tensor, label: int) -> Tensor:
    """The constant that, added to one logit, makes the model right most often: a scalar, 0 where none helps.

    Args:
        logits: float32 [examples, classes]; the mean accuracy over the classes counts.
        labels: of the examples, int64 [examples].
        label: of the logit.
    """
    rest = logits.clone()
    rest[:, label] = -torch.inf
    other, said = rest.max(1)
    missing = other - logits[:, label]  # a constant above it makes the model say the label
    classes, places = labels.unique(return_inverse=True)
    share = 1 / torch.bincount(places).float()[places] / len(classes)
    biases = torch.cat([torch.zeros(1), missing.quantile(torch.linspace(0, 1, _BIASES)) + 1e-4])
    taken = biases[:, None] > missing
    right = torch.where(taken, labels == label, said == labels).float() @ share
    return biases[right.argmax()]
