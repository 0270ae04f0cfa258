// The dialog that starts a task: action, target and variables, and a confirmation.

import { Problem, ask, post } from './api.js';
import { covers, el, named, say } from './format.js';
import { harmless } from './terminal.js';

const NAME = '[A-Za-z0-9_][A-Za-z0-9_.\\-]*';
const RECENT = 200; // newest tasks, whose names the dialog suggests

let count = 0;

export class RunDialog {
  // `like`: a task that provides the app, env, action and variables.
  constructor(page, like = null) {
    this.page = page;
    this.met = page.meet(); // the settings may now ask to confirm other actions
    this.keys = new Map(); // the idempotency key of each request that was sent
    count += 1;
    this.fields = {};
    for (const [name, value] of [['app', like?.app], ['env', like?.env], ['action', like?.action]]) {
      this.fields[name] = el('input', {
        name, required: true, value: value ?? '', list: `${name}s-${count}`, autocomplete: 'off',
        autocapitalize: 'none', spellcheck: 'false', maxlength: name === 'action' ? 200 : 100,
        pattern: name === 'action' ? null : NAME, autofocus: name === 'app' && !like,
        title: name === 'action' ? null : 'Letters, digits, _ . and -',
      });
    }
    this.lists = Object.fromEntries(['app', 'env', 'action'].map((name) => [name, el('datalist', { id: `${name}s-${count}` })]));
    this.rows = el('div', { class: 'variables' });
    this.add = el('button', { type: 'button', onclick: () => this.#variable().focus() }, 'Add a variable');
    this.error = el('p', { role: 'alert' });
    this.sure = el('div', { class: 'sure', hidden: true });
    this.button = el('button', { class: 'primary' }, 'Run');
    this.form = el('form', { onsubmit: (event) => { event.preventDefault(); this.#submit(); }, oninput: () => this.#changed() },
      el('h2', { id: `run-${count}` }, like ? 'Run again' : 'Run a task'),
      ...['app', 'env', 'action'].map((name) => el('label', {}, name, this.fields[name], this.lists[name])),
      el('fieldset', {}, el('legend', {}, 'Variables'), this.rows,
        this.add),
      this.sure, this.error,
      el('div', { class: 'buttons' },
        el('button', { type: 'button', onclick: () => this.dialog.close() }, 'Cancel'), this.button));
    this.dialog = el('dialog', { class: 'run', 'aria-labelledby': `run-${count}` }, this.form);
    this.dialog.addEventListener('close', () => this.dialog.remove());
    for (const [name, value] of Object.entries(like?.variables ?? {})) this.#variable(name, value);
    document.body.append(this.dialog);
    this.dialog.showModal();
    this.#offer();
    this.fields.app.addEventListener('change', () => this.#actions());
    this.fields.env.addEventListener('change', () => this.#actions());
    this.#actions();
  }

  #variable(name = '', value = '') {
    const secret = el('input', { type: 'checkbox', class: 'secret' });
    // The daemon does not keep the value of a secret, so the user must enter it again.
    secret.checked = value === '***';
    const field = el('input', { 'aria-label': 'Name', placeholder: 'name', class: 'key', value: name, autocomplete: 'off', autocapitalize: 'none', spellcheck: 'false', pattern: '[A-Za-z_][A-Za-z0-9_.\\-]*', title: 'Letters, digits, _ . and -; the first must not be a digit' });
    const lines = /[\r\n]/.test(value); // an <input> would drop them
    const text = el(lines ? 'textarea' : 'input', {
      'aria-label': 'Value', placeholder: secret.checked ? 'secret: enter it again' : 'value',
      class: 'value', value: secret.checked ? '' : value, autocomplete: 'off', required: secret.checked,
    });
    const veil = () => {
      if (lines) text.classList.toggle('veiled', secret.checked);
      else text.type = secret.checked ? 'password' : 'text';
    };
    text.addEventListener('input', () => { field.required = text.value !== ''; });
    field.addEventListener('change', () => { secret.checked ||= this.#secret(field.value); veil(); });
    secret.addEventListener('change', veil);
    veil();
    const row = el('div', { class: 'variable' }, field, text, el('label', { class: 'check' }, secret, 'secret'),
      el('button', { type: 'button', 'aria-label': 'Remove this variable', title: 'Remove', onclick: () => this.#remove(row) }, '×'));
    this.rows.append(row);
    return field;
  }

  #remove(row) {
    const near = row.nextElementSibling ?? row.previousElementSibling;
    (near?.querySelector('.key') ?? this.add).focus();
    row.remove();
    this.#changed();
  }

  // Whether the daemon treats every variable of this name as secret.
  #secret(name) { return named(this.page.me.secret, name.trim()); }

  // Suggest the names from recent tasks.
  async #offer() {
    let answer;
    try {
      answer = await ask(`/tasks?limit=${RECENT}&output=none`);
    } catch { return; }
    this.recent = Object.values(answer.tasks);
    this.#fill('app', this.recent.map((task) => task.app));
    this.#fill('env', this.recent.map((task) => task.env));
    this.#actions();
  }

  // Suggest the actions that the command lists, if it can, and those of recent tasks.
  async #actions() {
    const [app, env] = [this.fields.app.value.trim(), this.fields.env.value.trim()];
    const before = (this.recent ?? []).filter((task) => !app || task.app === app).map((task) => task.action);
    this.#fill('action', before);
    if (!app || !env || !this.fields.app.checkValidity() || !this.fields.env.checkValidity()) return;
    if (this.listed === `${app}/${env}`) { this.#fill('action', [...this.known ?? [], ...before]); return; }
    this.listed = `${app}/${env}`;
    this.known = [];
    try {
      const found = await ask(`/${encodeURIComponent(app)}/${encodeURIComponent(env)}/tasks`);
      if (this.listed !== `${app}/${env}`) return;
      this.known = Object.keys(found);
      this.#fill('action', [...this.known, ...before]);
    } catch { /* no list, or no right to see it: any action can still be typed */ }
  }

  #fill(name, values) {
    this.lists[name].replaceChildren(...[...new Set(values)].map((value) => el('option', { value })));
  }

  // Take back the confirmation if the user has changed the task since.
  #changed() {
    if (!this.sure.hidden && this.reviewed !== JSON.stringify(this.#asked())) {
      this.sure.hidden = true;
      this.sure.replaceChildren();
      say(this.button, 'Run');
    }
    say(this.error, '');
  }

  #asked() {
    const variables = {};
    const secret = [];
    for (const row of this.rows.children) {
      const name = row.querySelector('.key').value.trim();
      if (!name) continue;
      variables[name] = row.querySelector('.value').value;
      if (row.querySelector('.secret').checked) secret.push(name);
    }
    const [app, env, action] = ['app', 'env', 'action'].map((name) => this.fields[name].value.trim());
    return { app, env, action, variables, secret };
  }

  #review(asked) {
    const { app, env, action, variables, secret } = asked;
    this.reviewed = JSON.stringify(asked);
    this.typed = el('input', { name: 'sure', autocomplete: 'off', autocapitalize: 'none', spellcheck: 'false', required: true });
    const hidden = (name) => secret.includes(name) || this.#secret(name);
    const shown = Object.entries(variables).map(([name, value]) => `${name}=${hidden(name) ? '***' : harmless(value)}`);
    this.sure.replaceChildren(
      el('p', {}, 'This will run ', el('b', {}, action), ' for ', el('b', {}, app), ' on ', el('b', {}, env),
        shown.length ? ` with ${shown.join(', ')}.` : '.'),
      el('label', {}, `Type ${env} to confirm`, this.typed));
    this.sure.hidden = false;
    say(this.button, `Run on ${env}`);
    this.typed.focus();
  }

  async #submit() {
    const asked = this.#asked();
    const { app, env, action, variables, secret } = asked;
    say(this.error, '');
    const names = [...this.rows.querySelectorAll('.key')].map((field) => field.value.trim());
    const twice = names.find((name, i) => name && names.indexOf(name) !== i);
    if (twice) {
      say(this.error, `The variable ${twice} appears twice.`);
      return;
    }
    this.button.disabled = true;
    await this.met;
    this.button.disabled = false;
    if (covers(this.page.me.confirm, app, env, action)) {
      if (this.sure.hidden) { this.#review(asked); return; }
      if (this.typed.value !== env) {
        say(this.error, `Type ${env} to confirm.`);
        this.typed.focus();
        return;
      }
    }
    // With the same key, a retry after a lost response does not start the task twice.
    const content = JSON.stringify(asked);
    if (!this.keys.has(content)) this.keys.set(content, newKey());
    this.button.disabled = true;
    try {
      const body = { action, variables, ...(secret.length ? { secret } : {}) };
      const answer = await post(`/${encodeURIComponent(app)}/${encodeURIComponent(env)}`, body, { 'Idempotency-Key': this.keys.get(content) });
      // If the user has closed the dialog in the meantime, stay on the present view.
      if (this.dialog.open) this.page.go(`/web/job/${answer.taskId}`);
      this.dialog.close();
    } catch (error) {
      if (!(error instanceof Problem)) throw error;
      say(this.error, error.message);
    } finally {
      this.button.disabled = false;
    }
  }
}

const newKey = () => [...crypto.getRandomValues(new Uint8Array(16))].map((n) => n.toString(16).padStart(2, '0')).join('');
