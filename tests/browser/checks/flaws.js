// What assistive technology trips over most.
() => {
  const flaws = [];
  const all = (selector) => [...document.querySelectorAll(selector)];
  const pointed = (element, attribute) =>
    (element.getAttribute(attribute) ?? "")
      .split(" ")
      .filter(Boolean)
      .map((id) => document.getElementById(id));
  const name = (element) =>
    [
      element.getAttribute("aria-label"),
      element.labels?.[0]?.textContent,
      pointed(element, "aria-labelledby")[0]?.textContent,
      element.textContent,
    ].find((text) => text?.trim());

  const named = "button, a[href], input, textarea, summary, dialog, nav, aside, section, progress, [role=region]";
  for (const element of all(named)) if (!name(element)) flaws.push(`no name: ${element.outerHTML.slice(0, 80)}`);
  const ids = all("[id]").map(({ id }) => id);
  for (const id of ids) if (ids.indexOf(id) !== ids.lastIndexOf(id)) flaws.push(`twice: #${id}`);
  for (const landmark of ["main", "nav", "header", "h1"])
    if (all(landmark).length !== 1) flaws.push(`not one ${landmark}`);
  if (!document.documentElement.lang) flaws.push("no language");
  for (const element of all("svg")) if (!element.closest("[aria-hidden]")) flaws.push("an svg is read out");
  for (const attribute of ["aria-describedby", "aria-labelledby"])
    for (const element of all(`[${attribute}]`))
      if (pointed(element, attribute).includes(null)) flaws.push(`points nowhere: ${element.outerHTML.slice(0, 80)}`);
  for (const element of all("[aria-hidden=true]"))
    if (element.querySelector("a, button, input, textarea")) flaws.push("hidden but focusable");
  return flaws;
};
