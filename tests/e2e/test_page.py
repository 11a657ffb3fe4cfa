"""The page of the door, in a real browser."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from tests.e2e.browser import is_complaint, picture

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
expect = playwright.expect
WHOLE, LATE = ".state[data-kind=done]", 30000
FORGED = '<img src=x onerror="document.title=1">'


@pytest.fixture(scope="module")
def door(start_tiny, free_ports):
    [port] = free_ports(1)
    with start_tiny("--http-port", str(port)) as running:
        yield running, f"http://127.0.0.1:{port}/"


@pytest.fixture
def opened(chromium, door):
    """A page in a profile of its own; whatever its console complains of, or is asked of elsewhere, fails the test."""
    context = chromium.new_context(viewport={"width": 1280, "height": 860}, accept_downloads=True)
    page = context.new_page()
    complaints = []
    # What the browser itself says of an answer that is no 200 is expected where a test asks for one.
    page.on("console", lambda line: complaints.append(line.text) if is_complaint(line) else None)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda it: None if it.url.startswith((door[1], "blob:")) else complaints.append(it.url))
    page.goto(door[1])
    page.wait_for_selector("#server[data-kind=up]")
    page.fill("#prompt", "the golden gate")
    page.fill("#max_tokens", "12")
    page.check("#ignore_eos")
    yield page
    context.close()
    assert complaints == []


def run(page, texts=2):
    page.click("#run")
    expect(page.locator("#progress")).to_contain_text("Done", timeout=LATE)
    expect(page.locator(WHOLE)).to_have_count(texts)


def texts(page):
    return page.locator("#columns .text").all_text_contents()


def test_arms_stream_beside_the_plain_text_and_open_their_receipts(opened):
    opened.click("#add-arm")
    picture(opened, "form")
    run(opened, 3)
    plain, first, second = texts(opened)
    assert all((plain, first, second))
    assert plain != first
    receipts = opened.locator(".receipt")
    assert receipts.count() == 2
    receipts.first.locator("summary").click()
    assert "direction checked" in receipts.first.inner_text()
    assert opened.locator("#columns ins").count() > 0
    picture(opened, "diff")
    opened.click("[data-show=kl]")
    assert opened.locator(".token.heat").count() > 0
    opened.locator("#columns article").nth(1).locator(".token:not(:empty)").nth(2).hover()
    assert "here" in opened.inner_text("#tip")
    assert "plain (" in opened.inner_text("#tip")
    picture(opened, "kl")


def test_strengths_are_slid_and_what_is_asked_is_what_the_receipt_says(opened):
    slider = opened.get_by_label("Strength λ, slider")
    slider.focus()
    for _ in range(3):
        slider.press("ArrowRight")
    asked = opened.get_by_label("Strength λ", exact=True).input_value()
    run(opened)
    assert f"λ {asked} ·" in opened.inner_text(".receipt summary")
    opened.get_by_label("Strength λ", exact=True).fill("9")
    opened.click("#run")
    opened.wait_for_selector("#problem:not([hidden])")
    assert "DOSE_TOO_HIGH" in opened.inner_text("#problem")
    assert opened.input_value("#prompt") == "the golden gate"


def test_what_is_refused_leaves_the_texts_that_are_there(opened):
    problem = opened.locator("#problem")
    opened.fill("#max_tokens", "-4")
    opened.click("#run")
    expect(problem).to_contain_text("max_tokens")
    expect(opened.locator("#columns article")).to_have_count(0)
    expect(opened.locator("#bar")).to_be_hidden()
    expect(opened.locator("#reroll")).to_be_disabled()
    opened.fill("#max_tokens", "12")
    run(opened)
    before = texts(opened)
    for field, typed, said in (("#max_tokens", "-4", "max_tokens"), ("#prompt", "", "The prompt is empty")):
        opened.fill(field, typed)
        opened.click("#run")
        expect(problem).to_contain_text(said)
        expect(opened.locator(WHOLE)).to_have_count(2)
        assert texts(opened) == before
        picture(opened, f"refused-{field[1:]}")
    opened.click("#view-vote")
    opened.fill("#prompt", "the golden gate")
    opened.click("#vote-next")
    expect(problem).to_contain_text("max_tokens")


def test_on_a_phone_what_was_asked_for_comes_into_sight(opened):
    opened.set_viewport_size({"width": 390, "height": 844})
    run(opened)
    expect(opened.locator("#columns article").first).to_be_in_viewport()
    for view in ("history", "vote", "compare"):
        opened.locator("header").scroll_into_view_if_needed()
        opened.click(f"#view-{view}")
        expect(opened.locator(f"#{view}-view")).to_be_in_viewport(ratio=0.3)
        # What became of the texts is said above them alone.
        expect(opened.locator("#progress")).to_be_visible(visible=view == "compare")
    opened.click("#view-history")
    opened.locator("#history-view").get_by_text("Open").click()
    expect(opened.locator("#prompt")).to_be_in_viewport()
    opened.fill("#max_tokens", "-4")
    opened.locator("#prompt").press("Control+Enter")
    expect(opened.locator("#problem")).to_be_in_viewport()


def test_a_text_is_stopped_and_says_that_nothing_proves_it(opened):
    opened.fill("#max_tokens", "100000")
    opened.fill("#temperature", "1")
    opened.click("#run")
    expect(opened.locator(".state[data-kind=busy]")).to_have_count(2)
    expect(opened.locator("#columns .text").first).to_have_text(re.compile(".{20}", re.DOTALL), timeout=LATE)
    opened.click("#stop")
    expect(opened.locator(".state[data-kind=failed]")).to_have_count(2)
    assert "Not proven" in opened.inner_text("#columns")


def test_a_text_goes_on_from_a_token(opened):
    run(opened)
    steered = opened.locator("#columns article").nth(1)
    steered.locator(".token:not(:empty)").nth(2).click()
    assert "token ids" in opened.inner_text("#prompt-note")
    assert opened.locator("#prompt").input_value().startswith("the golden gate")
    run(opened)
    assert len(texts(opened)) == 2


def test_a_link_holds_prompt_settings_seed_and_digests(opened, door):
    opened.fill("#temperature", "1")
    run(opened)
    before = texts(opened)
    opened.context.grant_permissions(["clipboard-read", "clipboard-write"])
    opened.click("[data-copy=link]")
    link = opened.evaluate("navigator.clipboard.readText()")
    other = opened.context.new_page()
    other.goto(link)
    other.wait_for_selector("#server[data-kind=up]")
    run(other)
    assert texts(other) == before
    # Of another version, and edited.
    change = """import('/settings.js').then(({{fromFragment, toFragment}}) => {{
        const it = fromFragment(location.hash);
        {};
        return toFragment(it);
    }})"""
    digest = opened.evaluate(change.format("it.arms[0].uses[0].digest = 'sha256:' + '0'.repeat(64)"))
    other.goto(f"{door[1]}#{digest}")
    other.reload()
    other.wait_for_selector("#problem:not([hidden])")
    assert "served as sha256:" in other.inner_text("#problem")
    other.click("#run")
    expect(other.locator("#problem")).to_contain_text("DIGEST_NOT_SERVED")
    other.goto(f"{door[1]}#{digest[:-40]}")
    other.reload()
    other.wait_for_selector("#problem:not([hidden])")
    assert "cannot be read" in other.inner_text("#problem")
    gone = opened.evaluate(change.format("it.arms[0].uses[0].name = 'gone'"))
    other.goto(f"{door[1]}#{gone}")
    other.reload()
    other.wait_for_selector("#problem:not([hidden])")
    assert "gone is not served here" in other.inner_text("#problem")
    other.close()


def test_a_vote_is_blind_and_counted(opened):
    opened.fill("#temperature", "1")
    # So much that no pair is the same text twice.
    opened.get_by_label("Strength λ", exact=True).fill("1.8")
    opened.click("#view-vote")
    opened.click("#vote-next")
    opened.wait_for_selector("[data-vote]", timeout=30000)
    # What the model wrote may hold any of these words.
    for text in opened.locator("#vote-pair .text").all():
        text.evaluate("it => it.replaceChildren()")
    shown = opened.inner_html("#vote-pair")
    assert "golden" not in shown.replace("the golden gate", "")
    assert not [name for name in ("arm 1", "plain", "normal") if name in shown]
    picture(opened, "vote")
    opened.fill("#max_tokens", "-4")
    opened.click("#vote-next")
    expect(opened.locator("#problem")).to_contain_text("max_tokens")
    expect(opened.locator("[data-vote]")).to_have_count(3)
    opened.keyboard.press("1")
    opened.click("#vote-tally summary")
    expect(opened.locator("#vote-tally td")).to_have_count(7)
    cells = opened.locator("#vote-tally td").all_text_contents()
    assert [cells[0], cells[2], int(cells[1]) + int(cells[3])] == ["plain", "arm 1", 1]
    picture(opened, "tally")


def test_what_people_paste_and_models_write_stays_text(opened):
    opened.fill("#prompt", FORGED)
    opened.fill("#marks", "x, <b>")
    run(opened)
    opened.click("#view-history")
    assert FORGED in opened.inner_text("#history-view")
    assert opened.title() == "Steering, side by side"
    assert opened.locator("#results img").count() == 0
    opened.click("#view-compare")
    opened.fill("#prompt", "x" * 10**6)
    assert "1,000,000 bytes; this server accepts" in opened.inner_text("#prompt-note")
    opened.click("#run")
    assert "1,000,000 bytes" in opened.inner_text("#problem")


def test_a_weight_that_is_no_number_is_sent_and_not_left_out(opened):
    typed = "sea, storm*-0.5, tide*1.2.3, foam*"
    assert opened.evaluate("typed => import('/settings.js').then(it => it.wordMessages(typed))", typed) == [
        {"text": "sea"},
        {"text": "storm", "weight": -0.5},
        {"text": "tide", "weight": "1.2.3"},
        {"text": "foam", "weight": ""},
    ]


def test_what_was_typed_survives_a_reload(opened):
    opened.fill("#prompt", "kept across a reload")
    opened.reload()
    opened.wait_for_selector("#server[data-kind=up]")
    assert opened.input_value("#prompt") == "kept across a reload"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_is_found_by_axe_wide_narrow_light_and_dark(opened, scheme):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    opened.emulate_media(color_scheme=scheme)
    run(opened)
    opened.locator(".receipt summary").first.click()
    for width in (1280, 390):
        opened.set_viewport_size({"width": width, "height": 860})
        for view in ("compare", "vote", "history"):
            opened.click(f"#view-{view}")
            picture(opened, f"{view}-{width}-{scheme}")
            found = axe.run(opened).response["violations"]
            assert [(each["id"], each["nodes"][0]["html"]) for each in found] == []
            assert opened.evaluate("document.documentElement.scrollWidth") <= width


def test_the_command_the_script_and_the_request_that_it_copies_give_the_same_text(opened, door):
    server, _ = door
    opened.fill("#prompt", 'it\'s the "golden" gate')
    opened.get_by_label("Strength λ", exact=True).fill("0.4")
    run(opened)
    steered = texts(opened)[1]
    opened.context.grant_permissions(["clipboard-read", "clipboard-write"])
    scripts = Path(sys.executable).parent
    environment = os.environ | {"STEER_TARGET": server.target, "PATH": f"{scripts}:{os.environ['PATH']}"}
    printed = {}
    for kind in ("cli", "python", "curl"):
        opened.click(f"[data-copy={kind}]")
        expect(opened.locator("#progress")).to_contain_text("copied")
        text = opened.evaluate("navigator.clipboard.readText()")
        command = {
            "cli": ["sh", "-c", f"{text} --json"],
            "python": [sys.executable, "-c", text],
            "curl": ["sh", "-c", f"{text} --noproxy '*'"],
        }[kind]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60)
        assert done.returncode == 0, done.stderr
        printed[kind] = done.stdout
    assert steered in printed["python"]
    assert (
        steered in json.dumps(json.loads(printed["cli"]), ensure_ascii=False)
        or json.dumps(steered)[1:-1] in printed["cli"]
    )
    finished = [json.loads(line[6:]) for line in printed["curl"].splitlines() if line.startswith("data: ")]
    assert steered in [event["finished"]["text"] for event in finished if "finished" in event]


def test_its_files_come_with_a_policy_that_lets_nothing_else_in(door):
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    for name in ("", "main.js", "style.css"):
        with opener.open(f"{door[1]}{name}", timeout=10) as answer:
            assert "default-src 'none'" in answer.headers["content-security-policy"]
            assert answer.headers["x-content-type-options"] == "nosniff"
    with pytest.raises(urllib.error.HTTPError, match="403"):
        opener.open(urllib.request.Request(door[1], headers={"Host": "evil.example"}), timeout=10)


# Last: it stops the server.
def test_a_server_that_goes_away_under_the_page_loses_nothing_that_was_typed(opened, door):
    server, _ = door
    opened.fill("#prompt", "typed before it went")
    server.signal()
    assert server.exit_code(20) == 0
    opened.click("#run")
    opened.wait_for_selector("#problem:not([hidden])")
    assert "cannot be reached" in opened.inner_text("#problem")
    assert opened.input_value("#prompt") == "typed before it went"
    assert "what you typed is kept" in opened.inner_text("#server")
