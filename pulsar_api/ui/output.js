// The page's knowledge of a task's output, whatever its size: where its segments of about
// 64 KiB begin, the rows of some of them, and the last segment, the tail, as it grows.

import { Stream, ask } from './api.js';
import { MAX_ROW, Terminal, joined } from './terminal.js';

const SMALL = 1 << 16; // bytes; a smaller output is all tail
const TAIL = 1 << 17; // bytes; a longer tail is cut, and a new one begins
const KEPT = 1.6e7; // approximate bytes of rows to keep besides the visible ones
const LEAST = 3; // segments to keep, however large they are
const BEHIND = 4e6; // bytes; if the stream is further behind, it skips ahead
const LOOK = 2000; // milliseconds between two checks of that

const encoder = new TextEncoder();

export class Output {
  // `tells` has: grown(), called for new output; shown(), which returns the first and the
  // last visible segment; seen(), which returns the first visible line, or null; anew(seen),
  // called when all segments have changed; state(task), end(task), away(problem).
  constructor(id, tells) {
    this.id = id;
    this.tells = tells;
    this.segments = [];
    this.size = 0; // bytes, by the last message of the daemon
    this.cut = null; // the range that was cut out of the middle
    this.settled = 0; // index of the last segment whose position comes from the daemon
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

  // How many rows a segment has. An estimate, if it was never loaded.
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

  // Load the rows of a segment, unless they are there.
  async load(index) {
    const one = this.segments[index];
    one.used = this.uses += 1;
    if (!one.rows) await (one.loading ??= this.#fetch(one, this.segments[index + 1]?.start ?? this.size));
  }

  // The text of some lines, at most `most` characters.
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

  // Ask the daemon where segments begin, starting with the one that holds a byte.
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

  // Follow the tail from its beginning to the end of the task.
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
      // Invalid UTF-8 has another length here than in the file, so cut only between pieces.
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

  // Check now and then whether output arrives faster than the browser or the network can
  // take it, and whether the middle was cut, which changes the numbers of later lines.
  async #look() {
    const { tail, size } = this;
    if (this.skipping || !tail?.terminal || size <= SMALL || size === this.looked) return;
    this.looked = size;
    let answer;
    try {
      answer = await ask(`/task/${this.id}/lines?from=${tail.start}`);
    } catch {
      return; // the daemon does not answer, and the stream will report that
    }
    if (this.closed || this.skipping) return;
    if (String(answer.cut) !== String(this.cut)) await this.#skip(0);
    else if (answer.size - size > BEHIND) await this.#skip(this.segments[this.settled].start);
  }

  // Load the positions of lines from a byte on, and follow from the last one.
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
      // The stream continues where the segments end, and reconnects by itself.
    }
    this.skipping = false;
    if (this.closed) return;
    this.#follow();
    this.tells.anew(seen);
  }

  // The difference between new and old line numbers, from the start of an old segment on.
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

  // Drop the rows that have not been visible for the longest time.
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

// The last position where a text can be cut without splitting a row, 0 if there is none. A
// carriage return at the end may be the first half of a line's end.
function lastBreak(text) {
  return text.lastIndexOf('\n') + 1 || text.slice(0, -1).lastIndexOf('\r') + 1;
}

// The approximate memory of some rows, in bytes.
function weight(rows) {
  return rows.reduce((sum, row) => sum + 100 + (row.simple === null
    ? row.pieces().reduce((size, [text, look]) => size + 100 + 2 * text.length + (look.fg || look.bg ? 400 : 0), 0)
    : 2 * row.simple.length), 0);
}
