"""Which stretches of examples are done, by part: sorted, so that a look costs the same however many there are."""

from bisect import bisect_left, insort

Stretch = tuple[int, int]  # examples start … stop - 1


class Index:
    """Stretches of examples by part; they may overlap, in any order."""

    def __init__(self) -> None:
        """Nothing is done."""
        self._stretches: dict[str, list[Stretch]] = {}
        self._longest: dict[str, int] = {}  # how far before a place a stretch over it can begin

    def add(self, part: str, start: int, stop: int) -> None:
        """Note a stretch; one that is known already changes nothing."""
        stretches = self._stretches.setdefault(part, [])
        if stretches and stretches[-1] >= (start, stop):
            place = bisect_left(stretches, (start, stop))
            if stretches[place] != (start, stop):
                insort(stretches, (start, stop))
        else:
            stretches.append((start, stop))  # as a rule: batches come in their order
        self._longest[part] = max(self._longest.get(part, 0), stop - start)

    def parts(self) -> list[str]:
        """All parts that anything is known of."""
        return list(self._stretches)

    def overlapping(self, part: str, start: int, stop: int) -> list[Stretch]:
        """The stretches of a part that share examples with start … stop - 1, in order."""
        stretches = self._stretches.get(part, [])
        first = bisect_left(stretches, (start - self._longest.get(part, 0), 0))
        last = bisect_left(stretches, (stop, 0), lo=first)
        return [stretch for stretch in stretches[first:last] if stretch[1] > start]

    def end(self, kind: str) -> int:
        """One past the last example of which a part of some kind is done; 0 where none is."""
        known = [stretches for part, stretches in self._stretches.items() if part.startswith(f"{kind}-")]
        return max((stop for stretches in known for _, stop in stretches), default=0)


def gaps(done: list[Stretch], start: int, stop: int) -> list[Stretch]:
    """What of examples start … stop - 1 no stretch covers."""
    found, position = [], start
    for first, last in sorted(done):
        if last <= position or first >= stop:
            continue
        if first > position:
            found.append((position, first))
        position = max(position, last)
    return found + ([(position, stop)] if position < stop else [])
