// Whatever below `root` could run, load, submit, or look like something else.
(root) => {
  const forbidden =
    /^(script|style|iframe|object|embed|form|input|img|svg|math|base|link|meta|template|audio|video|noscript|h1|h2)$/i;
  const dangerous = /^(on|style$|src|srcset|action|formaction|xlink|id$|name$)/i;
  const found = [];
  for (const element of root.querySelectorAll("*")) {
    if (forbidden.test(element.tagName)) found.push(element.outerHTML);
    for (const { name, value } of element.attributes)
      if (dangerous.test(name)) found.push(`${element.tagName} ${name}=${value}`);
    if (element.tagName !== "A") continue;
    if (!/^(https?:\/\/|mailto:)/i.test(element.getAttribute("href") ?? "")) found.push(element.outerHTML);
    if (element.rel !== "noopener noreferrer nofollow") found.push(element.outerHTML);
  }
  return found;
};
