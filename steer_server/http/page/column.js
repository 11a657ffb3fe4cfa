// One text beside the others: while it comes, and when it is whole.

import { changedRanges, markedRanges, within } from "./diff.js";
import { el, number, short } from "./dom.js";

const REASONS = {
  FINISH_REASON_EOS: "ended by itself", FINISH_REASON_MAX_TOKENS: "all tokens used",
  FINISH_REASON_CONTEXT_LIMIT: "the context is full", FINISH_REASON_TIME_LIMIT: "time is up",
  FINISH_REASON_CANCELLED: "stopped by the server", FINISH_REASON_STOP_STRING: "stop string",
  FINISH_REASON_STOP_TOKEN: "stop token",
};

export class Column {
  /** `actions`: fork(column, index) and tip(element, lines) of the page. */
  constructor(name, actions) {
    this.name = name;
    this.actions = actions;
    this.pieces = [];
    this.promptIds = [];
    this.finished = null;
    this.comparison = null;
    this.state = el("span", { className: "state" }, "waiting");
    this.text = el("p", { className: "text", dir: "auto", "aria-label": `Text of ${name}` });
    this.figures = el("p", { className: "figures" });
    this.receipts = el("div", { className: "receipts" });
    this.element = el("article", { className: "column", "aria-label": name, tabIndex: -1 },
      el("h2", {}, name, " ", this.state), this.text, this.figures, this.receipts);
    this.text.addEventListener("keydown", (event) => this.#walk(event));
  }

  get wholeText() {
    return this.pieces.map((piece) => piece.text).join("");
  }

  started(message) {
    this.promptIds = message.prompt_token_ids ?? [];
    this.#state("reading", "busy");
  }

  delta(message) {
    if (!this.pieces.length) this.#state("writing", "busy");
    const piece = { text: message.text, ids: message.token_ids ?? [], logprob: message.logprobs?.[0] };
    this.pieces.push(piece);
    if (piece.text) this.text.append(piece.text);
  }

  end(message) {
    this.finished = message;
    const receipts = message.receipts ?? [];
    const label = receipts.length ? "✓ proven" : "✓ plain";
    this.#state(label, "done");
    this.receipts.replaceChildren(...receipts.map((receipt) => receiptView(receipt)));
    this.#showFigures();
  }

  compared(comparison) {
    this.comparison = comparison;
    this.#showFigures();
  }

  /** The stream ended before this text did. */
  broken(why) {
    if (this.finished) return;
    this.#state(why, "failed");
    if (this.pieces.length) this.receipts.replaceChildren(el("p", { className: "note" }, "Not proven: there is no receipt for a text that was cut off."));
  }

  #state(text, kind) {
    this.state.textContent = text;
    this.state.dataset.kind = kind;
  }

