// What the browser keeps between visits. Full or forbidden storage loses history, never what is on the page.

const HISTORY = "steering.history";
const VOTES = "steering.votes";
const DRAFT = "steering.draft";
const TOKEN = "steering.token";
const MOST = 25;

function read(storage, key, otherwise) {
  try {
    return JSON.parse(storage().getItem(key)) ?? otherwise;
  } catch {
    return otherwise;
  }
}

function write(storage, key, value) {
  try {
    storage().setItem(key, JSON.stringify(value));
    return true;
  } catch {
    return false;
  }
}

const shared = () => localStorage;
const ofTab = () => sessionStorage;

export const history = () => {
  const found = read(shared, HISTORY, []);
  return Array.isArray(found) ? found : [];
};

/** Puts one experiment first; the oldest go, and as many more as there is no room for. */
export function remember(entry) {
  // Read once more: another tab may have added its own.
  let entries = [entry, ...history()].slice(0, MOST);
  while (entries.length && !write(shared, HISTORY, entries)) entries = entries.slice(0, -1);
}

export const forget = (time) => write(shared, HISTORY, history().filter((entry) => entry.time !== time));
export const forgetAll = () => write(shared, HISTORY, []);

export const votes = () => {
  const found = read(shared, VOTES, {});
  return found && typeof found === "object" && !Array.isArray(found) ? found : {};
};

/** Adds one vote ("a", "b" or "tie") of a pair. */
export function addVote(key, label, vote) {
  const all = votes();
  const tally = all[key] ?? { label, a: 0, b: 0, tie: 0 };
  tally[vote] += 1;
  write(shared, VOTES, { ...all, [key]: tally });
}

export const dropVotes = () => write(shared, VOTES, {});

/** Who is calling. Of this tab alone, and never among what is shown, linked, copied or exported. */
let ofPage = null;
export const token = () => read(ofTab, TOKEN, ofPage);
export function keepToken(text) {
  ofPage = text;
  write(ofTab, TOKEN, text);
}

/** What was typed in this tab. */
export const draft = () => read(ofTab, DRAFT, null);
export const keepDraft = (settings) => write(ofTab, DRAFT, settings);
