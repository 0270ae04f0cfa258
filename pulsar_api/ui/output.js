// What is known of a task's output, whatever its size: where its segments of about 64 KiB
// begin, the rows of some of them, and the last one, the tail, as it grows.

import { Stream, ask } from './api.js';
import { MAX_ROW, Terminal, joined } from './terminal.js';

const SMALL = 1 << 16; // bytes of output up to which all of it is the tail
const TAIL = 1 << 17; // bytes from which on the tail is cut, and a new one begun
const KEPT = 1.6e7; // bytes, about, of the rows that are kept beside those that are seen
const LEAST = 3; // segments that are kept, whatever they take
const BEHIND = 4e6; // bytes that the stream may be behind; more is skipped
const LOOK = 2000; // milliseconds between two looks at whether it is

const encoder = new TextEncoder();

export class Output {
  // `tells` has: grown(), there is more; shown(), the first and the last segment that are
  // seen; seen(), the line that is, or null; anew(seen), the segments are others now;
  // state(task), end(task), away(problem).
  constructor(id, tells) {
    this.id = id;
    this.tells = tells;
    this.segments = [];
    this.size = 0; // bytes, as far as we have heard
    this.cut = null; // what was cut out of its middle
    this.settled = 0; // index of the segment up to which the daemon has said where they are
    this.uses = 0;
    this.looks = setInterval(() => this.#look(), LOOK);
  }

  async open(size) {
    const found = size > SMALL ? await this.#index(0) : null;
    if (this.closed) return;
    if (found) this.#take(found); else this.segments = [segment(0, 1, true)];
    this.#follow();
  }

  close() {
    this.closed = true;
    this.stream?.close();
    clearInterval(this.looks);
  }

  get tail() { return this.segments.at(-1); }

  // The number of lines, as far as it is known.
  get lines() {
    const { tail } = this;
    if (!tail) return 0;
    if (!tail.terminal) return tail.line - 1;
    return tail.terminal.line - (tail.terminal.fresh ? 1 : 0);
  }

  // How many rows a segment has; about, if it was never loaded.
  count(index) {
    const one = this.segments[index];
    if (one.rows) return one.rows.length;
    if (one.counted !== null) return one.counted;
    if (one.start === this.cut?.[0]) return 2;
    const next = this.segments[index + 1];
    return Math.max(1, next.line - one.line, Math.ceil((next.start - one.start) / MAX_ROW));
  }

  get total() {
    let total = 0;
    for (let index = 0; index < this.segments.length; index += 1) total += this.count(index);
    return total;
  }

  // The segment in which a line begins.
  holds(line) {
    let index = Math.max(0, this.segments.findLastIndex((one) => one.line <= line));
    while (index > 0 && this.segments[index].line === line && !this.segments[index].begins) index -= 1;
    return index;
  }

  // Have the rows of a segment.
  async load(index) {
    const one = this.segments[index];
    one.used = this.uses += 1;
    if (!one.rows) await (one.loading ??= this.#fetch(one, this.segments[index + 1]?.start ?? this.size));
  }

  // The text of some lines, up to a bound of characters.
  async text([from, to], most) {
    const found = [];
    let size = 0;
    for (let index = this.holds(from); index < this.segments.length && this.segments[index].line <= to; index += 1) {
      await this.load(index);
      let { line } = this.segments[index];
      for (const row of this.segments[index].rows ?? []) {
        line = row.number || line;
        if (line < from || line > to) continue;
        found.push(row);
        size += row.plain().length + 1;
        if (size > most) return joined(found).slice(0, most);
      }
    }
    return joined(found);
  }

  // Ask where the segments are, from the one on that holds a byte.
  async #index(from) {
    let { segments, size } = this;
    let [next, cut] = [from, null];
    while (next !== null && !this.closed) {
      const answer = await ask(`/task/${this.id}/lines?from=${next}`);
      const first = answer.segments[0]?.[0] ?? 0;
      segments = segments.filter((one) => one.start < first);
      for (const [start, line, begins] of answer.segments) {
        segments.push(segment(start, line, begins, answer.styles[start]));
      }
      next = answer.nextFrom;
      cut = answer.cut;
      size = Math.max(size, answer.size);
    }
    return { segments: segments.length ? segments : [segment(0, 1, true)], cut, size };
  }

  #take({ segments, cut, size }) {
    this.segments = segments;
    this.settled = segments.length - 1;
    this.cut = cut;
    this.size = Math.max(this.size, size);
  }

