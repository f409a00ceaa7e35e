"""What a page shows, a `View`, and what a tab of it must bring: subclasses of `Tab` in `tabs/` register themselves."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from hf_coar.errors import CoarError
from hf_coar.explore.columns import Progress
from hf_coar.explore.source import Source


@dataclass(frozen=True)
class View:
    """Everything that a link reopens; the defaults are left out of the link.

    Attributes:
        view: which tab.
        example: the example that is looked at, a row of the attributions.
        component: the component that is looked at.
        label: show only examples with this label; -1 for all.
        wrong: show only examples that the model gets wrong.
        page: of the list of examples.
        k: ablate so many of the example's strongest components; 0 where `ticked` says which.
        side: which of them: those that "help" it most, or those that "hurt" it most.
        ticked: components to ablate.
        layer: the layer whose components are listed; "" for all.
        lower: examples whose outputs an edit is to lower.
        higher: examples whose outputs an edit is to raise.
        spared: examples whose outputs an edit is to leave as they are; all others where there are none.
        n_components: how many components an edit ablates.
        text: a text of the visitor's own.
        image: the name under which the explorer keeps an image of the visitor's own, while it runs.
        explained: the class whose output is attributed for that; -1 for the predicted one.
    """

    view: str = "examples"
    example: int = 0
    component: int = 0
    label: int = -1
    wrong: bool = False
    page: int = 0
    k: int = 0
    side: str = "help"
    ticked: tuple[int, ...] = ()
    layer: str = ""
    lower: tuple[int, ...] = ()
    higher: tuple[int, ...] = ()
    spared: tuple[int, ...] = ()
    n_components: int = 10
    text: str = ""
    image: str = ""
    explained: int = -1


Updates = dict[Any, Any]  # new values of controls, as Gradio takes them
Act = Callable[[Source, View, int, Any], View]


class Tab:
    """A tab of the page: its controls, what happens at them, and what is drawn when it is looked at.

    Every attribute that is a control of Gradio can be changed by the updates that its methods return.

    Attributes:
        name: in links.
        title: on the page.
        place: tabs with smaller ones come first.
        kept: fields of `View` that a link to it holds, besides the example and the component.
        acts: by their `data-act`, what clicks make of a view: (source, view, `data-value`, control beside) -> view.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    place: ClassVar[int]
    kept: ClassVar[Sequence[str]] = ()
    acts: ClassVar[Mapping[str, Act]] = {}

    def __init__(self, page: Any) -> None:
        """Lay the controls out; nothing is computed before somebody looks."""
        self.page, self.gr, self.source = page, page.gr, page.source
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


TABS: dict[str, type[Tab]] = {}  # by name


def register(tab: type[Tab]) -> type[Tab]:
    """Decorator: puts a tab on every page.

    Raises:
        CoarError: the name, or one of the acts, is taken.
    """
    taken = {act for other in TABS.values() for act in other.acts} & set(tab.acts)
    if tab.name in TABS or taken:
        raise CoarError(f"the name of the tab {tab.name!r}, or one of its acts {sorted(tab.acts)}, is taken")
    TABS[tab.name] = tab
    return tab
