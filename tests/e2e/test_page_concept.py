"""A concept that is built from the page, in a real browser."""

from __future__ import annotations

import pytest

from operators.core.store import Store
from tests.e2e.browser import is_complaint, picture

expect = pytest.importorskip("playwright.sync_api", reason="playwright is not installed").expect
LATE = 120_000


@pytest.fixture
def opened(chromium, start_server, tiny_model, golden, free_ports, tmp_path):
    Store(tmp_path).save("golden", golden)
    [port] = free_ports(1)
    options = ("--store", str(tmp_path), "--http-port", str(port), "--operator-admin")
    complaints = []
    with start_server(*options, model=tiny_model, threads=1):
        context = chromium.new_context(viewport={"width": 1280, "height": 860})
        page = context.new_page()
        page.on("console", lambda line: complaints.append(line.text) if is_complaint(line) else None)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.goto(f"http://127.0.0.1:{port}/")
        page.wait_for_selector("#server[data-kind=up]")
        yield page
        context.close()
    assert complaints == []


def fill(page, name, texts):
    page.click("#add-concept")
    page.fill("#concept-name", name)
    page.fill("#concept-texts", texts)


def test_a_concept_is_built_named_anew_where_it_is_taken_used_and_cancelled(opened, tmp_path):
    before = (tmp_path / "golden.safetensors").read_bytes()
    fill(opened, "", "the bay")
    expect(opened.locator("#concept .note").first).to_contain_text("end on the concept's own word, without a full stop")
    opened.click("#concept-build")
    expect(opened.locator("#concept-problem")).to_have_text("A name and at least one text are needed.")
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    assert axe.run(opened).response["violations"] == []
    opened.fill("#concept-name", "golden")
    opened.click("#concept-build")
    problem = opened.locator("#concept-problem")
    expect(problem).to_contain_text("operator 'golden'", timeout=LATE)
    expect(problem.locator("button")).to_have_text("Replace it")
    picture(opened, "concept-taken")
    opened.fill("#concept-name", "bay")
    # What would be replaced is not what stands there now.
    expect(problem).to_be_hidden()
    opened.fill("#concept-texts", "the bay\nthe other bay\n")
    opened.click("#concept-build")
    expect(opened.locator("#concept-progress")).to_be_visible()
    picture(opened, "concept-built")
    expect(opened.locator("#concept")).to_be_hidden(timeout=LATE)
    expect(opened.locator("#progress")).to_contain_text("bay is served")
    picture(opened, "concept-served")
    opened.fill("#prompt", "the golden gate")
    opened.fill("#max_tokens", "8")
    opened.click("#run")
    expect(opened.locator("#progress")).to_contain_text("Done", timeout=LATE)
    expect(opened.locator("#columns article").filter(has_text="bay")).to_have_count(1)
    fill(opened, "tea", "a cup of tea")
    opened.fill("#concept-words", "tea")
    opened.check("#concept-calibrate")
    opened.click("#concept-build")
    opened.click("#concept-cancel")
    expect(opened.locator("#concept-status")).to_contain_text("It was cancelled", timeout=LATE)
    assert sorted(path.name for path in tmp_path.glob("[a-z]*.safetensors")) == [
        "bay.safetensors",
        "golden.safetensors",
    ]
    assert (tmp_path / "golden.safetensors").read_bytes() == before


def test_a_server_whose_operators_stay_offers_no_building(chromium, start_tiny, free_ports):
    [port] = free_ports(1)
    with start_tiny("--http-port", str(port)):
        page = chromium.new_page()
        page.goto(f"http://127.0.0.1:{port}/")
        page.wait_for_selector("#server[data-kind=up]")
        assert page.locator("#add-arm").is_visible()
        assert not page.locator("#add-concept").is_visible()
        page.close()


def test_a_build_is_looked_for_again_and_only_what_was_refused_is_replaced(chromium, start_tiny, free_ports):
    [port] = free_ports(1)
    asked = []

    def answer(route):
        name, body = route.request.url.rsplit("/", 1)[-1], route.request.post_data_json
        asked.append((name, body))
        if name == "BuildOperator" and "replace" not in body:
            found = {"metadata": {"found": "sha256:" + "1" * 64}}
            error = {"code": "OPERATOR_EXISTS", "message": "operator 'ocean' is there", "details": [found]}
            route.fulfill(status=409, json={"error": error})
        elif name == "BuildOperator":
            route.fulfill(json={"id": "b1", "name": "ocean", "state": "BUILD_STATE_RUNNING"})
        elif [each for each, _ in asked].count("WatchBuild") < 3:
            error = {"code": "RATE_LIMITED", "message": "too many calls", "details": []}
            route.fulfill(status=429, headers={"retry-after": "0"}, json={"error": error})
        else:
            report = '{"id": "b1", "name": "ocean", "state": "BUILD_STATE_FAILED", "problem": "no such layer"}'
            route.fulfill(content_type="text/event-stream", body=f"data: {report}\n\n")

    with start_tiny("--http-port", str(port), "--operator-admin"):
        page = chromium.new_page()
        page.goto(f"http://127.0.0.1:{port}/")
        page.wait_for_selector("#server[data-kind=up]")
        page.route("**/api/*Build*", answer)
        fill(page, "ocean", "the sea")
        page.click("#concept-build")
        page.click("#concept-problem button")
        expect(page.locator("#concept-problem")).to_have_text("no such layer", timeout=LATE)
        page.close()
    assert [body.get("replace") for name, body in asked if name == "BuildOperator"] == [None, "sha256:" + "1" * 64]
    assert [body["id"] for name, body in asked if name == "WatchBuild"] == ["b1"] * 3
