// What comes after # in an address is never sent to a daemon, so it has to be taken along:
// links to tasks in chats are like /web#job/47.
const { hash } = location;
const next = document.querySelector('[name=next]');
if (hash && next) {
  next.value += hash;
  for (const link of document.querySelectorAll('a[href*="next="]')) {
    link.href += encodeURIComponent(hash);
  }
}
