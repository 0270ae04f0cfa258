// The list of tasks: live, newest first, filtered by the query of the address.

import { Stream, ask } from './api.js';
import { STATUS, duration, el, ended, say, setBadge, when, whyNot } from './format.js';

const PAGE = 100;
const MOST = 1000; // tasks that the list keeps when new ones arrive
const FILTERS = ['status', 'app', 'env', 'user', 'text'];

export class List {
  constructor(page) {
    this.page = page;
    this.tasks = new Map();
    this.items = new Map();
    this.query = new URLSearchParams(location.search);
    this.form = this.#form();
    this.list = el('ol', { class: 'tasks', 'aria-label': 'Tasks, newest first' });
    this.note = el('p', { class: 'note' }, 'Loading…');
    this.live = el('p', { class: 'unseen', role: 'status' });
    this.more = el('button', { type: 'button', class: 'more', hidden: true, onclick: () => this.#next() }, 'Older tasks');
    page.view.replaceChildren(
      el('h1', { tabindex: -1 }, 'Tasks'), this.form, this.list, this.note, this.more, this.live);
    this.observer = new IntersectionObserver((found) => {
      if (found.some((one) => one.isIntersecting)) this.#next();
    }, { rootMargin: '400px' });
    this.observer.observe(this.more);
    this.ticks = setInterval(() => this.#tick(), 1000);
    this.place = history.state?.list; // where the user left the list
    page.title('Tasks');
    this.#load();
    // The first event can arrive before the list does; the newer version of a task counts.
    this.stream = new Stream('/events', '/login/me', {
      created: (task) => this.#hear(task),
      state: (task) => this.#hear(task),
    }, (problem) => page.away(problem));
    this.stream.missed = () => this.#load();
  }

  close() {
    this.closed = true;
    this.stream.close();
    this.observer.disconnect();
    clearInterval(this.ticks);
    clearTimeout(this.typing);
    clearTimeout(this.retry);
  }

  leave() {
    history.replaceState({ list: { count: this.items.size, y: scrollY } }, '');
  }

  #form() {
    const options = Object.entries(STATUS)
      .map(([name, { word }]) => el('option', { value: name }, word));
    const fields = {
      status: el('select', { name: 'status' }, el('option', { value: '' }, 'any'), ...options),
    };
    for (const name of FILTERS.slice(1)) {
      fields[name] = el('input', {
        name, type: 'search', autocomplete: 'off', autocapitalize: 'none', maxlength: 200,
        placeholder: name === 'text' ? 'app, env, action or user' : null,
      });
    }
    for (const [name, field] of Object.entries(fields)) field.value = this.query.get(name) ?? '';
    const labels = Object.entries(fields).map(([name, field]) => el('label', { class: name },
      el('span', {}, name === 'text' ? 'search' : name), field));
    const change = () => {
      clearTimeout(this.typing);
      this.typing = setTimeout(() => this.#filter(fields), 200);
    };
    const narrow = FILTERS.slice(1, 4).some((name) => this.query.get(name));
    const details = el('details', { class: 'narrow', open: narrow || matchMedia('(min-width: 50rem)').matches },
      el('summary', {}, 'Filter'), el('div', {}, ...labels.slice(1, 4)));
    return el('form', {
      class: 'filter', role: 'search', oninput: change, onchange: change,
      onsubmit: (event) => { event.preventDefault(); change(); },
    }, labels[4], labels[0], details);
  }

  #filter(fields) {
    const query = new URLSearchParams();
    for (const [name, field] of Object.entries(fields)) {
      const value = field.value.trim();
      if (value) query.set(name, value);
    }
    if (String(query) === String(this.query)) return;
    this.query = query;
    this.page.moved(query.size ? `?${query}` : location.pathname);
    this.filtered = true;
    this.#anew();
  }

  #anew() {
    this.last = null;
    this.loaded = false;
    this.query = new URLSearchParams(this.query); // a new object: older responses are dropped
    this.tasks.clear();
    this.items.clear();
    this.list.replaceChildren();
    this.more.hidden = true;
    say(this.note, 'Loading…');
    this.#load();
  }

  // Load the tasks older than `before`. Null: load the newest, and drop removed tasks.
  async #load(before = null) {
    clearTimeout(this.retry);
    const asked = this.query;
    const query = new URLSearchParams([...asked].filter(([name]) => FILTERS.includes(name)));
    const limit = before ? PAGE : Math.min(MOST, Math.max(PAGE, this.items.size, this.place?.count ?? 0));
    query.set('limit', limit);
    query.set('output', 'none');
    if (before) query.set('before', before);
    this.loading = true;
    let answer;
    try {
      answer = await ask(`/tasks?${query}`);
    } catch (error) {
      if (this.closed || asked !== this.query) return;
      say(this.note, error.message);
      if (error.passes) this.retry = setTimeout(() => this.#load(before), 1000 * Math.max(2, error.after));
      return;
    } finally {
      this.loading = false;
    }
    if (this.closed || asked !== this.query) return;
    const tasks = Object.values(answer.tasks).sort((a, b) => b.id - a.id);
    const last = tasks.at(-1)?.id ?? null;
    if (!before) {
      const there = new Set(tasks.map((task) => task.id));
      const oldest = tasks.length < limit ? 0 : last;
      for (const id of this.items.keys()) if (id >= oldest && !there.has(id)) this.#drop(id);
    }
    for (const task of tasks) this.#put(task);
    if (before || !this.last || last < this.last) {
      this.last = last;
      this.more.hidden = tasks.length < limit || last === 1;
    }
    this.loaded = true;
    this.#count();
    if (this.filtered) say(this.live, this.note.textContent);
    this.filtered = false;
    const { place } = this;
    this.place = null;
    if (place) requestAnimationFrame(() => scrollTo(0, place.y));
  }

  #next() {
    if (!this.loading && !this.more.hidden && this.last) this.#load(this.last);
  }

