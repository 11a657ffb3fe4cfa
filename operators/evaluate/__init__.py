"""Which form of steering to use: many forms, at the same distance from the plain model, on the same prompts."""
