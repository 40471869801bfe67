"use strict";

window.SwaggerUIBundle({
  url: "/openapi.json",
  dom_id: "#swagger-ui",
  deepLinking: true,
  // Its badge asks a server on the internet about the document; this page talks to its own server only.
  validatorUrl: null,
});
