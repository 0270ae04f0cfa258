// Shows the output of a task. Only the rows near the visible part are elements.

import { el, exact } from './format.js';
import { Output } from './output.js';
import { MAX_PIECES } from './terminal.js';

const BEFORE = 120; // rows above the first visible row that are elements
const AFTER = 240; // rows from there on that are elements
const SPANS = 20000; // elements for styles and matches; the nearest rows get them
const TALLEST = 6e6; // pixels; browsers cannot show much more than twice as many
const IDLE = 250; // milliseconds without a scroll event, after which scrolling is over

// A place is {s, r, y}: the row r of the segment s, y pixels below the top of the visible
// part. With `end` it is the last row, at the bottom.
export class Log {
  // `tells` has: follow(following), grown(lines), state(task), end(task), away(problem).
  constructor(id, scroller, tells) {
    this.scroller = scroller;
    this.tells = tells;
    this.output = new Output(id, {
      ...tells,
      grown: () => this.#grown(),
      shown: () => (this.range ? [this.range.first[0], this.range.last[0]] : [0, -1]),
      seen: () => (this.following ? null : this.#seen()),
      anew: (seen) => this.#anew(seen),
    });
    this.above = el('div', { class: 'space' });
    this.body = el('div', { class: 'rows' });
    this.below = el('div', { class: 'space' });
    scroller.replaceChildren(this.above, this.body, this.below);
    this.following = true;
    this.nodes = new Map();
    this.short = false; // whether some elements lack their styles
    this.range = null; // the rows that are elements: {first: [segment, row], last: …}
    this.marked = null; // the first and the last line in the address
    this.query = '';
    this.times = false;
    this.turn = 0; // grows with each jump, so that earlier jumps in progress give up
    this.went = -1e9; // the time of the last jump
    this.showing = 0; // the number of jumps in progress
    this.known = 0; // the scroll position after the last event, or as set by this class
    this.rowHeight = 20;
    this.stops = [];
    this.#listen();
  }

  #listen() {
    const { scroller } = this;
    const listen = (target, name, hear, passive = true) => {
      target.addEventListener(name, hear, { passive });
      this.stops.push(() => target.removeEventListener(name, hear));
    };
    listen(scroller, 'scroll', () => this.#scrolled());
    listen(scroller, 'wheel', (event) => { if (event.deltaY < 0) this.#leave(); });
    listen(scroller, 'keydown', (event) => {
      if (['ArrowUp', 'PageUp'].includes(event.key)) this.#leave();
      // The browser would scroll smoothly, and stop where rows on the way become elements.
      const go = { Home: () => this.top(), End: () => this.resume() }[event.key];
      if (!go || event.target !== scroller) return;
      event.preventDefault();
      go();
    }, false);
    listen(scroller, 'touchmove', () => { this.touched = performance.now(); });
    listen(document, 'selectionchange', () => this.#selected());
    const observer = new ResizeObserver(() => this.#schedule());
    observer.observe(scroller);
    this.stops.push(() => observer.disconnect());
  }

  // Show the output, at the end or at a line. `task` is the present state of the task.
  async open(task, line = null) {
    await this.output.open(task.outputSize);
    if (this.closed) return;
    if (line) await this.goTo(line);
    else this.#schedule();
  }

  close() {
    this.closed = true;
    this.output.close();
    this.stops.forEach((stop) => stop());
    clearTimeout(this.idle);
  }

  get lines() { return this.output.lines; }

  get size() { return this.output.size; }

  get empty() { return this.lines === 0 && !this.output.tail?.rows?.length; }

  text(lines, most) { return this.output.text(lines, most); }

  // -- output that arrives

  #grown() {
    this.tells.grown(this.lines);
    if (this.wanted && this.lines >= this.wanted.line) {
      const { line, y } = this.wanted;
      this.wanted = null;
      this.#show(line, y, this.turn).catch(() => {});
    } else {
      this.#schedule();
    }
  }

  #anew(seen) {
    this.#go();
    if (seen) this.#show(seen.line, seen.y, this.turn).catch(() => {});
    else this.#schedule();
  }

  // The number of the first line on the screen, 0 if there is none.
  seen() { return this.#seen()?.line ?? 0; }

  // The line where a search begins: the first visible one, or the top when following.
  line() { return this.following ? 0 : this.seen(); }

  // The first byte of the segment that holds this line.
  offset() {
    const { output } = this;
    return output.segments[output.holds(this.line())]?.start ?? 0;
  }

  // The first line on the screen, and its position.
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

  // Begin a jump, and give up an earlier one that is still in progress.
  #go() {
    this.turn += 1;
    this.went = performance.now();
    this.pending = null;
    this.wanted = null;
    this.range = null;
    this.scroller.classList.remove('loading');
  }

  // -- rendering

  #schedule() {
    this.frame ??= requestAnimationFrame(() => {
      this.frame = null;
      if (this.closed || !this.output.tail?.rows) return;
      this.#render(this.following ? this.#endPlace() : this.#place());
    });
  }

  // The first visible row.
  #place() {
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

  #endPlace() {
    let s = this.output.segments.length - 1;
    while (s > 0 && this.output.count(s) === 0) s -= 1;
    return { s, r: Math.max(0, this.output.count(s) - 1), y: 0, end: true };
  }

  // The height in pixels of a row that is not an element.
  #scale() { return Math.min(this.rowHeight, TALLEST / Math.max(1, this.output.total)); }

  #at(number) {
    let left = Math.max(0, Math.floor(number));
    for (let s = 0; s < this.output.segments.length; s += 1) {
      const count = this.output.count(s);
      if (left < count) return [s, left];
      left -= count;
    }
    const { s, r } = this.#endPlace();
    return [s, r];
  }

