// The experiments that this browser keeps.

import { byId, el } from "./dom.js";
import * as kept from "./kept.js";
import { action } from "./messages.js";
import { checked } from "./settings.js";

/** Lists them; `open` is called with the settings of the one that is chosen. */
export function showHistory(open) {
  const items = kept.history().map((entry) => {
    let settings;
    try {
      settings = checked(entry.settings);
    } catch {
      return null;
    }
    const again = () => showHistory(open);
    const texts = (entry.texts ?? []).map(({ name, text }) => el("p", { className: "kept" }, el("b", {}, `${name}: `), String(text)));
    const actions = [action("Open", () => open(settings)), action("Delete", () => { kept.forget(entry.time); again(); })];
    const head = el("p", {}, el("time", {}, new Date(entry.time).toLocaleString()), " · ", settings.prompt.slice(0, 120));
    return el("li", {}, head, ...texts, el("div", { className: "actions" }, ...actions));
  }).filter(Boolean);
  const clear = action("Delete all", () => { kept.forgetAll(); showHistory(open); });
  byId("history-view").replaceChildren(...(items.length
    ? [el("ol", { className: "history" }, ...items), clear]
    : [el("p", {}, "Experiments that you run are kept here, in this browser alone.")]));
}
