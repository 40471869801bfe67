/** highlight.js with the languages people ask about. Loaded after the page stands. */
import core from "highlight.js/core";
import bash from "highlight.js/bash";
import c from "highlight.js/c";
import cpp from "highlight.js/cpp";
import css from "highlight.js/css";
import diff from "highlight.js/diff";
import go from "highlight.js/go";
import java from "highlight.js/java";
import javascript from "highlight.js/javascript";
import json from "highlight.js/json";
import markdown from "highlight.js/markdown";
import python from "highlight.js/python";
import rust from "highlight.js/rust";
import sql from "highlight.js/sql";
import typescript from "highlight.js/typescript";
import xml from "highlight.js/xml";
import yaml from "highlight.js/yaml";

const languages = {
  bash,
  c,
  cpp,
  css,
  diff,
  go,
  java,
  javascript,
  json,
  markdown,
  python,
  rust,
  sql,
  typescript,
  xml,
  yaml,
};
for (const [name, language] of Object.entries(languages)) core.registerLanguage(name, language);
core.configure({ throwUnescapedHTML: true });

export default core;
