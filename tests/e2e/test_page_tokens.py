"""The page of a server that asks who is calling."""

from __future__ import annotations

import hashlib
import secrets

import pytest

from tests.e2e.browser import is_complaint, picture

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
expect = playwright.expect
LATE = 30000


def _token():
    return f"steer_{secrets.token_urlsafe(32)}"


TOKENS = {"whole": _token(), "reader": _token(), "narrow": _token(), "unknown": _token()}
ENTRIES = {
    "whole": 'scopes = ["generate", "read"]',
    "reader": 'scopes = ["read"]',
    "narrow": 'scopes = ["generate", "read"]\noperators = ["dress"]',
}


@pytest.fixture(scope="module")
def address(start_tiny, free_ports, tmp_path_factory):
    file = tmp_path_factory.mktemp("tokens") / "tokens.toml"
    file.write_text(
        "".join(
            f'[tokens.{name}]\nsha256 = "{hashlib.sha256(TOKENS[name].encode()).hexdigest()}"\n{entry}\n'
            for name, entry in ENTRIES.items()
        )
    )
    file.chmod(0o600)
    [port] = free_ports(1)
    with start_tiny("--http-port", str(port), "--tokens", str(file)) as server:
        yield f"http://127.0.0.1:{port}/"
    assert not [line for line in server.log for token in TOKENS.values() if token in line]


@pytest.fixture
def opened(chromium, address):
    """The page, at its form for the token."""
    context = chromium.new_context(viewport={"width": 1280, "height": 860}, accept_downloads=True)
    context.grant_permissions(["clipboard-read", "clipboard-write"])
    page = context.new_page()
    complaints = []
    page.on("console", lambda line: complaints.append(line.text) if is_complaint(line) else None)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.goto(address)
    expect(page.locator("#access")).to_be_visible()
    yield page
    context.close()
    assert complaints == []


def give(page, name):
    page.fill("#token", TOKENS[name])
    page.click("#access button[type=submit]")


def test_the_page_asks_for_a_token_and_keeps_it_in_the_tab_alone(opened, address):
    assert opened.inner_text("#access-note") == "This server asks for a token."
    assert opened.evaluate("document.activeElement.id") == "token"
    assert opened.get_attribute("#token", "type") == "password"
    picture(opened, "token-asked")
    opened.fill("#prompt", "the golden gate")
    opened.fill("#token", "no token at all")
    opened.keyboard.press("Enter")
    expect(opened.locator("#access-note")).to_contain_text("That is no token")
    give(opened, "unknown")
    expect(opened.locator("#access-note")).to_have_text("The server says: the token is not accepted.")
    picture(opened, "token-refused")
    give(opened, "whole")
    expect(opened.locator("#server[data-kind=up]")).to_be_visible()
    expect(opened.locator("#access")).to_be_hidden()
    assert opened.input_value("#prompt") == "the golden gate"
    opened.fill("#max_tokens", "8")
    opened.click("#run")
    expect(opened.locator("#progress")).to_contain_text("Done", timeout=LATE)
    picture(opened, "token-good")
    shown = [opened.content(), opened.url, opened.evaluate("JSON.stringify(localStorage)")]
    for kind in ("link", "cli", "python", "curl"):
        opened.click(f"[data-copy={kind}]")
        expect(opened.locator("#progress")).to_contain_text("copied")
        shown.append(opened.evaluate("navigator.clipboard.readText()"))
        assert ("STEER_TOKEN" in opened.inner_text("#progress")) is (kind != "link")
    assert "Bearer $STEER_TOKEN" in shown[-1]
    for kind in ("json", "csv"):
        with opened.expect_download() as saved:
            opened.click(f"[data-export={kind}]")
        shown.append(saved.value.path().read_text())
    assert not [text for text in shown if TOKENS["whole"] in text]
    assert TOKENS["whole"] in opened.evaluate("JSON.stringify(sessionStorage)")
    # It outlives a reload, and no other tab has it.
    opened.reload()
    expect(opened.locator("#server[data-kind=up]")).to_be_visible()
    other = opened.context.new_page()
    other.goto(address)
    expect(other.locator("#access")).to_be_visible()
    other.close()
    opened.click("#forget-token")
    expect(opened.locator("#access")).to_be_visible()
    assert "steer_" not in opened.evaluate("JSON.stringify(sessionStorage)")


def test_the_page_says_which_scope_or_operator_a_token_lacks(opened):
    give(opened, "reader")
    expect(opened.locator("#server[data-kind=up]")).to_be_visible()
    opened.fill("#prompt", "x")
    opened.fill("#max_tokens", "4")
    opened.click("#run")
    expect(opened.locator("#problem")).to_contain_text("needs the scope generate")
    picture(opened, "token-without-scope")
    opened.get_by_role("button", name="Use another token").click()
    give(opened, "narrow")
    expect(opened.locator("#access")).to_be_hidden()
    for name, said in (("golden", "PERMISSION_DENIED"), ("dress", "")):
        opened.locator("#arms select").first.select_option(name)
        opened.click("#run")
        if said:
            expect(opened.locator("#problem")).to_contain_text(said)
        else:
            expect(opened.locator("#progress")).to_contain_text("Done", timeout=LATE)


def test_nothing_is_found_by_axe_where_a_token_is_asked_for(opened):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    for scheme in ("light", "dark"):
        opened.emulate_media(color_scheme=scheme)
        for width in (1280, 390):
            opened.set_viewport_size({"width": width, "height": 860})
            picture(opened, f"token-{width}-{scheme}")
            found = axe.run(opened).response["violations"]
            assert [(each["id"], each["nodes"][0]["html"]) for each in found] == []
            assert opened.evaluate("document.documentElement.scrollWidth") <= width


def test_a_token_is_not_sent_from_a_page_that_came_without_tls_unless_somebody_says_so(opened):
    # As a page of another machine sees itself; 127.0.0.1 is secure to a browser.
    sent = []
    opened.on("request", lambda it: sent.append(it.headers.get("authorization")))
    opened.add_init_script("Object.defineProperty(window, 'isSecureContext', { value: false })")
    opened.reload()
    expect(opened.locator("#access-private")).to_be_visible()
    give(opened, "whole")
    expect(opened.locator("#access-note")).to_contain_text("everybody on the way can read the token")
    assert not any(sent)
    opened.check("#access-private")
    opened.click("#access button[type=submit]")
    expect(opened.locator("#server[data-kind=up]")).to_be_visible()
