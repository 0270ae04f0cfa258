// Shows the output of a task, of any size: only the rows around what is seen are elements,
// only some of the text is kept, the rest is asked for again by its place in bytes.
//
// The output is a row of segments of about 64 KiB, each with the number of its first line.
// The daemon knows where they begin; the last one, the tail, grows with the stream.

import { Stream, ask } from './api.js';
import { el, exact } from './format.js';
import { MAX_ROW, Terminal } from './terminal.js';

const SMALL = 1 << 16; // bytes of output up to which all of it is the tail
const TAIL = 1 << 17; // bytes from which on the tail is cut, and a new one begun
const LOADED = 50000; // rows that are kept, beside those that are seen
const BEFORE = 120; // rows that are elements above what is seen
const AFTER = 240; // and from there on
const TALLEST = 6e6; // pixels; browsers cannot show much more than twice that
const BEHIND = 4e6; // bytes that the stream may be behind; more is skipped
const LOOK = 2000; // milliseconds between two looks at whether it is
const IDLE = 250; // milliseconds after which scrolling is over

const encoder = new TextEncoder();

export class Log {
  // `tells` has: follow(following), away(problem), state(task), end(task), grown(lines).
  constructor(id, scroller, tells) {
    this.id = id;
    this.scroller = scroller;
    this.tells = tells;
    this.above = el('div', { class: 'space' });
    this.body = el('div', { class: 'rows' });
    this.below = el('div', { class: 'space' });
    scroller.replaceChildren(this.above, this.body, this.below);
    this.segments = [];
    this.following = true;
    this.nodes = new Map();
    this.range = null; // the rows that are elements: {first: [segment, row], last: …}
    this.marked = null; // [first, last] of the lines that the address names
    this.query = '';
    this.times = false;
    this.settled = 0; // index of the segment up to which the daemon has said where they are
    this.size = 0; // bytes of the output, as far as we have heard
    this.cut = null; // what was cut out of its middle
    this.turn = 0; // grows whenever one goes somewhere: what was on the way there gives up
    this.known = 0; // where the last scroll event, or we, have left the scroller
    this.rowHeight = 20;
    this.uses = 0;
    this.stops = [];
    const listen = (target, name, hear, passive = true) => {
      target.addEventListener(name, hear, { passive });
      this.stops.push(() => target.removeEventListener(name, hear));
    };
    listen(scroller, 'scroll', () => this.#scrolled());
    listen(scroller, 'wheel', (event) => { if (event.deltaY < 0) this.#leave(); });
    listen(scroller, 'keydown', (event) => {
      if (['ArrowUp', 'PageUp'].includes(event.key)) this.#leave();
      // The browser would roll there, and end where the rows on the way are made.
      const go = { Home: () => this.top(), End: () => this.resume() }[event.key];
      if (!go || event.target !== scroller) return;
      event.preventDefault();
      go();
    }, false);
    listen(scroller, 'touchmove', () => { this.touched = performance.now(); });
    const observer = new ResizeObserver(() => this.#schedule());
    observer.observe(scroller);
    this.stops.push(() => observer.disconnect());
    const looks = setInterval(() => this.#look(), LOOK);
    this.stops.push(() => clearInterval(looks));
  }

  // Begin, at the end or at a line. `task` is the task as it is now.
  async open(task, line = null) {
    if (task.outputSize > SMALL) await this.#index(0);
    else this.segments = [segment(0, 1, true)];
    if (this.closed) return;
    this.#follow();
    if (line) await this.goTo(line);
    else this.#schedule();
  }

  close() {
    this.closed = true;
    this.stream?.close();
    this.stops.forEach((stop) => stop());
    clearTimeout(this.idle);
  }

  // -- what is known of the output

  async #index(from) {
    let next = from;
    let found = this.segments;
    while (next !== null && !this.closed) {
      const answer = await ask(`/task/${this.id}/lines?from=${next}`);
      const first = answer.segments[0]?.[0] ?? 0;
      found = found.filter((one) => one.start < first);
      for (const [start, line, begins] of answer.segments) {
        found.push(segment(start, line, Boolean(begins)));
      }
      next = answer.nextFrom;
      this.cut = answer.cut;
      this.size = Math.max(this.size, answer.size);
    }
    if (this.closed) return;
    this.segments = found.length ? found : [segment(0, 1, true)];
    this.settled = Math.max(0, found.length - 1);
  }

  get tail() { return this.segments.at(-1); }

  // Read the tail as it grows: from its begin to the end of the task.
  #follow() {
    const { tail } = this;
    tail.terminal = new Terminal(tail.line, tail.begins);
    tail.terminal.style = this.segments.at(-2)?.after ?? tail.terminal.style;
    tail.rows = tail.terminal.rows;
    this.stream?.close();
    const url = `/task/${this.id}/events?times=1&offset=${tail.start}`;
    this.stream = new Stream(url, `/task/${this.id}?output=none`, {
      output: (event) => this.#hear(event),
      state: (task) => this.tells.state(task),
      end: (task) => {
        this.stream.close();
        this.tail.terminal.flush();
        this.#schedule();
        this.tells.end(task);
      },
    }, (problem) => this.tells.away(problem));
  }

  #hear({ offset, stream, text, at = 0 }) {
    this.size = Math.max(this.size, offset + encoder.encode(text).length);
    const { tail } = this;
    const full = offset - tail.start + text.length > TAIL;
    const cut = full ? text.lastIndexOf('\n') + 1 : 0;
    // What is not UTF-8 has another length here than there: cut at the begin of the piece.
    const exactly = cut > 0 && !text.slice(0, cut).includes('\ufffd');
    if (full && exactly) {
      tail.terminal.feed(text.slice(0, cut), stream, at);
      this.#begin(offset + encoder.encode(text.slice(0, cut)).length);
      text = text.slice(cut);
    } else if (full && (tail.terminal.fresh || offset - tail.start > 4 * TAIL)) {
      if (offset > tail.start) this.#begin(offset);
    }
    this.tail.terminal.feed(text, stream, at);
    this.tells.grown(this.lines);
    if (this.wanted && this.lines >= this.wanted.line) {
      const { line, y } = this.wanted;
      this.wanted = null;
      this.#show(line, y, this.turn).catch(() => {});
    } else {
      this.#schedule();
    }
  }

  // Begin a new tail at a byte.
  #begin(start) {
    const { terminal } = this.tail;
    const made = segment(start, terminal.line, terminal.fresh);
    this.tail.after = terminal.style;
    this.tail.terminal = null;
    made.terminal = new Terminal(terminal.line, terminal.fresh);
    made.terminal.style = terminal.style;
    made.terminal.held = terminal.held;
    made.rows = made.terminal.rows;
    this.segments.push(made);
    this.#evict();
  }

  // Now and then: whether more comes than a browser can read, or the network can bring; and
  // whether something was cut out of the middle, behind which lines have other numbers now.
  async #look() {
    const { tail, size } = this;
    if (this.skipping || !tail?.terminal || size <= SMALL || size === this.looked) return;
    this.looked = size;
    let answer;
    try {
      answer = await ask(`/task/${this.id}/lines?from=${tail.start}`);
    } catch {
      return; // it is away, which the stream will find out
    }
    if (this.closed || this.skipping) return;
    if (String(answer.cut) !== String(this.cut)) await this.#skip(0);
    else if (answer.size - size > BEHIND) await this.#skip(this.segments[this.settled].start);
  }

