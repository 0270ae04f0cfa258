// What the page makes of a program's output: as a terminal shows it, and never out of
// proportion to what was printed. Run by tests/test_terminal.py.

import assert from 'node:assert/strict';
import { readFile } from 'node:fs/promises';
import test from 'node:test';
import v8 from 'node:v8';
import vm from 'node:vm';

const source = await readFile(new URL('../../pulsar_api/ui/terminal.js', import.meta.url), 'utf8');
const { MAX_PIECES, MAX_ROW, MAX_STYLED, Terminal, joined } = await import(
  `data:text/javascript,${encodeURIComponent(source)}`);

v8.setFlagsFromString('--expose-gc');
const collect = vm.runInNewContext('gc');

const SEGMENT = 1 << 17; // characters of the largest segment
const PIECE = 1 << 16; // of what comes at once

function fed(...pieces) {
  const terminal = new Terminal(1, true);
  for (const piece of pieces) terminal.feed(...[piece].flat(), 0);
  return terminal;
}

const filled = (text) => text.repeat(Math.ceil(SEGMENT / text.length));

let colours = '';
for (let n = 0; colours.length < SEGMENT; n += 1) colours += `\x1b[38;2;${n & 255};${n >> 8};7mx`;

const HOSTILE = {
  'the cursor far to the right': filled('\x1b[2000Gx\n'),
  'and further and further': filled('\x1b[999C\x1b[999Cx\n'),
  'moved by tabs': filled(`${'\t'.repeat(250)}x\n`),
  'and all erased': filled('a\x1b[2000G\x1b[2K\n'),
  'again and again': filled('a\x1b[2000G\x1b[2K\x1b[1K'),
  'erased and written': filled('\x1b[K\x1b[2000Gx\r'),
  'erased from the begin': filled(`${'x'.repeat(50)}\x1b[1000Gx\x1b[1K`),
  'as many styles as characters': filled('\x1b[1mx\x1b[mx'),
  'also in short lines': filled('\x1b[1mx\x1b[mx\n'),
  'and gaps between them': filled('\x1b[1mx\x1b[mx\x1b[40C'),
  'as many colours as there are': colours,
  'empty lines': filled('\n'),
  'lines of a letter': filled('x\n'),
  'going back': filled('x\b'),
  'begun sequences': filled('\x1b['),
  'long sequences': filled(`\x1b[${'1;'.repeat(90)}m`),
  'signs that turn the text': filled('\u202e'),
};

for (const [name, text] of Object.entries(HOSTILE)) {
  test(`little is kept of ${name}`, () => {
    collect();
    const before = process.memoryUsage().heapUsed;
    const terminal = new Terminal(1, true);
    for (let at = 0; at < text.length; at += PIECE) terminal.feed(text.slice(at, at + PIECE), 'stdout', 1.5e12);
    collect();
    const bytes = process.memoryUsage().heapUsed - before;
    assert.ok(bytes < 32e6, `${bytes} bytes of ${text.length}`);
    const { rows } = terminal;
    const styled = rows.map((row) => row.pieces().filter(([, look, error]) => look.classes || error).length);
    assert.ok(styled.every((count) => count <= MAX_PIECES));
    assert.ok(styled.reduce((a, b) => a + b, 0) <= MAX_STYLED + rows.length);
    assert.ok(joined(rows, 5000).length <= 5000);
  });
}

test('two streams that take turns are pieces as well', () => {
  const terminal = new Terminal(1, true);
  for (let n = 0; n < SEGMENT; n += 1) terminal.feed('x', n % 2 ? 'stderr' : 'stdout', 0);
  assert.ok(terminal.rows.every((row) => row.pieces().length <= MAX_PIECES));
  const pieces = terminal.rows.flatMap((row) => row.pieces()).length;
  assert.ok(pieces <= MAX_STYLED + terminal.rows.length + MAX_PIECES);
  assert.equal(joined(terminal.rows).length, SEGMENT);
});

test('the cursor is where it was moved to, and blanks are shared', () => {
  const { rows } = fed('\x1b[2000Gx\n\x1b[2000Gy\n  z\tw');
  assert.equal(rows[0].plain(), `${' '.repeat(1999)}x`);
  assert.equal(rows[1].plain(), `${' '.repeat(1999)}y`);
  assert.equal(rows[2].plain(), '  z     w');
  assert.deepEqual(rows[0].pieces().map(([text]) => text.length), [1999, 1]);
});

