// What the page says: a problem with what can be done about it, what is going on, and what a token is about.

import { byId, el } from "./dom.js";

const OF_THE_PAGE = ["UNREACHABLE", "BROKEN"];

/** A button that does something. */
export function action(text, work) {
  const button = el("button", { type: "button" }, text);
  button.addEventListener("click", work);
  return button;
}

/** Shows an error until the next one, or null. */
export function tell(error, ...actions) {
  const box = byId("problem");
  box.hidden = !error;
  box.replaceChildren();
  if (!error) return;
  box.append(el("p", {}, error.message));
  if (error.code && !OF_THE_PAGE.includes(error.code)) box.append(el("p", { className: "note" }, [error.code, error.field].filter(Boolean).join(" · ")));
  if (actions.length) box.append(el("div", { className: "actions" }, ...actions));
  // It may be above or below what is in sight.
  box.scrollIntoView({ block: "nearest" });
}

/** One line on what is going on. */
export const say = (text) => { byId("progress").textContent = text; };

/** Lines beside an element; without one they go. */
export function tip(element, lines = []) {
  const box = byId("tip");
  box.hidden = !element;
  if (!element) return;
  box.replaceChildren(...lines.map((line) => el("div", {}, line)));
  const at = element.getBoundingClientRect();
  const size = box.getBoundingClientRect();
  const isAbove = at.top > size.height + 12;
  box.style.left = `${Math.min(Math.max(8, at.left), innerWidth - size.width - 8)}px`;
  box.style.top = `${isAbove ? at.top - size.height - 6 : at.bottom + 6}px`;
}

/** Puts a text where it can be pasted from; where the browser does not let the page, it is shown to be copied by hand. */
export async function put(text, name) {
  try {
    await navigator.clipboard.writeText(text);
    say(`${name} is copied.`);
  } catch {
    const area = el("textarea", { value: text, rows: 8, readOnly: true, "aria-label": name });
    const dialog = el("dialog", { "aria-label": name }, el("p", {}, `${name}, to be copied by hand:`), area);
    dialog.append(action("Close", () => dialog.close()));
    dialog.addEventListener("close", () => dialog.remove());
    document.body.append(dialog);
    dialog.showModal();
    area.select();
  }
}
