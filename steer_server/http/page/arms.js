// The editor of the arms: operators with their strength, blend, positions and words.

import { el, number } from "./dom.js";
import { newArm, newUse } from "./settings.js";

const POSITIONS = [
  ["", "as recommended"], ["all", "everywhere"], ["first", "first token"], ["prompt", "prompt"],
  ["generated", "generated"], ["1..", "all but the first"],
];
const MAX_STRENGTH = 1.2;

/** The arms of `settings`, edited in place; `changed` is called after each change. */
export class ArmEditor {
  constructor(list, changed) {
    this.list = list;
    this.changed = changed;
    this.operators = new Map();
    this.count = 0;
  }

  show(settings, operators) {
    this.settings = settings;
    this.operators = new Map(operators.map((operator) => [operator.name, operator]));
    this.list.replaceChildren(...settings.arms.map((arm) => this.#arm(arm)));
  }

  add() {
    const usable = [...this.operators.values()].filter((operator) => !operator.problem);
    const taken = new Set(this.settings.arms.flatMap((arm) => arm.uses.map((use) => use.name)));
    const operator = usable.find((each) => !taken.has(each.name) && !each.lens) ?? usable.find((each) => !each.lens) ?? usable[0];
    this.settings.arms.push(newArm(this.#freeName(), operator?.name ?? ""));
    this.#redraw();
    this.list.lastElementChild.querySelector("select").focus();
  }

  #freeName() {
    const names = new Set(this.settings.arms.map((arm) => arm.name));
    let index = this.settings.arms.length + 1;
    while (names.has(`arm ${index}`)) index++;
    return `arm ${index}`;
  }

  #redraw() {
    this.list.replaceChildren(...this.settings.arms.map((arm) => this.#arm(arm)));
    this.changed();
  }

  #arm(arm) {
    const name = el("input", { type: "text", value: arm.name, maxLength: 128, "aria-label": "Name of the arm", className: "arm-name" });
    name.addEventListener("input", () => { arm.name = name.value; this.changed(); });
    const remove = el("button", { type: "button", className: "quiet", title: "Remove this arm", "aria-label": `Remove ${arm.name}` }, "✕");
    remove.addEventListener("click", () => {
      this.settings.arms.splice(this.settings.arms.indexOf(arm), 1);
      this.#redraw();
    });
    const more = el("button", { type: "button", className: "quiet" }, "Mix in another operator");
    more.addEventListener("click", () => { arm.uses.push(newUse(arm.uses[0]?.name ?? "")); this.#redraw(); });
    return el("li", { className: "arm" }, el("div", { className: "arm-head" }, name, remove), ...arm.uses.map((use) => this.#use(arm, use)), more);
  }

  #use(arm, use) {
    const id = `use-${++this.count}`;
    const operator = this.operators.get(use.name);
    const select = el("select", { id, "aria-label": "Operator" });
    if (!operator) select.append(el("option", { value: use.name, selected: true }, use.name ? `${use.name} (not served)` : "choose …"));
    for (const each of this.operators.values()) {
      select.append(el("option", { value: each.name, selected: each.name === use.name, disabled: Boolean(each.problem) }, each.problem ? `${each.name} (cannot be used)` : each.name));
    }
    select.addEventListener("change", () => {
      Object.assign(use, newUse(select.value));
      this.#redraw();
    });
    const head = el("div", { className: "use-head" }, select);
    if (arm.uses.length > 1) {
      const remove = el("button", { type: "button", className: "quiet", "aria-label": `Take ${use.name} out`, title: "Take it out" }, "✕");
      remove.addEventListener("click", () => { arm.uses.splice(arm.uses.indexOf(use), 1); this.#redraw(); });
      head.append(remove);
    }
    const parts = [head];
    if (operator?.lens) parts.push(this.#words(use));
    parts.push(this.#slider(use, "strength", "Strength λ", operator?.recommended_strength, -MAX_STRENGTH, MAX_STRENGTH, curveRange(operator)));
    if (operator && !operator.lens && operator.rank !== 0) {
      parts.push(this.#slider(use, "blend", "Blend β", operator.recommended_blend, 0, 1, null));
    }
    const positions = el("select", { "aria-label": "Where it pushes" });
    const known = POSITIONS.some(([value]) => value === use.positions);
    for (const [value, label] of known ? POSITIONS : [...POSITIONS, [use.positions, use.positions]]) {
      positions.append(el("option", { value, selected: value === use.positions }, label));
    }
    positions.addEventListener("change", () => { use.positions = positions.value; this.changed(); });
    parts.push(el("label", { className: "row" }, el("span", {}, "Where"), positions));
    return el("div", { className: "use" }, ...parts);
  }

  #words(use) {
    const input = el("input", { type: "text", value: use.words, placeholder: "coffee, or ocean, storm*-0.5", spellcheck: false });
    input.addEventListener("input", () => { use.words = input.value; this.changed(); });
    return el("label", { className: "row" }, el("span", {}, "Words"), input);
  }

  #slider(use, part, label, recommended, low, high, range) {
    const top = Math.max(high, Math.abs(use[part] ?? 0), recommended ?? 0);
    const least = low < 0 ? -top : low;
    const shown = use[part] ?? recommended ?? 0;
    const slider = el("input", { type: "range", min: least, max: top, step: 0.01, value: shown, "aria-label": `${label}, slider` });
    const exact = el("input", { type: "number", min: least, max: top, step: "any", value: use[part] ?? "", placeholder: number(recommended ?? 0), "aria-label": label });
    const set = (text, from) => {
      use[part] = text === "" ? null : Number(text);
      if (from !== slider) slider.value = use[part] ?? recommended ?? 0;
      if (from !== exact) exact.value = use[part] ?? "";
      this.changed();
    };
    slider.addEventListener("input", () => set(slider.value, slider));
    exact.addEventListener("input", () => set(exact.value, exact));
    const track = el("span", { className: "track" }, slider);
    if (range) {
      const place = (value) => `${(100 * (value - least)) / (top - least)}%`;
      track.classList.add("ranged");
      track.style.setProperty("--from", place(Math.max(least, range[0])));
      track.style.setProperty("--to", place(Math.min(top, range[1])));
      track.title = `Shaded: measured from ${number(range[0])} to ${number(range[1])}`;
    }
    return el("div", { className: "row" }, el("span", {}, label), track, exact);
  }
}

/** Strengths that were measured; else the neighbourhood of the recommended one. */
function curveRange(operator) {
  if (!operator) return null;
  const measured = (operator.curve ?? []).map((point) => point.strength);
  if (measured.length) return [Math.min(...measured), Math.max(...measured)];
  const recommended = operator.recommended_strength;
  return recommended ? [0.7 * recommended, 1.3 * recommended] : null;
}