test('text of more pieces than are shown is all there', () => {
  const { rows } = fed(`${'\x1b[31mx\x1b[32my'.repeat(MAX_PIECES)}\n\x1b[33mz`);
  assert.equal(rows[0].plain(), 'xy'.repeat(MAX_PIECES));
  const looks = rows[0].pieces().map(([, look]) => look.classes);
  assert.deepEqual([looks.length, looks[0], looks[1], looks.at(-1)], [MAX_PIECES, 'f1', 'f2', '']);
  assert.deepEqual(rows[1].pieces().map(([text, look]) => [text, look.classes]), [['z', 'f3']]);
});

test('a log with a colour in each line keeps them all', () => {
  const { rows } = fed('\x1b[32mok\x1b[m   1 of many\n'.repeat(4000));
  assert.ok(rows.every((row) => row.pieces().length === 2));
});

test('of more text than can be copied it is the end', () => {
  const { rows } = fed('one\ntwo\nthree\n');
  assert.equal(joined(rows), 'one\ntwo\nthree');
  assert.equal(joined(rows, 9), 'two\nthree');
  assert.equal(joined(rows, 7), '\nthree'.padStart(7, 'o'));
  assert.equal(joined([], 7), '');
});

// -- by the definition

const ACTS = ['a', 'b', 'xyz', 'é', '\n', '\r', '\b', '\t', '\r\n', '\0', '\u202e',
  '\x1b[2000G', '\x1b[5G', '\x1b[40C', '\x1b[3D', '\x1b[K', '\x1b[0K', '\x1b[1K', '\x1b[2K', '\x1b[9K',
  '\x1b[1990G', '\x1b[1m', '\x1b[m', 'x'.repeat(1990), 'y'.repeat(50)];
const SHOWN = { '\0': '\u2400', '\u202e': '\u2039202E\u203a' };

// Rows of cells, [character, bold].
function naive(acts) {
  const rows = [];
  let [row, column, bold] = [null, 0, false];
  const put = (character) => {
    if (!row || column >= MAX_ROW) { rows.push(row = []); if (column >= MAX_ROW) column = 0; }
    while (row.length < column) row.push([' ', false]);
    row[column] = [character, bold];
    column += 1;
  };
  const blank = (to) => { for (let i = 0; i < to; i += 1) row[i] = [' ', false]; };
  for (const act of acts) {
    const [, count, letter] = /^\x1b\[(\d*)([A-Z])$/.exec(act) ?? [];
    if (act.endsWith('\n')) { if (!row) rows.push([]); row = null; column = 0; }
    else if (act === '\r') { if (!row) rows.push(row = []); column = 0; }
    else if (act === '\b') column = Math.max(0, column - 1);
    else if (act === '\t') column = Math.min(MAX_ROW - 1, column + 8 - column % 8);
    else if (act === '\x1b[1m') bold = true;
    else if (act === '\x1b[m') bold = false;
    else if (letter === 'G') column = Math.min(MAX_ROW, Number(count)) - 1;
    else if (letter === 'C') column = Math.min(MAX_ROW - 1, column + Number(count));
    else if (letter === 'D') column = Math.max(0, column - Number(count));
    else if (letter === 'K') {
      if (row && '012'.includes(count || '0')) {
        if (count !== '1') row.length = Math.min(row.length, column);
        if (count === '1') blank(Math.min(column + 1, row.length));
        if (count === '2') blank(column);
      }
    } else for (const character of SHOWN[act] ?? act) put(character);
  }
  return rows;
}

function cells(row) {
  return row.pieces().flatMap(([text, look]) => [...text].map((character) => [character, look.classes === 'bold']));
}

// Blanks at the end of a row, and last rows without anything else, are not to be seen.
function seen(rows) {
  const found = rows.map((row) => {
    const last = row.findLastIndex(([character, bold]) => character !== ' ' || bold);
    return row.slice(0, last + 1).map(([character, bold]) => character + (bold ? '*' : '')).join('');
  });
  while (found.at(-1) === '') found.pop();
  return found;
}

test('whatever is printed, in whatever pieces, is what a terminal shows', () => {
  let seed = 7;
  const random = (most) => { seed = (seed * 48271) % 2147483647; return seed % most; };
  for (let run = 0; run < 3000; run += 1) {
    const acts = Array.from({ length: random(25) }, () => ACTS[random(ACTS.length)]);
    const whole = acts.join('');
    const cut = random(whole.length + 1);
    const terminal = fed([whole.slice(0, cut), 'stdout'], [whole.slice(cut), 'stdout']);
    terminal.flush();
    assert.deepEqual(seen(terminal.rows.map(cells)), seen(naive(acts)), JSON.stringify([acts, cut]));
  }
});
