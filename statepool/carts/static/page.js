"use strict";

// Keeps what changes by itself up to date: without this script, the page is loaded once more.

function update(old, fresh) {
  if (old.isEqualNode(fresh)) return;
  const before = [...old.childNodes], after = [...fresh.childNodes];
  const alike = old.nodeName === fresh.nodeName && before.length === after.length &&
    before.every((one, number) => one.nodeName === after[number].nodeName && one.id === after[number].id);
  if (!alike) {
    old.replaceWith(fresh);
  } else if (old.nodeType === Node.TEXT_NODE) {
    old.data = fresh.data;
  } else {
    for (const name of old.getAttributeNames()) {
      if (!fresh.hasAttribute(name)) old.removeAttribute(name);
    }
    for (const { name, value } of fresh.attributes) {
      if (old.getAttribute(name) !== value) old.setAttribute(name, value);
    }
    before.forEach((one, number) => update(one, after[number]));
  }
}

async function look() {
  const place = document.getElementById("live").dataset.poll;
  const answer = await fetch(place, { headers: { Accept: "text/html" } });
  if (!answer.ok) return answer.status < 500; // what is gone, or no longer permitted, stays so
  const page = new DOMParser().parseFromString(await answer.text(), "text/html");
  const focus = document.activeElement && document.activeElement.id;
  for (const fresh of page.querySelectorAll(".live")) {
    update(document.getElementById(fresh.id), document.adoptNode(fresh));
  }
  if (focus) document.getElementById(focus)?.focus({ preventScroll: true });
  return false;
}

async function keepLooking() {
  const live = document.getElementById("live");
  const seconds = live && Number(live.dataset.seconds);
  if (!seconds) return;
  await new Promise((done) => setTimeout(done, seconds * 1000));
  let ended = false;
  if (!document.hidden) {
    try {
      ended = await look();
    } catch {
      ended = false; // the service is away: it may come back
    }
  }
  if (!ended) keepLooking();
}

keepLooking();
