// The view of one task: its facts, its output, and the actions on it.

import { ask, askText, post } from './api.js';
import { STATUS, badge, bytes, duration, el, ended, remarks, say, setBadge, when, whyNot } from './format.js';
import { Log } from './log.js';
import { Search } from './search.js';
import { Terminal, harmless, joined } from './terminal.js';

const COPIED = 1 << 20; // the most characters that Copy takes
const SAID = 5000; // milliseconds between two announcements of new lines

export class TaskView {
  constructor(page, id) {
    this.page = page;
    this.id = id;
    this.said = null; // the number of lines at the last announcement, and its time
    this.#build();
    this.ticks = setInterval(() => this.#tick(), 1000);
    this.onhash = () => this.#hash(true);
    addEventListener('hashchange', this.onhash);
    this.onvisible = () => this.#hidden();
    document.addEventListener('visibilitychange', this.onvisible);
    this.#hidden();
    page.title(`Task ${id}`);
    this.#open();
  }

  close() {
    this.closed = true;
    this.log.close();
    clearInterval(this.ticks);
    clearInterval(this.polls);
    clearTimeout(this.retry);
    removeEventListener('hashchange', this.onhash);
    document.removeEventListener('visibilitychange', this.onvisible);
    document.body.classList.remove('task');
  }

  #build() {
    const button = (text, onclick, more = {}) => el('button', { type: 'button', onclick, ...more }, text);
    this.name = el('h1', { tabindex: -1 }, `Task ${this.id}`);
    this.state = el('span', { class: 'state' });
    this.kill = button('Kill…', () => this.#askKill(), { class: 'danger', hidden: true });
    this.again = button('Run again…', () => this.page.run(this.task), { hidden: true });
    this.brief = el('summary', {}, 'Details');
    this.facts = el('dl', { class: 'facts' });
    this.about = el('details', { class: 'about', open: matchMedia('(min-width: 50rem) and (min-height: 40rem)').matches }, this.brief, this.facts);
    this.reason = el('p', { class: 'reason', hidden: true });
    this.remarks = el('ul', { class: 'remarks', hidden: true });
    this.search = el('input', { type: 'search', placeholder: 'Search the output', 'aria-label': 'Search the output', maxlength: 200, autocomplete: 'off' });
    this.found = el('span', { class: 'found', role: 'status' });
    const form = el('form', {
      class: 'find', role: 'search',
      onsubmit: (event) => { event.preventDefault(); this.#find(1); },
      oninput: () => { if (!this.search.value) this.#find(0); },
    }, this.search, button('↑', () => this.#find(-1), { 'aria-label': 'Previous match', title: 'Previous match' }),
    button('↓', () => this.#find(1), { 'aria-label': 'Next match', title: 'Next match' }), this.found);
    this.times = button('Times', () => this.#toggle(), { 'aria-pressed': 'false' });
    this.copied = el('span', { role: 'status', class: 'copied' });
    this.bar = el('div', { class: 'bar' }, form, this.times,
      button('Top', () => this.log.top()),
      button('Copy', () => this.#copy()),
      el('a', { class: 'button', href: `/task/${this.id}/log`, download: `task-${this.id}.log` }, 'Download'), this.copied);
    this.scroller = el('div', { class: 'log', tabindex: 0, role: 'region', 'aria-label': 'Output' });
    this.resume = button('↓ Follow the end', () => { this.log.resume(); this.scroller.focus(); }, { class: 'resume', hidden: true });
    this.live = el('p', { class: 'unseen', role: 'status' });
    this.empty = el('p', { class: 'empty' }, 'Loading…');
    this.page.view.replaceChildren(
      el('div', { class: 'head' },
        el('a', { href: '/web/', 'data-view': true, class: 'back' }, '‹ Tasks'),
        el('div', { class: 'titles' }, this.name, this.state),
        el('div', { class: 'actions' }, this.kill, this.again)),
      this.reason,
      this.remarks,
      this.about,
      this.bar,
      el('div', { class: 'screen' }, this.scroller, this.empty, this.resume),
      this.live);
    document.body.classList.add('task');
    this.scroller.addEventListener('click', (event) => this.#pick(event));
    this.scroller.addEventListener('copy', (event) => {
      if (getSelection().isCollapsed) return;
      event.preventDefault();
      this.#copy();
    });
    this.scroller.addEventListener('keydown', (event) => {
      if (event.key !== 'l' || event.ctrlKey || event.metaKey || event.altKey) return;
      const line = this.log.seen();
      if (line) this.#mark([line, line]);
      if (line) this.#announce(`The address now points to line ${line}.`);
    });
    this.log = new Log(this.id, this.scroller, {
      follow: (following) => { this.resume.hidden = following; },
      away: (problem) => this.#away(problem),
      state: (task) => this.#show(task),
      end: (task) => this.#show(task),
      grown: (lines) => this.#grown(lines),
    });
  }

  // The page now knows the user and the user's rights.
  met() { if (this.task) this.#show(this.task); }

  #bytes() { return Math.max(this.task.outputSize, this.log.size); }

  async #open() {
    let task;
    try {
      task = await ask(`/task/${this.id}?output=none`);
      if (this.closed) return;
      this.page.away(null);
      this.#show(task);
      const marked = this.#hash(false);
      await this.log.open(task, marked ? marked[0] : null);
    } catch (error) {
      if (this.closed) return;
      this.#away(error);
      if (error.passes) this.retry = setTimeout(() => this.#open(), 1500);
    }
  }

  // Show why the daemon does not answer. An error that will not pass, such as a missing
  // task or right, appears in place of the output.
  #away(problem) {
    if (problem === null || problem.passes) {
      this.page.away(problem);
      return;
    }
    this.page.away(null);
    if (this.task) {
      say(this.reason, problem.message);
      this.reason.hidden = false;
    } else {
      say(this.empty, problem.message);
      this.bar.hidden = true;
      this.about.hidden = true;
    }
  }

  #show(task) {
    if (this.closed || (this.task && this.task.version > task.version)) return;
    const before = this.task?.status;
    this.task = task;
    if (!before) {
      this.name.replaceChildren(`${task.app} ${task.env} ${task.action} `, el('span', { class: 'id' }, `#${task.id}`));
    }
    setBadge(this.state, task);
    const { word, sign } = STATUS[task.status] ?? { word: task.status, sign: '?' };
    this.page.title(`${sign} ${word} · ${task.app} ${task.env} #${task.id}`);
    if (before && before !== task.status) this.#announce(`The task is ${word}.`);
    const may = (right) => this.page.may(right, task.app, task.env, task.action);
    const held = document.activeElement === this.kill;
    this.kill.hidden = ended(task) || !may('kill');
    if (held && this.kill.hidden) this.name.focus(); // so that Tab does not start at the top
    this.again.hidden = !ended(task) || !may('run');
    const why = whyNot(task);
    say(this.reason, why);
    this.reason.hidden = !why;
    this.reason.classList.toggle('waits', task.status === 'created');
    const notes = remarks(task);
    this.remarks.replaceChildren(...notes.map((text) => el('li', {}, text)));
    this.remarks.hidden = !notes.length;
    this.#tell(task);
    say(this.resume, ended(task) ? '↓ To the end' : '↓ Follow the end');
    this.#emptiness();
  }

  #tell(task) {
    this.#sum();
    const facts = [];
    const fact = (name, ...value) => facts.push(el('div', {}, el('dt', {}, name), el('dd', {}, ...value)));
    this.long = el('span', {}, duration(task, this.page.now()) ?? '–');
    fact('Time', this.long);
    if (task.exitCode !== null) fact('Exit code', String(task.exitCode));
    if (task.signal) fact('Signal', task.signal);
    fact('By', task.user ?? 'not signed in');
    fact('Created', when(task.createdAt));
    if (task.startedAt) fact('Started', when(task.startedAt));
    if (task.endedAt) fact('Ended', when(task.endedAt));
    this.printed = el('span', {}, bytes(this.#bytes()));
    fact('Output', this.printed);
    if (task.cpuSeconds != null) fact('Processor time', `${task.cpuSeconds.toFixed(2)} s`);
    if (task.memoryPeak != null) fact('Memory', `${bytes(task.memoryPeak)} peak`);
    if (task.pid) fact('Process', String(task.pid));
    if (task.command) fact('Command', el('code', {}, task.command));
    const variables = Object.entries(task.variables ?? {});
    if (variables.length) {
      fact('Variables', el('ul', {}, ...variables.map(([name, value]) => el('li', {}, el('code', {}, harmless(`${name}=${value}`))))));
    }
    this.facts.replaceChildren(...facts);
  }

  // The most important facts, in one line.
  #sum() {
    const { task } = this;
    const long = duration(task, this.page.now());
    say(this.brief, [
      task.exitCode === null ? null : `exit code ${task.exitCode}`,
      task.signal,
      long === null ? null : `${ended(task) ? 'after' : 'for'} ${long}`,
      task.user === null ? null : `by ${task.user}`,
    ].filter(Boolean).join(' · ') || 'Details');
  }

  #tick() {
    if (!this.task || ended(this.task)) return;
    say(this.long, duration(this.task, this.page.now()) ?? '–');
    this.#sum();
  }

  #grown(lines) {
    this.#emptiness();
    if (this.printed) say(this.printed, bytes(this.#bytes()));
    if (!this.task) return;
    const now = performance.now();
    // Output from before the page was opened is not announced.
    if (!this.said || this.log.size <= this.task.outputSize) this.said = { lines, at: now };
    if (now - this.said.at < SAID) {
      this.saying ??= setTimeout(() => { this.saying = null; if (!this.closed) this.#grown(this.log.lines); }, SAID);
      return;
    }
    const more = lines - this.said.lines;
    this.said = { lines, at: now };
    if (more > 0 && !ended(this.task)) this.#announce(`${more} new line${more === 1 ? '' : 's'}`);
  }

  #emptiness() {
    const nothing = this.log.empty;
    this.empty.hidden = !nothing || (this.task?.outputSize ?? 1) > 0;
    if (nothing && this.task) say(this.empty, ended(this.task) ? 'The task printed nothing.' : 'No output yet.');
  }

  // For screen readers. Callers limit how often this speaks.
  #announce(text) { this.live.textContent = text; }

  // A hidden tab has closed its stream, so poll for the state that its title shows.
  #hidden() {
    clearInterval(this.polls);
    if (!document.hidden) return;
    this.polls = setInterval(async () => {
      if (this.task && ended(this.task)) { clearInterval(this.polls); return; }
      try { this.#show(await ask(`/task/${this.id}?output=none`)); } catch { /* the daemon does not answer; the next poll tries again */ }
    }, 10000);
  }

  // -- lines in the address: #L120 or #L120-L130

  #hash(go) {
    const found = /^#L(\d{1,15})(?:-L?(\d{1,15}))?$/.exec(location.hash);
    const lines = found && [Number(found[1]), Number(found[2] ?? found[1])].sort((a, b) => a - b);
    this.picked = lines;
    this.log.mark(lines);
    if (go && lines) this.log.goTo(lines[0]).catch(() => {});
    return lines;
  }

  #pick(event) {
    const line = Number(event.target.closest?.('a.n')?.dataset.n);
    if (!line) return;
    event.preventDefault();
    // A second click on the same line removes the mark.
    if (this.picked?.[0] === line && this.picked[1] === line) { this.#mark(null); return; }
    const from = event.shiftKey && this.picked ? this.picked[0] : line;
    this.#mark([Math.min(from, line), Math.max(from, line)]);
  }

  #mark(lines) {
    this.picked = lines;
    const hash = lines && (lines[0] === lines[1] ? `#L${lines[0]}` : `#L${lines[0]}-L${lines[1]}`);
    history.replaceState(history.state, '', hash ?? location.pathname + location.search);
    this.log.mark(lines);
  }

  // -- search

  async #find(step) {
    const text = this.search.value;
    if (text !== this.walk?.text) {
      this.walk = new Search(this.id, text, () => this.log.size);
      this.log.find(text);
      this.log.mark(this.picked);
      say(this.found, '');
    }
    const { walk } = this;
    if (!text || !step || walk.busy) return;
    walk.busy = true;
    say(this.found, 'Searching…');
    try {
      const match = await walk.step(step, this.log.line(), this.log.offset());
      if (this.walk !== walk || this.closed) return;
      const where = walk.whole ? `${walk.at + 1} of ${walk.matches.length}` : `line ${match?.[0]}`;
      say(this.found, match ? where : 'Not found');
      if (!match) return;
      this.log.mark([match[0], match[0]]);
      await this.log.goTo(...match);
    } catch (error) {
      if (this.walk === walk) say(this.found, error.message);
    } finally {
      walk.busy = false;
    }
  }

  #toggle() {
    const times = this.times.getAttribute('aria-pressed') !== 'true';
    this.times.setAttribute('aria-pressed', String(times));
    this.log.showTimes(times);
  }

  // Copy the selection, else the lines in the address, else the whole output or its end.
  async #copy() {
    try {
      const [text, what] = await this.#toCopy();
      const done = await copy(text);
      say(this.copied, done ? what : 'The browser did not allow copying');
    } catch (error) {
      say(this.copied, error.message);
    }
    setTimeout(() => say(this.copied, ''), 4000);
  }

  async #toCopy() {
    const selected = await this.log.selection(COPIED);
    const text = selected ?? (this.picked && await this.log.text(this.picked, COPIED));
    if (text !== null) {
      const what = selected === null ? 'the marked lines' : 'the selection';
      return [text, text.length < COPIED ? `Copied ${what}` : `Copied the first 1 MB of ${what}`];
    }
    const terminal = new Terminal(1, true);
    terminal.feed(await askText(`/task/${this.id}/log?tail=${COPIED}`), 'stdout', 0);
    terminal.flush();
    const whole = this.#bytes() <= COPIED;
    // Unless the text is whole, its first line is incomplete.
    const rows = whole ? terminal.rows : terminal.rows.filter((row) => terminal.rows[0] !== row);
    // By moving the cursor, a program can make many characters out of few bytes.
    const copied = joined(rows, 8 * COPIED);
    const all = whole && copied.length < 8 * COPIED;
    return [copied, all ? 'Copied all' : 'Copied the last 1 MB. Use Download for all of it'];
  }

  // -- kill

  #askKill() {
    const { task } = this;
    const error = el('p', { role: 'alert' });
    const dialog = el('dialog', { class: 'ask', 'aria-labelledby': 'kill-title' },
      el('form', {
        method: 'dialog',
        onsubmit: async (event) => {
          event.preventDefault();
          const button = event.target.querySelector('.danger');
          button.disabled = true;
          try {
            this.#show(await post(`/task/${task.id}/kill?output=none`));
            dialog.close();
          } catch (problem) {
            say(error, problem.message);
            button.disabled = false;
          }
        },
      },
      el('h2', { id: 'kill-title' }, `Kill ${task.app} on ${task.env}?`),
      el('p', {}, badge(task), ` #${task.id} ${task.action}: all its processes get a request to end. Those that do not end are killed.`),
      error,
      el('div', { class: 'buttons' },
        el('button', { type: 'button', onclick: () => dialog.close(), autofocus: true }, 'Keep it running'),
        el('button', { class: 'danger' }, `Kill ${task.app} on ${task.env}`))));
    dialog.addEventListener('close', () => {
      dialog.remove();
      if (this.kill.hidden && !this.closed) this.name.focus();
    });
    document.body.append(dialog);
    dialog.showModal();
  }
}

async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    // Without TLS, browsers offer only the old way to use the clipboard.
    const focus = document.activeElement;
    const area = el('textarea', { value: text, class: 'unseen', 'aria-hidden': 'true' });
    document.body.append(area);
    area.select();
    const done = document.execCommand('copy');
    area.remove();
    focus?.focus();
    return done;
  }
}
