// Talks with the daemon: questions, and streams that come back by themselves.

export class Problem extends Error {
  constructor(status, detail, type = '') {
    super(detail);
    this.status = status; // 0: the daemon cannot be reached
    this.type = type;
  }
}

export const AWAY = 'The daemon cannot be reached. What runs goes on; this page comes back by itself.';

export function signIn() {
  const here = location.pathname + location.search + location.hash;
  location.assign(`/login?next=${encodeURIComponent(here)}`);
}

// Ask, and return the answer's JSON; a `Problem` says what went wrong.
export async function ask(path, options = {}) {
  let answer;
  try {
    answer = await fetch(path, { credentials: 'same-origin', ...options });
  } catch (error) {
    if (error.name === 'AbortError') throw error;
    throw new Problem(0, AWAY);
  }
  const body = await answer.json().catch(() => null);
  if (answer.ok && body !== null) return body;
  const detail = body?.detail ?? `The daemon answered ${answer.status}.`;
  if (answer.status === 401) signIn();
  throw new Problem(answer.status, detail, body?.type ?? '');
}

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
    this.closed = true;
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
    const seconds = PATIENCE[Math.min(this.tries, PATIENCE.length - 1)];
    this.tries += 1;
    this.timer = setTimeout(async () => {
      try {
        await ask(this.probe);
      } catch (error) {
        if (this.closed) return;
        // What is gone, or not for us, does not come back.
        if (error.status === 403 || error.status === 404) this.tells(error);
        else this.#later(error);
        return;
      }
      if (!this.closed && !(document.hidden && this.tries > PATIENCE.length)) this.#open();
    }, seconds * 1000);
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
