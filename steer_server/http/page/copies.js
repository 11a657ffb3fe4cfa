// The experiment as something to run elsewhere, and its texts as files.

import { compareRequest, promptMessage, samplingMessage, wordMessages } from "./settings.js";

const shell = (text) => `'${String(text).replaceAll("'", "'\\''")}'`;
/** A Python literal of a text. JSON's escapes are Python's. */
const python = (text) => JSON.stringify(String(text)).replaceAll("\u2028", "\\u2028").replaceAll("\u2029", "\\u2029");
const lone = (settings) => settings.arms.length === 1;

function useOption(use) {
  let option = use.name + (use.strength === null ? "" : `=${use.strength}`);
  if (use.blend !== null) option += use.strength === null ? `=@${use.blend}` : `@${use.blend}`;
  if (use.positions) option += `:${use.positions}`;
  if (use.digest) option += `,digest=${use.digest}`;
  return option;
}

const wordOption = (use) => use.words
  + (use.strength === null ? "" : `=${use.strength}`) + (use.positions ? `:${use.positions}` : "");

/** Why an experiment cannot be written as a command; null where it can. */
export function notForCli(settings) {
  if (settings.ids) return "a prompt of token ids, as a fork makes it";
  if (!settings.arms.length) return "an experiment without an arm";
  for (const arm of settings.arms) {
    if (arm.uses.some((use) => use.words) && !lone(settings)) return "words in one of several arms";
    if (new Set(arm.uses.filter((use) => use.words).map((use) => use.name)).size > 1) return "words of two lenses";
    if (arm.uses.some((use) => use.blend !== null && use.strength === null)) return "a blend without a strength";
  }
  return null;
}

/** `where`: the server's target, this page's origin, whether it speaks TLS, and whether it asks for a token. */
export function asCli(settings, { target, tls }) {
  const parts = ["steer ab", shell(settings.prompt)];
  if (settings.prompt.startsWith("-")) parts.splice(1, 1);
  if (settings.chat) parts.push("--chat");
  if (lone(settings)) {
    for (const use of settings.arms[0].uses) {
      if (use.words) {
        parts.push("--word", shell(wordOption(use)));
        if (use.name !== "lens") parts.push("--lens", shell(use.name));
      } else parts.push("--operator", shell(useOption(use)));
    }
  } else {
    for (const arm of settings.arms) parts.push("--arm", shell(`${arm.name}: ${arm.uses.map(useOption).join(" ")}`));
  }
  const sampling = samplingMessage(settings);
  for (const [name, value] of Object.entries(sampling)) parts.push(`--${name.replaceAll("_", "-")}`, ...(value === true ? [] : [String(value)]));
  if (target) parts.push("--target", shell(target));
  if (tls) parts.push("--tls");
  if (settings.prompt.startsWith("-")) parts.push("--", shell(settings.prompt));
  return parts.join(" ");
}

function pythonPositions(text) {
  return text ? `, positions=Positions.parse(${python(text)})` : "";
}

function pythonUse(use) {
  const words = wordMessages(use.words);
  const digest = use.digest ? `, digest=${python(use.digest)}` : "";
  const strength = use.strength === null ? "" : `, strength=${use.strength}`;
  const blend = use.blend === null ? "" : `, blend=${use.blend}`;
  const worded = words.length
    ? `, words=(${words.map((word) => `WeightedWord(${python(word.text)}${word.weight === undefined ? "" : `, ${word.weight}`})`).join(", ")},)` : "";
  return `OperatorUse(${python(use.name)}${strength}${blend}${pythonPositions(use.positions)}${worded}${digest})`;
}

export function asPython(settings, { target, tls }) {
  const prompt = promptMessage(settings);
  const written = prompt.token_ids ? `[${prompt.token_ids.ids.join(", ")}]`
    : prompt.chat ? `Chat((ChatMessage("user", ${python(settings.prompt)}),))` : python(settings.prompt);
  const sampling = Object.entries(samplingMessage(settings)).map(([name, value]) => `${name}=${value === true ? "True" : value}`).join(", ");
  const arms = settings.arms.map((arm) => `    ${python(arm.name)}: [${arm.uses.map(pythonUse).join(", ")}],`);
  const names = ["OperatorUse", "SamplingParams", "SteerClient"];
  const code = arms.join("\n");
  if (code.includes("Positions.parse")) names.push("Positions");
  if (code.includes("WeightedWord(")) names.push("WeightedWord");
  if (prompt.chat) names.push("Chat", "ChatMessage");
  return [
    `from steer_client import ${names.sort().join(", ")}`, "",
    `arms = {\n${code}\n}`,
    `with SteerClient(${[target ? python(target) : "", tls ? "tls=True" : ""].filter(Boolean).join(", ")}) as client:`,
    `    result = client.compare(${written}, arms=arms, sampling=SamplingParams(${sampling}))`,
    "print(\"plain:\", result.normal.text)",
    "for name, arm in result.steered.items():",
    "    print(f\"{name}: {arm.generation.text}\")", "",
  ].join("\n");
}

export function asCurl(settings, { origin, token }) {
  // The shell puts the token in: what is copied can be pasted anywhere.
  const bearer = token ? ' -H "authorization: Bearer $STEER_TOKEN"' : "";
  return `curl -sN ${shell(`${origin}/api/Compare`)}${bearer} -H 'content-type: application/json' -d ${shell(JSON.stringify(compareRequest(settings)))}`;
}

const cell = (value) => {
  const text = value === undefined || value === null ? "" : String(value);
  return /[",\r\n]/.test(text) ? `"${text.replaceAll("\"", "\"\"")}"` : text;
};

/** Lines of RFC 4180, one per text. */
export function asCsv(settings, columns) {
  const head = ["arm", "prompt", "text", "finish_reason", "tokens", "seed", "kl_mean", "kl_p95", "perplexity", "first_divergence", "digests"];
  const lines = columns.map(({ name, text, finished, comparison }) => [
    name, settings.prompt, text, finished?.finish_reason, finished?.usage?.completion_tokens, finished?.seed,
    comparison?.kl_mean, comparison?.kl_p95, comparison?.steered_perplexity, comparison?.first_divergence,
    (finished?.receipts ?? []).map((receipt) => `${receipt.operator} ${receipt.digest}`).join("; "),
  ]);
  return [head, ...lines].map((line) => `${line.map(cell).join(",")}\r\n`).join("");
}
