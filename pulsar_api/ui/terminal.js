// Reads what a program prints as a terminal would, line by line: colours, carriage returns,
// backspaces, erasing in the line (ECMA-48). All other control sequences are shown as text.

export const MAX_ROW = 2000; // characters of one row; a longer line goes on in the next
export const MAX_PIECES = 400; // of a row; what follows is one more, without a style
export const MAX_STYLED = 10000; // pieces of all rows of one terminal; then rows have one each
const MAX_SEQUENCE = 200;

const PLAIN = { classes: '', fg: '', bg: '' };
const kept = new Map([['', PLAIN]]);

// Styles are compared by identity, so each is made once. A colour of the palette is a class,
// any other one is a text; then the class says what it stands on.
function style(marks, fg, bg) {
  const fore = typeof fg === 'string' ? fg : '';
  const back = typeof bg === 'string' ? bg : '';
  const classes = [
    ...[...marks].sort(),
    typeof fg === 'number' ? `f${fg}` : fore && (bg === '' ? 'fg' : 'raw'),
    typeof bg === 'number' ? `b${bg}` : back && (fg === '' ? 'bg on' : 'bg'),
  ].filter(Boolean).join(' ');
  const key = `${classes}|${fore}|${back}`;
  if (key === '||') return PLAIN;
  let found = kept.get(key);
  if (!found) {
    if (kept.size > 5000) kept.clear();
    found = { classes, fg: fore, bg: back, marks, rawFg: fg, rawBg: bg };
    kept.set(key, found);
  }
  return found;
}

const MARKS = { 1: 'bold', 2: 'dim', 3: 'italic', 4: 'under', 7: 'inverse', 9: 'strike' };
const ENDS = { 22: ['bold', 'dim'], 23: ['italic'], 24: ['under'], 27: ['inverse'], 29: ['strike'] };

function palette(number) {
  if (number < 16) return number;
  if (number > 231) {
    const grey = 8 + (number - 232) * 10;
    return `rgb(${grey},${grey},${grey})`;
  }
  const steps = [0, 95, 135, 175, 215, 255];
  const n = number - 16;
  return `rgb(${steps[Math.floor(n / 36)]},${steps[Math.floor(n / 6) % 6]},${steps[n % 6]})`;
}

const mixed = (parts) => `rgb(${[0, 1, 2].map((k) => Math.min(255, parts[k] ?? 0)).join(',')})`;

// "Select graphic rendition" (ECMA-48, 8.3.117; the extended colours of ISO 8613-6).
function rendition(from, parameters) {
  let marks = new Set(from.marks);
  let fg = from.rawFg ?? '';
  let bg = from.rawBg ?? '';
  // A colon begins what belongs to a number (ISO 8613-6): 4:3 is one thing, 4;3 are two.
  const groups = parameters.split(';').map((group) => group.split(':').map((text) => Number(text) || 0));
  const numbers = groups.map(([first]) => first);
  for (let i = 0; i < numbers.length; i += 1) {
    const n = numbers[i];
    const sub = groups[i];
    if (n === 4 && sub[1] === 0) marks.delete('under');
    else if ((n === 38 || n === 48) && sub.length > 1) {
      const rgb = sub.length > 5 ? sub.slice(3, 6) : sub.slice(2, 5);
      const colour = sub[1] === 5 ? palette(Math.min(255, sub[2] ?? 0)) : sub[1] === 2 ? mixed(rgb) : '';
      if (n === 38) fg = colour; else bg = colour;
    } else if (n === 0) { marks = new Set(); fg = ''; bg = ''; }
    else if (MARKS[n]) marks.add(MARKS[n]);
    else if (ENDS[n]) ENDS[n].forEach((mark) => marks.delete(mark));
    else if (n >= 30 && n <= 37) fg = n - 30;
    else if (n >= 90 && n <= 97) fg = n - 82;
    else if (n === 39) fg = '';
    else if (n >= 40 && n <= 47) bg = n - 40;
    else if (n >= 100 && n <= 107) bg = n - 92;
    else if (n === 49) bg = '';
    else if (n === 38 || n === 48) {
      let colour = '';
      if (numbers[i + 1] === 5) {
        colour = palette(Math.min(255, numbers[i + 2] ?? 0));
        i += 2;
      } else if (numbers[i + 1] === 2) {
        colour = mixed(numbers.slice(i + 2, i + 5));
        i += 4;
      }
      if (n === 38) fg = colour; else bg = colour;
    }
  }
  return style(marks, fg, bg);
}

