// Building an operator at the server: what is asked for, how far it is, and what came of it.

import { call, events } from "./api.js";
import { byId, el } from "./dom.js";
import { action } from "./messages.js";

const ENDS = {
  BUILD_STATE_SUCCEEDED: "It is there", BUILD_STATE_FAILED: "It failed", BUILD_STATE_CANCELLED: "It was cancelled",
};

const WAIT = 2;
/** Answers after which there is nothing to look for: it is not known, or not to be seen by this token. */
const LOST = [400, 403, 404];

const lines = (text) => text.split("\n").map((line) => line.trim()).filter(Boolean);

/** The seconds of a duration such as "12.5s", as people read them. */
function duration(text) {
  const seconds = Math.round(Number.parseFloat(text));
  return seconds < 90 ? `${seconds} s` : `${Math.round(seconds / 60)} min`;
}

/** The version that has the name, where the server says which: a later one is not replaced unseen. */
function taken(error) {
  return error.details.map((detail) => detail.metadata?.found).find(Boolean) ?? "any";
}

export class ConceptDialog {
  /** `built(name)` is called with each operator that has come into service. */
  constructor(built) {
    this.built = built;
    this.build = null;
    this.dialog = byId("concept");
    this.form = byId("concept-form");
    byId("add-concept").addEventListener("click", () => this.dialog.showModal());
    byId("concept-close").addEventListener("click", () => this.dialog.close());
    byId("concept-cancel").addEventListener("click", () => this.#cancel());
    this.form.addEventListener("submit", (event) => { event.preventDefault(); this.#submit(this.#request()); });
    // What is wrong, and what may be done about it, is of what was sent.
    this.form.addEventListener("input", () => this.#problem(""));
  }

  /** `model` as the server describes it; where its operators cannot be changed, there is nothing to open. */
  offer(model) {
    byId("add-concept").hidden = !model.operator_admin;
  }

  #request() {
    const words = byId("concept-words").value.split(",").map((word) => word.trim()).filter(Boolean);
    const calibrate = byId("concept-calibrate").checked;
    return {
      name: byId("concept-name").value.trim(), texts: lines(byId("concept-texts").value), words,
      ...(calibrate ? { calibrate, quick: true } : {}),
    };
  }

  async #submit(request) {
    if (!request.name || !request.texts.length) return this.#problem("A name and at least one text are needed.");
    if (request.calibrate && !request.words.length) return this.#problem("Trials count words of the concept: give some, or build without trials.");
    this.#problem("");
    this.#busy(true);
    this.#say("Asking the server …");
    try {
      this.build = await call("BuildOperator", request);
      await this.#watch();
      await this.#end();
    } catch (error) {
      this.#say("");
      if (error.code === "OPERATOR_EXISTS") return this.#problem(`There is an operator '${request.name}' already.`, action("Replace it", () => this.#submit({ ...request, replace: taken(error) })));
      this.#problem(error.message);
    } finally {
      this.build = null;
      this.#busy(false);
    }
  }

  /** Shows how far the build is, up to its end, however often the connection breaks or the server asks to come again. */
  async #watch() {
    for (;;) {
      let wait = WAIT;
      try {
        for await (const report of events("WatchBuild", { id: this.build.id })) this.#show(report);
      } catch (error) {
        if (LOST.includes(error.status)) throw error;
        wait = error.retryAfter ?? WAIT;
        this.#say(`${error.message} The build goes on at the server; it is looked for again …`);
      }
      if (this.build.state in ENDS) return;
      await new Promise((resume) => { setTimeout(resume, 1000 * wait); });
    }
  }

  #show(report) {
    this.build = report;
    const total = Number(report.total ?? 0);
    const bar = byId("concept-progress");
    if (total) bar.value = Number(report.done ?? 0) / total;
    else bar.removeAttribute("value");
    const left = report.time_left ? ` · about ${duration(report.time_left)} left of this stage` : "";
    this.#say(report.state === "BUILD_STATE_WAITING" ? "Waiting for another build …" : `${report.stage || "Starting"}${left} …`);
  }

  async #end() {
    const { state, problem, operator, name } = this.build;
    this.#say(`${ENDS[state] ?? "It ended"}${problem ? `: ${problem}` : "."}`);
    if (state === "BUILD_STATE_FAILED") this.#problem(problem || "The build failed.");
    if (!operator) return;
    await this.built(name);
    this.dialog.close();
    this.form.reset();
    this.#say("");
  }

  async #cancel() {
    if (!this.build) return;
    try {
      await call("CancelBuild", { id: this.build.id });
    } catch (error) {
      this.#problem(error.message);
    }
  }

  #busy(is) {
    byId("concept-build").disabled = is;
    byId("concept-cancel").hidden = !is;
    byId("concept-progress").hidden = !is;
    byId("concept-progress").removeAttribute("value");
  }

  #say(text) {
    byId("concept-status").textContent = text;
  }

  #problem(text, retry = null) {
    byId("concept-problem").hidden = !text;
    byId("concept-problem").replaceChildren(el("p", {}, text), ...(retry ? [retry] : []));
  }
}
