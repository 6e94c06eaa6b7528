"""The pages of the repository: their links lead somewhere."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted(
    p.relative_to(ROOT)
    for p in ROOT.glob("**/*.md")
    if not {"runs", ".git"} & set(p.relative_to(ROOT).parts)
)


def anchors(page):
    """The anchors of a page's headings, made as GitHub makes them."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S)
    titles = re.findall(r"^#+ (.*)", text, re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_links(page):
    text, folder = (ROOT / page).read_text(), (ROOT / page).parent
    links = re.findall(r"\]\(\s*([^)\s]+)\s*\)", text)
    assert links or len(text.splitlines()) < 10, "no links found: has their form changed?"
    for link in links:
        if link.startswith(("https://", "http://")):
            continue
        file, _, anchor = link.partition("#")
        target = (folder / file if file else ROOT / page).resolve()
        assert target.exists(), link
        assert ROOT in (target, *target.parents), link
        assert not anchor or anchor in anchors(target), link


def test_pages_are_found():
    assert {"README.md", "algorithms/README.md", "data/README.md", "envs/README.md"} <= {
        str(page) for page in PAGES
    }
