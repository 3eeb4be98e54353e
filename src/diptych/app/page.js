// Keys of the Label tab. They press its buttons, so that a key does what a click does and nothing else.
document.addEventListener("keydown", (event) => {
  const shown = (id) => {
    const found = document.getElementById(id);
    return found && found.offsetParent ? found : null;
  };
  const caption = shown("label-caption")?.querySelector("textarea, input");
  if (!caption || event.ctrlKey || event.metaKey || event.altKey || event.repeat) return;
  if (event.target.matches("textarea, input, select, [contenteditable]")) {
    if (event.key === "Escape") event.target.blur();
    if (event.key === "Enter" && event.target === caption && !event.shiftKey) {
      event.preventDefault();
      caption.blur();
      shown("label-accept").click();
    }
    return;
  }
  const button = { a: "label-accept", r: "label-reject", s: "label-skip", u: "label-undo" }[event.key];
  if (button) shown(button).click();
  else if (event.key === "e") caption.focus();
  else if (/^[1-9]$/.test(event.key)) {
    const candidate = document.querySelectorAll("#label-image [data-caption]")[event.key - 1];
    if (!candidate) return;
    caption.value = candidate.textContent;
    caption.dispatchEvent(new Event("input", { bubbles: true }));
  } else return;
  event.preventDefault();
});
