"""Who may do what: tokens and their scopes, rates, and the audit log. Knows neither gRPC nor HTTP."""
