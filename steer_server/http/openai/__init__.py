"""OpenAI's API, so that a client that knows nothing of steering can ask for steered texts.

A parameter is acted upon as OpenAI's API means it, or refused by name.
"""
