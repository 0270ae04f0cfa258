// Talks with the daemon: questions, and streams that come back by themselves.

export class Problem extends Error {
  constructor(status, detail, after = 0) {
    super(detail);
    this.status = status; // 0: the daemon cannot be reached
    this.after = after; // seconds after which one may try again, if it says so
  }

  // Whether it may be another time when one asks again.
  get passes() { return ![400, 401, 403, 404].includes(this.status); }
}

export const AWAY = 'The daemon cannot be reached. What runs goes on; this page comes back by itself.';

export function signIn() {
  const here = location.pathname + location.search + location.hash;
  location.assign(`/login?next=${encodeURIComponent(here)}`);
}

async function answered(path, options) {
  let answer;
  try {
    answer = await fetch(path, { credentials: 'same-origin', ...options });
  } catch {
    throw new Problem(0, AWAY);
  }
  if (answer.ok) return answer;
  const body = await answer.json().catch(() => null);
  if (answer.status === 401) signIn();
  throw new Problem(answer.status, body?.detail ?? `The daemon answered ${answer.status}.`, Number(answer.headers.get('retry-after')) || 0);
}

const broken = () => { throw new Problem(0, AWAY); };

// Ask, and return the answer's JSON; a `Problem` says what went wrong.
export const ask = async (path, options = {}) => (await answered(path, options)).json().catch(broken);

// The same, and what time it is by the daemon's clock, in milliseconds.
export async function askDated(path) {
  const answer = await answered(path, {});
  return [await answer.json().catch(broken), Date.parse(answer.headers.get('date') ?? '')];
}

export const askText = async (path) => (await answered(path, {})).text().catch(broken);

export const post = (path, value, headers = {}) => ask(path, {
  method: 'POST',
  headers: { 'Content-Type': 'application/json', ...headers },
  body: value === undefined ? undefined : JSON.stringify(value),
});

const PATIENCE = [1, 1, 2, 4, 8]; // seconds until the next try
const HIDDEN = 15; // seconds after which a page that nobody sees gives its connection back

// Server-sent events with a cursor: after a fault of the network or a restart of the daemon
// it goes on where it was, without a gap. `hears` maps names of events to functions of
// (value, cursor); `tells(problem)` is called with why it is away, or null when it is there.
// `probe` is a question that is answered if the stream would be. `missed` is called if it
// comes back and cannot know what happened meanwhile.
export class Stream {
  constructor(url, probe, hears, tells) {
    this.url = url;
    this.probe = probe;
    this.hears = hears;
    this.tells = tells;
    this.cursor = '';
    this.tries = 0;
    this.onvisibility = () => this.#seen(!document.hidden);
    document.addEventListener('visibilitychange', this.onvisibility);
    this.#open();
    if (document.hidden) this.#seen(false);
  }

  close() {
    document.removeEventListener('visibilitychange', this.onvisibility);
    clearTimeout(this.hiding);
    this.#stop();
  }

  #stop() {
    clearTimeout(this.timer);
    this.timer = null;
    this.source?.close();
    this.source = null;
  }

  #open() {
    this.#stop();
    const url = new URL(this.url, location.href);
    if (this.cursor) url.searchParams.set('lastEventId', this.cursor);
    const source = new EventSource(url);
    this.source = source;
    source.onopen = () => {
      this.tries = 0;
      // Before the first event there is no place to go on from.
      if (this.opened && !this.cursor) this.missed?.();
      this.opened = true;
      this.tells(null);
    };
    source.onerror = () => {
      if (this.source !== source) return;
      // An EventSource does not always come back by itself, and never after an answer that
      // it does not like; ours always does, and asks why first.
      this.#stop();
      this.#later();
    };
    for (const [name, hear] of Object.entries(this.hears)) {
      source.addEventListener(name, (event) => {
        if (this.source !== source) return;
        this.cursor = event.lastEventId;
        hear(JSON.parse(event.data), this.cursor);
      });
    }
  }

  #later(problem = new Problem(0, AWAY)) {
    this.tells(problem);
    const seconds = Math.max(problem.after, PATIENCE[Math.min(this.tries, PATIENCE.length - 1)]);
    this.tries += 1;
    const timer = setTimeout(async () => {
      let error = null;
      try {
        await ask(this.probe);
      } catch (problem) {
        error = problem;
      }
      if (this.timer !== timer) return; // it was closed, or opened anew, meanwhile
      if (!error) this.#open();
      else if (error.passes) this.#later(error);
      else this.tells(error);
    }, seconds * 1000);
    this.timer = timer;
  }

  // A browser has six connections to one daemon: hidden tabs must not hold them.
  #seen(visible) {
    clearTimeout(this.hiding);
    if (!visible) {
      this.hiding = setTimeout(() => this.#stop(), HIDDEN * 1000);
    } else if (!this.source) {
      this.tries = 0;
      this.#open();
    }
  }
}
