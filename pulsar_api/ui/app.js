// The page: it chooses the view for the address, knows the user, and watches the daemon.

import { askDated } from './api.js';
import { covers, el, say } from './format.js';
import { List } from './list.js';
import { RunDialog } from './run.js';
import { TaskView } from './task.js';

const PATIENCE = 1000; // milliseconds before the banner appears: a restart is often quicker

const page = {
  view: document.querySelector('main'),
  banner: document.querySelector('#away'),
  me: { user: null, rights: [], confirm: [], secret: [] },
  skew: 0,

  // The time by the daemon's clock, in milliseconds: the clock of a phone can be wrong.
  now: () => Date.now() + page.skew,

  title(text) { document.title = `${text} – pulsar-api`; },

  may(right, app, env, action = null) {
    return page.me.rights.some(({ may, on }) => may.includes(right) && covers(on, app, env, action));
  },

  // Show why the daemon does not answer. Null: it answers.
  away(problem) {
    if (problem !== null) {
      say(page.banner, problem.message);
      page.leaving ??= setTimeout(() => { page.banner.hidden = false; }, PATIENCE);
      return;
    }
    if (!page.leaving) return;
    page.back();
    page.meet(); // after a restart the daemon may have other settings
  },

  back() {
    clearTimeout(page.leaving);
    page.leaving = null;
    page.banner.hidden = true;
  },

  run(like) { new RunDialog(page, like); },

  go(path) {
    view.leave?.();
    history.pushState(null, '', path);
    show(true);
  },

  // Change the address without changing the view.
  moved(path) {
    history.replaceState(history.state, '', path);
    shown = location.pathname + location.search;
  },

  // Ask the daemon for the user's name and rights.
  async meet() {
    const asked = Date.now();
    try {
      const [me, date] = await askDated('/login/me');
      const skew = date - (asked + Date.now()) / 2;
      // The header has whole seconds, and the delay of the network is not known.
      if (Math.abs(skew) > 1500 + (Date.now() - asked) / 2) page.skew = skew;
      page.me = me;
    } catch (error) {
      page.away(error);
      setTimeout(page.meet, 1500);
      return;
    }
    page.back();
    greet();
    view.met?.();
  },
};

let view = null;
let shown = '';

function show(focus) {
  view?.close();
  document.querySelectorAll('dialog').forEach((dialog) => dialog.close());
  // Published clients use addresses like /web#job/47.
  const old = /^#job\/(\d+)$/.exec(location.hash);
  if (old) history.replaceState(null, '', `/web/job/${old[1]}`);
  const task = /^\/web\/job\/([^/]+)\/?$/.exec(location.pathname);
  view = task ? new TaskView(page, task[1]) : new List(page);
  shown = location.pathname + location.search;
  if (focus) {
    scrollTo(0, 0);
    page.view.querySelector('h1')?.focus();
  }
}

// The list remembers its own scroll position.
history.scrollRestoration = 'manual';
addEventListener('popstate', () => {
  if (/^#job\//.test(location.hash) || location.pathname + location.search !== shown) show(true);
});

document.addEventListener('click', (event) => {
  const link = event.target.closest?.('a[data-view]');
  if (!link || event.button || event.metaKey || event.ctrlKey || event.shiftKey || event.altKey) return;
  event.preventDefault();
  page.go(link.getAttribute('href'));
});

// Keyboard shortcuts, except while the user types into a field.
document.addEventListener('keydown', (event) => {
  if (event.metaKey || event.ctrlKey || event.altKey || event.target.closest('input, select, textarea') || document.querySelector('dialog[open]')) return;
  if (event.key === '/') {
    event.preventDefault();
    page.view.querySelector('input[type=search]')?.focus();
  } else if (event.key === 'r' && !document.querySelector('#run').hidden) {
    event.preventDefault();
    page.run();
  }
});

function greet() {
  const { user, signedIn, rights } = page.me;
  document.querySelector('#run').hidden = !rights.some(({ may }) => may.includes('run'));
  const account = document.querySelector('#account');
  account.hidden = !user;
  if (!user || account.dataset.user === user) return;
  account.dataset.user = user;
  account.replaceChildren(el('summary', {}, user),
    el('form', { method: 'post', action: '/logout', class: 'account' },
      el('p', {}, `Signed in as ${user}`),
      signedIn ? el('button', {}, 'Sign out') : el('span', {}, 'The browser sends the credentials.'),
      signedIn ? el('button', { formaction: '/logout?everywhere=1' }, 'Sign out everywhere') : null));
}

document.querySelector('#run').addEventListener('click', () => page.run());
// Ask for the user and for the tasks at the same time.
show(false);
page.meet();
