// What one experiment is asked with: as the page keeps it, as a link holds it, and as the contract wants it.

const MAX_ARMS = 15;
const POSITIONS = /^(|all|first|prompt|generated|(?:(?:prompt|generated):)?\d{0,9}\.\.\d{0,9})$/;
const SAMPLING = ["max_tokens", "temperature", "top_p", "repetition_penalty"];

export const newUse = (name = "") => ({
  name, strength: null, blend: null, positions: "", words: "", digest: null,
});
export const newArm = (name, operator = "") => ({ name, uses: [newUse(operator)] });
export const newSettings = () => ({
  prompt: "", ids: null, chat: false, arms: [], marks: "",
  sampling: { max_tokens: 40, temperature: 0, top_p: 1, repetition_penalty: 1.2, seed: null, ignore_eos: false },
});

/** Settings from what somebody may have edited. Throws an Error that names the part at fault. */
export function checked(value) {
  const fail = (part) => { throw new Error(`${part} is not what this page writes`); };
  const text = (it, part, max = 200000) => (typeof it === "string" && it.length <= max ? it : fail(part));
  const number = (it, part) => (it === null || Number.isFinite(it) ? it : fail(part));
  const object = (it, part) => (it && typeof it === "object" && !Array.isArray(it) ? it : fail(part));
  object(value, "it");
  const settings = newSettings();
  settings.prompt = text(value.prompt, "prompt");
  settings.chat = value.chat === true;
  settings.marks = text(value.marks ?? "", "marks", 2000);
  if (value.ids !== null && value.ids !== undefined) {
    if (!Array.isArray(value.ids) || !value.ids.every((id) => Number.isInteger(id) && id >= 0)) fail("ids");
    settings.ids = value.ids;
  }
  const sampling = object(value.sampling, "sampling");
  for (const name of SAMPLING) settings.sampling[name] = number(sampling[name] ?? null, `sampling.${name}`);
  const seed = sampling.seed ?? null;
  if (seed !== null && !(typeof seed === "string" && /^\d{1,20}$/.test(seed))) fail("sampling.seed");
  settings.sampling.seed = seed;
  settings.sampling.ignore_eos = sampling.ignore_eos === true;
  if (!Array.isArray(value.arms) || value.arms.length > MAX_ARMS) fail("arms");
  settings.arms = value.arms.map((arm, i) => {
    object(arm, `arms[${i}]`);
    if (!Array.isArray(arm.uses) || !arm.uses.length || arm.uses.length > 16) fail(`arms[${i}].uses`);
    return {
      name: text(arm.name, `arms[${i}].name`, 128),
      uses: arm.uses.map((use, j) => {
        const part = `arms[${i}].uses[${j}]`;
        object(use, part);
        if (!POSITIONS.test(text(use.positions ?? "", `${part}.positions`))) fail(`${part}.positions`);
        const digest = use.digest ?? null;
        if (digest !== null && !/^sha256:[0-9a-f]{64}$/.test(text(digest, `${part}.digest`))) fail(`${part}.digest`);
        return {
          name: text(use.name, `${part}.name`, 200),
          strength: number(use.strength ?? null, `${part}.strength`),
          blend: number(use.blend ?? null, `${part}.blend`),
          positions: use.positions ?? "",
          words: text(use.words ?? "", `${part}.words`, 2000),
          digest,
        };
      }),
    };
  });
  return settings;
}

/** The part of a link behind "#". */
export function toFragment(settings) {
  const bytes = new TextEncoder().encode(JSON.stringify({ v: 1, ...settings }));
  let binary = "";
  for (const byte of bytes) binary += String.fromCharCode(byte);
  return `x=${btoa(binary).replaceAll("+", "-").replaceAll("/", "_").replaceAll("=", "")}`;
}

/** Settings of a link; null where it holds none. Throws an Error for one that was damaged. */
export function fromFragment(fragment) {
  const found = /^#?x=([\w-]+)$/.exec(fragment);
  if (!found) {
    if (fragment.replace("#", "").startsWith("x=")) throw new Error("it has characters that no link of this page has");
    return null;
  }
  let value;
  try {
    const binary = atob(found[1].replaceAll("-", "+").replaceAll("_", "/"));
    const bytes = Uint8Array.from(binary, (character) => character.charCodeAt(0));
    value = JSON.parse(new TextDecoder("utf-8", { fatal: true }).decode(bytes));
  } catch {
    throw new Error("a part of it is missing or was changed");
  }
  if (value?.v !== 1) throw new Error("it was made by another version of this page");
  return checked(value);
}

/** "first" or "generated:2..5" as the contract's message; undefined for the recommended ones. */
export function positionsMessage(text) {
  if (!text) return undefined;
  if (text === "first") return { end: 1 };
  const part = /^(all|prompt|generated)/.exec(text)?.[1];
  const range = /(\d*)\.\.(\d*)$/.exec(text);
  const message = part ? { part: `PART_${part.toUpperCase()}` } : {};
  if (range?.[1]) message.start = Number(range[1]);
  if (range?.[2]) message.end = Number(range[2]);
  return message;
}

/** "ocean, storm*-0.5" as the contract's words. */
export function wordMessages(text) {
  return text.split(",").map((each) => each.trim()).filter(Boolean).map((each) => {
    const [word, ...weights] = each.split("*");
    if (!weights.length) return { text: each };
    const weight = weights.join("*").trim();
    // What is no number goes as it was typed, for the server to refuse: as JSON, NaN would mean that there is no weight.
    return { text: word.trim(), weight: weight && Number.isFinite(Number(weight)) ? Number(weight) : weight };
  });
}

function useMessage(use) {
  const message = { name: use.name };
  if (use.strength !== null) message.strength = use.strength;
  if (use.blend !== null) message.blend = use.blend;
  const positions = positionsMessage(use.positions);
  if (positions) message.positions = positions;
  const words = wordMessages(use.words);
  if (words.length) message.words = words;
  if (use.digest) message.digest = use.digest;
  return message;
}

/** Why there is nothing to go on from; empty where there is. */
export const emptyPrompt = (settings) => (settings.ids || settings.prompt ? "" : "The prompt is empty: type what the texts go on from.");

/** The contract's prompt. */
export function promptMessage(settings) {
  if (settings.ids) return { token_ids: { ids: settings.ids } };
  if (settings.chat) return { chat: { messages: [{ role: "user", content: settings.prompt }] } };
  return { text: settings.prompt };
}

/** The contract's sampling parameters; what is not set is left to the server. */
export function samplingMessage(settings) {
  const message = {};
  for (const name of SAMPLING) if (settings.sampling[name] !== null) message[name] = settings.sampling[name];
  if (settings.sampling.seed !== null) message.seed = settings.sampling.seed;
  if (settings.sampling.ignore_eos) message.ignore_eos = true;
  return message;
}

/** The contract's CompareRequest. */
export function compareRequest(settings) {
  return {
    prompt: promptMessage(settings),
    sampling: samplingMessage(settings),
    arms: settings.arms.map((arm) => ({ name: arm.name, operators: arm.uses.map(useMessage) })),
  };
}
