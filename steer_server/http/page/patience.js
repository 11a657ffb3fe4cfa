// A server that is busy is asked again.

import { say } from "./messages.js";

/** Where the server is busy, waits as long as it says and asks again. */
export async function withPatience(work, signal) {
  for (let tries = 0; ; tries++) {
    try {
      return await work();
    } catch (error) {
      if (error.retryAfter === null || error.retryAfter === undefined || tries === 8) throw error;
      for (let left = Math.max(1, Math.ceil(error.retryAfter)); left > 0; left--) {
        say(`The server is busy; asking again in ${left} s …`);
        await new Promise((resolve, reject) => {
          const timer = setTimeout(resolve, 1000);
          signal.addEventListener("abort", () => { clearTimeout(timer); reject(new DOMException("stopped", "AbortError")); }, { once: true });
        });
      }
    }
  }
}
