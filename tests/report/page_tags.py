"""A parser of report pages: the tags in order, and the text."""

from __future__ import annotations

import html.parser
import re

VOID = {"meta", "img", "br", "line", "path", "rect", "circle", "polyline"}  # without an end tag, or self-closing


class Tags(html.parser.HTMLParser):
    """Every tag with its attributes, all text, and the tags that are still open."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID and not (self.get_starttag_text() or "").endswith("/>"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag, tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)

    @property
    def words(self) -> str:
        """All text with single spaces."""
        return " ".join("".join(self.text).split())


def assert_self_contained(page: str) -> None:
    """The page closes its tags, runs no script and loads nothing from outside."""
    tags = Tags(page)
    assert tags.open == []  # every tag is closed, in order
    names = {name for name, _ in tags.tags}
    assert not names & {"script", "iframe", "object", "embed", "link", "base", "form"}
    for _, attributes in tags.tags:
        assert not any(name.startswith("on") for name in attributes)
        assert (attributes.get("src") or "data:image/").startswith("data:image/")
        assert (attributes.get("href") or "#").startswith("#")
    assert "url(" not in re.sub(r"url\(#tip\)", "", page)
    assert "@import" not in page
    policies = [attributes for _, attributes in tags.tags if attributes.get("http-equiv") == "Content-Security-Policy"]
    policy = policies[0]["content"]
    assert (policy or "").startswith("default-src 'none'")
