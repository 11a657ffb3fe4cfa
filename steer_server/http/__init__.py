"""The door over HTTP: the contract as JSON, for pages and for curl. The same calls, limits and errors as over gRPC."""
