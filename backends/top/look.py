"""What the operator has chosen to see, and what a key makes of it: values in, values out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from backends.top.panels import SHORT_TITLES
from backends.top.replicas import ORDERS


class Place(NamedTuple):
    """Where the cursor of a panel is: at a row by its name, or where that row was."""

    name: str = ""
    at: int = 0
    top: int = 0  # the first row that is shown


class Look(NamedTuple):
    panel: int = 0
    order: int = 0  # of the replicas
    backwards: bool = False
    words: str = ""  # that rows must have in them
    swapped: bool = False  # the panel's second table is above
    paused: bool = False
    places: tuple[Place, ...] = (Place(),) * (2 * len(SHORT_TITLES))
    ascii_only: bool = False

    @property
    def place(self) -> Place:
        return self.places[self._slot]

    def with_place(self, place: Place) -> Look:
        before, behind = self.places[: self._slot], self.places[self._slot + 1 :]
        return self._replace(places=(*before, place, *behind))

    def at_panel(self, panel: int) -> Look:
        return self._replace(panel=panel % len(SHORT_TITLES), swapped=False)

    def next_order(self) -> Look:
        """The cursor goes to the top: an order is asked for because of what is first in it."""
        turned = self._replace(order=(self.order + 1) % len(ORDERS), backwards=False)
        return turned.with_place(Place())

    def turned(self) -> Look:
        return self._replace(backwards=not self.backwards).with_place(Place())

    def said(self) -> str:
        """Return what is not as it was at the start, for the line of the tabs."""
        parts = []
        if self.panel == 0:
            name = ORDERS[self.order].name
            parts.append(f"by {name}" + (", backwards" if self.backwards else ""))
        if self.words:
            parts.append(f"/{self.words}")
        if self.paused:
            parts.append("PAUSED")
        return "  ".join(parts)

    @property
    def _slot(self) -> int:
        return 2 * self.panel + self.swapped


def settled(place: Place, names: Sequence[str], rows: int) -> Place:
    """Return where the cursor is among the rows of now, of which `rows` fit on the screen.

    It stays with its row; where that is gone, with the place that it had. It is always in sight.
    """
    if not names:
        return Place()
    gone = place.name not in names
    index = min(place.at, len(names) - 1) if gone else names.index(place.name)
    rows = max(rows, 1)
    top = min(place.top, index, max(len(names) - rows, 0))
    top = max(top, index - rows + 1, 0)
    return Place(names[index], index, top)


def moved(place: Place, names: Sequence[str], by: int) -> Place:
    """Return the place `by` rows further down, or up, as far as there are any."""
    if not names:
        return Place()
    index = min(max(place.at + by, 0), len(names) - 1)
    return Place(names[index], index, place.top)
