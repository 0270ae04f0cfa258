// Shows the output of a task: only the rows around what is seen are elements.

import { el, exact } from './format.js';
import { Output } from './output.js';
import { MAX_PIECES } from './terminal.js';

const BEFORE = 120; // rows that are elements above what is seen
const AFTER = 240; // and from there on
const SPANS = 20000; // elements with a style or a match, of all rows; the farthest are left out
const TALLEST = 6e6; // pixels; browsers cannot show much more than twice that
const IDLE = 250; // milliseconds after which scrolling is over

// A place is {s, r, y}: the row r of the segment s, and how far below the top of what is
// seen it is, in pixels; with `end` the last row, at the bottom.
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
    this.short = false; // not all of these have their styles
    this.range = null; // the rows that are elements: {first: [segment, row], last: …}
    this.marked = null; // [first, last] of the lines that the address names
    this.query = '';
    this.times = false;
    this.turn = 0; // grows whenever one goes somewhere: what was on the way there gives up
    this.went = -1e9; // when one went somewhere last, other than by scrolling
    this.showing = 0; // how many lines are on the way to be shown
    this.known = 0; // where the last scroll event, or we, have left the scroller
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
      // The browser would roll there, and end where the rows on the way are made.
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

  // Begin, at the end or at a line. `task` is the task as it is now.
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

  // -- what comes

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

  // The number of the first line on the screen; 0 if there is none.
  seen() { return this.#seen()?.line ?? 0; }

  // Where a search begins: that line, or the first one if the end is followed.
  line() { return this.following ? 0 : this.seen(); }

  // The byte from which on the segment of that line goes.
  offset() {
    const { output } = this;
    return output.segments[output.holds(this.line())]?.start ?? 0;
  }

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
    this.went = performance.now();
    this.pending = null;
    this.wanted = null;
    this.range = null;
    this.scroller.classList.remove('loading');
  }

  // -- what is shown

  #schedule() {
    this.frame ??= requestAnimationFrame(() => {
      this.frame = null;
      if (this.closed || !this.output.tail?.rows) return;
      this.#render(this.following ? this.#endPlace() : this.#place());
    });
  }

  // The row at the top of what is seen.
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

  // Pixels for a row that is no element.
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

  // Some rows on from a place, over the borders of segments.
  #step([s, r], rows) {
    r += rows;
    while (r >= this.output.count(s) && s < this.output.segments.length - 1) { r -= this.output.count(s); s += 1; }
    return [s, r];
  }

  // Make elements of the rows around a place, which stays where it is on the screen.
  #render(place) {
    const { scroller } = this;
    const { segments, total } = this.output;
    const { s } = place;
    if (!segments[s].rows) {
      this.#await(place);
      return;
    }
    // What was waited for is no longer where one is.
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
    const over = node ? node.offsetTop : 0; // heights of the elements above the place
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

  // The rows around a place as far as they are loaded; which of them it is; where they begin.
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

  // Make these rows the elements. One of them is where the reader is: the rows that are
  // nearest to it, and those below it first, get their styles while there are some left.
  #fill(rows, index = 0) {
    const wanted = new Set(rows);
    for (const [row, node] of this.nodes) {
      // Rows that may have changed are made again.
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

  // A row with so many elements at most that have a style or a match.
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

  // The text, cut where what is searched for begins and ends, so often at most.
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

  // A place whose rows are not here yet: leave room for it, and show it when they come.
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
      // The end may be elsewhere by now.
      this.#render(place.end ? this.#endPlace() : { ...place, s, jump: true });
    }, () => setTimeout(() => {
      if (this.pending === place && !this.closed) this.#await(place);
    }, 1000));
  }

  // Load the neighbours of what is shown before they are needed.
  #want() {
    const { output } = this;
    const { first, last } = this.range;
    for (const [step, from, near] of [[-1, first[0], first[1] < BEFORE],
      [1, last[0], last[1] + AFTER > output.count(last[0])]]) {
      let s = from + step;
      // Of a line that is written over again and again most segments show nothing.
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
    // It was us.
    if (Math.abs(top - this.known) < 1 || !this.output.tail?.rows) return;
    const bottom = scroller.scrollHeight - scroller.clientHeight;
    const atEnd = bottom - top < 4;
    // The browser may still roll to where one wanted to go before.
    const rolls = performance.now() - this.went < IDLE;
    if (rolls && this.showing) return;
    if (this.following && (atEnd || rolls)) {
      // At the end nobody did: the box has become larger, and nothing is below.
      this.#schedule();
      return;
    }
    // Nobody did: the box has become larger, and where we were is behind the end now.
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
    if (!this.output.tail?.rows) return;
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
    // It may still come.
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

  // Make all elements anew.
  #again() {
    const place = this.range && !this.following ? this.#place() : null;
    this.nodes.forEach((node) => node.remove());
    this.nodes.clear();
    if (place) this.#render(place); else this.#schedule();
  }

  // -- what is selected

  // Remember where a selection begins: the row may be no element any more when it ends.
  #selected() {
    const { anchorNode, anchorOffset, isCollapsed } = getSelection();
    if (!this.body.contains(anchorNode)) {
      if (isCollapsed) this.anchor = null;
      return;
    }
    // The browser moves it up to the body when the row goes.
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
    // A long line goes on in the next row.
    while (!segments[s].rows[r].number) {
      if (r > 0) r -= 1;
      else if (s > 0 && segments[s - 1].rows?.length) { s -= 1; r = segments[s].rows.length - 1; } else break;
      column += segments[s].rows[r].plain().length;
    }
    return [segments[s].rows[r].number || segments[s].line, column];
  }

  // The text that is selected, up to a bound of characters; null: nothing is.
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

// As the daemon searches: letters of ASCII are the same in both cases.
const fold = (text) => text.replace(/[A-Z]+/g, (found) => found.toLowerCase());

function clock(moment) {
  const two = (n, width = 2) => String(n).padStart(width, '0');
  return `${two(moment.getHours())}:${two(moment.getMinutes())}:${two(moment.getSeconds())}.${two(moment.getMilliseconds(), 3)}`;
}
