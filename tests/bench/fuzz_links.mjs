// Links of the page that somebody has edited: each is refused with a word, or is settings that the page writes itself.
//
//     node tests/bench/fuzz_links.mjs --seconds 600
//     node tests/bench/fuzz_links.mjs --links 2000

import { readFileSync } from "node:fs";

const source = readFileSync(new URL("../../steer_server/http/page/settings.js", import.meta.url));
const { compareRequest, fromFragment, newSettings, newUse, toFragment } = await import(
  `data:text/javascript;base64,${source.toString("base64")}`
);

const option = (name) => { const at = process.argv.indexOf(name); return at < 0 ? Infinity : Number(process.argv[at + 1]); };
const end = Date.now() + option("--seconds") * 1000, most = option("--links");

let seed = 1;
const random = (below) => { seed = (Math.imul(seed, 1664525) + 1013904223) >>> 0; return Math.floor((seed / 2 ** 32) * below); };
const pick = (list) => list[random(list.length)];
const VALUES = [
  () => null, () => true, () => "", () => "x".repeat(pick([1, 129, 2001, 200001])), () => "first", () => ["first"], () => "generated:2..5",
  () => [], () => ({}), () => [null], () => ({ toString: "x" }), () => -1, () => 0.5, () => 1e308, () => 2 ** 53, () => "__proto__",
  () => [`sha256:${"0".repeat(64)}`], () => `sha256:${"0".repeat(64)}`, () => "\ud800", () => [1, 2], () => ["7"], () => "7",
];

function valid() {
  const settings = newSettings();
  settings.prompt = pick(["", "I went to see the", "\u2603"]);
  settings.arms = [0, 1].map((i) => ({ name: `arm ${i}`, uses: [{ ...newUse("ocean"), strength: 0.4, positions: "first" }] }));
  return settings;
}

function spoil(value) {
  const places = [];
  (function walk(it) {
    if (it && typeof it === "object") for (const key of Object.keys(it)) { places.push([it, key]); walk(it[key]); }
  })(value);
  const [it, key] = pick(places);
  if (random(8) === 0) delete it[key]; else it[key] = pick(VALUES)();
}

function fragment() {
  const settings = valid();
  for (let i = random(4); i > 0; i -= 1) spoil(settings);
  const written = [...toFragment(settings)];
  for (let i = random(3) ? 0 : 1 + random(3); i > 0; i -= 1) written.splice(random(written.length), random(2), pick([..."aZ09-_=%\u2603"]));
  return written.join("");
}

const WRITTEN = (it) => JSON.stringify(it);
let done = 0, read = 0;
for (; done < most && Date.now() < end; done += 1) {
  const link = fragment();
  let settings;
  try {
    settings = fromFragment(link);
  } catch (error) {
    if (error.constructor !== Error || !error.message) throw new Error(`${link}\nis met with ${error.stack}`);
    continue;
  }
  if (settings === null) continue;
  read += 1;
  for (const arm of settings.arms) {
    for (const use of arm.uses) {
      for (const [name, it] of Object.entries(use)) {
        const accepted = ["strength", "blend"].includes(name) ? "number" : "string";
        if (it !== null && typeof it !== accepted) throw new Error(`${link}\nhas the ${name} ${WRITTEN(it)}`);
      }
    }
  }
  compareRequest(settings);
  if (WRITTEN(fromFragment(toFragment(settings))) !== WRITTEN(settings)) throw new Error(`${link}\nis read as other settings`);
}
console.log(`${done} links, ${read} of them read`);
