// Blind votes: two texts of one prompt in drawn order, without a name, shown when both are whole.

import { ApiError, events } from "./api.js";
import { el, number } from "./dom.js";
import { addVote, dropVotes, votes } from "./kept.js";
import { compareRequest, emptyPrompt } from "./settings.js";
import { signTest, wilson } from "./statistics.js";

const PLAIN = "";

export class VoteView {
  /** `settings()` gives those of the form; `tell` says what is wrong. */
  constructor(root, settings, tell) {
    Object.assign(this, { root, settings, tell });
    this.round = 0;
    this.first = el("select", { "aria-label": "One side" });
    this.second = el("select", { "aria-label": "Other side" });
    this.prompts = el("textarea", { id: "vote-prompts", rows: 3, spellcheck: false, placeholder: "One prompt per line. Empty: the prompt of the form." });
    this.next = el("button", { type: "button", className: "primary", id: "vote-next" }, "Next pair");
    this.pair = el("div", { id: "vote-pair" });
    this.status = el("p", { role: "status", className: "note" });
    this.tally = el("details", { id: "vote-tally" }, el("summary", {}, "Show the tally (it may tell you which is which)"));
    this.next.addEventListener("click", () => this.#draw());
    this.tally.addEventListener("toggle", () => this.#showTally());
    document.addEventListener("keydown", (event) => this.#key(event));
    root.append(
      el("p", {}, "Which text is better? Two texts of the same prompt, in an order that is drawn anew, without a name."),
      el("div", { className: "vote-setup" }, this.first, el("span", {}, "against"), this.second),
      el("label", { htmlFor: "vote-prompts" }, "Prompts"), this.prompts, this.next, this.status, this.pair, this.tally,
    );
  }

  refresh() {
    const { arms } = this.settings();
    const options = [[PLAIN, "plain"], ...arms.map((arm) => [arm.name, arm.name])];
    for (const [select, otherwise] of [[this.first, PLAIN], [this.second, arms[0]?.name ?? PLAIN]]) {
      const kept = options.some(([value]) => value === select.value) && select.options.length ? select.value : otherwise;
      select.replaceChildren(...options.map(([value, label]) => el("option", { value, selected: value === kept }, label)));
    }
    if (this.first.value === this.second.value && arms.length) this.second.value = arms[0].name;
    this.#showTally();
  }

  async #draw() {
    const sides = [this.first.value, this.second.value];
    const settings = structuredClone(this.settings());
    if (sides[0] === sides[1]) return this.tell(new ApiError("Choose two different sides."));
    const lines = this.prompts.value.split("\n").map((line) => line.trim()).filter(Boolean);
    if (lines.length) {
      settings.ids = null;
      settings.prompt = lines[this.round % lines.length];
    }
    const nothing = emptyPrompt(settings);
    if (nothing) return this.tell(new ApiError(nothing));
    settings.sampling.seed = String(crypto.getRandomValues(new Uint32Array(1))[0]);
    settings.arms = settings.arms.filter((arm) => sides.includes(arm.name));
    // The pair is known by what was asked for, so that votes of other strengths are another tally.
    const key = JSON.stringify([sides.map((name) => settings.arms.find((arm) => arm.name === name)?.uses ?? "plain"), { ...settings.sampling, seed: null }]);
    this.tell(null);
    this.next.disabled = true;
    const before = this.status.textContent;
    this.status.textContent = "Two texts are on their way; they appear together.";
    const texts = new Map();
    try {
      for await (const event of events("Compare", { ...compareRequest(settings), score: false })) {
        // What is refused leaves the earlier pair in place; from here on nobody votes on it unseen.
        this.answer = null;
        this.pair.replaceChildren();
        if (event.finished) texts.set(event.arm === "normal" ? PLAIN : event.arm, event.finished.text);
      }
    } catch (error) {
      this.status.textContent = this.answer ? before : "";
      return this.tell(error);
    } finally {
      this.next.disabled = false;
    }
    this.round += 1;
    const shown = sides.map((name) => texts.get(name));
    if (shown.some((text) => text === undefined)) return this.tell(new ApiError("A text is missing; this pair is left out."));
    if (shown[0] === shown[1]) {
      this.status.textContent = "Both sides wrote the same text; the pair is left out.";
      return;
    }
    const order = crypto.getRandomValues(new Uint8Array(1))[0] & 1 ? ["a", "b"] : ["b", "a"];
    this.#show(settings.prompt, order.map((side) => shown[side === "a" ? 0 : 1]), order, key, sides.map((name) => name || "plain").join(" against "));
  }

  #show(prompt, texts, order, key, label) {
    this.answer = (choice) => {
      this.answer = null;
      addVote(key, label, choice === "tie" ? "tie" : order[choice]);
      this.pair.replaceChildren();
      this.status.textContent = "Counted.";
      this.#showTally();
      this.next.focus();
    };
    const button = (text, choice, name) => {
      const it = el("button", { type: "button", "data-vote": name }, text);
      it.addEventListener("click", () => this.answer?.(choice));
      return it;
    };
    this.pair.replaceChildren(
      el("p", { className: "vote-prompt" }, prompt),
      el("div", { className: "pair" },
        ...texts.map((text, index) => el("article", { className: "column", "aria-label": `Text ${index + 1}` }, el("h2", {}, `Text ${index + 1}`), el("p", { className: "text", dir: "auto" }, text))),
      ),
      el("div", { className: "actions", role: "group", "aria-label": "Your vote" }, button("Text 1 (key 1)", 0, "1"), button("A tie (key 0)", "tie", "0"), button("Text 2 (key 2)", 1, "2")),
    );
    this.status.textContent = "Two texts are there: vote.";
  }

  #key(event) {
    if (!this.answer || this.root.hidden || event.target.matches("input, textarea, select")) return;
    const choice = { 1: 0, 0: "tie", 2: 1 }[event.key];
    if (choice !== undefined) this.answer(choice);
  }

  #showTally() {
    const lines = [];
    if (this.tally.open) {
      for (const { label, a, b, tie } of Object.values(votes())) {
        const [names, decided] = [String(label).split(" against "), a + b];
        const [low, high] = wilson(b, decided);
        lines.push(el("tr", {}, ...[names[0], a, names[1], b, tie, decided ? `${number(b / decided, 2)} (${number(low, 2)} to ${number(high, 2)})` : "–", number(signTest(a, b), 2)].map((cell) => el("td", {}, String(cell)))));
      }
    }
    const [summary] = this.tally.children;
    if (!this.tally.open) return this.tally.replaceChildren(summary);
    const clear = el("button", { type: "button" }, "Delete all votes");
    clear.addEventListener("click", () => { dropVotes(); this.#showTally(); });
    const heads = ["one side", "votes", "other side", "votes", "ties", "share of the other (95 %)", "sign test p"];
    this.tally.replaceChildren(summary, lines.length
      ? el("div", { className: "wide-table", tabIndex: 0, role: "region", "aria-label": "Tally" }, el("table", {}, el("thead", {}, el("tr", {}, ...heads.map((head) => el("th", { scope: "col" }, head)))), el("tbody", {}, ...lines)))
      : el("p", { className: "note" }, "No votes yet."), ...(lines.length ? [clear] : []));
  }
}
