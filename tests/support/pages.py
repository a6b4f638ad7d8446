"""Pages of the service as a strict reader sees them: what is not well formed fails the test."""

from __future__ import annotations

from html.parser import HTMLParser

from attrs import define, field

_EMPTY = {"meta", "link", "input"}
"""Elements of HTML that have no end."""


@define
class Form:
    """
    A form.

    :param action: where it is sent
    :param method: how
    :param fields: what a browser would send of it as it is, by name
    :param boxes: the values of its checkboxes, by name
    """

    action: str
    method: str
    fields: dict[str, str] = field(factory=dict)
    boxes: dict[str, list[str]] = field(factory=dict)


class HTML(HTMLParser):
    """
    What is in a page.

    :param text: the page
    """

    def __init__(self, text: str) -> None:
        super().__init__()
        self.source = text
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.forms: list[Form] = []
        self.depths: dict[str, int] = {}
        """How many lists each checkbox is in, by its value."""
        self._open: list[str] = []
        self._texts: list[str] = []
        self.feed(text)
        self.close()
        assert not self._open, f"{self._open} are never closed"

    @property
    def text(self) -> str:
        """What a person reads, with one blank where there are several."""
        return " ".join(" ".join(self._texts).split())

    @property
    def links(self) -> dict[str, str]:
        """Where links lead, by their ids."""
        return {
            found["id"]: found["href"]
            for tag, found in self.tags
            if tag == "a" and {"id", "href"} <= set(found)
        }

    def form(self, action: str) -> Form:
        """:returns: the one form that is sent there"""
        (found,) = [form for form in self.forms if form.action == action]
        return found

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note an element."""
        found = {name: value or "" for name, value in attrs}
        assert len(found) == len(attrs), f"{tag} has an attribute twice"
        self.tags.append((tag, found))
        if tag not in _EMPTY:
            self._open.append(tag)
        if tag == "form":
            assert "form" not in self._open[:-1], "a form in a form"
            self.forms.append(Form(found["action"], found.get("method", "get")))
        if tag == "input" and found["type" if "type" in found else "name"] == "checkbox":
            self.forms[-1].boxes.setdefault(found["name"], []).append(found.get("value", "on"))
            self.depths[found.get("value", "on")] = self._open.count("ul")
        elif tag == "input" and "form" in self._open:
            self.forms[-1].fields[found["name"]] = found.get("value", "")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note an element of SVG without content."""
        self.tags.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        """Close an element."""
        assert [tag] == self._open[-1:], f"</{tag}> in {self._open}"
        self._open.pop()

    def handle_data(self, data: str) -> None:
        """Note a text."""
        self._texts.append(data)
