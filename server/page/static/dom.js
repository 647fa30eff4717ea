// Elements from the page, and new ones. Text from elsewhere enters as text only: there is no way
// here that parses it.

/** The element with an id that index.html has. */
export function byId(id) {
  return document.getElementById(id);
}

/** A new element: attributes (false leaves one out), then children, strings becoming text. */
export function make(tag, attributes = {}, ...children) {
  return filled(document.createElement(tag), attributes, children);
}

/** A new element of a drawing. */
export function draw(tag, attributes = {}, ...children) {
  return filled(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);
}

function filled(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== false) {
      element.setAttribute(name, value);
    }
  }
  element.append(...children);
  return element;
}

/** Write a text only where it changes: no work for the browser, no word from a screen reader. */
export function write(element, text) {
  if (element.textContent !== text) {
    element.textContent = text;
  }
}

/** Say how an action went, in a live region. `tone`: "good", "bad" or "". */
export function say(element, text, tone = "") {
  element.dataset.tone = tone;
  write(element, text);
}
