// Walks from match to match through the output of a task, forwards and backwards.
//
// The daemon returns the matches in pages, from a given byte on: a log can have millions.

import { ask } from './api.js';

const KEPT = 2000; // matches to keep when walking backwards; a page has half as many

export class Search {
  // `size()` returns the present size of the output in bytes.
  constructor(id, text, size) {
    this.id = id;
    this.text = text;
    this.size = size;
    this.matches = []; // [line, offset] in order, for a part of the output
    this.from = 0; // the first byte of this part
    this.next = 0; // the first byte that has not been searched; null: all have been
    this.upTo = 0; // the byte up to which the output has been searched
    this.at = -1;
  }

  // Whether the matches cover the whole output.
  get whole() { return this.from === 0 && this.next === null; }

  // Return the next match, or the previous one, null if there is none. The first step
  // begins at `line` and `offset`.
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

  // After the last known match: load the next page, search new output, or begin at the top.
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

  // Before the first known match: load earlier matches, or go to the end.
  async #back() {
    if (this.from > 0) await this.#last(this.from);
    if (this.at < 0) await this.#last(Infinity);
  }

  // Load the last matches before a byte.
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

  // Start again at a byte.
  async #jump(offset) {
    this.matches = [];
    this.from = this.next = this.upTo = offset;
    await this.#more();
  }

  // Load the next page with a match.
  async #more() {
    const before = this.matches.length;
    do {
      // The last line may have grown, so search its end again.
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
