"""The door over HTTP: OpenAI's API, and the contract as JSON. The same calls, limits and errors as over gRPC."""
