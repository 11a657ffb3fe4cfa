"""Writes the table of settings into docs/CONFIGURATION.md, from the fields of the server's configuration."""

from __future__ import annotations

from pathlib import Path

from steer_server.config import ServerConfig, flag, variable
from steer_server.configuration.flags import default_text

PAGE = Path(__file__).resolve().parents[1] / "docs" / "CONFIGURATION.md"
BEGIN, END = "<!-- settings -->\n", "<!-- end of settings -->\n"


def table() -> str:
    """Markdown, a row for each field."""
    rows = ["| key | flag | environment | default | what |", "|---|---|---|---|---|"]
    for name, field in ServerConfig.model_fields.items():
        default, what = (
            " ".join(text.split()).replace("|", "\\|") for text in (default_text(name), field.description or "")
        )
        rows.append(f"| `{name}` | `{flag(name)}` | `{variable(name)}` | {default} | {what} |")
    return "\n".join(rows) + "\n"


def with_table(page: str) -> str:
    """The page with today's table between the two marks."""
    before, _, rest = page.partition(BEGIN)
    return f"{before}{BEGIN}{table()}{END}{rest.partition(END)[2]}"


if __name__ == "__main__":
    PAGE.write_text(with_table(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