// What changes nothing in a log: character sets, the keypad, whether the cursor is seen.
const NOTHING = /^\x1b(?:[()][A-Z0-9]|[=>]|\[\?(?:1|7|12|25|2004)[hl])/;
const SEQUENCE = /^\x1b\[([0-9;:]*)([A-Za-z])/;
// Controls, and what turns the direction of writing, with which a line can look like another.
const SPECIAL = /[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]/;
const SPECIALS = new RegExp(SPECIAL, 'g');
// What may still become a sequence when more comes.
const BEGUN = /\x1b(?:[()]|\[\??[0-9;:]*)?$/;

function shown(character) {
  const code = character.codePointAt(0);
  if (code < 0x20) return String.fromCodePoint(0x2400 + code);
  if (code === 0x7f) return '\u2421';
  return `\u2039${code.toString(16).toUpperCase().padStart(4, '0')}\u203a`;
}

// A text of others, with what could make it look like another one shown as such.
export const harmless = (text) => text.replace(SPECIALS, (found) => (found === '\n' ? found : shown(found)));

const spaces = [];
const space = (length) => spaces[length] ??= ' '.repeat(length); // each is made once

const SHORT = 32; // columns up to which a blank is a part of the text beside it

// What was written into a row, by columns; those without a cell are blank.
class Cells {
  constructor() {
    this.found = new Map(); // [character, style, of stderr] of a column
    this.length = 0; // columns
    this.low = 0; // none is before this column
  }

  put(column, cell) {
    this.found.set(column, cell);
    this.low = Math.min(this.low, column);
    this.length = Math.max(this.length, column + 1);
  }

  // Forget some; it takes as long as there are such, so that nobody can have it take long.
  erase(from, to) {
    from = Math.max(from, this.low);
    to = Math.min(to, this.length);
    if (to - from > this.found.size) {
      for (const column of this.found.keys()) if (column >= from && column < to) this.found.delete(column);
    } else {
      for (let column = from; column < to; column += 1) this.found.delete(column);
    }
    if (from === this.low) this.low = Math.max(from, to);
  }
}

// One row of the log: pieces of text, each with a style; a number if a line begins here.
export class Row {
  constructor(number, at) {
    this.number = number; // 0: the line before goes on
    this.at = at; // milliseconds since 1970
    this.cells = null; // while they may be written over
    this.simple = null; // all of it, if it has one style and nothing else
    this.simpleStyle = PLAIN;
    this.error = false;
    this.done = null;
  }

  // It does not change any more: kept as pieces, which take less than single characters.
  close(most = MAX_PIECES) {
    if (this.simple !== null) return;
    this.done = this.pieces(most);
    this.cells = null;
  }

  // The text, piece by piece: [text, style, of stderr]. Elements cost more than what was
  // printed to have them, so of more pieces than that the last ones are one, without a style.
  pieces(most = MAX_PIECES) {
    if (this.simple !== null) return [[this.simple, this.simpleStyle, this.error]];
    if (this.done) return this.done;
    if (!this.cells) return [];
    const runs = [];
    let count = 0;
    let last = null;
    const add = (text, style, error) => {
      if (last && last[1] === style && last[2] === error) {
        last[0].push(text);
      } else if (count >= most && last) {
        last[0].push(text);
        last[1] = PLAIN;
      } else {
        runs.push(last = [[text], count < most ? style : PLAIN, error]);
        count += 1;
      }
    };
    let next = 0;
    const blank = (to) => {
      if (to - next <= SHORT) {
        if (to > next) add(space(to - next), PLAIN, false);
      } else {
        // A piece by itself, whose text all others of that length have, too.
        runs.push([[space(to - next)], PLAIN, false]);
        last = null;
      }
    };
    const { found, length } = this.cells;
    for (const column of [...found.keys()].sort((a, b) => a - b)) {
      blank(column);
      add(...found.get(column));
      next = column + 1;
    }
    blank(length);
    return runs.map(([parts, style, error]) => [parts.length > 1 ? parts.join('') : parts[0], style, error]);
  }

  plain() { return this.pieces().map(([text]) => text).join(''); }
}

// The text of rows, without the breaks that only rows have; of more characters than that
// the end.
export function joined(rows, most = Infinity) {
  const found = [];
  let size = 0;
  for (let place = rows.length - 1; place >= 0 && size < most; place -= 1) {
    const text = (rows[place].number && place ? '\n' : '') + rows[place].plain();
    found.push(text);
    size += text.length;
  }
  const text = found.reverse().join('');
  return size > most ? text.slice(-most) : text;
}

// Makes rows of text that comes in pieces. `rows` grows; its last may still change.
export class Terminal {
  // `renditions`: the parameters of SGR that are in force, as "1;31".
  constructor(line, begins, renditions = '') {
    this.line = line; // the number of the line that is being written
    this.rows = [];
    this.row = null;
    this.fresh = begins; // whether the next character begins a line
    this.column = 0;
    this.styled = MAX_STYLED; // how many pieces the rows may still have
    this.style = renditions ? rendition(PLAIN, renditions) : PLAIN;
    this.held = '';
  }

  // Go on where another one stopped. What that one has to write over is this one's.
  follow(other) {
    this.line = other.line;
    this.fresh = other.fresh;
    this.style = other.style;
    this.held = other.held;
    return this;
  }

  // What comes next is not for this one: a row that it would write over is not to be seen.
  leave() {
    if (!this.row || this.column > 0) return;
    this.fresh = this.row.number > 0;
    this.row = null;
    this.rows.pop();
  }

  feed(text, stream, at) {
    text = this.held + text;
    this.held = '';
    const begun = BEGUN.exec(text);
    if (begun && text.length - begun.index < MAX_SEQUENCE) {
      this.held = text.slice(begun.index);
      text = text.slice(0, begun.index);
    }
    const error = stream === 'stderr';
    let from = 0;
    while (from < text.length) {
      let to = text.indexOf('\n', from);
      const whole = to >= 0;
      if (!whole) to = text.length;
      this.#write(text.slice(from, to), error, at);
      if (whole) this.#end(at);
      from = to + 1;
    }
  }

  // Nothing comes any more: what was held back was no sequence.
  flush() {
    const { held } = this;
    this.held = '';
    for (const character of held) this.#put(character === '\x1b' ? '\u241b' : character, false, 0);
  }

  #open(at) {
    this.row = new Row(this.fresh ? this.line : 0, at);
    this.fresh = false;
    this.rows.push(this.row);
    return this.row;
  }

  #close() {
    this.row.close(Math.max(1, Math.min(MAX_PIECES, this.styled)));
    if (this.row.done) this.styled -= Math.max(0, this.row.done.length - 1);
  }

  #end(at) {
    if (!this.row) {
      this.#open(at).simple = '';
    }
    this.#close();
    this.row = null;
    this.column = 0;
    this.fresh = true;
    this.line += 1;
  }

  #write(text, error, at) {
    let from = 0;
    let end = text.length;
    // The end of a line as DOS has it; if it is not, the next piece writes over it.
    while (end > 0 && text[end - 1] === '\r') end -= 1;
    const returned = end < text.length;
    if (returned) text = text.slice(0, end);
    if (!this.row && this.column === 0 && !SPECIAL.test(text)) {
      while (from < text.length) {
        const row = this.#open(at);
        let to = Math.min(text.length, from + MAX_ROW);
        if (to < text.length && text.codePointAt(to - 1) > 0xffff) to -= 1;
        row.simple = text.slice(from, to);
        row.simpleStyle = this.style;
        row.error = error;
        this.column = to - from;
        from = to;
      }
    } else {
      this.#mixed(text, error, at);
    }
    if (returned) {
      if (!this.row) this.#open(at);
      this.column = 0;
    }
  }

  #mixed(text, error, at) {
    if (this.row) this.#cells();
    let from = 0;
    while (from < text.length) {
      SPECIALS.lastIndex = from;
      const found = SPECIALS.exec(text);
      const to = found ? found.index : text.length;
      if (to > from) this.#run(text.slice(from, to), error, at);
      if (!found) return;
      from = to + 1;
      switch (found[0]) {
        case '\r': this.column = 0; break;
        case '\b': this.column = Math.max(0, this.column - 1); break;
        case '\t': this.column = Math.min(MAX_ROW - 1, this.column + 8 - this.column % 8); break;
        case '\x1b': {
          const rest = text.slice(to, to + MAX_SEQUENCE);
          const nothing = NOTHING.exec(rest);
          const sequence = SEQUENCE.exec(rest);
          if (nothing) from = to + nothing[0].length;
          else if (sequence && this.#obey(sequence[2], sequence[1])) from = to + sequence[0].length;
          else this.#put('\u241b', error, at);
          break;
        }
        default:
          for (const character of shown(found[0])) this.#put(character, error, at);
      }
    }
  }

  // Follow a sequence, if it is one that stays in the line.
  #obey(letter, parameters) {
    const count = Math.min(MAX_ROW, Math.max(1, Number(parameters) || 1));
    switch (letter) {
      case 'm': this.style = rendition(this.style, parameters); return true;
      case 'C': this.column = Math.min(MAX_ROW - 1, this.column + count); return true;
      case 'D': this.column = Math.max(0, this.column - count); return true;
      case 'G': this.column = Math.min(MAX_ROW - 1, count - 1); return true;
      case 'K': this.#erase(Number(parameters) || 0); return true;
      default: return false;
    }
  }

  #erase(how) {
    if (!this.row || how > 2) return;
    const cells = this.#cells();
    cells.erase(how === 0 ? this.column : 0, how === 1 ? this.column + 1 : cells.length);
    if (how === 0) cells.length = Math.min(cells.length, this.column);
    if (how === 2) cells.length = this.column;
  }

  #run(text, error, at) {
    for (const character of text) this.#put(character, error, at);
  }

  // The row as single characters, which can be written over.
  #cells() {
    const { row } = this;
    if (row.cells === null) {
      const cells = row.cells = new Cells();
      for (const character of row.simple ?? '') cells.put(cells.length, [character, row.simpleStyle, row.error]);
      if (row.simple !== null && this.column === row.simple.length) this.column = cells.length;
      row.simple = null;
      row.error = false;
    }
    return row.cells;
  }

  #put(character, error, at) {
    if (!this.row) this.#open(at);
    if (this.column >= MAX_ROW) {
      this.#close();
      this.#open(at);
      this.column = 0;
    }
    this.#cells().put(this.column, [character, this.style, error]);
    this.column += 1;
  }
}
