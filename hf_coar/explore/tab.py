"""What a page shows, a `View`, and what a tab of it must bring: subclasses of `Tab` in `tabs/` register themselves."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from hf_coar.explore.columns import Progress
from hf_coar.explore.source import Source
from hf_coar.storage.registry import Registry


@dataclass(frozen=True)
class View:
    """Everything that a link reopens; the defaults are left out of the link."""

    view: str = "examples"  # which tab
    example: int = 0  # the example that is looked at, a row of the attributions
    component: int = -1  # the component that is looked at; -1 for the strongest one
    find: str = ""  # parts of the names of the components that are listed
    label: int = -1  # show only examples with this label; -1 for all
    wrong: bool = False  # show only examples that the model gets wrong
    page: int = 0  # of the list of examples
    k: int = 0  # ablate so many of the example's strongest components; 0 where `ticked` says which
    side: str = "help"  # which of them: those that "help" it most, or those that "hurt" it most
    ticked: tuple[int, ...] = ()  # components to ablate
    layer: str = ""  # the layer whose components are listed; "" for all
    lower: tuple[int, ...] = ()  # examples whose outputs an edit is to lower
    higher: tuple[int, ...] = ()  # examples whose outputs an edit is to raise
    spared: tuple[int, ...] = ()  # examples that an edit is to leave as they are; all others where none
    n_components: int = 10  # how many components an edit ablates
    text: str = ""  # a text of the visitor's own
    image: str = ""  # the name under which the explorer keeps an image of the visitor's own, while it runs
    explained: int = -1  # the class whose output is attributed for that; -1 for the predicted one


Updates = dict[Any, Any]  # new values of controls, as Gradio takes them
Act = Callable[[Source, View, int, Any], View]


class Tab:
    """A tab of the page: its controls, what happens at them, and what is drawn when it is looked at.

    Every attribute that is a control of Gradio can be changed by the updates that its methods return.

    Attributes:
        title: on the page.
        place: tabs with smaller ones come first.
        kept: fields of `View` that a link to it holds, besides the example and the component.
        acts: by their `data-act`, what clicks make of a view: (source, view, `data-value`, control beside) -> view.
    """

    title: ClassVar[str]
    place: ClassVar[int]
    kept: ClassVar[Sequence[str]] = ()
    acts: ClassVar[Mapping[str, Act]] = {}

    def __init__(self, page: Any, name: str) -> None:
        """Lay the controls out; nothing is computed before somebody looks."""
        self.page, self.name, self.gr, self.source = page, name, page.gr, page.source
        self.settings: list[tuple[Any, str, str, dict[str, Any]]] = []
        self.later: list[tuple[Any, Callable[[View], Any], Callable[[View, Progress], str]]] = []
        self.build()

    def build(self) -> None:
        """Make the controls."""

    def sets(self, field: str, control: Any, event: str = "input", **resets: Any) -> Any:
        """Let a control set a field of the view, which sends others back to `resets`."""
        self.settings.append((control, field, event, resets))
        return control

    def draws_later(self, html: Any, key: Callable[[View], Any], draw: Callable[[View, Progress], str]) -> Any:
        """Let `draw` fill HTML after all else, with a bar, whenever the key of the view is another than before."""
        self.later.append((html, key, draw))
        return html

    def connect(self) -> None:
        """Connect further events; all tabs are built by then."""

    def draw(self, view: View, before: View) -> Updates:
        """What it shows of a view; `before` is the view that was shown until now."""
        return {}

    def controls(self, view: View) -> Updates:
        """The values that its controls have in a view."""
        return {control: getattr(view, field) for control, field, _, _ in self.settings}


TABS: Registry[type[Tab]] = Registry("tab")  # by the name that links have
