"""Finding components together with what stands in for them."""

from collections.abc import Sequence
from dataclasses import replace

from torch import nn

from hf_coar import components
from hf_coar.components import Components
from hf_coar.components.positions import at_positions
from hf_coar.masking.ablations import Ablation, get
from hf_coar.masking.masked_model import MaskedModel


def find_components(
    model: nn.Module,
    granularity: str = "unit",
    include: Sequence[str] | str | None = None,
    exclude: Sequence[str] | str | None = None,
    ablation: str | Ablation = "zero",
    positions: Sequence[int] | Sequence[str] | None = None,
) -> Components:
    """The components of a model, and what stands in for them when they are ablated.

    Args:
        model: any module; of timm or transformers best. Its weights are not read, unless `ablation` runs it: it may be
            on the meta device.
        granularity: "unit" (convolution filters and output neurons of every weight matrix), "input" (input features of
            every weight matrix), "head" (attention heads), "expert" (experts of a mixture) or "module" (whole
            matrices).
        include: globs over module names, such as `["layer4.*"]`: only these. A head that is named here counts too,
            and an embedding whose own name is (not only that of the block around it).
        exclude: globs over module names: not these.
        ablation: what an ablated component is replaced by: "zero", `Mean(data)`, `Resample(data, seed=0)`,
            `Patch(corrupt)` or `Values(tensor)`. All that takes the components goes by it: `ablate`, `attribute`,
            `evaluate`, `edit`, and the attributions that are saved.
        positions: of a model of sequences, every component is one at each of these tokens by itself: numbers such as
            `range(12)`, or names of roles such as `["subject", "last token"]`, which the entry `positions` of every
            batch tells (`components.mark` makes it). Such components have no weights of their own: they cannot be
            edited.

    Returns:
        The components, in the order of the modules. The classifier or language-model head and the embeddings are left
        out by default, and of a model with adapters (PEFT) all but their ranks; `components.skipped` lists every weight
        that was left out, with the reason. Of a plain module whose classifier cannot be told, nothing is left out.
        Where nothing tells the rows of a matrix of an unknown class from its columns, a warning names it, and its group
        says `guessed`.

    Raises:
        ModelError: a lazy module without a shape, TorchScript, or weights of inference mode.
        NoComponentsError: nothing is left, the model has none of this granularity, or a glob matches no module.
        CoarError: an unknown granularity, or an ablation that these components cannot have.
    """
    chosen = get(ablation)
    found = components.find_components(model, granularity, include, exclude)
    found = found if positions is None else at_positions(found, positions)
    return replace(found, stand_in=chosen.stand_in(MaskedModel(model, found))) if chosen.name != "zero" else found
