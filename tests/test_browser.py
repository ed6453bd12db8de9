"""The fixture itself: a page that misbehaves is caught."""

from __future__ import annotations

import pytest

from support.browser import PHONE, well_behaved, wider_than_the_screen


def test_a_page_is_opened_as_asked(open_page, tmp_path):
    file = tmp_path / "page.html"
    file.write_text("<title>t</title><div style='width: 500px'>x</div>")
    page = open_page(file, viewport=PHONE, color_scheme="dark")
    assert page.title() == "t"
    assert page.evaluate("matchMedia('(prefers-color-scheme: dark)').matches")
    assert wider_than_the_screen(page) > 100


@pytest.mark.parametrize(
    ("body", "fault"),
    [
        ("<script>nowhere()</script>", "nowhere is not defined"),
        ("<script>console.error('bad')</script>", "console error: bad"),
        ("<img src='https://example.org/a.png'>", "request: https://example.org/a.png"),
    ],
)
def test_what_a_page_must_not_do_fails_the_test_that_opened_it(browser, tmp_path, body, fault):
    (tmp_path / "page.html").write_text(body)
    with pytest.raises(pytest.fail.Exception, match=fault), well_behaved(browser) as open_page:
        open_page(tmp_path / "page.html").wait_for_timeout(100)
