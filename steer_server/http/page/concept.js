// Building an operator at the server: what is asked for, how far it is, and what came of it.

import { call, events } from "./api.js";
import { byId, el } from "./dom.js";
import { action } from "./messages.js";

const ENDS = {
  BUILD_STATE_SUCCEEDED: "It is there", BUILD_STATE_FAILED: "It failed", BUILD_STATE_CANCELLED: "It was cancelled",
};

const lines = (text) => text.split("\n").map((line) => line.trim()).filter(Boolean);

/** The seconds of a duration such as "12.5s", as people read them. */
function duration(text) {
  const seconds = Math.round(Number.parseFloat(text));
  return seconds < 90 ? `${seconds} s` : `${Math.round(seconds / 60)} min`;
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
    this.form.addEventListener("submit", (event) => { event.preventDefault(); this.#submit(""); });
  }

  /** `model` as the server describes it; where its operators cannot be changed, there is nothing to open. */
  offer(model) {
    byId("add-concept").hidden = !model.operator_admin;
  }

  #request(replace) {
    const words = byId("concept-words").value.split(",").map((word) => word.trim()).filter(Boolean);
    const calibrate = byId("concept-calibrate").checked;
    return {
      name: byId("concept-name").value.trim(), texts: lines(byId("concept-texts").value), words,
      ...(calibrate ? { calibrate, quick: true } : {}), ...(replace ? { replace } : {}),
    };
  }

  async #submit(replace) {
    const request = this.#request(replace);
    if (!request.name || !request.texts.length) return this.#problem("A name and at least one text are needed.");
    if (request.calibrate && !request.words.length) return this.#problem("Trials count words of the concept: give some, or build without trials.");
    this.#problem("");
    this.#busy(true);
    this.#say("Asking the server …");
    try {
      this.build = await call("BuildOperator", request);
      for await (const report of events("WatchBuild", { id: this.build.id })) this.#show(report);
      await this.#end();
    } catch (error) {
      this.#say("");
      if (error.code === "OPERATOR_EXISTS") return this.#problem(`There is an operator '${request.name}' already.`, action("Replace it", () => this.#submit("any")));
      this.#problem(error.reachable === false && this.build ? `${error.message} The build goes on at the server.` : error.message);
    } finally {
      this.build = null;
      this.#busy(false);
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
