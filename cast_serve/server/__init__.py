"""OpenAI-compatible HTTP server over the engine: routes in `app`, wire format in `protocol` and `sse`."""
