"""The mathematics: detached maps of prompts, exact, replayed, sketched and averaged. No files, no commands."""
