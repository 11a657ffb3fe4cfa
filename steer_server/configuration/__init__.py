"""Where the settings of a server come from: a file, the environment, flags; the later beats the earlier."""