  // Read the tail as it grows: from its begin to the end of the task.
  #follow() {
    const { tail } = this;
    tail.terminal = new Terminal(tail.line, tail.begins, tail.style);
    tail.rows = tail.terminal.rows;
    this.stream?.close();
    const url = `/task/${this.id}/events?times=1&offset=${tail.start}`;
    this.stream = new Stream(url, `/task/${this.id}?output=none`, {
      output: (event, cursor) => this.#hear(event, Number.parseInt(cursor, 10)),
      state: (task) => this.tells.state(task),
      end: (task) => {
        this.stream.close();
        this.tail.terminal.flush();
        this.tells.grown();
        this.tells.end(task);
      },
    }, (problem) => this.tells.away(problem));
  }

  #hear({ offset, stream, text, at = 0 }, end) {
    this.size = Math.max(this.size, end);
    const { tail } = this;
    if (offset - tail.start + text.length > TAIL) {
      const before = text.slice(0, lastBreak(text));
      // What is not UTF-8 has another length here than there: cut at the begin of the piece.
      if (before && !before.includes('\ufffd')) {
        tail.terminal.feed(before, stream, at);
        this.#begin(offset + encoder.encode(before).length);
        text = text.slice(before.length);
      } else if (offset > tail.start && (tail.terminal.fresh || offset - tail.start > 4 * TAIL)) {
        this.#begin(offset);
      }
    }
    this.tail.terminal.feed(text, stream, at);
    this.tells.grown();
  }

  // Begin a new tail at a byte.
  #begin(start) {
    const { tail } = this;
    const { terminal } = tail;
    terminal.leave();
    tail.terminal = null;
    tail.weight = weight(tail.rows);
    const made = segment(start, terminal.line, terminal.fresh);
    made.terminal = new Terminal().follow(terminal);
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
    const seen = this.tells.seen();
    const had = seen && this.segments[this.holds(seen.line)];
    try {
      const found = await this.#index(from);
      if (seen && String(found.cut) !== String(this.cut)) seen.line += await this.#shift(had, found);
      if (!this.closed) this.#take(found);
    } catch {
      // The stream goes on where the segments end, and comes back by itself.
    }
    this.skipping = false;
    if (this.closed) return;
    this.#follow();
    this.tells.anew(seen);
  }

  // By how much the numbers of the lines are others from the begin of what was a segment on.
  async #shift(had, { segments, cut }) {
    if (!cut || had.start < cut[0]) return 0;
    const has = segments.findLast((one) => one.start <= had.start);
    let { line } = has;
    for await (const [, , text] of this.#pieces(has.start, had.start)) line += text.split('\n').length - 1;
    return line - had.line;
  }

  async* #pieces(start, end) {
    for (let at = start; at < end && !this.closed;) {
      const answer = await ask(`/task/${this.id}/pieces?offset=${at}&end=${end}`);
      const began = answer.began === null ? null : answer.began * 1000;
      for (const [stream, since, text] of answer.pieces) {
        yield [stream, began === null ? 0 : began + since, text];
      }
      if (answer.nextOffset <= at) return;
      at = answer.nextOffset;
    }
  }

  async #fetch(one, end) {
    try {
      const terminal = new Terminal(one.line, one.begins, one.style);
      for await (const [stream, at, text] of this.#pieces(one.start, end)) terminal.feed(text, stream, at);
      terminal.flush();
      terminal.leave();
      one.rows = terminal.rows;
      one.weight = weight(one.rows);
      this.#evict();
    } finally {
      one.loading = null;
    }
  }

  // Forget the rows that were not looked at for longest.
  #evict() {
    const [first, last] = this.tells.shown();
    const spare = this.segments.slice(0, -1).filter((one, index) => one.rows && !(index >= first && index <= last));
    spare.sort((a, b) => b.used - a.used);
    let kept = 0;
    spare.forEach((one, place) => {
      kept += one.weight;
      if (place < LEAST || kept <= KEPT) return;
      one.counted = one.rows.length;
      one.rows = null;
    });
  }
}

function segment(start, line, begins, style = '') {
  return { start, line, begins, style, rows: null, counted: null, weight: 0, loading: null, used: 0, terminal: null };
}

// Where a text can be cut so that no row goes over the cut; 0: nowhere. A carriage return at
// its end may be half of the end of a line.
function lastBreak(text) {
  return text.lastIndexOf('\n') + 1 || text.slice(0, -1).lastIndexOf('\r') + 1;
}

// About how many bytes some rows take.
function weight(rows) {
  return rows.reduce((sum, row) => sum + 100 + (row.simple === null
    ? row.pieces().reduce((size, [text, look]) => size + 100 + 2 * text.length + (look.fg || look.bg ? 400 : 0), 0)
    : 2 * row.simple.length), 0);
}