  // Ask where the lines are from a byte on, and follow from the end of it.
  async #skip(from) {
    this.skipping = true;
    this.stream.close();
    const [old, cut] = [this.segments, String(this.cut)];
    try {
      await this.#index(from);
    } catch {
      // The stream goes on where the segments end, and comes back by itself.
    }
    this.skipping = false;
    if (this.closed) return;
    const seen = this.following ? null : this.#seen();
    if (seen && cut !== String(this.cut)) {
      // Lines have other numbers now; places in bytes are what they were.
      const had = old.findLast((one) => one.line <= seen.line) ?? old[0];
      const has = this.segments.findLast((one) => one.start <= had.start);
      seen.line += has.line - had.line;
    }
    this.#go();
    this.#follow();
    if (seen) await this.#show(seen.line, seen.y, this.turn).catch(() => {});
    else this.#schedule();
  }

  // The first line on the screen; 0 if there is none, or the end is followed.
  line() { return this.following ? 0 : this.#seen()?.line ?? 0; }

  // The first line on the screen, and where it is.
  #seen() {
    const top = this.scroller.getBoundingClientRect().top;
    let line = 0;
    for (const node of this.body.children) {
      const box = node.getBoundingClientRect();
      line = Number(node.firstChild.dataset.n) || line;
      if (box.bottom > top && line) return { line, y: box.top - top };
    }
    return null;
  }

  // One goes somewhere else: what was waited for is no longer wanted.
  #go() {
    this.turn += 1;
    this.pending = null;
    this.wanted = null;
    this.range = null;
    this.scroller.classList.remove('loading');
  }

  // The number of lines, as far as it is known.
  get lines() {
    const { tail } = this;
    if (!tail) return 0;
    if (!tail.terminal) return tail.line - 1;
    return tail.terminal.line - (tail.terminal.fresh ? 1 : 0);
  }

  #count(index) {
    const one = this.segments[index];
    if (one.rows) return one.rows.length;
    if (one.start === this.cut?.[0]) return 2;
    const next = this.segments[index + 1];
    return Math.max(1, next.line - one.line, Math.ceil((next.start - one.start) / MAX_ROW));
  }

  async #load(index) {
    const one = this.segments[index];
    one.used = this.uses += 1;
    if (one.rows) return;
    one.loading ??= this.#fetch(one, this.segments[index + 1].start, index);
    await one.loading;
  }

  async #fetch(one, end, index) {
    const terminal = new Terminal(one.line, one.begins);
    terminal.style = this.segments[index - 1]?.after ?? terminal.style;
    try {
      for (let at = one.start; at < end && !this.closed;) {
        const answer = await ask(`/task/${this.id}/pieces?offset=${at}&end=${end}`);
        for (const [stream, since, text] of answer.pieces) {
          terminal.feed(text, stream, answer.began ? answer.began * 1000 + since : 0);
        }
        if (answer.nextOffset <= at) break;
        at = answer.nextOffset;
      }
      terminal.flush();
      one.rows = terminal.rows;
      one.after = terminal.style;
      this.#evict();
    } finally {
      one.loading = null;
    }
  }

  // Forget the text of what was not looked at for longest.
  #evict() {
    const [first, last] = this.range ? [this.range.first[0], this.range.last[0]] : [0, -1];
    const loaded = this.segments.slice(0, -1)
      .filter((one, index) => one.rows && !(index >= first && index <= last));
    loaded.sort((a, b) => b.used - a.used);
    let rows = 0;
    for (const one of loaded) {
      rows += one.rows.length;
      if (rows > LOADED) one.rows = null;
    }
  }

  // -- what is shown

  #schedule() {
    this.frame ??= requestAnimationFrame(() => {
      this.frame = null;
      if (this.closed || !this.segments.length) return;
      if (this.following) this.#render(this.#endAnchor());
      else this.#render(this.#anchor());
    });
  }

  // The row at the top of what is seen, and how far below the top it is.
  #anchor() {
    const top = this.scroller.scrollTop;
    const nodes = this.body.children;
    if (this.range && nodes.length) {
      let [low, high] = [0, nodes.length - 1];
      const base = this.body.offsetTop;
      while (low < high) {
        const middle = (low + high) >> 1;
        const node = nodes[middle];
        if (base + node.offsetTop + node.offsetHeight > top) high = middle; else low = middle + 1;
      }
      const [s, r] = this.#step(this.range.first, low);
      return { s, r, y: base + nodes[low].offsetTop - top };
    }
    const [s, r] = this.#at(top / this.#scale());
    return { s, r, y: 0 };
  }

  #endAnchor() {
    const s = this.segments.length - 1;
    const empty = !this.segments[s].rows.length && s > 0;
    const last = empty ? s - 1 : s;
    return { s: last, r: Math.max(0, this.#count(last) - 1), y: 0, end: true };
  }

  #total() {
    let total = 0;
    for (let i = 0; i < this.segments.length; i += 1) total += this.#count(i);
    return total;
  }

  // Pixels for a row that is no element.
  #scale() { return Math.min(this.rowHeight, TALLEST / Math.max(1, this.#total())); }

  #at(number) {
    let left = Math.max(0, Math.floor(number));
    for (let s = 0; s < this.segments.length; s += 1) {
      const count = this.#count(s);
      if (left < count) return [s, left];
      left -= count;
    }
    const { s, r } = this.#endAnchor();
    return [s, r];
  }

  #number([s, r]) {
    for (let i = 0; i < s; i += 1) r += this.#count(i);
    return r;
  }

  // Some rows on from a place, over the borders of segments.
  #step([s, r], rows) {
    r += rows;
    while (r >= this.#count(s) && s < this.segments.length - 1) { r -= this.#count(s); s += 1; }
    return [s, r];
  }

  #lineOf({ s, r }) {
    const { rows, line } = this.segments[s];
    for (let i = Math.min(r, (rows?.length ?? 0) - 1); i >= 0; i -= 1) {
      if (rows[i].number) return rows[i].number;
    }
    return line;
  }

  // Make elements of the rows around a place, which stays where it is on the screen.
  #render(anchor) {
    const { scroller } = this;
    let { s, r } = anchor;
    if (!this.segments[s].rows) {
      this.#await(anchor);
      return;
    }
    // What was waited for is no longer where one is.
    this.pending = null;
    scroller.classList.remove('loading');
    r = Math.min(r, Math.max(0, this.segments[s].rows.length - 1));
    const [rows, index, first] = this.#around(s, r, anchor.end ? AFTER : BEFORE);
    const before = scroller.scrollTop;
    this.#fill(rows);
    scroller.style.setProperty('--digits', Math.max(3, String(this.lines).length));
    if (rows.length && !this.measured) {
      this.rowHeight = this.body.firstChild.offsetHeight || 20;
      this.measured = true;
    }
    this.range = { first, last: this.#step(first, Math.max(0, rows.length - 1)) };
    const node = this.body.children[index];
    const scale = this.#scale();
    const over = node ? node.offsetTop : 0; // heights of the elements above the place
    const number = this.#number(first);
    const place = before + anchor.y - over;
    const fits = number === 0 ? place === 0 : place > 0;
    const space = anchor.end || anchor.jump || !fits ? number * scale : place;
    this.above.style.height = `${space}px`;
    const left = this.#total() - number - rows.length;
    this.below.style.height = `${Math.max(0, left * scale)}px`;
    if (anchor.end) scroller.scrollTop = scroller.scrollHeight;
    else if (space !== place) scroller.scrollTop = space + over - anchor.y;
    this.known = scroller.scrollTop;
    this.#want();
  }

  // The rows around a place as far as they are loaded; which of them it is; where they begin.
  #around(s, r, before) {
    const rows = [];
    let [a, i] = [s, r];
    while (rows.length < before) {
      if (i === 0) {
        if (a === 0 || !this.segments[a - 1].rows) break;
        a -= 1;
        i = this.segments[a].rows.length;
        continue;
      }
      i -= 1;
      rows.unshift(this.segments[a].rows[i]);
    }
    const index = rows.length;
    const first = [a, i];
    for (let [b, j] = [s, r]; rows.length < index + AFTER;) {
      const found = this.segments[b].rows;
      if (j < found.length) { rows.push(found[j]); j += 1; continue; }
      if (b + 1 >= this.segments.length || !this.segments[b + 1].rows) break;
      b += 1;
      j = 0;
    }
    return [rows, index, first];
  }

  #fill(rows) {
    const wanted = new Set(rows);
    for (const [row, node] of this.nodes) {
      // Rows that may have changed are made again.
      if (!wanted.has(row) || node.open) {
        node.remove();
        this.nodes.delete(row);
      }
    }
    let place = this.body.firstChild;
    for (const row of rows) {
      let node = this.nodes.get(row);
      if (node && node === place) { place = place.nextSibling; continue; }
      if (!node) {
        node = this.#element(row);
        node.open = row === this.tail.terminal?.row || row === this.tail.rows?.at(-1);
        this.nodes.set(row, node);
      }
      this.body.insertBefore(node, place);
    }
  }

  #element(row) {
    const text = el('span', { class: 't' });
    let error = false;
    let hit = false;
    for (const [piece, look, stderr] of row.pieces()) {
      error ||= stderr;
      for (const [part, found] of this.#split(piece)) {
        hit ||= found;
        const plain = look.classes === '' && !look.fg && !look.bg && !stderr && !found;
        if (plain) { text.append(part); continue; }
        const span = el(found ? 'mark' : 'span',
          { class: stderr ? `${look.classes} e` : look.classes || null }, part);
        if (look.fg) span.style.color = look.fg;
        if (look.bg) span.style.backgroundColor = look.bg;
        text.append(span);
      }
    }
    const { number } = row;
    const classes = ['row'];
    if (error) classes.push('err');
    if (hit) classes.push('hit');
    if (this.marked && number >= this.marked[0] && number <= this.marked[1]) classes.push('marked');
    const node = el('div', { class: classes.join(' ') });
    node.append(el('a', number
      ? { class: 'n', href: `#L${number}`, 'data-n': number, tabindex: -1, 'aria-label': `Line ${number}` }
      : { class: 'n', 'aria-hidden': 'true' }));
    if (this.times) {
      const moment = row.at ? new Date(row.at) : null;
      node.append(el('time', { class: 'at', datetime: moment?.toISOString(), title: moment && exact(moment) },
        moment ? clock(moment) : ''));
    }
    node.append(text);
    return node;
  }

  #split(text) {
    if (!this.query) return [[text, false]];
    const parts = [];
    const folded = text.toLowerCase();
    let from = 0;
    // A text whose small letters have another length is not marked; it is found all the same.
    while (folded.length === text.length) {
      const at = folded.indexOf(this.query, from);
      if (at < 0) break;
      if (at > from) parts.push([text.slice(from, at), false]);
      from = at + this.query.length;
      parts.push([text.slice(at, from), true]);
    }
    if (from < text.length) parts.push([text.slice(from), false]);
    return parts;
  }

  // A place whose text is not here yet: leave room for it, and show it when it comes.
  #await(anchor) {
    this.pending = anchor;
    this.range = null;
    this.#fill([]);
    const scale = this.#scale();
    this.above.style.height = `${this.#number([anchor.s, anchor.r]) * scale}px`;
    this.below.style.height = `${Math.max(this.scroller.clientHeight, (this.#total() - this.#number([anchor.s, anchor.r])) * scale)}px`;
    this.known = this.scroller.scrollTop;
    const one = this.segments[anchor.s];
    this.scroller.classList.add('loading');
    this.#load(anchor.s).then(() => {
      if (this.pending !== anchor || this.closed) return;
      this.pending = null;
      const s = this.segments.indexOf(one);
      if (s < 0) return;
      if (anchor.line) anchor.r = Math.max(0, one.rows.findIndex((row) => row.number === anchor.line));
      this.scroller.classList.remove('loading');
      // The end may be elsewhere by now.
      this.#render(anchor.end ? this.#endAnchor() : { ...anchor, s, jump: true });
    }, () => setTimeout(() => {
      if (this.pending === anchor && !this.closed) this.#await(anchor);
    }, 1000));
  }

  // Load the neighbours of what is shown before they are needed.
  #want() {
    const { first, last } = this.range;
    for (const [s, near] of [[first[0] - 1, first[1] < BEFORE],
      [last[0] + 1, last[1] + AFTER > this.#count(last[0])]]) {
      const one = this.segments[s];
      if (near && one && !one.rows && !one.loading) {
        this.#load(s).then(() => this.#schedule(), () => {});
      }
    }
    for (let s = first[0]; s <= last[0]; s += 1) this.segments[s].used = this.uses += 1;
  }

  #leave() {
    if (!this.following || this.scroller.scrollHeight <= this.scroller.clientHeight) return;
    this.following = false;
    this.tells.follow(false);
  }

  #scrolled() {
    const { scroller } = this;
    const top = scroller.scrollTop;
    // It was us.
    if (Math.abs(top - this.known) < 1 || !this.segments.length) return;
    this.wanted = null;
    this.turn += 1;
    const bottom = scroller.scrollHeight - scroller.clientHeight;
    const up = top < this.known - 1;
    this.known = top;
    if (up) this.#leave();
    const atEnd = bottom - top < 4;
    if (atEnd && !up && !this.following) {
      this.resume();
      return;
    }
    if (this.following) return;
    clearTimeout(this.idle);
    this.idle = setTimeout(() => this.#settle(), IDLE);
    const height = scroller.clientHeight;
    const start = this.body.offsetTop;
    const end = start + this.body.offsetHeight;
    if (this.range && top >= start - height && top <= end) {
      const more = (top - start < height && this.#number(this.range.first) > 0)
        || (end - top < 2 * height && end < scroller.scrollHeight - 1);
      if (more) this.#render(this.#anchor());
      return;
    }
    // Far away, as by dragging the bar: the place says which row.
    const [s, r] = this.#at(top / this.#scale());
    this.range = null;
    this.#render({ s, r, y: 0, jump: true });
  }

  // Scrolling is over: let the bar say where we are.
  #settle() {
    if (this.closed || this.following || !this.range) return;
    if (performance.now() - (this.touched ?? -1e9) < 2 * IDLE) {
      this.idle = setTimeout(() => this.#settle(), 2 * IDLE);
      return;
    }
    const is = this.above.offsetHeight;
    const should = this.#number(this.range.first) * this.#scale();
    if (Math.abs(is - should) < 2 * this.scroller.clientHeight) return;
    this.above.style.height = `${should}px`;
    this.scroller.scrollTop += should - is;
    this.known = this.scroller.scrollTop;
  }

  // -- what one can do with it

  // Follow the end again.
  resume() {
    this.#go();
    this.following = true;
    this.tells.follow(true);
    this.#schedule();
  }

  top() {
    this.#stay();
    this.scroller.scrollTop = 0;
    this.#render({ s: 0, r: 0, y: 0, jump: true });
  }

  // Show a line in the upper third; of a long one the part that has what is searched for,
  // if it is known at which byte that is.
  async goTo(line, offset = null) {
    this.#stay();
    await this.#show(line, this.scroller.clientHeight / 3, this.turn, offset);
  }

  #stay() {
    this.#go();
    this.following = false;
    this.tells.follow(false);
  }

  // The segment in which a line begins.
  #holds(line) {
    let s = Math.max(0, this.segments.findLastIndex((one) => one.line <= line));
    while (s > 0 && this.segments[s].line === line && !this.segments[s].begins) s -= 1;
    return s;
  }

  async #show(line, y, turn, offset = null) {
    let s = this.#holds(line);
    if (offset !== null) {
      const at = this.segments.findLastIndex((one) => one.start <= offset);
      if (at > s && this.segments[at].line <= line) s = at;
    }
    await this.#load(s);
    const { rows, begins } = this.segments[s] ?? {};
    if (turn !== this.turn || this.closed || !rows) return;
    let r = rows.findIndex((row) => row.number === line);
    if (r < 0 && !begins && this.segments[s].line === line) r = 0;
    // It may still come.
    if (r < 0 && this.segments[s] === this.tail) this.wanted = { line, y };
    if (r < 0) r = Math.max(0, rows.length - 1);
    if (offset !== null && this.query) {
      let to = r + 1;
      while (to < rows.length && !rows[to].number) to += 1;
      const found = rows.slice(r, to).findIndex((row) => row.plain().toLowerCase().includes(this.query));
      r += Math.max(0, found);
    }
    this.range = null;
    this.#render({ s, r, y, jump: true });
  }

  mark(lines) {
    this.marked = lines;
    this.#again();
  }

  find(text) {
    this.query = text.toLowerCase();
    this.#again();
  }

  showTimes(times) {
    this.times = times;
    this.#again();
  }

  // Make all elements anew.
  #again() {
    const anchor = this.range && !this.following ? this.#anchor() : null;
    this.nodes.forEach((node) => node.remove());
    this.nodes.clear();
    if (anchor) this.#render(anchor); else this.#schedule();
  }

  // The text of some lines, up to a bound of characters.
  async text([from, to], most) {
    let found = '';
    for (let s = this.#holds(from); s < this.segments.length && this.segments[s].line <= to; s += 1) {
      await this.#load(s);
      let line = this.segments[s].line;
      for (const row of this.segments[s].rows) {
        line = row.number || line;
        if (line < from || line > to) continue;
        found += (row.number && found ? '\n' : '') + row.plain();
        if (found.length > most) return found.slice(0, most);
      }
    }
    return found;
  }
}

function segment(start, line, begins) {
  return { start, line, begins, rows: null, after: null, loading: null, used: 0, terminal: null };
}

function clock(moment) {
  const two = (n, width = 2) => String(n).padStart(width, '0');
  return `${two(moment.getHours())}:${two(moment.getMinutes())}:${two(moment.getSeconds())}.${two(moment.getMilliseconds(), 3)}`;
}
