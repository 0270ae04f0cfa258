// Texts for states, times, durations and sizes, and small helpers for the DOM.

export const STATUS = {
  created: { word: 'waiting', sign: '○' },
  running: { word: 'running', sign: '▶' },
  finished: { word: 'finished', sign: '✓' },
  failed: { word: 'failed', sign: '✗' },
  killed: { word: 'killed', sign: '■' },
  lost: { word: 'lost', sign: '?' },
};

export const ended = (task) => !['created', 'running'].includes(task.status);

// Make an element. Properties that begin with "on" are listeners, others are attributes.
// Children are elements or text, so no text from outside is ever parsed as markup.
export function el(name, properties = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(properties)) {
    if (value === null || value === undefined || value === false) continue;
    if (key.startsWith('on')) made.addEventListener(key.slice(2), value);
    else if (key === 'value') made.value = value;
    else made.setAttribute(key, value === true ? '' : value);
  }
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}

// Change a text only if it differs: this saves work, and a screen reader repeats nothing.
export function say(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

export function badge(task) {
  const { word, sign } = STATUS[task.status] ?? { word: task.status, sign: '?' };
  return el('span', { class: `status ${task.status}` },
    el('span', { class: 'sign', 'aria-hidden': 'true' }, sign), word);
}

export function setBadge(element, task) {
  if (element.dataset.status === task.status) return;
  element.dataset.status = task.status;
  element.replaceChildren(badge(task));
}

const CLOCK = new Intl.DateTimeFormat(undefined, { timeStyle: 'short' });
const DAY = new Intl.DateTimeFormat(undefined, { dateStyle: 'medium', timeStyle: 'short' });
const EXACT = new Intl.DateTimeFormat(undefined, { dateStyle: 'full', timeStyle: 'long' });

export const exact = (moment) => EXACT.format(moment);

// A moment for people: only the time if it is today, else the date as well.
export function when(text) {
  if (!text) return el('span', {}, '–');
  const moment = new Date(text);
  const today = moment.toDateString() === new Date().toDateString();
  return el('time', { datetime: text, title: `${exact(moment)} (${text})` },
    (today ? CLOCK : DAY).format(moment));
}

export function span(seconds) {
  const whole = Math.max(0, Math.floor(seconds));
  const parts = [[86400, 'd'], [3600, 'h'], [60, 'min'], [1, 's']]
    .map(([size, unit], i, all) => [Math.floor((i ? whole % all[i - 1][0] : whole) / size), unit])
    .filter(([count]) => count > 0)
    .slice(0, 2);
  if (seconds < 1 && whole !== seconds) return `${Math.max(1, Math.round(seconds * 1000))} ms`;
  if (seconds < 10 && whole !== seconds) return `${seconds.toFixed(1)} s`;
  if (!parts.length) return '0 s';
  return parts.map(([count, unit]) => `${count} ${unit}`).join(' ');
}

// Why a task waits or did not succeed, "" if there is no reason to show.
export function whyNot(task) {
  if (task.status !== 'created' && !task.waitingFor) return task.reason ?? '';
  return `waits for ${task.waitingFor ?? 'its turn'}`;
}

// Sentences about anything unusual: processes that still run, and notes.
export function remarks(task) {
  const list = (processes) => processes.map(({ pid, command, user }) => `${pid} ${command} (${user})`).join(', ');
  const found = [...(task.notes ?? [])];
  if (task.heldBy?.length) {
    found.unshift(`These processes did not end and still hold ${task.app} ${task.env}: ${list(task.heldBy)}. `
      + `An admin can free it with: pulsar-api free ${task.app} ${task.env}`);
  }
  if (task.stillRunning?.length) found.unshift(`Left running by the task: ${list(task.stillRunning)}.`);
  return found;
}

// How long a task ran, or has run so far. Null if it never started.
export function duration(task, now) {
  if (!task.startedAt) return null;
  const end = task.endedAt ? Date.parse(task.endedAt) : now;
  const seconds = (end - Date.parse(task.startedAt)) / 1000;
  return span(task.endedAt ? seconds : Math.floor(Math.max(0, seconds)));
}

export function bytes(count) {
  const units = ['bytes', 'KB', 'MB', 'GB', 'TB'];
  let step = 0;
  while (count >= 1000 && step < units.length - 1) { count /= 1000; step += 1; }
  return `${step && count < 10 ? count.toFixed(1) : Math.round(count)} ${units[step]}`;
}

// Match a pattern of the settings: * and ? are wildcards, all other characters are literal.
function fits(pattern, text) {
  const source = pattern.replace(/[\\^$.*+?()[\]{}|]/g, (c) =>
    ({ '*': '.*', '?': '.' }[c] ?? `\\${c}`));
  return new RegExp(`^${source}$`, 's').test(text);
}

// Whether a pattern matches a name. Case does not matter.
export const named = (patterns, name) => patterns.some((pattern) => fits(pattern.toLowerCase(), name.toLowerCase()));

// Whether "app/env/action" patterns match. Without an action: whether any action can match.
export function covers(patterns, app, env, action = null) {
  return patterns.some((pattern) => {
    const [a, e = '*', ...rest] = pattern.split('/');
    return fits(a, app) && fits(e, env)
      && (action === null || fits(rest.length ? rest.join('/') : '*', action));
  });
}
