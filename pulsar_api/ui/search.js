// Walks from match to match through the output of a task, on either side of where one is.
//
// The daemon gives the matches a page at a time, from a byte on; a log can have millions.

import { ask } from './api.js';

const KEPT = 2000; // matches that are kept when one goes back over more; a page has half of it

export class Search {
  // `size()` is how many bytes of output there are by now.
  constructor(id, text, size) {
    this.id = id;
    this.text = text;
    this.size = size;
    this.matches = []; // [line, offset] in order, of a part of the output
    this.from = 0; // the byte that this part begins with
    this.next = 0; // and the one from which on nothing is known; null: all is
    this.upTo = 0; // how far has been looked
    this.at = -1;
  }

  // All that there is.
  get whole() { return this.from === 0 && this.next === null; }

  // Go to the next match, or the one before; `line` and `offset` say where one is at the
  // beginning. Return it, or null if there is none.
  async step(step, line, offset) {
    if (this.at < 0) {
      await this.#more();
      if (!this.whole && (this.matches.at(-1)?.[0] ?? Infinity) < line) {
        await this.#jump(offset);
        while (this.next !== null && (this.matches.at(-1)?.[0] ?? 0) < line) await this.#more();
      }
      const first = this.matches.findIndex((match) => match[0] >= line);
      if (step > 0) this.at = first;
      else this.at = (first < 0 ? this.matches.length : first) - 1;
    } else {
      this.at += step;
    }
    if (this.at >= this.matches.length || (step > 0 && this.at < 0)) await this.#onward();
    else if (this.at < 0) await this.#back();
    return this.matches[this.at] ?? null;
  }

  // Behind the last one that is known: the next page, what was printed since, or from the top.
  async #onward() {
    const place = this.matches.length;
    while (this.matches.length === place && (this.next !== null || this.size() > this.upTo)) await this.#more();
    if (this.matches.length > place) {
      this.at = place;
      return;
    }
    if (this.from > 0) await this.#jump(0);
    this.at = 0;
  }

  // Before the first one that is known: what is before it, or else the end.
  async #back() {
    if (this.from > 0) await this.#last(this.from);
    if (this.at < 0) await this.#last(Infinity);
  }

  // Have the last matches before a byte.
  async #last(end) {
    if (this.from > 0) await this.#jump(0);
    while (this.next !== null && (this.matches.at(-1)?.[1] ?? 0) < end) {
      await this.#more();
      this.#shorten();
    }
    this.at = this.matches.findLastIndex((match) => match[1] < end);
  }

  #shorten() {
    const over = this.matches.length - KEPT;
    if (over <= 0) return;
    this.matches.splice(0, over);
    this.from = this.matches[0][1];
  }

  // Begin anew at a byte.
  async #jump(offset) {
    this.matches = [];
    this.from = this.next = this.upTo = offset;
    await this.#more();
  }

  // Ask for the next page that has something; `from` where to begin it.
  async #more() {
    const before = this.matches.length;
    do {
      // The line that was the last may have become longer.
      const from = this.next ?? Math.max(this.from, this.upTo - 4 * this.text.length);
      const answer = await ask(`/task/${this.id}/search?${new URLSearchParams({ text: this.text, from })}`);
      for (const match of answer.matches) {
        if ((this.matches.at(-1)?.[0] ?? 0) < match[0]) this.matches.push(match);
      }
      this.next = answer.nextFrom;
      this.upTo = from + answer.searched;
    } while (this.next !== null && this.matches.length === before);
  }
}
