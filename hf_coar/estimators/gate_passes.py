"""Gate passes: one forward and backward pass that reads the effect of every component of every example."""

from contextlib import ExitStack

import torch
from torch import Tensor, nn

from hf_coar import data as data_module
from hf_coar import masking, models
from hf_coar.components import Components
from hf_coar.errors import ModelError
from hf_coar.estimators.delta_reads import DeltaReads, elementwise_modules, followed
from hf_coar.models.outputs import Output

FORWARD_AND_BACKWARD = 3.0  # cost of a forward and backward pass to the gates, in forward passes


class GatePasses:
    """The passes of one model; call it with a batch and gates."""

    def __init__(self, model: nn.Module, components: Components, output: Output, delta: bool = False) -> None:
        """Prepare.

        Args:
            model: whose parameters need no gradients.
            components: its components.
            output: what is differentiated.
            delta: read exact differences where they can be had, see `delta_reads`, and not derivatives.
        """
        self.model, self.components, self.output, self.delta = model, components, output, delta
        self._sizes = components.sizes()
        self._activations = elementwise_modules(model) if delta else []
        self._inert: set[str] = set()

    def begin_batch(self) -> None:
        """Other examples come: which modules run may depend on them."""
        self._inert = set()

    def __call__(self, batch: data_module.Batch, gates: Tensor, smoothing: float = 0.0) -> tuple[Tensor, Tensor]:
        """One pass.

        Args:
            batch: of examples.
            gates: float32 [examples, components], on the device of the batch.
            smoothing: see `delta_reads.followed`; only with `delta`.

        Returns:
            outputs float32 [examples] and what was read of every gate, float32 [examples, components]: the derivative
            of the example's output, or the exact difference; 0 for modules that do not run.

        Raises:
            ModelError: the forward blocks all gradients, or the model reads a weight without running its module.
        """
        # One leaf a group: a slice of a single leaf would cost a full-sized gradient for every group.
        leaves = [part.contiguous().requires_grad_() for part in gates.split(self._sizes, dim=1)]
        reads = DeltaReads()
        with torch.enable_grad():
            with masking.gated(self.model, self.components, leaves) as fired, ExitStack() as stack:
                if self.delta:
                    stack.enter_context(followed(self._activations, fired, reads, smoothing))
                values = self.output(models.logits(self.model, batch), batch)
            self._check_differentiable(values)
            derivatives = torch.autograd.grad(values.sum(), leaves, allow_unused=True, retain_graph=self.delta)
        self._check_reached({group.parameter for group in fired.missing()}, batch)
        corrections = reads.corrections(leaves)
        parts = [c if d is None else d + c for d, c in zip(derivatives, corrections, strict=True)]
        return values.detach(), torch.cat(parts, dim=1)

    def energies(self, batch: data_module.Batch) -> tuple[Tensor, Tensor]:
        """One forward pass with everything in place.

        Returns:
            outputs float32 [examples] and energies, float32 [examples, components]: the sum of the squares of what the
            component adds to its module's output; 0 where gates enter elsewhere.
        """
        count, device = data_module.size(batch), next(iter(batch.values())).device
        leaves = [torch.ones(count, size, device=device, requires_grad=True) for size in self._sizes]
        energies = DeltaReads()

        def note(gated: Tensor, part: Tensor, level: Tensor) -> None:
            energy = part.detach().float().square().sum_to_size(level.shape)
            # Half precision ends at 65,504; such a row is an outlier all the same.
            energies.add(level, energy.clamp_max(torch.finfo(level.dtype).max / 64).to(level.dtype))

        with torch.enable_grad(), masking.gated(self.model, self.components, leaves) as fired:
            fired.observe = note
            values = self.output(models.logits(self.model, batch), batch)
        self._check_differentiable(values)
        return values.detach(), torch.cat(energies.corrections(leaves), dim=1)

    def _check_differentiable(self, values: Tensor) -> None:
        if not values.requires_grad:
            raise ModelError(
                f"no gradient reaches the gates of {type(self.model).__name__}: its forward blocks it (integer "
                "kernels, no_grad or numpy inside); use a method that needs none, such as hf_coar.Regression()"
            )

    def _check_reached(self, missing: set[str], batch: data_module.Batch) -> None:
        """Modules that do not run for a batch have no effect on it; weights read without their module are an error."""
        if missing <= self._inert:
            return
        kept = torch.cat([torch.full((g.size,), g.parameter not in missing) for g in self.components.groups])
        with torch.no_grad():
            plain = models.logits(self.model, batch)
            with masking.ablate(self.model, self.components, kept, how="weights"):
                changed = models.logits(self.model, batch)
        if not torch.equal(plain, changed):
            raise ModelError(
                f"gates cannot reach {', '.join(sorted(missing)[:8])}: the model reads these weights without running "
                "their modules; exclude them, or use method=hf_coar.Regression()"
            )
        self._inert |= missing
