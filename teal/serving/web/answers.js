"use strict";
// What a model wrote, as nodes of the page. Its text is never trusted: Markdown becomes HTML, and DOMPurify removes
// whatever could run, load or send something.

const ALLOWED = {
  ALLOWED_TAGS: [
    "a", "b", "blockquote", "br", "code", "del", "em", "h1", "h2", "h3", "h4", "h5", "h6", "hr", "i", "li", "ol", "p",
    "pre", "strong", "sub", "sup", "table", "tbody", "td", "th", "thead", "tr", "ul",
  ],
  ALLOWED_ATTR: ["align", "href", "start"],
  ALLOWED_URI_REGEXP: /^(?:https?|mailto):/i,
};
const SCROLL_SLACK = 40; // pixels from the end within which the reader counts as being there

DOMPurify.addHook("afterSanitizeAttributes", (node) => {
  if (node.tagName !== "A") return;
  node.setAttribute("target", "_blank");
  node.setAttribute("rel", "noopener noreferrer");
});

function element(tag, className, text = "") {
  const node = document.createElement(tag);
  node.className = className;
  node.textContent = text;
  return node;
}

// Shows text as Markdown in node.
function showMarkdown(node, text) {
  const html = marked.parse(text, { gfm: true, breaks: true });
  node.replaceChildren(DOMPurify.sanitize(html, { ...ALLOWED, RETURN_DOM_FRAGMENT: true }));
}

// Runs change, and then shows the end of the conversation if it was in view before.
function keepingEndInView(scroller, change) {
  const atEnd = scroller.scrollHeight - scroller.scrollTop - scroller.clientHeight < SCROLL_SLACK;
  change();
  if (atEnd) scroller.scrollTop = scroller.scrollHeight;
}

// A turn's place in the conversation: the message, and columns for answers.
function addTurn(conversation, message) {
  const turn = element("div", "turn"), columns = element("div", "columns");
  turn.append(element("p", "user", message), columns);
  conversation.append(turn);
  return columns;
}

// A place for an answer, beside those before it. show(text) draws at most once a frame.
function addAnswer(conversation, columns) {
  const column = element("div", ""), node = element("div", "answer"), figures = element("span", "figures");
  column.append(node, figures);
  columns.append(column);
  let wanted = null;
  const draw = () => {
    if (wanted === null) return;
    const text = wanted;
    wanted = null;
    keepingEndInView(conversation, () => showMarkdown(node, text));
  };
  return {
    node,
    figures,
    show(text) {
      if (wanted === null) requestAnimationFrame(draw);
      wanted = text;
    },
    finish: draw,
  };
}

// Marks what follows the first character in which the second answer departs from the first.
function markDifference(first, second) {
  const expected = first.textContent, text = second.textContent;
  let i = 0;
  while (i < text.length && text[i] === expected[i]) i += 1;
  if (i === text.length || !CSS.highlights) return;
  const walker = document.createTreeWalker(second, NodeFilter.SHOW_TEXT);
  let node = walker.nextNode();
  for (; i >= node.length; node = walker.nextNode()) i -= node.length;
  const range = new Range();
  range.setStart(node, i);
  range.setEnd(second, second.childNodes.length);
  if (!CSS.highlights.has("differs")) CSS.highlights.set("differs", new Highlight());
  CSS.highlights.get("differs").add(range);
}