  #number([s, r]) {
    for (let i = 0; i < s; i += 1) r += this.output.count(i);
    return r;
  }

  // The place some rows further on, also in another segment.
  #step([s, r], rows) {
    r += rows;
    while (r >= this.output.count(s) && s < this.output.segments.length - 1) { r -= this.output.count(s); s += 1; }
    return [s, r];
  }

  // Make elements of the rows around a place, without moving it on the screen.
  #render(place) {
    const { scroller } = this;
    const { segments, total } = this.output;
    const { s } = place;
    if (!segments[s].rows) {
      this.#await(place);
      return;
    }
    // The rows that were being loaded are for an earlier place.
    this.pending = null;
    scroller.classList.remove('loading');
    const r = Math.min(place.r, Math.max(0, segments[s].rows.length - 1));
    const [rows, index, first] = this.#around(s, r, place.end ? AFTER : BEFORE);
    const before = scroller.scrollTop;
    this.#fill(rows, index);
    scroller.style.setProperty('--digits', Math.max(3, String(this.lines).length));
    if (rows.length && !this.measured) {
      this.rowHeight = this.body.firstChild.offsetHeight || 20;
      this.measured = true;
    }
    this.range = { first, last: this.#step(first, Math.max(0, rows.length - 1)) };
    const node = this.body.children[index];
    const scale = this.#scale();
    const over = node ? node.offsetTop : 0; // the height of the elements above the place
    const number = this.#number(first);
    const room = before + place.y - over;
    const fits = number === 0 ? room === 0 : room > 0;
    const space = place.end || place.jump || !fits ? number * scale : room;
    this.above.style.height = `${space}px`;
    this.below.style.height = `${Math.max(0, total - number - rows.length) * scale}px`;
    if (place.end) scroller.scrollTop = scroller.scrollHeight;
    else if (space !== room) scroller.scrollTop = space + over - place.y;
    this.known = scroller.scrollTop;
    this.#want();
  }

  // The loaded rows around a place, the index of the place among them, and where they
  // begin.
  #around(s, r, before) {
    const { segments } = this.output;
    const rows = [];
    let [a, i] = [s, r];
    while (rows.length < before) {
      if (i === 0) {
        if (a === 0 || !segments[a - 1].rows) break;
        a -= 1;
        i = segments[a].rows.length;
        continue;
      }
      i -= 1;
      rows.push(segments[a].rows[i]);
    }
    rows.reverse();
    const index = rows.length;
    const first = [a, i];
    for (let [b, j] = [s, r]; rows.length < index + AFTER;) {
      const found = segments[b].rows;
      if (j < found.length) { rows.push(found[j]); j += 1; continue; }
      if (b + 1 >= segments.length || !segments[b + 1].rows) break;
      b += 1;
      j = 0;
    }
    return [rows, index, first];
  }

  // Make these rows the elements. Styles are limited in number, so the rows nearest to the
  // reader's row get them first, and rows below it before rows above it.
  #fill(rows, index = 0) {
    const wanted = new Set(rows);
    for (const [row, node] of this.nodes) {
      // Make rows that can have changed again.
      if (!wanted.has(row) || node.open) {
        node.remove();
        this.nodes.delete(row);
      }
    }
    const { tail } = this.output;
    const distance = (place) => (place < index ? 2 * (index - place) : place - index);
    let left = SPANS;
    for (const place of [...rows.keys()].sort((a, b) => distance(a) - distance(b))) {
      const row = rows[place];
      const most = Math.min(MAX_PIECES, left);
      let node = this.nodes.get(row);
      if (!node || node.spans > most || (node.spans === node.most && node.most < most)) {
        node?.remove();
        node = this.#element(row, most);
        node.open = row === tail.terminal?.row || row === tail.rows?.at(-1);
        this.nodes.set(row, node);
      }
      left -= node.spans;
    }
    this.short = left < MAX_PIECES;
    let next = this.body.firstChild;
    for (const row of rows) {
      const node = this.nodes.get(row);
      if (node === next) next = next.nextSibling;
      else this.body.insertBefore(node, next);
    }
  }

  // The element of a row, with at most `most` elements for styles and matches.
  #element(row, most) {
    const text = el('span', { class: 't' });
    let error = false;
    let spans = 0;
    for (const [piece, look, stderr] of row.pieces()) {
      error ||= stderr;
      for (const [part, found] of this.#split(piece, most - spans)) {
        const plain = look.classes === '' && !stderr && !found;
        if (plain || spans >= most) { text.append(part); continue; }
        spans += 1;
        const span = el(found ? 'mark' : 'span',
          { class: stderr ? `${look.classes} e` : look.classes || null }, part);
        if (look.fg) span.style.setProperty('--fg', look.fg);
        if (look.bg) span.style.setProperty('--bg', look.bg);
        text.append(span);
      }
    }
    const { number } = row;
    const classes = ['row'];
    if (error) classes.push('err');
    if (this.#isMarked(row)) classes.push('marked');
    const node = el('div', { class: classes.join(' ') });
    node.row = row;
    node.spans = spans;
    node.most = most;
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

  // The text, cut where matches of the search begin and end, at most `most` times.
  #split(text, most) {
    if (!this.query) return [[text, false]];
    const parts = [];
    const folded = fold(text);
    let from = 0;
    for (let left = most; left > 0; left -= 1) {
      const at = folded.indexOf(this.query, from);
      if (at < 0) break;
      if (at > from) parts.push([text.slice(from, at), false]);
      from = at + this.query.length;
      parts.push([text.slice(at, from), true]);
    }
    if (from < text.length) parts.push([text.slice(from), false]);
    return parts;
  }

  // Leave space for a place whose rows are not loaded yet, and show it once they are.
  #await(place) {
    const { output, scroller } = this;
    this.pending = place;
    this.range = null;
    this.#fill([]);
    const scale = this.#scale();
    const number = this.#number([place.s, place.r]);
    this.above.style.height = `${number * scale}px`;
    this.below.style.height = `${Math.max(scroller.clientHeight, (output.total - number) * scale)}px`;
    this.known = scroller.scrollTop;
    const one = output.segments[place.s];
    scroller.classList.add('loading');
    output.load(place.s).then(() => {
      if (this.pending !== place || this.closed) return;
      this.pending = null;
      const s = output.segments.indexOf(one);
      if (s < 0) return;
      scroller.classList.remove('loading');
      // The end can have moved in the meantime.
      this.#render(place.end ? this.#endPlace() : { ...place, s, jump: true });
    }, () => setTimeout(() => {
      if (this.pending === place && !this.closed) this.#await(place);
    }, 1000));
  }

  // Load the neighbours of the shown segments before they are needed.
  #want() {
    const { output } = this;
    const { first, last } = this.range;
    for (const [step, from, near] of [[-1, first[0], first[1] < BEFORE],
      [1, last[0], last[1] + AFTER > output.count(last[0])]]) {
      let s = from + step;
      // If a program overwrites one line again and again, most segments have no rows.
      while (output.segments[s]?.rows?.length === 0) s += step;
      const one = output.segments[s];
      if (near && one && !one.rows && !one.loading) output.load(s).then(() => this.#schedule(), () => {});
    }
    for (let s = first[0]; s <= last[0]; s += 1) output.segments[s].used = output.uses += 1;
  }

  // -- scrolling

  #leave() {
    if (!this.following || this.scroller.scrollHeight <= this.scroller.clientHeight) return;
    this.following = false;
    this.tells.follow(false);
  }

  #scrolled() {
    const { scroller } = this;
    const top = scroller.scrollTop;
    // This class has set the position itself.
    if (Math.abs(top - this.known) < 1 || !this.output.tail?.rows) return;
    const bottom = scroller.scrollHeight - scroller.clientHeight;
    const atEnd = bottom - top < 4;
    // The browser may still be scrolling because of an earlier input.
    const rolls = performance.now() - this.went < IDLE;
    if (rolls && this.showing) return;
    if (this.following && (atEnd || rolls)) {
      // At the end, the user did not scroll: the box has grown, so nothing is below.
      this.#schedule();
      return;
    }
    // The user did not scroll: the box has grown, and the old position is beyond the end.
    if (atEnd && this.known > bottom) {
      this.known = top;
      return;
    }
    this.wanted = null;
    this.turn += 1;
    const up = top < this.known - 1;
    this.known = top;
    if (up) this.#leave();
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
      if (more || this.short) this.#render(this.#place());
      return;
    }
    // The user has scrolled far, as with the scroll bar: the position gives the row.
    const [s, r] = this.#at(top / this.#scale());
    this.range = null;
    this.#render({ s, r, y: 0, jump: true });
  }

  // Correct the scroll bar once scrolling is over.
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

  // -- actions

  // Follow the end again.
  resume() {
    this.#go();
    this.following = true;
    this.tells.follow(true);
    this.#schedule();
  }

  top() {
    if (!this.output.tail?.rows) return;
    this.#stay();
    this.scroller.scrollTop = 0;
    this.#render({ s: 0, r: 0, y: 0, jump: true });
  }

  // Show a line in the upper third. `offset` is the byte of a match, so that of a long line
  // the part with the match is shown.
  async goTo(line, offset = null) {
    this.#stay();
    await this.#show(line, this.scroller.clientHeight / 3, this.turn, offset);
  }

  #stay() {
    this.#go();
    this.following = false;
    this.tells.follow(false);
  }

  async #show(line, y, turn, offset = null) {
    const { output } = this;
    if (!output.segments.length) return;
    let s = output.holds(line);
    if (offset !== null) {
      const at = output.segments.findLastIndex((one) => one.start <= offset);
      if (at > s && output.segments[at].line <= line) s = at;
    }
    this.showing += 1;
    await output.load(s).finally(() => { this.showing -= 1; });
    const { rows, begins } = output.segments[s] ?? {};
    if (turn !== this.turn || this.closed || !rows) return;
    let r = rows.findIndex((row) => row.number === line);
    if (r < 0 && !begins && output.segments[s].line === line) r = 0;
    // The line may not have been printed yet.
    if (r < 0 && output.segments[s] === output.tail) this.wanted = { line, y };
    if (r < 0) r = Math.max(0, rows.length - 1);
    if (offset !== null && this.query) {
      let to = r + 1;
      while (to < rows.length && !rows[to].number) to += 1;
      const found = rows.slice(r, to).findIndex((row) => fold(row.plain()).includes(this.query));
      r += Math.max(0, found);
    }
    this.range = null;
    this.#render({ s, r, y, jump: true });
  }

  mark(lines) {
    this.marked = lines;
    for (const [row, node] of this.nodes) node.classList.toggle('marked', this.#isMarked(row));
  }

  #isMarked({ number }) {
    return this.marked !== null && number >= this.marked[0] && number <= this.marked[1];
  }

  find(text) {
    this.query = fold(text);
    this.#again();
  }

  showTimes(times) {
    this.times = times;
    this.#again();
  }

  // Make all elements again.
  #again() {
    const place = this.range && !this.following ? this.#place() : null;
    this.nodes.forEach((node) => node.remove());
    this.nodes.clear();
    if (place) this.#render(place); else this.#schedule();
  }

  // -- the selection

  // Remember where a selection begins: its row may no longer be an element at the end.
  #selected() {
    const { anchorNode, anchorOffset, isCollapsed } = getSelection();
    if (!this.body.contains(anchorNode)) {
      if (isCollapsed) this.anchor = null;
      return;
    }
    // When the row is removed, the browser moves the start of the selection to the body.
    if (anchorNode === this.body && this.anchor) return;
    this.anchor = this.#spot(anchorNode, anchorOffset) ?? this.anchor;
  }

  // A place in the text of a row: [line, character].
  #spot(node, offset) {
    if (node === this.body) [node, offset] = [node.children[offset] ?? node.lastChild, offset < node.children.length ? 0 : 9];
    const element = (node.nodeType === Node.TEXT_NODE ? node.parentElement : node).closest('.row');
    if (!element) return null;
    const before = document.createRange();
    before.selectNodeContents(element.querySelector('.t'));
    const inside = before.comparePoint(node, offset);
    if (inside === 0) before.setEnd(node, offset);
    let column = inside < 0 ? 0 : String(before).length;
    const { segments } = this.output;
    let s = segments.findIndex((one) => one.rows?.includes(element.row));
    if (s < 0) return null;
    let r = segments[s].rows.indexOf(element.row);
    // A long line continues in the next row.
    while (!segments[s].rows[r].number) {
      if (r > 0) r -= 1;
      else if (s > 0 && segments[s - 1].rows?.length) { s -= 1; r = segments[s].rows.length - 1; } else break;
      column += segments[s].rows[r].plain().length;
    }
    return [segments[s].rows[r].number || segments[s].line, column];
  }

  // The selected text, at most `most` characters, null if nothing is selected.
  async selection(most) {
    const { focusNode, focusOffset, isCollapsed } = getSelection();
    const focus = !isCollapsed && this.anchor && this.body.contains(focusNode) && this.#spot(focusNode, focusOffset);
    if (!focus) return null;
    const [from, to] = [this.anchor, focus].sort((a, b) => a[0] - b[0] || a[1] - b[1]);
    const text = await this.output.text([from[0], to[0]], most);
    const last = text.lastIndexOf('\n') + 1;
    return text.slice(from[1], text.length < most ? last + to[1] : most);
  }
}

// The daemon searches in the same way: only ASCII letters match in either case.
const fold = (text) => text.replace(/[A-Z]+/g, (found) => found.toLowerCase());

function clock(moment) {
  const two = (n, width = 2) => String(n).padStart(width, '0');
  return `${two(moment.getHours())}:${two(moment.getMinutes())}:${two(moment.getSeconds())}.${two(moment.getMilliseconds(), 3)}`;
}
