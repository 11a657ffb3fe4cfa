// Elements, made so that whatever comes from a user or a server is text and never markup.

/** An element. Members of `properties` are set as properties, those of `attributes` under "aria-…" and "data-…" too. */
export function el(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name.includes("-") || name === "role" || name === "for") element.setAttribute(name, value);
    else element[name] = value;
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

export const byId = (id) => document.getElementById(id);

/** A number as people read it. */
export function number(value, digits = 3) {
  if (value === undefined || value === null) return "–";
  const numeric = Number(value);
  return Number.isFinite(numeric) ? String(Number(numeric.toPrecision(digits))) : String(value);
}

/** A shortened digest. */
export const short = (digest) => (digest ? `${digest.slice(0, 15)}…` : "");
