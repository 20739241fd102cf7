// Shows the document of this service, and asks nobody else for anything.
SwaggerUIBundle({url: "/openapi.json", dom_id: "#docs", deepLinking: true, validatorUrl: null});
