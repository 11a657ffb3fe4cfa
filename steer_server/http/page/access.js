// The token: asked for when the server wants one, kept in this tab alone.

import { byId } from "./dom.js";
import { keepToken, token } from "./kept.js";

// As the server and its clients take it; fetch would throw for what no header can carry.
const TOKEN = /^[A-Za-z0-9._~+/-]{1,4096}=*$/;

const note = (text) => { byId("access-note").textContent = text; };

/** Asks for a token, and says why. */
export function askForToken(why) {
  const isNew = byId("access").hidden;
  byId("access").hidden = false;
  byId("access-readable").hidden = isSecureContext;
  byId("token").toggleAttribute("aria-invalid", Boolean(token()));
  note(why);
  if (isNew) byId("token").focus();
}

export const isAskingForToken = () => !byId("access").hidden;

/** Of a server that is gone nobody knows whether it takes the token. */
export const stopAsking = () => { byId("access").hidden = true; };

/** Whoever was let in needs no form. */
export function tokenIsGood() {
  const asked = isAskingForToken();
  stopAsking();
  byId("forget-token").hidden = !token();
  if (asked) byId("prompt").focus();
}

/** `again` asks the server anew, after the token was typed or forgotten. */
export function watchToken(again) {
  addEventListener("token-refused", (event) => askForToken(token() ? `The server says: ${event.detail}.` : "This server asks for a token."));
  byId("access").addEventListener("submit", (event) => {
    event.preventDefault();
    const typed = byId("token").value.trim();
    if (!TOKEN.test(typed)) return note("That is no token: it is one word of letters, digits and -._~+/ alone.");
    if (!isSecureContext && !byId("access-private").checked) return note("Without TLS everybody on the way can read the token.");
    keepToken(typed);
    byId("token").value = "";
    note("Asking the server …");
    again();
  });
  byId("forget-token").addEventListener("click", () => {
    keepToken(null);
    byId("forget-token").hidden = true;
    again();
  });
}
