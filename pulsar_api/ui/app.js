// The page: which view the address means, who looks at it, and whether the daemon is there.

import { AWAY, Problem, ask } from './api.js';
import { covers, el, say } from './format.js';
import { List } from './list.js';
import { RunDialog } from './run.js';
import { TaskView } from './task.js';

const PATIENCE = 1000; // milliseconds until it is said: a restart is often quicker

const page = {
  view: document.querySelector('main'),
  banner: document.querySelector('#away'),
  me: { user: null, rights: [], confirm: [] },
  skew: 0,

  // The time by the daemon's clock, in milliseconds: that of a phone may be wrong.
  now: () => Date.now() + page.skew,

  title(text) { document.title = `${text} – pulsar-api`; },

  may(right, app, env, action = null) {
    return page.me.rights.some(({ may, on }) => may.includes(right) && covers(on, app, env, action));
  },

  // Say why the daemon does not answer, or with null that it does.
  away(problem) {
    if (problem === null) {
      clearTimeout(page.leaving);
      page.leaving = null;
      page.banner.hidden = true;
    } else {
      say(page.banner, problem.message);
      page.leaving ??= setTimeout(() => { page.banner.hidden = false; }, PATIENCE);
    }
  },

  run(like) { new RunDialog(page, like); },

  go(path) {
    history.pushState(null, '', path);
    show(true);
  },
};

let view = null;

function show(focus) {
  view?.close();
  document.querySelectorAll('dialog').forEach((dialog) => dialog.close());
  // Published clients are told addresses like /web#job/47.
  const old = /^#job\/(\d+)$/.exec(location.hash);
  if (old) history.replaceState(null, '', `/web/job/${old[1]}`);
  const task = /^\/web\/job\/(\d{1,15})\/?$/.exec(location.pathname);
  view = task ? new TaskView(page, Number(task[1])) : new List(page);
  shown = location.pathname + location.search;
  if (focus) {
    scrollTo(0, 0);
    page.view.querySelector('h1')?.focus();
  }
}

let shown = '';

addEventListener('popstate', () => {
  if (/^#job\//.test(location.hash) || location.pathname + location.search !== shown) show(true);
});

document.addEventListener('click', (event) => {
  const link = event.target.closest?.('a[data-view]');
  if (!link || event.button || event.metaKey || event.ctrlKey || event.shiftKey || event.altKey) return;
  event.preventDefault();
  page.go(link.getAttribute('href'));
});

// Single keys, but not for who is writing.
document.addEventListener('keydown', (event) => {
  if (event.metaKey || event.ctrlKey || event.altKey || event.target.closest('input, select, textarea, dialog')) return;
  if (event.key === '/') {
    event.preventDefault();
    page.view.querySelector('input[type=search]')?.focus();
  } else if (event.key === 'r' && !document.querySelector('#run').hidden) {
    event.preventDefault();
    page.run();
  }
});

async function meet() {
  const asked = Date.now();
  try {
    const answer = await fetch('/login/me');
    const date = Date.parse(answer.headers.get('date') ?? '');
    const skew = date - (asked + Date.now()) / 2;
    // The header has whole seconds, and how long it was on the way is not known.
    if (Math.abs(skew) > 1500 + (Date.now() - asked) / 2) page.skew = skew;
    page.me = answer.ok ? await answer.json() : await ask('/login/me');
  } catch (error) {
    page.away(error instanceof Problem ? error : new Problem(0, AWAY));
    setTimeout(meet, 1500);
    return;
  }
  page.away(null);
  const runs = page.me.rights.some(({ may }) => may.includes('run'));
  document.querySelector('#run').hidden = !runs;
  const account = document.querySelector('#account');
  if (page.me.user) {
    account.replaceChildren(el('summary', {}, page.me.user),
      el('form', { method: 'post', action: '/logout', class: 'account' },
        el('p', {}, `Signed in as ${page.me.user}`),
        page.me.signedIn ? el('button', {}, 'Sign out') : el('span', {}, 'by the browser'),
        page.me.signedIn ? el('button', { formaction: '/logout?everywhere=1' }, 'Sign out everywhere') : null));
    account.hidden = false;
  }
  view.met?.();
}

document.querySelector('#run').addEventListener('click', () => page.run());
// Who one is and what there is are asked for at the same time.
show(false);
meet();
