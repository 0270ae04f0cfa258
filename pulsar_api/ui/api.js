// Talks with the daemon: requests, and streams that reconnect by themselves.

export class Problem extends Error {
  constructor(status, detail, after = 0) {
    super(detail);
    this.status = status; // 0: the daemon cannot be reached
    this.after = after; // seconds until the next try, from Retry-After
  }

  // Whether another try may succeed.
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

// Send a request and return the JSON of the response. Throws a `Problem`.
export const ask = async (path, options = {}) => (await answered(path, options)).json().catch(broken);

// The same, and the time by the daemon's clock, in milliseconds.
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
const HIDDEN = 15; // seconds after which a hidden page closes its connection

// Server-sent events with a cursor: after a network fault or a restart of the daemon the
// stream continues where it stopped, without a gap. `hears` maps names of events to
// functions of (value, cursor). `tells(problem)` gets the reason when the stream is down,
// null when it is up. `probe` is a path that the daemon answers if it would answer the
// stream. `missed` is called after a reconnection that may have missed events.
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
      // Before the first event there is no cursor to continue from.
      if (this.opened && !this.cursor) this.missed?.();
      this.opened = true;
      this.tells(null);
    };
    source.onerror = () => {
      if (this.source !== source) return;
      // An EventSource does not always reconnect, and never after a response other than
      // 200. This stream always reconnects, after asking for the reason.
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
      if (this.timer !== timer) return; // the stream was closed or reopened in the meantime
      if (!error) this.#open();
      else if (error.passes) this.#later(error);
      else this.tells(error);
    }, seconds * 1000);
    this.timer = timer;
  }

  // A browser opens at most six connections to one daemon: hidden tabs must not hold them.
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
