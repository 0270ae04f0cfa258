// Browsers never send the part after # to a server, so this page must carry it along: links
// to tasks in chats look like /web#job/47.
const { hash } = location;
const next = document.querySelector('[name=next]');
if (hash && next) {
  next.value += hash;
  for (const link of document.querySelectorAll('a[href*="next="]')) {
    link.href += encodeURIComponent(hash);
  }
}