  #count() {
    const count = this.items.size;
    const filtered = this.query.size ? ` that match${count === 1 ? 'es' : ''}` : '';
    const none = this.query.size ? 'No tasks match.' : 'There are no tasks yet.';
    const shown = `${count}${this.more.hidden ? '' : ' newest'} task${count === 1 ? '' : 's'}${filtered}`;
    say(this.note, count ? shown : none);
  }

  #matches(task) {
    const equal = ['status', 'app', 'env', 'user']
      .every((name) => !this.query.get(name) || this.query.get(name) === (task[name] ?? ''));
    const text = (this.query.get('text') ?? '').toLowerCase();
    return equal && (!text || [task.app, task.env, task.action, task.user ?? '']
      .some((part) => part.toLowerCase().includes(text)));
  }

  #hear(task) {
    const known = this.tasks.get(task.id);
    if (!known && !this.more.hidden && this.last && task.id < this.last) return; // not loaded yet
    if (this.#matches(task)) {
      this.#put(task);
      if (!known) this.#shorten();
    } else if (known && known.version <= task.version) {
      this.#drop(task.id);
    }
    if (this.loaded) this.#count();
  }

  // Drop old tasks, so that a page that stays open for weeks does not grow without bound.
  #shorten() {
    if (this.items.size <= MOST || scrollY > innerHeight) return;
    const ids = [...this.items.keys()].sort((a, b) => b - a);
    ids.slice(MOST / 2).forEach((id) => this.#drop(id));
    this.last = ids[MOST / 2 - 1];
    this.more.hidden = false;
  }

  #drop(id) {
    this.items.get(id).item.remove();
    this.items.delete(id);
    this.tasks.delete(id);
  }

  #put(task) {
    const known = this.tasks.get(task.id);
    if (known && known.version > task.version) return;
    this.tasks.set(task.id, task);
    let parts = this.items.get(task.id);
    if (!parts) {
      parts = this.#item(task);
      this.items.set(task.id, parts);
      this.list.insertBefore(parts.item, this.#before(task.id));
    }
    setBadge(parts.badge, task);
    say(parts.long, duration(task, this.page.now()) ?? '');
    say(parts.why, whyNot(task));
  }

  // The item that a task belongs before, null if the task is the oldest.
  #before(id) {
    const { children } = this.list;
    let [low, high] = [0, children.length];
    while (low < high) {
      const middle = (low + high) >> 1;
      if (Number(children[middle].dataset.id) < id) high = middle; else low = middle + 1;
    }
    return children[low] ?? null;
  }

  #item(task) {
    const parts = { badge: el('span', { class: 'state' }), long: el('span', { class: 'long' }), why: el('span', { class: 'why' }), when: el('span', { class: 'when' }, when(task.createdAt)) };
    const name = el('a', { href: `/web/job/${task.id}`, 'data-view': true },
      el('span', { class: 'id' }, `#${task.id} `), el('b', {}, task.app), ` ${task.env} `,
      el('span', { class: 'action' }, task.action));
    parts.item = el('li', { 'data-id': task.id }, parts.badge, name,
      el('span', { class: 'who' }, task.user ?? ''), parts.when, parts.long, parts.why);
    return parts;
  }

  #tick() {
    const now = this.page.now();
    const day = new Date().toDateString();
    for (const [id, task] of this.tasks) {
      const parts = this.items.get(id);
      if (!ended(task)) say(parts.long, duration(task, now) ?? '');
      if (this.day && this.day !== day) parts.when.replaceChildren(when(task.createdAt));
    }
    this.day = day;
  }
}