  #showFigures() {
    const parts = [];
    const { finished, comparison } = this;
    if (finished) {
      parts.push(`${finished.usage?.completion_tokens ?? 0} tokens`);
      const reason = REASONS[finished.finish_reason];
      if (reason) parts.push(reason);
      if (this.actions.isDrawn() && Number(finished.seed)) parts.push(`seed ${finished.seed}`);
    }
    if (comparison?.kl_mean !== undefined) parts.push(`KL ${number(comparison.kl_mean, 2)} mean, ${number(comparison.kl_p95, 2)} p95`);
    if (comparison?.steered_perplexity !== undefined) parts.push(`perplexity ${number(comparison.steered_perplexity)}`);
    if (comparison && comparison.first_divergence === undefined && finished) parts.push("same text as plain");
    this.figures.textContent = parts.join(" · ");
  }

  /** Draws the text once more: `base` is the plain text, `marks` words, `show` one of diff, kl, plain. */
  draw(base, marks, show, klTop) {
    if (!this.finished) return;
    const whole = this.wholeText;
    const changed = show === "diff" && base !== null && base !== whole ? changedRanges(base, whole) : [];
    const marked = show === "plain" ? [] : markedRanges(whole, marks);
    const cuts = [...new Set([...changed, ...marked].flat())].sort((a, b) => a - b);
    const tokens = [];
    let at = 0;
    let index = 0;
    for (const piece of this.pieces) {
      const end = at + piece.text.length;
      const token = el("span", { className: "token", tabIndex: -1 });
      const inner = [at, ...cuts.filter((cut) => cut > at && cut < end), end];
      for (let k = 0; k + 1 < inner.length; k++) {
        const part = whole.slice(inner[k], inner[k + 1]);
        if (!part) continue;
        let node = document.createTextNode(part);
        if (within(marked, inner[k])) node = el("mark", {}, node);
        if (within(changed, inner[k])) node = el("ins", {}, node);
        token.append(node);
      }
      if (piece.ids.length) {
        const place = index;
        index += piece.ids.length;
        const kl = this.comparison?.kl_per_token?.[place];
        if (show === "kl" && kl !== undefined) {
          token.classList.add("heat");
          token.style.setProperty("--heat", `${Math.round(72 * Math.min(1, Number(kl) / klTop))}%`);
        }
        const lines = () => this.#about(place, piece);
        token.addEventListener("mouseenter", () => this.actions.tip(token, lines()));
        token.addEventListener("focus", () => this.actions.tip(token, lines()));
        token.addEventListener("mouseleave", () => this.actions.tip(null));
        token.addEventListener("blur", () => this.actions.tip(null));
        token.addEventListener("click", () => this.actions.fork(this, place));
      }
      tokens.push(token);
      at = end;
    }
    if (tokens.length) tokens[0].tabIndex = 0;
    this.text.replaceChildren(...tokens);
  }

  #about(place, piece) {
    const lines = [`token ${place}, id ${piece.ids.join(" ")}`];
    const compared = this.comparison?.tokens?.[place];
    if (compared) {
      lines.push(`log p: ${number(compared.logprob)} here, ${number(compared.normal_logprob)} plain (${number(compared.logprob - compared.normal_logprob, 2)})`);
      if (compared.gained?.length) lines.push(`gained: ${compared.gained.map((each) => each.token).join(" ")}`);
      if (compared.lost?.length) lines.push(`lost: ${compared.lost.map((each) => each.token).join(" ")}`);
    } else if (piece.logprob) lines.push(`log p: ${number(piece.logprob.logprob)}`);
    const kl = this.comparison?.kl_per_token?.[place];
    if (kl !== undefined) lines.push(`KL(plain‖arm): ${number(kl, 2)} nats`);
    lines.push("Click or Enter: go on from here as a new prompt");
    return lines;
  }

  #walk(event) {
    const tokens = [...this.text.children];
    const at = tokens.indexOf(document.activeElement);
    if (at < 0) return;
    if (event.key === "Enter") return document.activeElement.click();
    const next = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: tokens.length - 1 }[event.key];
    if (next === undefined || !tokens[next]) return;
    event.preventDefault();
    tokens[at].tabIndex = -1;
    tokens[next].tabIndex = 0;
    tokens[next].focus();
  }
}

function receiptView(receipt) {
  const rows = [
    ["digest", receipt.digest],
    ["layer", receipt.layer],
    ["λ asked", number(receipt.strength)],
    ["λ measured", `${number(2 * receipt.mean_dose)} mean, ${number(2 * receipt.max_dose)} at most`],
    ["λ of the layer's operators together", number(2 * receipt.dose_bound)],
    ["β", number(receipt.blend)],
    ["rule", (receipt.rule ?? "").replace("RULE_", "").toLowerCase()],
    ["steered", `${receipt.prompt_tokens_steered} prompt + ${receipt.generated_tokens_steered} generated tokens`
      + (receipt.prompt_tokens_cached ? `, ${receipt.prompt_tokens_cached} from the cache` : "")],
    ["direction checked", `at ${receipt.positions_checked} tokens`
      + (receipt.worst_cosine === undefined ? "" : `, cosine at least ${Number(receipt.worst_cosine).toFixed(6)}`)],
    ["recommended by the operator", (receipt.defaulted ?? []).join(", ") || "nothing"],
  ];
  if (receipt.words?.length) rows.unshift(["words", receipt.words.map((word) => (word.weight === 1 ? word.text : `${word.text} × ${number(word.weight)}`)).join(", ")]);
  if (receipt.kl !== undefined) rows.push(["KL asked for", `${number(receipt.kl)} nats (p95)`]);
  const list = el("dl", {}, ...rows.flatMap(([name, value]) => [el("dt", {}, name), el("dd", {}, String(value))]));
  const title = `✓ ${receipt.operator} · λ ${number(receipt.strength)} · layer ${receipt.layer} · ${short(receipt.digest)}`;
  return el("details", { className: "receipt" }, el("summary", {}, title), list);
}
