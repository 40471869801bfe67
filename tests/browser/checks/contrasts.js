// Text whose contrast against what is behind it is less than the 4.5 that WCAG 2.2 asks for. Colours go through
// a canvas, as the style may give them in any notation.
() => {
  const canvas = Object.assign(document.createElement("canvas"), { width: 1, height: 1 });
  const pen = canvas.getContext("2d", { willReadFrequently: true });
  const rgba = (colour) => {
    pen.clearRect(0, 0, 1, 1);
    pen.fillStyle = colour;
    pen.fillRect(0, 0, 1, 1);
    return [...pen.getImageData(0, 0, 1, 1).data];
  };
  const linear = (value) => (value / 255 <= 0.04045 ? value / 255 / 12.92 : ((value / 255 + 0.055) / 1.055) ** 2.4);
  const light = ([red, green, blue]) => 0.2126 * linear(red) + 0.7152 * linear(green) + 0.0722 * linear(blue);
  const behind = (element) => {
    for (let at = element; at; at = at.parentElement) {
      const colour = rgba(getComputedStyle(at).backgroundColor);
      if (colour[3] === 255) return colour;
    }
    return [255, 255, 255];
  };
  const shown = { opacityProperty: true, visibilityProperty: true };

  const poor = new Set();
  for (const element of document.querySelectorAll("#page *")) {
    const text = [...element.childNodes].some((node) => node.nodeType === Node.TEXT_NODE && node.data.trim());
    if (!text || !element.checkVisibility(shown)) continue;
    if (element.closest("[disabled], .visually-hidden, .skip")) continue;
    const [one, other] = [light(rgba(getComputedStyle(element).color)), light(behind(element))];
    const ratio = (Math.max(one, other) + 0.05) / (Math.min(one, other) + 0.05);
    const what = `${element.tagName}.${element.className}: ${element.textContent.slice(0, 30)}`;
    if (ratio < 4.5) poor.add(`${ratio.toFixed(2)} ${what}`);
  }
  return [...poor];
};
