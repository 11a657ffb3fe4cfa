"""A server that speaks TLS and asks who is calling: the page, the SDK and the command, each as people use them."""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from steer_client import (
    AsyncSteerClient,
    PermissionDeniedError,
    SamplingParams,
    ServerBusyError,
    ServerUnavailableError,
    SteerClient,
    TLSError,
    UnauthenticatedError,
)

from tests.authority import Authority
from tests.e2e.browser import is_complaint, picture

LATE = 30000
BIN = Path(sys.executable).parent
DOCS = (Path(__file__).parents[2] / "docs/CLIENTS.md").read_text(encoding="utf-8")
SHORT = SamplingParams(max_tokens=4, ignore_eos=True)


def _token():
    return f"steer_{secrets.token_urlsafe(32)}"


TOKENS = {name: _token() for name in ("whole", "reader", "narrow", "seldom", "renewed", "unknown")}
ENTRIES = {
    "whole": 'scopes = ["generate", "read"]',
    "reader": 'scopes = ["read"]',
    "narrow": 'scopes = ["generate", "read"]\noperators = ["dress"]',
    "seldom": 'scopes = ["read"]\nrequests_per_minute = 1',
}


def entry(name, token):
    return f'[tokens.{name}]\nsha256 = "{hashlib.sha256(token.encode()).hexdigest()}"\n{ENTRIES[name]}\n'


@dataclass(frozen=True)
class Guarded:
    """Where the server is, and the files of both sides."""

    target: str
    page: str
    ca: Path
    tokens: Path


@pytest.fixture(scope="module")
def guarded(start_tiny, free_ports, tmp_path_factory):
    directory = tmp_path_factory.mktemp("guarded")
    authority = Authority()
    certificate, key = authority.issue()
    for name, data in (("ca.pem", authority.pem), ("tls.crt", certificate), ("tls.key", key)):
        (directory / name).write_bytes(data)
    (tokens := directory / "tokens").write_text("".join(entry(name, TOKENS[name]) for name in ENTRIES))
    tokens.chmod(0o600)
    [port] = free_ports(1)
    tls = ("--tls-cert", str(directory / "tls.crt"), "--tls-key", str(directory / "tls.key"))
    with start_tiny("--http-port", str(port), "--tokens", str(tokens), *tls) as server:
        yield Guarded(server.target, f"https://127.0.0.1:{port}/", directory / "ca.pem", tokens)
    assert not [line for line in server.log for token in TOKENS.values() if token in line]


@pytest.fixture
def expect():
    return pytest.importorskip("playwright.sync_api", reason="playwright is not installed").expect


