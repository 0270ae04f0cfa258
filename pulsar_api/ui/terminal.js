// Interprets output as a terminal would, line by line: colours, carriage returns,
// backspaces and erasing within the line (ECMA-48). All other control sequences appear as
// text.

export const MAX_ROW = 2000; // characters of one row; a longer line goes on in the next
export const MAX_PIECES = 400; // pieces of a row; the rest of the row is one more, unstyled
export const MAX_STYLED = 10000; // pieces of all rows; beyond this each row has one piece
const MAX_SEQUENCE = 200;

const PLAIN = { classes: '', fg: '', bg: '' };
const kept = new Map([['', PLAIN]]);

// Styles are compared by identity, so each is made once. A palette colour is a class of
// CSS. Any other colour is a text in `fg` or `bg`, next to the class that uses it.
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
  // A colon adds a detail to the number before it (ISO 8613-6): 4:3 is one rendition, 4;3
  // two.
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

// Sequences without effect in a log: character sets, the keypad, showing the cursor.
const NOTHING = /^\x1b(?:[()][A-Z0-9]|[=>]|\[\?(?:1|7|12|25|2004)[hl])/;
const SEQUENCE = /^\x1b\[([0-9;:]*)([A-Za-z])/;
// Controls and direction marks, with which a line can pretend to be another one.
const SPECIAL = /[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]/;
const SPECIALS = new RegExp(SPECIAL, 'g');
// The beginning of a sequence, whose rest may follow in the next piece.
const BEGUN = /\x1b(?:[()]|\[\??[0-9;:]*)?$/;

function shown(character) {
  const code = character.codePointAt(0);
  if (code < 0x20) return String.fromCodePoint(0x2400 + code);
  if (code === 0x7f) return '\u2421';
  return `\u2039${code.toString(16).toUpperCase().padStart(4, '0')}\u203a`;
}

// A text from outside, with deceptive characters made visible.
export const harmless = (text) => text.replace(SPECIALS, (found) => (found === '\n' ? found : shown(found)));

const spaces = [];
const space = (length) => spaces[length] ??= ' '.repeat(length); // rows share these texts

const SHORT = 32; // columns; a longer blank becomes a piece of its own

// The characters of a row by column. Columns without an entry are blank.
class Cells {
  constructor() {
    this.found = new Map(); // [character, style, of stderr] of a column
    this.length = 0; // columns
    this.low = 0; // no column before this one has an entry
  }

  put(column, cell) {
    this.found.set(column, cell);
    this.low = Math.min(this.low, column);
    this.length = Math.max(this.length, column + 1);
  }

  // Erase columns. The time grows with the entries, not with the columns, which a program
  // can make arbitrarily many.
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

// One row of the log: pieces of text with a style each, and a number if a line begins here.
export class Row {
  constructor(number, at) {
    this.number = number; // 0: this row continues the line above
    this.at = at; // milliseconds since 1970
    this.cells = null; // the row as single characters, while a program can overwrite them
    this.simple = null; // the whole text, if the row has one style only
    this.simpleStyle = PLAIN;
    this.error = false;
    this.done = null;
  }

  // Store the row as pieces once it cannot change: they take less memory than characters.
  close(most = MAX_PIECES) {
    if (this.simple !== null) return;
    this.done = this.pieces(most);
    this.cells = null;
  }

  // The text in pieces: [text, style, of stderr]. An element takes more memory than the
  // output that causes it, so pieces beyond the limit become one piece without a style.
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
        // A long blank is a piece of its own, and blanks of one length share their text.
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

// The text of rows, without the breaks inside long lines. Beyond the limit only its end.
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

// Turns text that arrives in pieces into rows. `rows` grows, and its last row can change.
export class Terminal {
  // `renditions`: the active parameters of SGR, such as "1;31".
  constructor(line, begins, renditions = '') {
    this.line = line; // the number of the current line
    this.rows = [];
    this.row = null;
    this.fresh = begins; // whether the next character begins a line
    this.column = 0;
    this.styled = MAX_STYLED; // how many more pieces the rows may have
    this.style = renditions ? rendition(PLAIN, renditions) : PLAIN;
    this.held = '';
  }

  // Continue where another terminal stopped, and take over its unfinished row.
  follow(other) {
    this.line = other.line;
    this.fresh = other.fresh;
    this.style = other.style;
    this.held = other.held;
    return this;
  }

  // Another terminal continues here, so drop the unfinished row that it takes over.
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

  // The output has ended, so an incomplete sequence is text after all.
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
    // This is "\r\n" cut in two, or else the next piece overwrites the row.
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

  // Carry out a sequence, if its effect stays within the line.
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

  // The row as single characters, which a program can overwrite.
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
