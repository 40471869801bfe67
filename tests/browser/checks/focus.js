// Whether the focus can be seen where it is, and where that is.
() => {
  const element = document.activeElement;
  const ring = getComputedStyle(element).outlineStyle !== "none";
  const box = element.closest(".composer-box") !== null; // its border shows the focus
  const shown = element.checkVisibility({ opacityProperty: true, visibilityProperty: true });
  return [(ring || box || element === document.body) && shown, element.outerHTML.slice(0, 90)];
};
