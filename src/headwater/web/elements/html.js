/** The template tag and the few helpers that all elements share. */
import htm from "htm";
import { Component, h } from "preact";

export const html = htm.bind(h);

/** Draw an element again only when one of its properties changed. */
export function memo(draw) {
  return class extends Component {
    shouldComponentUpdate(next) {
      return Object.keys({ ...this.props, ...next }).some((name) => this.props[name] !== next[name]);
    }
    render(props) {
      return draw(props);
    }
  };
}

const SHAPES = {
  plus: "M12 5v14M5 12h14",
  search: "M11 4a7 7 0 1 0 0 14 7 7 0 0 0 0-14zM20 20l-4-4",
  menu: "M4 7h16M4 12h16M4 17h10",
  pencil: "M4 20l1-4L16 5l3 3L8 19z",
  trash: "M5 7h14M10 7V4h4v3M7 7l1 13h8l1-13M10 11v5M14 11v5",
  copy: "M9 9h10v11H9zM15 9V4H5v11h4",
  check: "M5 13l4 4L19 7",
  again: "M19 8a8 8 0 1 0 1 6M20 4v5h-5",
  send: "M12 19V5M6 11l6-6 6 6",
  stop: "M7 7h10v10H7z",
  down: "M12 5v14M6 13l6 6 6-6",
  left: "M14 6l-6 6 6 6",
  right: "M10 6l6 6-6 6",
  alert: "M12 8v5M12 16.5v.5M12 3l9.5 17h-19z",
  close: "M6 6l12 12M18 6L6 18",
  pulse: "M3 12h4l3-7 4 14 3-7h4",
  light:
    "M12 8a4 4 0 1 0 0 8 4 4 0 0 0 0-8zM12 2v2M12 20v2M2 12h2M20 12h2M5 5l1.4 1.4M17.6 17.6L19 19M19 5l-1.4 1.4M6.4 17.6L5 19",
  dark: "M20 14A8.5 8.5 0 0 1 10 4a8.5 8.5 0 1 0 10 10z",
  auto: "M12 3a9 9 0 1 0 0 18zM12 3a9 9 0 0 1 0 18",
  logo: "M12 3c3.6 4.3 6 7.4 6 10.6a6 6 0 0 1-12 0C6 10.4 8.4 7.3 12 3zM8.5 14.5c1.2-1 2.3-1 3.5 0s2.3 1 3.5 0",
};

/** @param {{ name: keyof typeof SHAPES }} props decoration only: the button around it has the words */
export function Icon({ name }) {
  return html`<svg class="icon icon-${name}" viewBox="0 0 24 24" aria-hidden="true"><path d=${SHAPES[name]} /></svg>`;
}

/** A button that shows an icon and says its label to who cannot see it. */
export function IconButton({ icon, label, ...rest }) {
  return html`<button type="button" class="icon-button" aria-label=${label} title=${label} ...${rest}>
    <${Icon} name=${icon} />
  </button>`;
}

/** Put text on the clipboard; plain HTTP on another host has no clipboard interface. */
export async function copy(text) {
  if (navigator.clipboard) return navigator.clipboard.writeText(text);
  const field = Object.assign(document.createElement("textarea"), { value: text, className: "visually-hidden" });
  document.body.append(field);
  field.select();
  document.execCommand("copy");
  field.remove();
}
