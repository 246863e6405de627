"""The pages for a browser: figures and templates."""

from pathlib import Path

TEMPLATES = Path(__file__).with_name("templates")