def environment(guarded, **more):
    """Of a process that is told nothing else: where the server is, and whom to trust."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("STEER_")}
    given = {"STEER_TARGET": guarded.target, "STEER_CA": str(guarded.ca), "CURL_CA_BUNDLE": str(guarded.ca)}
    return clean | given | {"PATH": f"{BIN}:{os.environ['PATH']}", "no_proxy": "*"} | more


def run(command, variables):
    done = subprocess.run(command, capture_output=True, text=True, env=variables, timeout=60)
    assert not [token for token in TOKENS.values() if token in done.stdout + done.stderr]
    return done


def test_the_commands_of_the_page_of_clients_are_served(guarded, tmp_path):
    (file := tmp_path / "token").write_text(f"{TOKENS['whole']}\n")
    [shell] = re.findall(r"^```sh\n(.*?)^```", DOCS, re.DOTALL | re.MULTILINE)
    [program] = re.findall(r"^```python\n(.*?)^```", DOCS, re.DOTALL | re.MULTILINE)

    def here(text):
        found = text.replace("steer.example:50051", guarded.target).replace("/etc/steer/ca.pem", str(guarded.ca))
        return found.replace("~/.config/steer/token", str(file)).replace("ocean", "golden")

    variables = environment(guarded)
    done = run(["sh", "-ec", here(shell)], variables)
    assert done.returncode == 0, done.stderr
    assert "✓ golden sha256:" in done.stderr
    asked = here(program).replace("client.close()", "print(client.model_info().num_layers)\nclient.close()")
    assert run([sys.executable, "-c", asked], variables | {"LAB_TOKEN": TOKENS["whole"]}).stdout == "4\n"
    refused = run(["steer", "generate", "x"], variables | {"STEER_TOKEN": TOKENS["unknown"]})
    assert (refused.returncode, refused.stderr) == (1, "steer: the token is not accepted\n")


async def test_each_refusal_has_its_type_and_says_what_is_wanted(guarded):
    def ask(name, work, **more):
        with SteerClient(guarded.target, ca=guarded.ca, token=TOKENS.get(name), retry=False, **more) as client:
            return work(client)

    assert ask("whole", lambda client: client.generate("x", operators="golden=0.4", sampling=SHORT)).receipts
    assert ask(None, lambda client: client.health())
    with pytest.raises(UnauthenticatedError, match=r"a token is needed.*; give one by token="):
        ask(None, lambda client: client.generate("x"))
    with pytest.raises(UnauthenticatedError, match="the token is not accepted"):
        ask("unknown", lambda client: list(client.stream("x")))
    with pytest.raises(PermissionDeniedError, match="needs the scope generate; token 'reader' has read"):
        ask("reader", lambda client: client.generate("x"))
    with pytest.raises(PermissionDeniedError, match="golden"):
        ask("narrow", lambda client: client.compare("x", operators="golden=0.4"))
    with pytest.raises(PermissionDeniedError, match="needs the scope admin"):
        ask("whole", lambda client: client.reload_operators())
    assert ask("seldom", lambda client: client.model_info())
    with pytest.raises(ServerBusyError) as caught:
        ask("seldom", lambda client: client.model_info())
    assert caught.value.reason == "RATE_LIMITED"
    assert 30 < caught.value.retry_after <= 60
    with SteerClient(guarded.target, tls=True) as client, pytest.raises(TLSError, match="that is not trusted here"):
        client.health()
    with SteerClient(guarded.target) as client, pytest.raises(ServerUnavailableError, match="does it speak TLS"):
        client.health()
    async with AsyncSteerClient(guarded.target, ca=guarded.ca, token=TOKENS["whole"]) as client:
        stream = client.stream("x", operators="golden=0.4", sampling=SHORT)
        assert [delta async for delta in stream]
        assert stream.result.receipts
        assert len((await client.sweep(["x"], operators={"golden": 0.4}, sampling=SHORT)).rows) == 2


def test_a_token_that_was_replaced_on_both_sides_needs_no_new_client(guarded, tmp_path):
    (file := tmp_path / "token").write_text(TOKENS["whole"])
    kept = guarded.tokens.read_text()

    def is_let_in():
        try:
            return bool(client.model_info())
        except UnauthenticatedError:
            return False

    def wait_until(let_in):
        end = time.monotonic() + 20
        while is_let_in() is not let_in:
            assert time.monotonic() < end
            time.sleep(0.05)

    with SteerClient(guarded.target, ca=guarded.ca, token_file=file) as client:
        assert is_let_in()
        guarded.tokens.write_text(kept.replace(entry("whole", TOKENS["whole"]), entry("whole", TOKENS["renewed"])))
        wait_until(False)
        file.write_text(TOKENS["renewed"])
        assert is_let_in()
        guarded.tokens.write_text(kept)
        file.write_text(TOKENS["whole"])
        wait_until(True)


@pytest.fixture
def opened(chromium, guarded, expect):
    """The page, at its form for the token."""
    view = {"width": 1280, "height": 860}
    # The browser has no option for an authority of one's own.
    context = chromium.new_context(viewport=view, accept_downloads=True, ignore_https_errors=True)
    context.grant_permissions(["clipboard-read", "clipboard-write"])
    page = context.new_page()
    complaints = []
    page.on("console", lambda line: complaints.append(line.text) if is_complaint(line) else None)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.goto(guarded.page)
    expect(page.locator("#access")).to_be_visible()
    yield page
    context.close()
    assert complaints == []


def give(page, name):
    page.fill("#token", TOKENS[name])
    page.click("#access button[type=submit]")


def test_the_page_asks_for_a_token_and_keeps_it_in_the_tab_alone(opened, guarded, expect):
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
    steered = opened.locator("#columns .text").nth(1).text_content()
    shown = [opened.content(), opened.url, opened.evaluate("JSON.stringify(localStorage)")]
    variables = environment(guarded, STEER_TOKEN=TOKENS["whole"])
    for kind in ("link", "cli", "python", "curl"):
        opened.click(f"[data-copy={kind}]")
        expect(opened.locator("#progress")).to_contain_text("copied")
        shown.append(opened.evaluate("navigator.clipboard.readText()"))
        assert ("STEER_TOKEN" in opened.inner_text("#progress")) is (kind != "link")
        if kind != "link":
            done = run([sys.executable, "-c", shown[-1]] if kind == "python" else ["sh", "-c", shown[-1]], variables)
            assert done.returncode == 0, done.stderr
            # The command shows texts in columns, the answer of curl is JSON.
            assert kind != "python" or steered in done.stdout
            assert kind != "curl" or '"receipts"' in done.stdout
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
    other.goto(guarded.page)
    expect(other.locator("#access")).to_be_visible()
    other.close()
    opened.click("#forget-token")
    expect(opened.locator("#access")).to_be_visible(timeout=LATE)
    assert "steer_" not in opened.evaluate("JSON.stringify(sessionStorage)")


def test_an_answer_to_a_token_that_was_forgotten_since_says_nothing(opened, expect):
    give(opened, "whole")
    expect(opened.locator("#server[data-kind=up]")).to_be_visible(timeout=LATE)
    held = _hold_questions(opened, TOKENS["whole"])
    with opened.expect_request("**/api/model"):
        opened.reload(wait_until="commit")
    expect(opened.locator("#prompt")).to_be_visible(timeout=LATE)
    opened.evaluate("document.getElementById('forget-token').click()")
    expect(opened.locator("#access")).to_be_visible(timeout=LATE)
    expect(opened.locator("#server[data-kind=down]")).to_be_visible(timeout=LATE)
    _let_go(opened, held)
    expect(opened.locator("#server[data-kind=down]")).to_be_visible()
    expect(opened.locator("#access")).to_be_visible()


def test_a_refusal_of_a_token_that_was_replaced_since_says_nothing(opened, expect):
    held = _hold_questions(opened, TOKENS["unknown"])
    with opened.expect_request("**/api/model"):
        give(opened, "unknown")
    give(opened, "whole")
    expect(opened.locator("#server[data-kind=up]")).to_be_visible(timeout=LATE)
    expect(opened.locator("#access")).to_be_hidden()
    _let_go(opened, held)
    expect(opened.locator("#access")).to_be_hidden()
    expect(opened.locator("#server[data-kind=up]")).to_be_visible()


def _hold_questions(page, token):
    """The page's questions with a token, which are kept from the server."""
    held = []

    def hold(route):
        if route.request.headers.get("authorization") == f"Bearer {token}":
            held.append(route)
        else:
            route.continue_()

    for method in ("model", "operators"):
        page.route(f"**/api/{method}", hold)
    return held


def _let_go(page, held):
    """Has the server answer them, and the page see the answers."""
    with page.expect_response("**/api/model"):
        for route in held:
            route.continue_()
    page.wait_for_timeout(300)


def test_the_page_says_which_scope_or_operator_a_token_lacks(opened, expect):
    give(opened, "reader")
    expect(opened.locator("#server[data-kind=up]")).to_be_visible()
    opened.fill("#prompt", "x")
    opened.fill("#max_tokens", "4")
    opened.click("#run")
    expect(opened.locator("#problem")).to_contain_text("needs the scope generate")
    picture(opened, "token-without-scope")
    opened.get_by_role("button", name="Use another token").click()
    # Not even what the page asks by itself from time to time may take the form away.
    opened.evaluate("import('/access.js').then(({ tokenIsGood }) => tokenIsGood(false))")
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


def test_a_token_is_not_sent_from_a_page_that_came_without_tls_unless_somebody_says_so(opened, expect):
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
